"""Several processes over gloo: the same training as one process, common decisions, and the death of one of them."""

import itertools
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from affmae_engine import checkpoint, events
from affmae_engine.config import FinetuneConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.errors import AffmaeError, ConfigError, Interrupted, ResourceError
from affmae_engine.model.build import build_segmenter, encoder_layers
from affmae_engine.run_dir import RunDir
from affmae_engine.runtime import distributed
from affmae_engine.runtime.device import pick_device
from affmae_engine.runtime.distributed import Ranks, SumOverRanks, current_ranks, process_group
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train import step as step_module
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, layer_decay_groups
from affmae_engine.train.step import EAGER_STEPS, TrainStep
from tests.engine.train.fitting import fit

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a process that uses a card cannot")
Make = Callable[..., object]


def in_processes(folder: Path, work: Callable[[int], object], world: int = 2, seconds: float = 60.0) -> list:
    """What `work(rank)` returns in each process of a group, or its error's name, its exit code, minus its signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update({name: str(value) for name, value in {**group, "RANK": rank}.items()})
                result: object = "nothing"
                try:
                    with process_group():
                        result = work(rank)
                except AffmaeError as error:
                    result = type(error).__name__
                (folder / f"result-{rank}.json").write_text(json.dumps(result))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # without the group's farewell, which would wait for a dead process
        children.append(child)
    deadline, results = time.monotonic() + seconds, []
    for rank, child in enumerate(children):
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        file = folder / f"result-{rank}.json"
        results.append(json.loads(file.read_text()) if file.exists() else os.waitstatus_to_exitcode(done[1]))
        file.unlink(missing_ok=True)
    return results


def step_events(run: RunDir) -> dict[int, events.StepLogged]:
    found = [events.from_line(text) for text in run.metrics.read_text().splitlines()]
    return {event.step: event for event in found if isinstance(event, events.StepLogged)}


def warnings_of(run: RunDir) -> list[str]:
    found = [events.from_line(text) for text in run.metrics.read_text().splitlines()]
    return [event.message for event in found if isinstance(event, events.Warned)]


def same_to_rounding(a: RunDir, b: RunDir, step: int) -> None:
    x, y = (checkpoint.Checkpoint(run.checkpoint(step), step) for run in (a, b))
    for kind in ("weights", "optimizer"):
        for name, tensor in getattr(x, kind)().items():
            torch.testing.assert_close(getattr(y, kind)()[name], tensor, rtol=1e-4, atol=1e-6)


def without_dropout(toy: object) -> object:
    toy.task.model[3].p = 0.0  # dropout depends on how a batch is shared out
    return toy


def test_a_lone_process_is_in_no_group() -> None:
    with process_group() as ranks:
        assert ranks == Ranks() == current_ranks()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_processes_train_like_one(
    precision: str, make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=8, micro_batch=2, log_every=1, precision=precision)
    alone, shared = make_run(config, "alone"), make_run(config, "shared")
    fit(alone, config, without_dropout(make_toy()).task)

    def work(rank: int) -> list[int]:
        toy = without_dropout(make_toy())
        with torch.no_grad():
            toy.task.model[0].weight += rank  # the first process's weights count
        sums = []
        real = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda tensor, *more: (sums.append(tensor.numel()), real(tensor, *more))[1]
        fit(shared, config, toy.task)
        return [*toy.source.asked, -len(sums)]

    first, second = in_processes(tmp_path, work)
    expected = [[step * 8 + rank * 4 + i for step in range(6) for i in range(4)] for rank in (0, 1)]
    assert [first[:-1], second[:-1]] == expected
    assert first[-1] == second[-1] == -(6 * 2 + 1), "per step: an agreement, and a sum of gradients and losses; the end"
    a, b = step_events(alone), step_events(shared)
    assert list(a) == list(b) == [1, 2, 3, 4, 5, 6]
    tolerance = 1e-6 if precision == "fp32" else 1e-3
    for step in a:
        assert b[step].losses["loss"] == pytest.approx(a[step].losses["loss"], rel=tolerance)
        assert b[step].grad_norm == pytest.approx(a[step].grad_norm, rel=10 * tolerance)
    if precision == "fp32":
        same_to_rounding(alone, shared, 6)
    names = checkpoint.Checkpoint(shared.checkpoint(6), 6).weights().keys()
    assert names == make_toy().task.model.state_dict().keys(), "no prefix of the wrapper"


def test_gradients_are_exchanged_once_per_step(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=8, micro_batch=1, steps=3)
    run = make_run(config)

    def work(rank: int) -> int:
        exchanged = []
        real = torch.distributed.all_reduce
        gradients = sum(parameter.numel() for parameter in make_toy().task.model.parameters())

        def counting(tensor: torch.Tensor, *more: object) -> object:
            exchanged.extend([1] if tensor.numel() >= gradients else [])
            return real(tensor, *more)

        torch.distributed.all_reduce = counting
        fit(run, config, make_toy().task)
        return len(exchanged)

    assert in_processes(tmp_path, work) == [3, 3]


class FakeGraph:
    """Stands for `CudaGraphedFunction` on a CPU. Capturing changes nothing. A replayed pass writes the very gradients
    that it was captured with, whatever the parameters' gradients are by then; a replayed update reads the present ones.
    """

    def __init__(self, function: Callable, example: dict, pool: None) -> None:
        self._function, step = function, function.__self__
        self._parameters = [p for group in step._optimizer.param_groups for p in group["params"]]
        self._written: list[torch.Tensor] = []
        if function.__name__ == "_backward":
            self._adds = self._parameters[0].grad is not None
            function(example)
            self._written = [p.grad for p in self._parameters]
            for tensor in self._written:
                tensor.zero_()

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._written:
            return self._function(batch)
        present = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        results = self._function(batch)
        for written, parameter, grad in zip(self._written, self._parameters, present, strict=True):
            written.copy_(written + parameter.grad if self._adds else parameter.grad)
            parameter.grad = grad
        return results


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_recorded_step_gives_the_same_bits_in_two_processes(
    precision: str, accumulate: int, make_toy: Make, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(step_module, "CudaGraphedFunction", FakeGraph)
    choice, steps = pick_device(TrainConfig(device="cpu", precision=precision)), EAGER_STEPS + 3

    def work(rank: int) -> list[list[object]]:
        found = []
        for record in (False, True):
            task, optim = make_toy().task, make_config().optim
            task.model.eval()  # no dropout, whose draws capturing would change
            optimizer = build_adamw(task.parameter_groups(optim), optim)
            take_step = TrainStep(
                task.model, task.losses, optimizer, torch.amp.GradScaler("cpu", enabled=precision == "fp16"), choice,
                accumulate=accumulate, clip_norm=0.1, record=record, ranks=current_ranks(),
            )  # fmt: skip
            data = [torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * i + rank)) for i in range(2 * steps)]
            batches = iter([{"x": x} for x in data])
            taken = [take_step(batches, seed=torch.manual_seed, watch=Stopwatch()) for _ in range(steps)]
            sums = [float(parameter.double().sum()) for parameter in task.model.parameters()]
            found.append([float(taken[-1].losses["loss"]), float(taken[-1].grad_norm), *sums])
        return found

    (plain, recorded), (plain_2, recorded_2) = in_processes(tmp_path, work)
    assert plain == recorded == plain_2 == recorded_2


@pytest.mark.parametrize("weights", [{}, {"step1": 0.0}, {"step2": 0.0, "step1": 0.0}])
def test_a_segmenter_trains_in_two_processes_like_in_one(weights: dict[str, float], tmp_path: Path) -> None:
    """Whatever each process sees: unlabelled images, a rare class. Heads without a weight are no obstacle either."""
    config = ModelConfig(size="tiny", drop_path=0, decoder_dropout=0)
    loss = SegmentationLoss(FinetuneConfig(), LossConfig(**weights), [0.5, 1.0, 1.5])
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = (images[:, 0] > 0).long()
    labels[1] = IGNORE
    labels[3, :4, :4] = 2
    choice, optim = pick_device(TrainConfig(device="cpu")), OptimConfig(lr=1e-3)

    def work(rank: int, world: int = 2) -> list[float]:
        torch.manual_seed(0)
        model = build_segmenter(config, 3).train()
        optimizer = build_adamw(layer_decay_groups(model, optim, encoder_layers(config)), optim)
        take_step = TrainStep(
            model, lambda net, batch: loss(net(batch["image"]), batch["labels"]), optimizer,
            torch.amp.GradScaler("cpu", enabled=False), choice,
            accumulate=1, clip_norm=1.0, ranks=Ranks(rank, world), agree=lambda out: out,
        )  # fmt: skip
        share = slice(rank * 4 // world, (rank + 1) * 4 // world)
        batches = itertools.repeat({"image": images[share], "labels": labels[share]})
        figures: list[float] = []
        for _ in range(3):
            taken = take_step(batches, seed=torch.manual_seed, watch=Stopwatch())
            figures += [float(taken.losses["loss"]), float(taken.grad_norm)]
        return figures

    alone = work(0, 1)
    first, second = in_processes(tmp_path, work)
    assert first == second == pytest.approx(alone, rel=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=4, steps=9, checkpoint_every=3, log_every=1, eval_every=0)
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    fit(whole, config, without_dropout(make_toy()).task)
    asked = []
    for last, world in ((3, 1), (6, 2), (9, 1)):
        toy = without_dropout(make_toy())

        def work(rank: int, toy: object = toy, last: int = last) -> list[int]:
            stop = StopRequest()
            real, calls = toy.source.sample, []

            def sample(index: int) -> dict[str, torch.Tensor]:
                calls.append(index)
                if last < 9 and index == 4 * last - 1:  # only one process asks for the stop
                    stop.request(signal.SIGTERM)
                return real(index)

            toy.source.sample = sample
            try:
                fit(parts, config, toy.task, resume=last > 3, stop=stop)
            except Interrupted as error:
                assert error.exit_code == 143 or rank == 0
            return calls

        results = in_processes(tmp_path, work, world)
        assert parts.checkpoint_steps()[0] == last
        asked += sorted(itertools.chain.from_iterable(results))
    assert asked == list(range(36))
    same_to_rounding(whole, parts, 9)


def test_a_bad_gradient_in_one_process_is_skipped_in_all(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=4, steps=6, log_every=3, eval_every=0)
    alone, shared = make_run(config, "alone"), make_run(config, "shared")
    fit(alone, config, without_dropout(make_toy(poisoned={11})).task)
    in_processes(tmp_path, lambda rank: fit(shared, config, without_dropout(make_toy(poisoned={11})).task).step)
    assert step_events(shared)[3].skipped == 1 == step_events(alone)[3].skipped
    same_to_rounding(alone, shared, 6)


def test_all_stop_when_too_many_steps_are_bad(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=4, steps=20, max_nonfinite=3, eval_every=0, checkpoint_every=4)
    run = make_run(config)
    poisoned = {4 * step + 3 for step in range(5, 20)}
    found = in_processes(tmp_path, lambda rank: fit(run, config, make_toy(poisoned=poisoned).task).step)
    assert found == ["DivergedError", "DivergedError"]
    assert run.checkpoint_steps() == [4]


def test_memory_short_in_one_process_halves_the_micro_batch_in_all(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=8, micro_batch=4, steps=6, log_every=1)
    whole, run = make_run(config, "whole"), make_run(config, "run")
    fit(whole, config, without_dropout(make_toy()).task)

    def work(rank: int) -> int:
        def explode(batch: dict[str, torch.Tensor]) -> None:
            if rank == 1 and len(batch["x"]) > 2 and len(calls) >= 3:
                raise torch.OutOfMemoryError("simulated")
            calls.append(len(batch["x"]))

        calls: list[int] = []
        fit(run, config, without_dropout(make_toy(before=explode)).task)
        return calls

    first, second = in_processes(tmp_path, work)
    assert first == [4, 4, 4, 4, *[2, 2] * 3] and second == [4, 4, 4, *[2, 2] * 3]
    assert any("step 4, which is repeated: 2 images at a time" in text for text in warnings_of(run))
    same_to_rounding(whole, run, 6)


def test_the_death_of_one_process_ends_the_others_and_the_run_goes_on(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=4, steps=9, checkpoint_every=3, log_every=1)
    whole, run = make_run(config, "whole"), make_run(config, "run")
    fit(whole, config, without_dropout(make_toy()).task)

    def work(rank: int) -> int:
        def die(batch: dict[str, torch.Tensor]) -> None:
            calls.append(batch)
            if rank == 1 and len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        calls: list[object] = []
        return fit(run, config, without_dropout(make_toy(before=die)).task).step

    start = time.monotonic()
    assert in_processes(tmp_path, work) == ["PeerLost", -signal.SIGKILL]
    assert time.monotonic() - start < 30
    assert json.loads(run.summary.read_text())["status"] == "failed"
    assert run.checkpoint_steps() == [3]
    in_processes(tmp_path, lambda rank: fit(run, config, without_dropout(make_toy()).task, resume=True).step)
    same_to_rounding(whole, run, 9)


def test_a_process_that_waits_for_its_device_is_ended_too(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an NCCL collective with a dead process: nothing reaches the main thread."""
    monkeypatch.setattr(distributed, "GRACE_S", 0.5)
    config = make_config(batch_size=4, steps=9, checkpoint_every=3, log_every=1)
    whole, run = make_run(config, "whole"), make_run(config, "run")
    fit(whole, config, without_dropout(make_toy()).task)

    def work(rank: int) -> int:
        def die_or_wait(batch: dict[str, torch.Tensor]) -> None:
            calls.append(batch)
            if len(calls) == 5:
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()

        calls: list[object] = []
        return fit(run, config, without_dropout(make_toy(before=die_or_wait)).task).step

    start = time.monotonic()
    assert in_processes(tmp_path, work) == [ResourceError.exit_code, -signal.SIGKILL]
    assert time.monotonic() - start < 30
    last = events.from_line(run.metrics.read_text().splitlines()[-1])
    assert isinstance(last, events.RunEnded) and last.status == "failed" and "another process" in last.message
    assert run.read_json(run.summary)["status"] == "failed" and run.checkpoint_steps() == [3]
    in_processes(tmp_path, lambda rank: fit(run, config, without_dropout(make_toy()).task, resume=True).step)
    same_to_rounding(whole, run, 9)


def test_a_batch_that_cannot_be_shared_out_is_refused(
    make_toy: Make, make_config: Make, make_run: Make, tmp_path: Path
) -> None:
    config = make_config(batch_size=5, micro_batch=1)
    run = make_run(config)
    assert in_processes(tmp_path, lambda rank: fit(run, config, make_toy().task).step) == ["ConfigError"] * 2
    with pytest.raises(
        ConfigError, match=r"train.batch_size \(5\) must be a multiple of the number of processes \(2\)"
    ):
        Ranks(0, 2).local_batch_size(5)


def test_text_and_numbers_are_shared(tmp_path: Path) -> None:
    def work(rank: int) -> list:
        ranks = current_ranks()
        return [
            ranks.broadcast_text("größe" * (1 - rank)),
            ranks.broadcast_text(""),
            ranks.smallest(7 - rank),
            ranks.any_rank(rank == 1, False),
        ]

    assert in_processes(tmp_path, work) == [["größe", "", 6, [True, False]]] * 2


def test_tensors_are_summed_in_place_of_their_buffer(tmp_path: Path) -> None:
    """Two CUDA graphs can have the sum between them: every call gives the same tensors, aligned for vector loads."""

    def work(rank: int) -> list:
        tensors = [torch.arange(5.0) + rank, torch.full((3, 7), float(rank)), torch.tensor(2.0)]
        add_up = SumOverRanks(tensors)
        first = add_up(tensors)
        values = [tensor.tolist() for tensor in first]
        again = add_up([2 * tensor for tensor in tensors])
        assert all(a is b for a, b in zip(first, again, strict=True))
        assert all(tensor.data_ptr() % 16 == 0 for tensor in first)
        return [values, again[0].tolist()]

    expected = [[[1.0, 3.0, 5.0, 7.0, 9.0], [[1.0] * 7] * 3, 4.0], [2.0, 6.0, 10.0, 14.0, 18.0]]
    assert in_processes(tmp_path, work) == [expected, expected]
