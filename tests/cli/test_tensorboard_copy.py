"""The copy for TensorBoard holds the same figures and pictures, also over a resume."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_cli.tensorboard_copy import tensorboard_copy
from affmae_engine import events
from affmae_engine.config import RunConfig
from affmae_engine.picture_files import save_png
from affmae_engine.run_dir import RunDir, create

STEP = {
    "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 10.0, "data_wait": 0.0, "step_s": 0.1, "memory_gib": 1.0,
    "memory_peak_gib": 2.0, "eta_s": 5.0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = create(tmp_path / "a")
    made.write_config(RunConfig(), "pretrain")
    return made


def started(step: int = 0) -> events.RunStarted:
    return events.RunStarted(
        task="pretrain", run="a", step=step, total_steps=100, resumed=step > 0, device="X", precision="fp32",
        parameters=1, batch_size=2,
    )  # fmt: skip


def test_figures_and_pictures_are_the_same_and_resumed_steps_replace_earlier_ones(run: RunDir) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    save_png(run.preview(3), np.full((4, 6, 3), 200, np.uint8))
    with tensorboard_copy(run) as copy:
        copy(started())
        for step in range(1, 6):
            copy(events.StepLogged(step=step, losses={"loss": float(step), "last": math.nan}, **STEP))
        copy(events.Evaluated(step=3, metrics={"iou": 0.5}, per_class={"axon": {"iou": 0.7}}, effective_rank=[9.0]))
        copy(events.PreviewSaved(step=3, path="previews/step-000003.png"))
        copy(events.SystemSampled(step=3, power=250.0))
    with tensorboard_copy(run) as copy:
        copy(started(3))
        copy(events.StepLogged(step=4, losses={"loss": 40.0}, **STEP))
    found = accumulator.EventAccumulator(str(run.tensorboard)).Reload()
    assert [(point.step, point.value) for point in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert "train/last" not in found.Tags()["scalars"]
    for tag, value in {
        "held_out/iou": 0.5, "class/axon/iou": 0.7, "effective_rank/stage1": 9.0, "system/power": 250.0,
        "run/images_per_s": 10.0,
    }.items():  # fmt: skip
        assert found.Scalars(tag)[0].value == pytest.approx(value)
    (picture,) = found.Images("preview/main")
    assert (picture.step, picture.width, picture.height) == (3, 6, 4)


def test_without_the_package_it_is_one_line_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    result = CliRunner().invoke(app, ["pretrain", "x.zarr", "--preset", "demo", "--tensorboard"])
    assert result.exit_code == 2 and 'pip install "affmae[tensorboard]"' in result.stderr
    assert list(tmp_path.iterdir()) == []
