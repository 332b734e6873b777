"""What becomes of a part: scores, times, and failures that are results."""

from dataclasses import asdict

import pytest
import torch

from affmae_engine.bench import quality_worker
from affmae_engine.bench.quality import Part, QualityPlan
from affmae_engine.bench.quality_data import parts_of
from affmae_engine.bench.quality_worker import Pace, calibrate, do_part, train_part, weights_of
from affmae_engine.config import RunConfig
from affmae_engine.data.phantom import CLASS_NAMES, generate
from affmae_engine.events import Evaluated, RunStarted, StepLogged
from affmae_engine.train.losses import SegmentationLoss

TINY = {
    "model": {"size": "tiny"}, "data": {"crop_size": 32, "workers": 0},
    "train": {"batch_size": 4, "micro_batch": 2, "device": "cpu"},
}  # fmt: skip


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate(TINY)


@pytest.fixture
def store(make_labelled_store):
    phantom = generate((6, 64, 64), seed=25)
    return make_labelled_store({"stack": (phantom.image_ZYX, phantom.labels_ZYX)}, class_names=CLASS_NAMES)


@pytest.fixture
def train(config: RunConfig, store, tmp_path):
    """train(part, tell): two steps with the settings of a comparison."""
    plan = QualityPlan((0,), (1.0,), 10.0, 5.0, {"pretrain": config, "finetune": config})

    def run(part: Part, tell=lambda message: None):
        return train_part(part, plan.config_of(part, 2), store, parts_of(store, 0.2), tmp_path, tell)

    return run


def test_pretraining_and_finetuning_give_scores(store, train, tmp_path) -> None:
    parts, told = parts_of(store, 0.2), []
    first = Part("vit-mae", 0)
    pretrained = train(first, told.append)
    assert pretrained.status == "ok", pretrained.note
    assert pretrained.steps == 2 and pretrained.images == 8 and pretrained.held_out_loss > 0
    assert pretrained.train_s > 0 and pretrained.seconds > pretrained.train_s
    assert weights_of(first, tmp_path).is_file(), "finetunings start from it"
    assert {m["step"] for m in told} == {1, 2} and told[-1]["total"] == 2

    tuned = Part("vit-mae", 0, "pretrained", 0.5)
    result = train(tuned, told.append)
    assert result.status == "ok", result.note
    assert 0 <= result.miou <= 1 and result.sections == 2 and len(result.per_class) == 5
    pixels = sum(figures["pixels"] for figures in result.per_class.values())
    assert pixels == sum((r.z1 - r.z0) * 64 * 64 for r in parts.test), (
        "all of the test part, and nothing else, is scored"
    )
    assert not (tmp_path / tuned.name / "checkpoints").exists()


@pytest.mark.parametrize(("model", "terms"), [("affmae", {"step1", "step2"}), ("vit-mae", set())])
def test_losses_are_of_the_output_that_both_models_have(model, terms, train, monkeypatch) -> None:
    events = []
    real = quality_worker.Pace.__call__
    monkeypatch.setattr(quality_worker.Pace, "__call__", lambda pace, event: (events.append(event), real(pace, event)))
    pretrained = train(Part(model, 0))
    (held_out,) = [event.metrics for event in events if isinstance(event, Evaluated)]
    trained = [event.losses for event in events if isinstance(event, StepLogged)][-1]
    assert held_out.keys() - {"loss", "last", "mean_fill", "explained"} == terms == trained.keys() - {"loss", "last"}
    assert pretrained.held_out_loss == held_out["last"] and pretrained.loss == trained["last"]
    assert (held_out["loss"] > 1.1 * held_out["last"]) == bool(terms)

    tuned = train(Part(model, 0, "scratch", 1.0))
    trained = [event.losses for event in events if isinstance(event, StepLogged)][-1]
    assert tuned.loss == pytest.approx(trained["focal"] + trained["dice"])
    assert (trained["loss"] > 1.1 * tuned.loss) == bool(terms)


def test_without_pretraining_there_is_no_finetuning_from_it(train) -> None:
    result = train(Part("affmae", 0, "pretrained", 1.0))
    assert (result.status, result.note) == ("failed", "its pretraining gave no weights")


@pytest.mark.parametrize(
    ("raised", "status", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"), "out of memory", "80 GiB"),
        (RuntimeError("cuDNN error\nmore"), "failed", "RuntimeError: cuDNN error"),
    ],
)
def test_failures_are_results(raised, status, note, train, monkeypatch, capsys) -> None:
    def fail(*args: object, **more: object) -> None:
        raise raised

    monkeypatch.setattr(quality_worker.Trainer, "fit", fail)
    result = train(Part("affmae", 0, "scratch", 1.0))
    assert result.status == status and note in result.note and "\n" not in result.note and result.miou is None
    assert "Traceback" in capsys.readouterr().err, "the log has it all"


def test_an_item_is_done_by_name(store, config, tmp_path) -> None:
    part = Part("vit-mae", 0, "pretrained", 1.0)
    item = {
        "store": str(store.path), "runs": str(tmp_path), "test_fraction": 0.2, "part": asdict(part),
        "config": config.model_dump(mode="json"), "calibrate_s": None,
    }  # fmt: skip
    found = do_part(item, lambda message: None)
    assert found["status"] == "failed" and found["result"]["note"] == "its pretraining gave no weights"


def test_divergence_is_a_result(store, config, tmp_path) -> None:
    wild = config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"lr": 1e30, "clip_norm": 0.0, "warmup_steps": 0}),
            "train": config.train.model_copy(update={"steps": 6, "log_every": 1, "max_nonfinite": 2}),
        }
    )
    part = Part("vit-mae", 0, "scratch", 1.0)
    wild = wild.model_copy(update={"model": wild.model.model_copy(update={"family": "vit-mae"})})
    result = train_part(part, wild, store, parts_of(store, 0.2), tmp_path, lambda message: None)
    assert result.status == "diverged" and "non-finite" in result.note


def test_calibration_halves_what_does_not_fit(store, config, tmp_path, monkeypatch) -> None:
    real, tried = SegmentationLoss.__call__, []

    def scarce(loss: SegmentationLoss, outputs: dict, labels: torch.Tensor) -> dict:
        tried.append(len(labels))
        if len(labels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loss, outputs, labels)

    monkeypatch.setattr(SegmentationLoss, "__call__", scarce)
    part = Part("vit-mae", 0, "scratch", 1.0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"family": "vit-mae"})})
    speed = calibrate(part, config, store, parts_of(store, 0.2), tmp_path, 0.05)
    assert tried[:3] == [2, 1, 1] and speed.micro_batch == 1 and 0 < speed.step_s < 10
    assert not list(tmp_path.glob("calibration-*")), "nothing is left of it"

    monkeypatch.setattr(SegmentationLoss, "__call__", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    speed = calibrate(part, config, store, parts_of(store, 0.2), tmp_path, 0.05)
    assert speed.step_s is None and speed.status == "out of memory"


def logged(step: int, step_s: float) -> StepLogged:
    return StepLogged(
        step=step, losses={"loss": 1.0}, lr=1e-3, grad_norm=1.0, images_per_s=1.0, data_wait=0.0, step_s=step_s,
        memory_gib=1.0, memory_peak_gib=1.0, eta_s=1.0,
    )  # fmt: skip


def test_start_up_is_not_the_pace() -> None:
    pace = Pace(warmup=10)
    for event in (logged(5, 4.0), logged(10, 0.5), logged(15, 0.2), logged(20, 0.3), logged(25, 0.2)):
        pace(event)
    assert pace.step_s == pytest.approx(0.2)
    assert pace.train_s == pytest.approx(5 * (4.0 + 0.5 + 0.2 + 0.3 + 0.2))
    assert pace.startup_s == pytest.approx(5 * 3.8 + 5 * 0.3)


def test_a_pace_asks_for_a_stop_once_it_has_measured_enough() -> None:
    pace = Pace(warmup=2, enough_s=1.0)
    pace(RunStarted(task="pretrain", run="r", step=0, total_steps=9, resumed=False, device="", precision="",
                    parameters=1, batch_size=1))  # fmt: skip
    for step in range(1, 30):
        pace(logged(step, 0.125))
        assert pace.stop.requested == (step >= 10), "two steps of warm-up, then a second of eight steps"
    assert pace.startup_s == pytest.approx(0.0)
