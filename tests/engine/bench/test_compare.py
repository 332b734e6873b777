"""Comparison of two results: what counts as a change, and which files are refused."""

import copy
import json

import pytest

from affmae_engine.bench.compare import compare, read_results
from affmae_engine.bench.report import SCHEMA
from affmae_engine.errors import InputError


def step(model: str = "affmae", ms: float | None = 100.0, spread: float = 1.0, gib: float = 8.0):
    low, high = (None, None) if ms is None else (ms - spread, ms + spread)
    case = {"model": model, "work": "pretrain", "size": "base", "resolution": 512, "batch": 32, "vit_mode": "auto"}
    return {"case": case, "ms": ms, "least_ms": low, "most_ms": high, "allocated_gib": gib}


def steps(*results, **changes):
    about = {"schema": SCHEMA, "kind": "comparison", "device": "a card", "dtype": "bf16"}
    return {**about, "versions": {"torch": "2.13.0"}, "results": list(results), **changes}


def verdicts(old, new) -> dict[tuple[str, str], str]:
    return {(c.what.split()[0], c.metric): c.verdict for c in compare(old, new).changes}


def test_times_count_when_their_intervals_do_not_touch() -> None:
    old = steps(step("affmae", 100.0), step("vit-mae", 300.0, spread=20.0))
    new = steps(step("affmae", 90.0, gib=8.02), step("vit-mae", 330.0, spread=20.0, gib=12.0))
    assert verdicts(old, new) == {
        ("affmae", "step"): "better",
        ("affmae", "peak memory"): "within the spread",
        ("vit-mae", "step"): "within the spread",
        ("vit-mae", "peak memory"): "worse",
    }
    assert verdicts(new, old)["affmae", "step"] == "worse"
    (change, *_) = compare(old, new).changes
    assert change.percent == pytest.approx(-10.0) and change.old == 100.0 and change.new == 90.0
    text = compare(old, new).table("old.json").markdown()
    assert "| affmae auto pretrain base 512 px batch 32 | step ms | 100 | 90 | -10.0 % | better |" in text


def test_rows_on_one_side_only() -> None:
    old, new = steps(step("affmae", None, gib=8.0)), steps(step("affmae", 50.0), step("vit-mae", 10.0))
    found = verdicts(old, new)
    assert found["affmae", "step"] == "only now" and found["vit-mae", "step"] == "only now"
    assert verdicts(new, old)["vit-mae", "peak memory"] == "only before"
    assert compare(new, old).changes[0].percent is None


def test_scores_count_when_mean_and_deviation_do_not_touch(quality_document) -> None:
    old = quality_document()
    new = quality_document()
    for record in new["summary"]:
        record["miou"] += 0.1 if record["init"] == "pretrained" else 0.005
    found = {(c.what, c.metric): c.verdict for c in compare(old, new).changes}
    assert found["small affmae pretrained 10% of the labels", "mean IoU"] == "better"
    assert found["small affmae scratch 10% of the labels", "mean IoU"] == "within the spread"
    worse = {(c.what, c.metric): c.verdict for c in compare(new, old).changes}
    assert worse["small vit-mae pretrained 100% of the labels", "mean IoU"] == "worse"


def test_scores_of_one_seed_get_no_verdict(quality_document) -> None:
    one, three = quality_document(seeds=(0,)), quality_document()
    better = quality_document(seeds=(0,))
    for record in better["summary"]:
        record["miou"] += 0.2
    for old, new in ((one, better), (better, one), (one, three), (three, better)):
        changes = compare(old, new).changes
        assert {change.verdict for change in changes} == {"no spread known"} and len(changes) == 8
    assert compare(one, better).changes[0].percent > 0
    assert "| no spread known |" in compare(one, better).table("old.json").markdown()


def test_kernels() -> None:
    def case(ms: float, both: float | None):
        whole = None if both is None else {"ms": both, "low_ms": both, "high_ms": both}
        forward = {"ms": ms, "low_ms": 0.98 * ms, "high_ms": 1.02 * ms}
        return {"op": "token_merging", "size": "base", "resolution": 512, "shape": "B2", "backend": "triton",
                "forward": forward, "both": whole}  # fmt: skip

    changes = compare(steps(case(1.0, 3.0), kind="kernels"), steps(case(1.01, 2.0), kind="kernels")).changes
    assert [(c.metric, c.verdict) for c in changes] == [
        ("forward", "within the spread"), ("forward and backward", "better"),
    ]  # fmt: skip
    assert len(compare(steps(case(1.0, None), kind="kernels"), steps(case(1.0, None), kind="kernels")).changes) == 1


def test_other_circumstances_are_warned_of() -> None:
    new = steps(step(), device="another card", versions={"torch": "2.14.0", "triton": "3.7.1"})
    found = compare(steps(step()), new).warnings
    assert "the device differs: a card before, another card now" in found
    assert any("torch 2.13.0 before, 2.14.0 now; triton absent before, 3.7.1 now" in text for text in found)
    assert compare(steps(step()), steps(step())).warnings == ()


def test_reading(tmp_path) -> None:
    values = steps(step())
    (tmp_path / "results.json").write_text(json.dumps(values))
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ("[1, 2]", "is not a result of affmae bench"),
        ('{"kind": "comparison"}', "is not a result of affmae bench"),
        ('{"kind": "weather", "results": []}', "is not a result of affmae bench"),
        ('{"kind": "comparison", "results": [], "schema": 999}', "has schema 999"),
    ],
)
def test_wrong_files(content: str | None, said: str, tmp_path) -> None:
    file = tmp_path / "old.json"
    if content is not None:
        file.write_text(content, "latin-1")
    with pytest.raises(InputError, match=said):
        read_results(file)


def test_other_kinds_and_edited_records(quality_document) -> None:
    with pytest.raises(
        InputError, match="the old file holds a comparison of speed and memory, this run a quality comparison"
    ):
        compare(steps(step()), quality_document())
    edited = copy.deepcopy(quality_document())
    del edited["summary"][0]["miou"]
    with pytest.raises(InputError, match="cannot be read"):
        compare(edited, quality_document())
    with pytest.raises(InputError, match="cannot be read"):
        compare(steps("nonsense"), steps(step()))
