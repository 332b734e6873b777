"""Going on with an earlier comparison: what may differ, and what may not."""

import json

import pytest

from affmae_engine.bench import quality_results
from affmae_engine.bench.quality import Lengths, Part, QualityPlan
from affmae_engine.bench.quality_data import Sources
from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError

ABOUT = {"device": "a card", "versions": {"torch": "2.13.0"}}
SOURCES = Sources(("images",), ("labels",))


def plan(*sizes: str, budget_s: float = 10.0, lr: float = 1e-3) -> QualityPlan:
    config = RunConfig.model_validate({"optim": {"lr": lr}})
    configs = {(size, task): config for size in sizes for task in ("pretrain", "finetune")}
    return QualityPlan(sizes, (0, 1, 2), (0.1, 1.0), budget_s, 5.0, configs)


@pytest.fixture
def folder(tmp_path, quality_document):
    """A folder with a finished comparison of the small network."""
    identity = quality_results.identity(plan("small"), SOURCES, ABOUT)
    values = {
        **quality_document(), **ABOUT, "sources": identity["sources"],
        "settings": {name: identity[name] for name in ("budget_s", "finetune_budget_s", "configs")},
        "lengths": Lengths({("small", "affmae"): 40}, {"small": 10}).to_json(),
        "speeds": [{"size": "small", "model": "affmae", "task": "pretrain", "step_s": 0.5}],
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(values))
    return tmp_path


def read(folder, wanted_plan: QualityPlan, **about) -> quality_results.Earlier:
    return quality_results.read_earlier(folder, quality_results.identity(wanted_plan, SOURCES, {**ABOUT, **about}))


def test_finished_parts_come_back(folder) -> None:
    earlier = read(folder, plan("small"))
    assert earlier.results.keys() == set(plan("small").parts())
    assert earlier.lengths.pretrain == {("small", "affmae"): 40} and earlier.seconds == 100.0
    assert earlier.speeds["small", "affmae", "pretrain"].step_s == 0.5


def test_sizes_may_be_added_but_nothing_dropped(folder) -> None:
    larger = plan("small", "base")
    earlier = read(folder, larger)
    quality_results.refuse_narrower(larger, earlier, folder)
    smaller = QualityPlan(("small",), (0,), (0.1, 1.0), 10.0, 5.0, larger.configs)
    with pytest.raises(ConfigError, match="holds 20 finished trainings that were not asked for now"):
        quality_results.refuse_narrower(smaller, earlier, folder)


@pytest.mark.parametrize(
    ("wanted", "about", "said"),
    [
        (plan("small", budget_s=11.0), {}, "other --budget"),
        (plan("small", lr=0.5), {}, r"other settings .*optim.lr was 0.001, is 0.5 now"),
        (plan("small"), {"device": "another card"}, "other device"),
        (plan("small"), {"versions": {"torch": "2.14.0"}}, "other versions"),
    ],
)
def test_what_must_agree(folder, wanted, about, said) -> None:
    with pytest.raises(ConfigError, match=said):
        read(folder, wanted, **about)


def test_what_else_a_folder_may_hold(tmp_path) -> None:
    assert read(tmp_path, plan("small")).results == {}
    (tmp_path / "data.zarr").mkdir()
    assert read(tmp_path, plan("small")).results == {}, "stopped while images were collected"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds other things \(notes.txt\)"):
        read(tmp_path, plan("small"))
    (tmp_path / "results.json").write_text('{"kind": "comparison", "schema": 2}')
    with pytest.raises(ConfigError, match=r"holds another benchmark \(comparison\)"):
        read(tmp_path, plan("small"))


def test_unfinished_and_failed_parts_are_done_again(folder) -> None:
    path = folder / "results.json"
    values = json.loads(path.read_text())
    unfinished = ("running", "waiting", "failed", "diverged", "out of memory")
    for record, status in zip(values["results"], unfinished, strict=False):
        record["status"] = status
    path.write_text(json.dumps(values))
    again = read(folder, plan("small")).results
    assert len(again) == 30 - 5 and Part("small", "affmae", 0) not in again
