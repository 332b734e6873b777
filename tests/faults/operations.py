"""What must be all or nothing: each operation with a state to begin from and a check of whatever is left.

`check` is called after a crash or an error, in a process of its own. It raises RuntimeError when what is there is
neither the old state nor the new one, and then does the operation again, without faults: that must end well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

from affmae_engine import atomic, checkpoint
from affmae_engine.data.ingest import ingest
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.readers import open_sources
from affmae_engine.data.store import Store
from affmae_engine.errors import InputError
from affmae_engine.predict.identity import is_finished, open_labels
from affmae_engine.predict.job import PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import predict
from affmae_engine.run_dir import RunDir, create
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.weights import WeightsMetadata
from tests.faults.workloads import CONFIG, differences, files

ALL = slice(None)


@dataclass(frozen=True)
class Operation:
    """One of them. `prepare` builds the old state in a new folder, `act` is what may be interrupted."""

    name: str
    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    check: Callable[[Path], object]


def require(condition: bool, what: str) -> None:
    """Raises RuntimeError when a promise is broken."""
    if not condition:
        raise RuntimeError(what)


# Checkpoints -----------------------------------------------------------------------------------------------------


def tensors(step: int) -> dict[str, Tensor]:
    """Another set for every step."""
    generator = torch.Generator().manual_seed(step)
    return {f"layer{i}": torch.randn(12, generator=generator) for i in range(2)}


def save(run: RunDir, step: int) -> None:
    """A checkpoint as the trainer writes it, and the note that it is the best."""
    about = WeightsMetadata(task="pretrain", step=step, model={}, image_size=8, normalisation={})
    checkpoint.save(run, weights=tensors(step), optimizer=tensors(-step), state={"step": step}, metadata=about)
    checkpoint.write_best(run, step, "score", float(step))


def saved(run: RunDir, steps: Sequence[int]) -> None:
    """Every checkpoint under a final name is one of `steps` and has the very content of that step."""
    for step in run.checkpoint_steps():
        require(step in steps, f"checkpoint {step} is not one of {list(steps)}")
        checkpoint.verify(run.checkpoint(step))
        one = checkpoint.Checkpoint(run.checkpoint(step), step)
        for found, expected in ((one.weights(), tensors(step)), (one.optimizer(), tensors(-step))):
            require(all(torch.equal(found[name], expected[name]) for name in expected), f"step {step} has other values")


def quiet(message: str) -> None:
    """Warnings are not what is looked at here."""


def begun(folder: Path, steps: Sequence[int]) -> RunDir:
    """A run with these checkpoints."""
    run = create(folder / "run")
    run.write_config(CONFIG, "pretrain")
    for step in steps:
        save(run, step)
    return run


def check_save(folder: Path) -> None:
    run = RunDir(folder / "run")
    saved(run, (1, 2))
    newest = checkpoint.newest_valid(run, quiet)
    require(newest is not None, "no checkpoint is left")
    best = checkpoint.best_step(run)
    require(best in run.checkpoint_steps(), f"best.json names {best}, which is not there")
    atomic.sweep(run.checkpoints)
    atomic.sweep(run.root)
    save(run, 2)
    saved(run, (1, 2))
    require(checkpoint.best_step(run) == 2 and not list(run.root.rglob(".*")), "the second save left something behind")


def prune(folder: Path) -> None:
    run = RunDir(folder / "run")
    checkpoint.write_best(run, 2, "score", 9.0)
    checkpoint.prune(run, 2, 2, quiet)


def check_prune(folder: Path) -> None:
    run = RunDir(folder / "run")
    saved(run, (1, 2, 3, 4))
    require({2, 3, 4} <= set(run.checkpoint_steps()), f"only {run.checkpoint_steps()} are left")
    atomic.sweep(run.checkpoints)
    atomic.sweep(run.root)
    prune(folder)
    require(run.checkpoint_steps() == [4, 3, 2] and not list(run.root.rglob(".*")), "pruning again is not complete")


def damaged(folder: Path) -> None:
    run = begun(folder, (1, 2, 3))
    weights = run.checkpoint(3) / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    (run.checkpoints / f".step-000009.x{atomic.PARTIAL_SUFFIX}").mkdir()


def fall_back(folder: Path) -> None:
    """What a resumed run does before it trains."""
    run = RunDir(folder / "run")
    atomic.sweep(run.checkpoints)
    newest = checkpoint.newest_valid(run, quiet)
    require(newest is not None and newest.step == 2, "did not fall back to step 2")
    checkpoint.set_aside_newer(run, 2)
    save(run, 3)


def check_fall_back(folder: Path) -> None:
    run = RunDir(folder / "run")
    newest = checkpoint.newest_valid(run, quiet)
    require(newest is not None and newest.step in (2, 3), "the good checkpoint is gone")
    if newest is not None and newest.step == 2:
        fall_back(folder)
    saved(run, (1, 2, 3))


# Datasets --------------------------------------------------------------------------------------------------------


def picture(seed: int) -> np.ndarray:
    """Grey values of an image."""
    return np.random.default_rng(seed).integers(0, 255, (2, 24, 20), np.uint8)


def dataset(folder: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        tifffile.imwrite(folder / f"{name}.tif", picture(seed))
    ingest([folder / "a.tif"], folder / "em.zarr", workers=1)


def add_image(folder: Path) -> None:
    report = ingest([folder / "b.tif"], folder / "em.zarr", workers=1)
    require(not report.skipped, f"skipped: {report.skipped}")


def check_dataset(folder: Path) -> None:
    store = Store.open(folder / "em.zarr")
    names = {image.name for image in store.images}
    require("a" in names and names <= {"a", "b"}, f"the dataset has {names}")
    for name in names:
        require(np.array_equal(store.read(name, ALL, ALL, ALL), picture("ab".index(name) + 1)), f"{name} has changed")
    add_image(folder)
    store = Store.open(folder / "em.zarr")
    for image in store.images:
        require(np.array_equal(store.read(image.name, ALL, ALL, ALL), picture("ab".index(image.name) + 1)), "changed")
    hidden = [str(entry) for entry in (folder / "em.zarr").rglob("*.partial")]
    require(len(store.images) == 2 and not hidden, f"the second ingestion left {hidden}")


# Predictions -----------------------------------------------------------------------------------------------------


class Levels(nn.Module):
    """Three classes by grey value."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": -(image - torch.tensor([0.0, 1.0, 2.0])[None, :, None, None]).square()}


def predicted(folder: Path, name: str, *, overwrite: bool = False) -> None:
    weights = folder / "weights"
    about = WeightsMetadata(
        task="finetune", model={}, image_size=16, normalisation={}, class_names=("a", "b", "c"), pixel_nm=4.0
    )
    choice = DeviceChoice(torch.device("cpu"), torch.float32, "fp32", "CPU")
    predictor = Predictor(weights, about, Levels().eval(), choice, Normalisation("dataset", 0.0, 100.0), 1)
    targets = Outputs(folder / "out" / name, with_probabilities=True)
    with open_sources(folder / "a.tif")[0] as source:
        options = PredictOptions(overwrite=overwrite)
        if overwrite or not is_finished(source, predictor, targets, options):
            predict(source, predictor, targets, options)


def image(folder: Path, name: str) -> None:
    """An image to predict, and what an undisturbed prediction of it leaves."""
    (folder / "weights").write_bytes(b"weights")
    tifffile.imwrite(folder / "a.tif", picture(1))
    predicted(folder, name)
    (folder / "out").rename(folder / "expected")


def older(folder: Path, name: str) -> None:
    """The same, with the output of another model in the way."""
    image(folder, name)
    (folder / "weights").write_bytes(b"others")
    predicted(folder, name)
    (folder / "weights").write_bytes(b"weights")


def _labels(path: Path) -> np.ndarray:
    with open_labels(path) as source:
        return source.read(ALL, ALL, ALL)


def check_predicted(folder: Path, name: str, *, replaced: bool = False) -> None:
    labels = folder / "out" / name
    require(labels.exists() or not replaced, "neither the old nor the new labels are there")
    if labels.exists():
        complete = np.array_equal(_labels(labels), _labels(folder / "expected" / name))
        require(complete, "labels under the final name are not complete")
    predicted(folder, name, overwrite=replaced)
    wrong = differences(files(folder / "out"), files(folder / "expected"))
    require(not wrong, f"not as without a fault: {wrong}")


# Runs ------------------------------------------------------------------------------------------------------------


def new_run(folder: Path) -> None:
    create(folder / "run").write_config(CONFIG, "pretrain")


def check_new_run(folder: Path) -> None:
    run = RunDir(folder / "run")
    if not run.exists():
        new_run(folder)
    require(run.read_config() == CONFIG, "the configuration is not what was written")
    with contextlib.suppress(InputError):  # there are none
        require(checkpoint.load_weights(run.root) is None, "weights out of nothing")


OPERATIONS = (
    Operation("save", lambda folder: begun(folder, (1,)), lambda folder: save(RunDir(folder / "run"), 2), check_save),
    Operation("prune", lambda folder: begun(folder, (1, 2, 3, 4)), prune, check_prune),
    Operation("fall-back", damaged, fall_back, check_fall_back),
    Operation("new-run", lambda folder: None, new_run, check_new_run),
    Operation("ingest", dataset, add_image, check_dataset),
    Operation(
        "predict-tiff",
        lambda folder: image(folder, "a.tif"),
        lambda folder: predicted(folder, "a.tif"),
        lambda folder: check_predicted(folder, "a.tif"),
    ),
    Operation(
        "predict-zarr",
        lambda folder: image(folder, "a.zarr"),
        lambda folder: predicted(folder, "a.zarr"),
        lambda folder: check_predicted(folder, "a.zarr"),
    ),
    Operation(
        "overwrite",
        lambda folder: older(folder, "a.zarr"),
        lambda folder: predicted(folder, "a.zarr", overwrite=True),
        lambda folder: check_predicted(folder, "a.zarr", replaced=True),
    ),
)
