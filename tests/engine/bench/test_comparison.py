"""Who is measured when, what a failure costs, how figures and ratios are made of rounds, and what the report says."""

from collections.abc import Callable
from threading import Lock

import pytest

from affmae_engine.bench.batches import default_batch, likely_gib
from affmae_engine.bench.case import Case, Measurement, Request
from affmae_engine.bench.comparison import Comparison, Settings
from affmae_engine.bench.comparison_report import ratio_table, sentences, tables
from affmae_engine.bench.results import ratios_of, result_of


def case(model: str, **fields) -> Case:
    return Case(model=model, **{"size": "base", "resolution": 512, "batch": 32, **fields})


OURS, THEIRS = case("affmae"), case("vit-mae")


class Script:
    """Answers by a function of the request and remembers who asked; counts how many asked at once."""

    def __init__(self, answer: Callable[[Request], Measurement]) -> None:
        self.answer, self.asked, self.lock = answer, [], Lock()

    def ask(self, request: Request) -> Measurement:
        with self.lock:
            self.asked.append(request)
        return self.answer(request)


def fast(request: Request) -> Measurement:
    ms = 40.0 if request.case.model == "affmae" else 160.0
    return Measurement(ms=ms, forward_ms=ms / 3, allocated_gib=ms / 5, how=request.case.model, parameters=1)


def compare(answer=fast, cases=(OURS, THEIRS), **settings) -> tuple[Comparison, Script]:
    script = Script(answer)
    asked = Settings(
        **{
            "rounds": 3, "request": Request(case=OURS), "compile_first": False, "max_batch": False, "memory_gib": 80.0,
            **settings,
        }
    )  # fmt: skip
    comparison = Comparison(list(cases), asked)
    comparison.compile_all(script)
    list(comparison.measure(script))
    return comparison, script


def test_the_families_take_turns() -> None:
    comparison, script = compare()
    assert [request.case.model for request in script.asked] == ["affmae", "vit-mae"] * 3
    assert [len(outcome.rounds) for outcome in comparison.outcomes] == [3, 3]
    assert comparison.clock.done == comparison.clock.total == 6 and comparison.clock.left_s == 0


def test_everything_is_compiled_before_anything_is_timed() -> None:
    comparison, script = compare(compile_first=True, rounds=1)
    assert [request.what for request in script.asked] == ["try", "try", "measure", "measure"]
    assert all(outcome.compiled is not None for outcome in comparison.outcomes)


def test_compiling_heeds_the_memory_of_the_card() -> None:
    now, most, lock = [0.0], [0.0], Lock()

    def answer(request: Request) -> Measurement:
        if request.what == "try":
            with lock:
                now[0] += likely_gib(request.case)
                most[0] = max(most[0], now[0])
            Lock().acquire(timeout=0.01)
            with lock:
                now[0] -= likely_gib(request.case)
        return fast(request)

    cases = [case(model, resolution=edge) for edge in (256, 512) for model in ("affmae", "vit-mae")] * 2
    _, script = compare(answer, cases, compile_first=True, rounds=1, memory_gib=48.0, compilers=8)
    assert sum(request.what == "try" for request in script.asked) == 8
    assert 0 < most[0] <= 0.9 * 48


def test_one_that_fails_is_not_tried_again_and_the_other_goes_on() -> None:
    def answer(request: Request) -> Measurement:
        return fast(request) if request.case == OURS else Measurement(status="out of memory", note="full")

    comparison, script = compare(answer)
    assert [request.case.model for request in script.asked] == ["affmae", "vit-mae", "affmae", "affmae"]
    assert comparison.clock.done == comparison.clock.total == 4
    results = [result_of(outcome) for outcome in comparison.outcomes]
    assert [result.status for result in results] == ["ok", "out of memory"]
    (ratio,) = ratios_of(results)
    assert ratio.speed is None and ratio.memory is None and ratio.flops > 7
    (sentence,) = sentences([ratio], results)
    assert sentence == (
        "ViT-MAE-base ran out of memory, pretraining at 512 px, 32 images at a time; AFFMAE-base takes 800 images/s "
        "there."
    )
    assert any("out of memory" in cell for table in tables(results, [ratio]) for row in table.rows for cell in row)


def test_the_loader_and_the_profile_are_looked_at_once() -> None:
    _, script = compare(request=Request(case=OURS, profile=True, data="em.zarr"))
    assert [(r.profile, r.data) for r in script.asked[::2]] == [(True, "em.zarr"), (False, None), (False, None)]


def test_the_largest_batch_is_looked_for_from_what_is_known() -> None:
    tried = []

    def answer(request: Request) -> Measurement:
        if request.what == "measure":
            return fast(request)
        tried.append(request.case.batch)
        limit = 300 if request.case.model == "affmae" else 70
        return Measurement(status="ok" if request.case.batch <= limit else "out of memory")

    comparison, _ = compare(answer, max_batch=True, rounds=1)
    ours, theirs = (outcome.max_batch for outcome in comparison.outcomes)
    assert 281 <= ours <= 300 and 65 <= theirs <= 70
    assert tried[0] == int(0.92 * 80 / 8 * 32)
    (ratio,) = ratios_of([result_of(outcome) for outcome in comparison.outcomes])
    assert ratio.max_batch == ours / theirs


def test_figures_are_medians_of_rounds() -> None:
    times = iter([40.0, 160.0, 42.0, 150.0, 50.0, 200.0])

    def answer(request: Request) -> Measurement:
        return fast(request).model_copy(update={"ms": next(times)})

    comparison, _ = compare(answer)
    results = [result_of(outcome) for outcome in comparison.outcomes]
    assert (results[0].ms, results[0].least_ms, results[0].most_ms) == (42, 40, 50)
    assert results[0].images_per_s == pytest.approx(32e3 / 42)
    assert results[0].mpx_per_s == pytest.approx(32e3 / 42 * 512**2 / 1e6)
    (ratio,) = ratios_of(results)
    assert (ratio.speed, ratio.speed_least, ratio.speed_most) == (160 / 42, 3.0, 5.0)
    assert ratio.memory == 0.25


def test_ratios_are_against_the_fastest_way_of_running_the_other() -> None:
    def answer(request: Request) -> Measurement:
        found = fast(request)
        slow = request.case.vit_mode == "eager"
        return found.model_copy(update={"ms": 300.0, "how": "slow"}) if slow else found

    comparison, _ = compare(answer, [OURS, case("vit-mae", vit_mode="eager"), THEIRS])
    results = [result_of(outcome) for outcome in comparison.outcomes]
    (ratio,) = ratios_of(results)
    assert (ratio.speed, ratio.against) == (4.0, "vit-mae")
    assert sentences([ratio], results) == [
        "AFFMAE-base takes **4.0 times as many images** as ViT-MAE-base, pretraining at 512 px, 32 images at a time "
        "(800 images/s against 200), in a quarter of the memory (8.00 against 32.0 GiB)."
    ]
    assert ratio_table([ratio]).rows[0][4] == "4.00"
    assert ratios_of(results[1:]) == []


def test_a_slower_one_is_called_slower() -> None:
    def answer(request: Request) -> Measurement:
        return fast(request).model_copy(update={"ms": 200.0 if request.case == OURS else 100.0, "allocated_gib": None})

    comparison, _ = compare(answer)
    results = [result_of(outcome) for outcome in comparison.outcomes]
    (sentence,) = sentences(ratios_of(results), results)
    assert sentence.startswith("AFFMAE-base is slower: it takes **0.5 times as many images**")
    assert "memory" not in sentence


@pytest.mark.parametrize(
    ("work", "size", "edge", "memory", "batch"),
    [
        ("pretrain", "base", 512, 80, 32),
        ("pretrain", "small", 512, 80, 64),
        ("pretrain", "base", 1024, 80, 8),
        ("pretrain", "small", 1024, 80, 8),
        ("pretrain", "base", 512, 24, 16),
        ("pretrain", "small", 512, 24, 32),
        ("pretrain", "base", 1024, 8, 1),
        ("finetune", "base", 512, 80, 32),
        ("finetune", "base", 512, 32, 16),
        ("predict", "base", 2048, 6, 1),
    ],
)
def test_default_batches(work: str, size: str, edge: int, memory: float, batch: int) -> None:
    assert default_batch(work, size, edge, memory) == batch
