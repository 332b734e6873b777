"""A resumed run is the uninterrupted one, bit for bit; what cannot be resumed says why."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from affmae_engine import checkpoint, events
from affmae_engine.config import FIELDS, OnResume, RunConfig, on_resume
from affmae_engine.data import loading
from affmae_engine.errors import ConfigError, CorruptError, Interrupted
from affmae_engine.run_dir import RunDir, create
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train import resume, state, trainer
from affmae_engine.train.pretraining import PretrainTask
from affmae_engine.train.trainer import Trainer
from tests.engine.train.fitting import fit

Make = Callable[..., object]


def tensors(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoint.Checkpoint(run.checkpoint(step), step)
    return {**saved.weights(), **saved.optimizer()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CLOCK = {"time", "seconds", "images_per_s", "data_wait", "step_s", "eta_s", "memory_gib", "memory_peak_gib"}
"""Fields that depend on the machine and the hour."""


def history(run: RunDir) -> list[dict]:
    """What was measured, in the order of the file: every line but those that tell of processes."""
    records = [json.loads(text) for text in run.metrics.read_text().splitlines()]
    kinds = ("step", "evaluated", "preview")
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in records if r["kind"] in kinds]


def fit_until(
    run: RunDir, config: RunConfig, make_toy: Make, step: int, also: Callable = lambda batch: None, **toy: object
) -> None:
    """Train and stop as after a signal in `step`."""
    stop, seen = StopRequest(), []

    def count(batch: dict[str, torch.Tensor]) -> None:
        also(batch)
        seen.append(batch)
        if len(seen) == step:
            stop.request()

    with pytest.raises(Interrupted):
        fit(run, config, make_toy(before=count, **toy).task, stop=stop)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_interrupted_and_resumed_equals_uninterrupted(
    stop_at: int, precision: str, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(precision=precision, steps=6)
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    poisoned = {9}
    fit(whole, config, make_toy(poisoned=poisoned).task)
    fit_until(parts, config, make_toy, stop_at, poisoned=poisoned)
    torch.manual_seed(99)
    toy = make_toy(poisoned=poisoned)
    seen: list[events.Event] = []
    fit(parts, config, toy.task, resume=True, sinks=[seen.append])
    assert same(tensors(whole, 6), tensors(parts, 6))
    assert history(whole) == history(parts)
    assert toy.source.asked == list(range(stop_at * 4, 6 * 4))
    assert isinstance(seen[0], events.RunStarted) and seen[0].resumed and seen[0].step == stop_at
    assert whole.read_json(whole.best) == parts.read_json(parts.best)


def test_what_a_kill_left_behind_is_cleaned_and_a_damaged_newest_skipped(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=9)
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    fit(whole, config, make_toy().task)
    fit_until(parts, config, make_toy, 7)
    assert parts.checkpoint_steps() == [7, 6]
    weights = parts.checkpoint(7) / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    (parts.checkpoints / ".step-000008.ff.partial").mkdir()
    with parts.metrics.open("a") as file:
        file.write('{"kind": "step", "st')  # torn by the kill
    seen: list[events.Event] = []
    fit(parts, config, make_toy().task, resume=True, sinks=[seen.append])
    assert seen[0].step == 6
    warnings = [event.message for event in seen if isinstance(event, events.Warned)]
    assert len(warnings) == 2 and "step 7" in warnings[0] and "step-000007.damaged" in warnings[1]
    assert same(tensors(whole, 9), tensors(parts, 9))
    assert all(events.from_line(text) is not None for text in parts.metrics.read_text().splitlines())
    assert list(parts.checkpoints.glob(".*")) == []


def test_more_steps_continue_on_the_longer_cosine(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=6)
    run = make_run(config)
    fit(run, config, make_toy().task)
    fit(run, make_config(steps=8), make_toy().task, resume=True)
    assert run.checkpoint_steps()[0] == 8
    rates = {record["step"]: record["lr"] for record in history(run) if record["kind"] == "step"}
    assert rates[8] == pytest.approx(1e-6) and len(rates) == 4
    assert run.read_config().train.steps == 8


def test_resuming_a_complete_run_trains_nothing(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    first = fit(run, config, make_toy().task)
    toy = make_toy()
    again = fit(run, config, toy.task, resume=True)
    assert toy.source.asked == [] and again.metrics == first.metrics and again.best_step == first.best_step


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_says_so(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=6, checkpoint_every=6, eval_every=0, log_every=1)
    whole, killed = make_run(config, "whole"), make_run(config, "killed")
    fit(whole, config, make_toy().task)
    # What a kill in step 4 leaves behind: no checkpoint, and figures of the steps before.
    lines = whole.metrics.read_text().splitlines(keepends=True)
    killed.metrics.write_text("".join(line for line in lines if '"step": 5' not in line and '"step": 6' not in line))
    toy, seen = make_toy(), []
    fit(killed, config, toy.task, resume=True, sinks=[seen.append])
    assert toy.source.asked == list(range(6 * 4))
    assert same(tensors(whole, 6), tensors(killed, 6)) and history(whole) == history(killed)
    assert seen[0].resumed and seen[0].step == 0
    (warning,) = [event.message for event in seen if isinstance(event, events.Warned)]
    assert "starts again from step 0" in warning


def test_all_checkpoints_damaged_is_an_error(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    fit(run, config, make_toy().task)
    for step in run.checkpoint_steps():
        (run.checkpoint(step) / checkpoint.STATE).write_text("{}")
    with pytest.raises(CorruptError):
        fit(run, config, make_toy().task, resume=True)


def test_other_data_is_refused(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    fit(run, config, make_toy().task)
    with pytest.raises(ConfigError, match="data is not what"):
        fit(run, config, make_toy(fingerprint="b").task, resume=True)


def test_a_continuation_keeps_whatever_decides_what_is_learned() -> None:
    sections = ("model.", "data.", "mask.", "loss.", "optim.", "finetune.")
    changeable = [path for path in FIELDS if path.startswith(sections) and on_resume(path) is not OnResume.KEPT]
    assert changeable == ["data.workers"]
    assert all(on_resume(f"train.{name}") is OnResume.KEPT for name in ("batch_size", "precision", "seed"))


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [("optim.lr", 1e-3, False), ("train.seed", 1, False), ("train.micro_batch", 2, True), ("train.steps", 9, True)],
)
def test_what_a_continuation_may_change(
    path: str, value: object, allowed: bool, make_config: Make, make_run: Make
) -> None:
    config = make_config()
    run = make_run(config)
    section, _, name = path.partition(".")
    asked = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    if allowed:
        resume.check_continuation(run, asked)
        return
    with pytest.raises(ConfigError, match=f"{path}: .* in the run, {value} now"):
        resume.check_continuation(run, asked)


def test_what_shows_in_the_last_digits_is_recorded(make_toy: Make, make_config: Make, make_run: Make) -> None:
    run = make_run(make_config())
    fit_until(run, make_config(), make_toy, 3)
    seen: list[events.Event] = []
    fit(run, make_config(micro_batch=2, log_every=1), make_toy().task, resume=True, sinks=[seen.append])
    (warning,) = [event.message for event in seen if isinstance(event, events.Warned)]
    assert warning.startswith("train.micro_batch is 2 from here on, was None")


@pytest.mark.parametrize(("drop_path", "dropout"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_other_draws_of_dropout_are_not_called_rounding(drop_path: float, dropout: float, make_config: Make) -> None:
    model = {"drop_path": drop_path, "decoder_dropout": dropout}
    before, now = (
        RunConfig.model_validate({"model": model, "train": {"micro_batch": micro}, "kernels": {"cuda_graph": on}})
        for micro, on in ((2, True), (4, False))
    )
    notes = resume.rounding_notes(before, now)
    ending = " up to rounding and the draws of dropout" if drop_path or dropout else " up to rounding"
    assert [note.split(" is ")[0] for note in notes] == ["train.micro_batch", "kernels.cuda_graph"]
    assert all(note.endswith(f"the result stays the same{ending}") for note in notes)


def test_what_was_measured_beyond_the_checkpoint_is_taken_out(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(log_every=1)
    run = make_run(config)
    fit(run, config, make_toy().task)
    before = run.metrics.read_text().splitlines()
    shutil.rmtree(run.checkpoint(6))
    with run.metrics.open("a") as file:
        file.write('{"kind": "from a later version", "step": 6}\n{"kind": "step", "st')
    fit(run, config, make_toy().task, resume=True)
    kinds = [(record["kind"], record.get("step")) for record in map(json.loads, run.metrics.read_text().splitlines())]
    assert kinds.count(("step", 5)) == kinds.count(("checkpoint", 6)) == 1
    kept = [(r["kind"], r["step"]) for r in map(json.loads, before) if r["step"] <= 3 or r["kind"] == "run_ended"]
    assert kinds[: len(kept) + 2] == [*kept, ("from a later version", 6), ("run_started", 3)]


def test_generators_go_through_json() -> None:
    torch.manual_seed(1), random.seed(2), np.random.seed(3)  # noqa: NPY002
    random.gauss(0, 1)
    record = json.loads(json.dumps(state._generators()))
    expected = torch.rand(3), random.gauss(0, 1), np.random.standard_normal(3)  # noqa: NPY002
    state._set_generators(record)
    found = torch.rand(3), random.gauss(0, 1), np.random.standard_normal(3)  # noqa: NPY002
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1] and (found[2] == expected[2]).all()


PARTS = ("weights", "optimizer", "step", "sampler", "scaler", "generators", "window", "step seed", "nothing")


@pytest.mark.parametrize("forgotten", PARTS)
def test_a_restore_that_forgets_something_is_caught(
    forgotten: str, make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the equality above really depends on each part."""

    def draw(batch: dict[str, torch.Tensor]) -> None:
        batch["x"] += 0.1 * random.random() + 0.1 * np.random.random()  # noqa: NPY002

    # In fp16 a poisoned sample halves the loss scale; some of its gradients are so small that the scale shows in them.
    config = make_config(precision="fp16" if forgotten == "scaler" else "fp32")
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    poisoned = {5} if forgotten == "scaler" else set()
    with seeded():
        fit(whole, config, make_toy(poisoned=poisoned, before=draw).task)
    with seeded():
        fit_until(parts, config, make_toy, 3, poisoned=poisoned, also=draw)
    if forgotten == "optimizer":
        monkeypatch.setattr(state, "load_optimizer_tensors", lambda *args: None)
    elif forgotten == "weights":
        monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
    elif forgotten == "step":
        real = checkpoint.Checkpoint.state
        monkeypatch.setattr(checkpoint.Checkpoint, "state", lambda self: {**real(self), "step": 0})
    elif forgotten == "sampler":
        monkeypatch.setattr(
            trainer, "batches", lambda data, **options: loading.batches(data, **{**options, "first": 0})
        )
    elif forgotten == "scaler":
        monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda *args: None)
    elif forgotten == "generators":
        monkeypatch.setattr(state, "_set_generators", lambda *args: None)
    elif forgotten == "window":
        monkeypatch.setattr(state.Window, "load_json", lambda *args: None)
    elif forgotten == "step seed":
        monkeypatch.setattr(trainer, "seed_forward", lambda *args: None)
    fit(parts, config, make_toy(poisoned=poisoned, before=draw).task, resume=True)
    found = (
        same(tensors(whole, 6), tensors(parts, 6))
        and history(whole) == history(parts)
        and saved_scale(whole) == saved_scale(parts)
    )
    assert found == (forgotten == "nothing")


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The generators that a fresh process starts with, and others after it."""
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    yield
    random.seed(6), np.random.seed(6)  # noqa: NPY002


def saved_scale(run: RunDir) -> dict:
    return checkpoint.Checkpoint(run.checkpoint(6), 6).state()["scaler"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use the card that its parent used")
def test_killed_again_and_again_still_ends_bit_equal(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=100, checkpoint_every=1, eval_every=5)
    whole = make_run(config, "whole")
    fit(whole, config, make_toy().task)
    killed, kills = make_run(config, "killed"), 0
    chance = random.Random(0)
    for _ in range(40):
        if killed.read_json(killed.summary).get("status") == "finished":
            break
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                if not killed.checkpoint_steps():
                    create(killed.root, overwrite=True).write_config(config, "pretrain")
                fit(killed, config, make_toy().task, resume=bool(killed.checkpoint_steps()))
            os._exit(0)
        time.sleep(chance.uniform(0.0, 0.15))
        if kills < 15:
            os.kill(process, signal.SIGKILL)
            kills += 1
        os.waitpid(process, 0)
    assert kills > 2
    assert same(tensors(whole, 100), tensors(killed, 100))
    assert history(whole) == history(killed)
    assert list(killed.checkpoints.glob(".*")) == []


def test_the_real_model_resumes_bit_equal_whatever_the_number_of_workers(make_store: Make, make_run: Make) -> None:
    blob = np.random.default_rng(0).integers(0, 255, (6, 96, 96), dtype=np.uint8)
    store = make_store({"a": blob})

    def config_with(workers: int) -> RunConfig:
        return RunConfig.model_validate(
            {
                "model": {"size": "tiny", "patch_size": 8},
                "data": {"crop_size": 64, "workers": workers, "holdout": 0.3},
                "mask": {"lattices": [4, 8]},
                "optim": {"lr": 1e-3},
                "train": {"steps": 6, "batch_size": 2, "micro_batch": 1, "device": "cpu", "log_every": 2},
            }
        )

    whole, parts = make_run(config_with(2), "whole"), make_run(config_with(0), "parts")
    Trainer(whole, PretrainTask(config_with(2), store)).fit()
    stop, calls = StopRequest(), []
    task = PretrainTask(config_with(0), store)

    losses = task.losses

    def counted(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(batch)
        if len(calls) == 3 * 2:
            stop.request()
        return losses(model, batch)

    task.losses = counted
    with pytest.raises(Interrupted):
        Trainer(parts, task, stop=stop).fit()
    Trainer(parts, PretrainTask(config_with(0), store), resume=True).fit()
    assert same(tensors(whole, 6), tensors(parts, 6))
    assert history(whole) == history(parts)
