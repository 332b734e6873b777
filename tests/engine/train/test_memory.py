"""Micro-batches: how their size is found, and that running out of memory changes nothing but their size."""

import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affmae_engine import checkpoint, events
from affmae_engine.config import RunConfig
from affmae_engine.errors import Interrupted
from affmae_engine.run_dir import RunDir
from affmae_engine.runtime import memory
from affmae_engine.runtime.memory import in_smaller_batches, largest_divisor, largest_that_fits, out_of_memory
from affmae_engine.runtime.signals import StopRequest
from tests.engine.train.fitting import fit

Make = Callable[..., object]
CPU = torch.device("cpu")


class Short:
    """Runs out of memory at the given calls, or for more than `limit` images. Remembers the sizes."""

    def __init__(self, at: tuple[int, ...] = (), limit: int = 10**9, error: Exception | None = None) -> None:
        self.at, self.limit, self.sizes = at, limit, []
        self.error = error or torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        self.sizes.append(len(batch["x"]))
        if len(self.sizes) in self.at or len(batch["x"]) > self.limit:
            raise self.error


def toy_without_dropout(make_toy: Make, **options: object) -> object:
    toy = make_toy(**options)
    toy.task.model[3].p = 0.0  # dropout depends on the micro-batch
    return toy


def warnings_of(run: RunDir) -> list[str]:
    found = [events.from_line(text) for text in run.metrics.read_text().splitlines()]
    return [event.message for event in found if isinstance(event, events.Warned)]


def assert_same_to_rounding(a: RunDir, b: RunDir, step: int) -> None:
    x, y = (checkpoint.Checkpoint(run.checkpoint(step), step) for run in (a, b))
    for kind in ("weights", "optimizer"):
        for name, tensor in getattr(x, kind)().items():
            torch.testing.assert_close(getattr(y, kind)()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_the_step_is_repeated_in_halves_with_the_same_samples(
    error: Exception | None, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(batch_size=12, micro_batch=6, steps=5, log_every=5, eval_every=0, checkpoint_every=5)
    small = make_config(batch_size=12, micro_batch=3, steps=5, log_every=5, eval_every=0, checkpoint_every=5)
    reference, run = make_run(small, "reference"), make_run(config, "run")
    fit(reference, small, toy_without_dropout(make_toy).task)
    # In the second micro-batch of step 3: the gradients of the first one are there already.
    short = Short(at=(6,), error=error)
    toy = toy_without_dropout(make_toy, before=short)
    assert fit(run, config, toy.task).status == "finished"
    assert short.sizes == [6] * 6 + [3] * (3 * 4)
    assert toy.source.asked == [*range(36), *range(24, 60)]
    (warning,) = warnings_of(run)
    assert "out of memory in step 3, which is repeated: 3 images at a time, 4 times a step" in warning
    assert_same_to_rounding(reference, run, 5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_goes_down_to_what_fits_and_a_resumed_run_stays_there(
    precision: str, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(batch_size=12, steps=6, precision=precision, eval_every=0)
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    short = Short(limit=2)
    fit(whole, config, make_toy(before=short).task)
    assert short.sizes == [12, 6, 3, *[2] * 36]
    stop = StopRequest()

    def stop_in_step_4(batch: dict[str, torch.Tensor]) -> None:
        short(batch)
        if len(short.sizes) == 3 + 4 * 6:
            stop.request()

    short = Short(limit=2)
    with pytest.raises(Interrupted):
        fit(parts, config, make_toy(before=stop_in_step_4).task, stop=stop)
    short = Short(limit=2)
    fit(parts, config, make_toy(before=short).task, resume=True)
    assert short.sizes == [2] * 12, "the size that fits is known from the checkpoint"
    a, b = (checkpoint.Checkpoint(run.checkpoint(6), 6) for run in (whole, parts))
    for kind in ("weights", "optimizer"):
        x, y = getattr(a, kind)(), getattr(b, kind)()
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_another_size_asked_for_is_taken(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(batch_size=12, steps=3, checkpoint_every=3)
    run, short = make_run(config), Short(limit=2)
    fit(run, config, make_toy(before=short).task)
    longer, short = make_config(batch_size=12, steps=4, micro_batch=4), Short()
    fit(run, longer, make_toy(before=short).task, resume=True)
    assert short.sizes == [4, 4, 4]


def test_auto_without_a_card(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(batch_size=12, micro_batch="auto", steps=1)
    run, short = make_run(config), Short()
    fit(run, config, make_toy(before=short).task)
    assert short.sizes == [6, 6]
    assert warnings_of(run) == []
    assert "6 images at a time, 2 times a step" in run.log.read_text()
    assert RunDir(run.root).read_config().train.micro_batch == "auto"
    assert RunConfig.model_validate({"train": {"micro_batch": "auto", "batch_size": 7}}).train.batch_size == 7


def test_an_error_of_another_kind_is_not_repeated(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config, short = make_config(), Short(at=(2,), error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        fit(make_run(config), config, make_toy(before=short).task)
    assert len(short.sizes) == 2


def test_divisors() -> None:
    assert [largest_divisor(96, limit) for limit in (200, 96, 50, 7, 1, 0)] == [96, 96, 48, 6, 1, 1]
    assert largest_divisor(7, 6) == 1


def test_out_of_memory_is_known_behind_other_errors() -> None:
    hidden = RuntimeError("compilation failed")
    hidden.__cause__ = torch.OutOfMemoryError("x")
    assert out_of_memory(hidden) is hidden.__cause__
    assert out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory")) is not None
    assert out_of_memory(ValueError("out of memory of a user")) is None


@given(
    share=st.sampled_from([1, 2, 7, 8, 12, 96, 288, 97]),
    base=st.integers(1, 50),
    each=st.integers(1, 20),
    budget=st.integers(0, 900),
    bump=st.integers(0, 30),
    hard=st.integers(0, 100),
)
def test_the_largest_size_that_fits_is_found(
    share: int, base: int, each: int, budget: int, bump: int, hard: int
) -> None:
    """Memory grows along a line, with a bump that no line foresees; beyond budget + hard the card gives up."""
    tried: list[int] = []

    def needed(size: int) -> int:
        return base + each * size + (bump if size % 3 == 0 else 0)

    def peak(size: int) -> int | None:
        assert size not in tried
        tried.append(size)
        return needed(size) if needed(size) <= budget + hard else None

    found = largest_that_fits(share, peak, budget)
    assert share % found == 0 and len(tried) <= 12
    assert needed(found) <= budget or found == 1
    if bump == 0:
        fits = [size for size in range(1, share + 1) if share % size == 0 and needed(size) <= budget]
        assert found == max(fits, default=1)
        assert sum(needed(size) > budget for size in tried) <= 3, "the card is hardly ever driven beyond its memory"


def test_work_in_smaller_batches() -> None:
    sizes: list[int] = []

    def work(size: int) -> int:
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError
        return size

    assert in_smaller_batches(work, 13, CPU) == 3 and sizes == [13, 6, 3]
    with pytest.raises(torch.OutOfMemoryError):
        in_smaller_batches(lambda size: work(99), 2, CPU)
    with pytest.raises(ZeroDivisionError):
        in_smaller_batches(lambda size: size // 0, 2, CPU)


def test_an_attempt_that_failed_leaves_no_tensor_to_the_next_one() -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def work(size: int) -> int:
        alive.append(sum(tensor() is not None for tensor in made))
        activations = torch.zeros(size)
        made.append(weakref.ref(activations))
        if size == 1:
            return size
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            if size == 2:  # behind another error, as the compiler wraps it
                raise RuntimeError("backend='inductor' raised") from error
            raise

    assert in_smaller_batches(work, 4, CPU) == 1
    assert alive == [0, 0, 0]


@pytest.mark.gpu
def test_a_measured_size_fits_and_leaves_headroom(make_toy: Make, make_config: Make) -> None:
    from affmae_engine.config import TrainConfig
    from affmae_engine.runtime.device import pick_device

    choice, task = pick_device(TrainConfig(device="cuda")), make_toy().task
    model = task.model.to(choice.device)

    def losses(net: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ballast = torch.empty(len(batch["x"]), 1 << 30, dtype=torch.uint8, device=choice.device)  # 1 GiB an image
        named = task.losses(net, batch)
        return {**named, "ballast": ballast[0, 0].float()}

    before, held = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    size = memory.measured_micro_batch(model, losses, task.dataset.sample(0), choice, 512)
    assert torch.cuda.max_memory_allocated() < held + (1 << 20), "the peak is not that of the measurement"
    free, total = torch.cuda.mem_get_info()
    room = free / 2**30 - max(1, 0.1 * total / 2**30)
    assert size == largest_divisor(512, int(room)) or size == largest_divisor(512, int(room) - 1)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
