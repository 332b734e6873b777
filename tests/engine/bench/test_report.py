"""Tables, and comparison of two results: what counts as a change, and which files are refused."""

import json

import pytest

from affmae_engine.bench.report import (
    SCHEMA,
    Figure,
    Table,
    circumstances,
    compare,
    document,
    figure,
    markdown,
    read_results,
    write,
)
from affmae_engine.config import TrainConfig
from affmae_engine.errors import InputError
from affmae_engine.runtime.device import pick_device


def result(*figures: Figure, **changes):
    about = circumstances(pick_device(TrainConfig(device="cpu")), {"rounds": 3}, ["a remark"])
    return document("speed", {**about, **changes}, [], figures)


def step(ms: float, spread: float | None = 1.0, what: str = "a") -> Figure:
    low, high = (None, None) if spread is None else (ms - spread, ms + spread)
    return Figure(what, "step", "ms", ms, low, high)


def verdicts(old, new) -> dict[str, str]:
    return {row[0]: row[-1] for row in compare(old, new)[0].rows}


def test_changes_count_where_the_intervals_do_not_overlap() -> None:
    old = result(step(100), step(300, 20, "b"), step(10, None, "c"), step(5, what="d"))
    new = result(step(90), step(330, 20, "b"), step(20, None, "c"), step(5, what="e"))
    assert verdicts(old, new) == {
        "a": "better", "b": "within the spread", "c": "no spread known", "d": "only before", "e": "only now",
    }  # fmt: skip
    assert verdicts(new, old)["a"] == "worse"
    assert "-10.0 %" in compare(old, new)[0].markdown()


def test_more_of_a_score_is_better() -> None:
    old, new = (result(Figure("a", "mean IoU", "", v, v - 0.01, v + 0.01, more_is_better=True)) for v in (0.5, 0.6))
    assert verdicts(old, new) == {"a": "better"} and verdicts(new, old) == {"a": "worse"}


def test_other_circumstances_are_named() -> None:
    _, warnings = compare(result(step(1)), result(step(1), device="another GPU"))
    assert len(warnings) == 1 and "another GPU" in warnings[0]
    assert compare(result(step(1)), result(step(1)))[1] == []


def test_results_survive_writing_and_reading(tmp_path) -> None:
    values = result(step(1))
    write(tmp_path, "Title", values, [Table("T", ("x", "y"), [("1", "")])], ["a-chart.png"])
    assert read_results(tmp_path, "speed") == read_results(tmp_path / "results.json", "speed") == values
    text = (tmp_path / "report.md").read_text()
    assert text == markdown("Title", values, [Table("T", ("x",), [("1",)])], ["a-chart.png"]), "no empty columns"
    assert "a remark" in text and "![a chart](a-chart.png)" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ("[1, 2]", "is not a result of affmae bench"),
        ('{"kind": "speed"}', "is not a result of affmae bench"),
        ('{"kind": "speed", "results": [], "schema": 2}', "has schema 2"),
        (f'{{"kind": "quality", "results": [], "schema": {SCHEMA}}}', "holds a result of `affmae bench quality`"),
    ],
)
def test_wrong_files_are_refused(content: str | None, said: str, tmp_path) -> None:
    file = tmp_path / "old.json"
    if content is not None:
        file.write_text(content, "latin-1")
    with pytest.raises(InputError, match=said):
        read_results(file, "speed")


def test_a_damaged_record_is_an_error() -> None:
    damaged = json.loads(json.dumps(result(step(1))))
    del damaged["figures"][0]["value"]
    with pytest.raises(InputError, match="cannot be read"):
        compare(damaged, result(step(1)))


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0, "0"), (1234.5, "1234"), (33.68, "33.7"), (0.01234, "0.0123")]
)
def test_three_digits(value, text) -> None:
    assert figure(value) == text
