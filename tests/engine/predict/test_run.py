"""Prediction of whole files: labels, metadata, pixel sizes, shards, failures halfway, memory."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaozarrs
import zarr
from PIL import Image

from affmae_engine import atomic
from affmae_engine.data.readers import open_sources
from affmae_engine.data.readers.arrays import ArraySource
from affmae_engine.errors import AffmaeError, BusyError, ConfigError, InputError, Interrupted, ResourceError
from affmae_engine.predict import job as jobs
from affmae_engine.predict import outputs, volume
from affmae_engine.predict.identity import is_finished, is_result, open_labels, recorded_fingerprint
from affmae_engine.predict.job import Job, PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import PredictProgress, Shard, predict
from affmae_engine.predict.sources import SectionStack
from affmae_engine.predict.work import Work, work_folder
from affmae_engine.runtime.signals import StopRequest

Make = Callable[..., Predictor]
Write = Callable[..., Path]
ALL = slice(None)


def run(
    path: Path, predictor: Predictor, out: Path, options: PredictOptions | None = None, *, targets: Any = None,
    **more: Any,
) -> Any:  # fmt: skip
    with open_sources(path)[0] as source:
        return predict(source, predictor, targets or Outputs(out), options or PredictOptions(), **more)


def labels_of(path: Path) -> np.ndarray:
    with open_labels(path) as source:
        return source.read(ALL, ALL, ALL)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".unfinished" not in str(path)
    }


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def stop_after(tiles: int) -> dict[str, Any]:
    """Arguments of `predict` that stop it after so many tiles."""
    stop = StopRequest()

    def progress(event: PredictProgress) -> None:
        if event.tiles_done >= tiles:
            stop.request(15)

    return {"on_progress": progress, "stop": stop}


@pytest.mark.parametrize("name", ["out.tif", "out.ome.zarr"])
def test_labels_fractions_scale_and_picture(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, name: str
) -> None:
    out = tmp_path / "results" / name
    seen: list[PredictProgress] = []
    report = run(write_stack(blobs), make_predictor(), out, on_progress=seen.append)
    labels = labels_of(out)
    assert labels.dtype == np.uint8 and np.array_equal(labels, blobs)
    assert report.labels == out and report.shape_ZYX == blobs.shape
    assert report.class_fractions == pytest.approx(
        dict(zip(("background", "membrane", "mitochondria"), np.bincount(blobs.ravel()) / blobs.size, strict=True))
    )
    with open_labels(out) as source:
        assert report.pixel_nm == pytest.approx((40.0, 4.0, 4.0)) and source.info.pixel_nm == pytest.approx((40, 4, 4))
    assert report.overlay == tmp_path / "results" / "out-overlay.png" and report.overlay.is_file()
    assert seen[-1] == PredictProgress("stack", 3, 3, seen[-1].tiles, seen[-1].tiles)
    assert [p.tiles_done for p in seen] == sorted(p.tiles_done for p in seen)
    assert not report.warnings and names(out.parent) == sorted([name, "out-overlay.png"])
    assert is_result(out) and is_result(report.overlay)


def test_an_ome_zarr_opens_as_image_with_named_labels(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path = write_stack(blobs)
    run(path, make_predictor(), tmp_path / "cells.zarr")
    root = zarr.open_group(tmp_path / "cells.zarr", mode="r")
    assert np.array_equal(root["0"][:], tifffile.imread(path))
    assert root["labels"].attrs["ome"]["labels"] == ["cells"]
    assert np.array_equal(root["labels/cells/0"][:], blobs)
    image_label = root["labels/cells"].attrs["ome"]["image-label"]
    assert [p["class"] for p in image_label["properties"]] == ["background", "membrane", "mitochondria"]
    for part in ("", "labels", "labels/cells"):
        assert yaozarrs.validate_zarr_store(str(tmp_path / "cells.zarr" / part)) is not None
    run(path, make_predictor(), tmp_path / "bare.zarr", PredictOptions(image=False))
    assert names(tmp_path / "bare.zarr") == ["labels", "zarr.json"]
    assert yaozarrs.validate_zarr_store(str(tmp_path / "bare.zarr" / "labels" / "bare")) is not None
    assert np.array_equal(labels_of(tmp_path / "bare.zarr"), blobs)
    assert is_result(tmp_path / "bare.zarr") and is_result(tmp_path / "cells.zarr")


def test_probabilities_beside_the_labels(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    report = run(
        write_stack(blobs), make_predictor(), tmp_path, targets=Outputs(tmp_path / "out.tif", with_probabilities=True)
    )
    assert report.probabilities == tmp_path / "out-probabilities.ome.zarr"
    assert yaozarrs.validate_zarr_store(str(report.probabilities)) is not None
    values = zarr.open_group(report.probabilities, mode="r")["0"][:]
    assert values.shape == (3, *blobs.shape) and values.dtype == np.uint8
    assert np.array_equal(values.argmax(0), blobs)
    assert np.abs(values.astype(int).sum(0) - 255).max() <= 2
    record = json.loads((report.probabilities / "zarr.json").read_text())["attributes"]["affmae_prediction"]
    assert record["class_names"][1] == "membrane" and record["probability"] == "value / 255"


def test_a_single_image_stays_two_dimensional(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    run(write_stack(blobs[:1]), make_predictor(), tmp_path / "out.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), blobs[0])


def test_sections_of_a_folder_are_one_stack(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    sections = [open_sources(write_stack(blobs[z : z + 1], f"in/s{z}.tif"))[0] for z in range(3)]
    stack = SectionStack(sections, "stack")
    report = predict(stack, make_predictor(), Outputs(tmp_path / "out" / "a.tif"), PredictOptions())
    assert report is not None and [Path(path).name for path, _ in report.sections] == ["s0.tif", "s1.tif", "s2.tif"]
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), blobs)


class Blind(torch.nn.Module):
    """Remembers the tiles that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(image)
        return {"logits": -20 * (image - torch.tensor([0.0, 1.0, 2.0])[None, :, None, None]).square()}


@pytest.mark.parametrize("rescale", [None, True])
@pytest.mark.parametrize("pixel_nm", [2.0, 8.0])
def test_planes_are_brought_to_the_trainings_size_and_keep_the_grid(
    tmp_path: Path, make_predictor: Make, write_stack: Write, pixel_nm: float, rescale: bool | None
) -> None:
    labels = np.zeros((2, 96, 120), np.uint8)
    labels[:, 24:72, 30:90] = 2
    path = write_stack(labels, pixel_nm=pixel_nm)
    report = run(path, make_predictor(Blind()), tmp_path / "out.tif", PredictOptions(rescale=rescale))
    factor = pixel_nm / 4.0
    assert report.rescaled_to == (96 * factor, 120 * factor)
    predicted = tifffile.imread(tmp_path / "out.tif")
    assert predicted.shape == labels.shape
    # A blurred step between classes 0 and 2 passes through grey level 1; only pixels at the edge may differ.
    wrong = np.argwhere(predicted != labels)
    edge = np.minimum.reduce([np.abs(wrong[:, 1, None] - [24, 71]).min(1), np.abs(wrong[:, 2, None] - [30, 89]).min(1)])
    assert (edge <= 2).all()
    assert report.pixel_nm[1] == pytest.approx(pixel_nm) and not any("rescale" in text for text in report.warnings)
    assert any(f"{pixel_nm:g} nm" in note and "own grid" in note for note in report.notes)


@pytest.mark.parametrize(
    ("pixel_nm", "rescale", "resampled", "warned"),
    [(4.0, None, False, False), (4.5, None, False, False), (4.5, True, True, False), (4.7, None, True, False),
     (4.7, False, False, True), (3.4, None, True, False), (3.4, False, False, True)],
)  # fmt: skip
def test_from_15_percent_on_planes_are_rescaled(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, pixel_nm: float,
    rescale: bool | None, resampled: bool, warned: bool,
) -> None:  # fmt: skip
    report = run(
        write_stack(blobs[:1], pixel_nm=pixel_nm),
        make_predictor(),
        tmp_path / "out.tif",
        PredictOptions(rescale=rescale),
    )
    assert (report.rescaled_to is not None) == resampled and bool(report.warnings) == warned
    if warned:
        assert "--no-rescale" in report.warnings[0] and f"{pixel_nm:g} nm" in report.warnings[0]


def test_an_unknown_pixel_size_is_said_and_can_be_given(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path = write_stack(blobs, pixel_nm=None)
    report = run(path, make_predictor(), tmp_path / "a.tif")
    assert any("does not say its pixel size" in note for note in report.notes) and report.rescaled_to is None
    given = PredictOptions(pixel_nm=(30.0, 4.0, 4.0))
    assert run(path, make_predictor(), tmp_path / "b.tif", given).pixel_nm == (30.0, 4.0, 4.0)
    assert open_sources(tmp_path / "b.tif")[0].info.pixel_nm == pytest.approx((30.0, 4.0, 4.0))
    with pytest.raises(ConfigError, match="cannot rescale") as caught:
        run(path, make_predictor(), tmp_path / "c.tif", PredictOptions(rescale=True))
    assert "--pixel-size" in caught.value.hint
    with pytest.raises(ConfigError, match="weights do not say"):
        run(path, make_predictor(pixel_nm=None), tmp_path / "c.tif", PredictOptions(rescale=True))


def test_a_tile_larger_than_the_image_is_clamped(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    model = Blind()
    report = run(write_stack(blobs), make_predictor(model), tmp_path / "out.tif", PredictOptions(tile=4096))
    assert report.tile == 90 and model.seen[0].shape[-1] == 90
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), blobs)


def test_orientations_are_averaged(tmp_path: Path, make_predictor: Make, toys: SimpleNamespace) -> None:
    noise = np.random.default_rng(8).integers(0, 255, (20, 24, 28), np.uint8)
    path = tmp_path / "cube.tif"
    tifffile.imwrite(path, noise, imagej=True, metadata={"axes": "ZYX"})
    predictor = make_predictor(toys.conv())
    targets = Outputs(tmp_path / "out.zarr", with_probabilities=True)
    report = run(path, predictor, tmp_path, PredictOptions(planes=("xy", "xz", "yz")), targets=targets)
    assert report.probabilities is not None
    found = zarr.open_group(report.probabilities, mode="r")["0"][:].astype(int)
    total = np.zeros((3, *noise.shape))
    for axes in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        turned = tmp_path / "turned.tif"
        tifffile.imwrite(turned, noise.transpose(axes), imagej=True, metadata={"axes": "ZYX"})
        alone = Outputs(tmp_path / f"alone{axes[0]}.zarr", with_probabilities=True)
        one = run(turned, predictor, tmp_path, targets=alone)
        values = zarr.open_group(one.probabilities, mode="r")["0"][:]
        total += values.transpose(0, *(1 + np.argsort(axes)))
    assert np.abs(found - total / 3).max() <= 0.51
    assert np.array_equal(labels_of(tmp_path / "out.zarr"), total.argmax(0))
    assert sum(report.class_fractions.values()) == pytest.approx(1)
    # One other orientation alone comes back in the volume's own order of axes.
    report = run(path, predictor, tmp_path / "xz.zarr", PredictOptions(planes=("xz",)))
    values = zarr.open_group(tmp_path / "alone1-probabilities.ome.zarr", mode="r")["0"][:]
    assert np.array_equal(labels_of(tmp_path / "xz.zarr"), values.transpose(0, 2, 1, 3).argmax(0))


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one section of at most 64 x 64 pixels, with sections of 90 x 70."""
    from affmae_engine.predict import grid

    monkeypatch.setattr(grid, "CHUNK", 64)
    monkeypatch.setattr(grid, "LARGEST_EDGE", 64)
    monkeypatch.setattr(grid, "PYRAMID_EDGE", 32)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("pixel_nm", [4.0, 3.0])
def test_shards_in_any_order_give_the_bytes_of_a_single_run(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, toys: SimpleNamespace, pixel_nm: float
) -> None:
    path, predictor = write_stack(blobs, pixel_nm=pixel_nm), make_predictor(toys.conv())
    whole = run(path, predictor, tmp_path, targets=Outputs(tmp_path / "whole" / "a.zarr", with_probabilities=True))
    assert whole.blocks == 12
    for order in ((0, 1, 2), (2, 0, 1)):
        folder = tmp_path / f"shards{order[0]}"
        targets = Outputs(folder / "a.zarr", with_probabilities=True)
        reports = [run(path, predictor, tmp_path, targets=targets, shard=Shard(i, 3)) for i in order]
        assert [report is None for report in reports] == [True, True, False]
        assert reports[-1].class_fractions == whole.class_fractions
        assert content(folder) == content(tmp_path / "whole") and names(folder) == names(tmp_path / "whole")


@pytest.mark.usefixtures("many_blocks")
def test_finish_puts_shards_together_and_says_what_is_missing(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, predictor, out = write_stack(blobs), make_predictor(), tmp_path / "a.zarr"
    with pytest.raises(ConfigError, match=r"nothing to .* is under way"):
        run(path, predictor, out, finish_only=True)
    with pytest.raises(ConfigError, match="a TIFF is one file"):
        run(path, predictor, tmp_path / "a.tif", shard=Shard(0, 2))
    assert run(path, predictor, out, shard=Shard(1, 2)) is None
    with pytest.raises(ConfigError, match="6 of 12 blocks") as caught:
        run(path, predictor, out, finish_only=True)
    assert "number 0" in caught.value.message and not out.exists()
    with monkeypatch.context() as patch:  # the last shard ends before it puts the output together
        patch.setattr("affmae_engine.predict.run._finish_shards", lambda job, must: None)
        assert run(path, predictor, out, shard=Shard(0, 2)) is None
    report = run(path, predictor, out, finish_only=True)
    assert np.array_equal(labels_of(out), blobs) and report.blocks_before == 12


def test_shards_of_another_prediction_are_refused_before_any_block(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, predictor, out = write_stack(blobs), make_predictor(), tmp_path / "a.zarr"

    def meanwhile(job: Job, numbers: Sequence[int], observer: Any) -> None:
        with pytest.raises(ConfigError, match="another overlap"):
            run(path, predictor, out, PredictOptions(overlap=0.25), shard=Shard(1, 2))
        for number in numbers:
            job.compute(number)

    assert run(path, predictor, out, shard=Shard(0, 2), engine=meanwhile) is None
    assert run(path, predictor, out, shard=Shard(1, 2)) is not None and np.array_equal(labels_of(out), blobs)


def test_more_shards_than_blocks(tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray) -> None:
    path, predictor = write_stack(blobs), make_predictor()
    reports = [run(path, predictor, tmp_path / "a.zarr", shard=Shard(i, 9)) for i in range(9)]
    assert sum(report is not None for report in reports) == 1 and np.array_equal(labels_of(tmp_path / "a.zarr"), blobs)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("name", ["out.tif", "out.zarr"])
def test_a_stopped_prediction_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, toys: SimpleNamespace, name: str
) -> None:
    path, predictor = write_stack(blobs), make_predictor(toys.conv())
    whole, targets = Outputs(tmp_path / "whole" / name, True), Outputs(tmp_path / "again" / name, True)
    total = run(path, predictor, tmp_path, targets=whole)
    for tiles in (60, 150):
        with pytest.raises(Interrupted, match="no output was written yet") as caught:
            run(path, predictor, tmp_path, targets=targets, **stop_after(tiles))
        assert caught.value.exit_code == 143 and names(tmp_path / "again") == [f".{name}.unfinished"]
    assert not is_finished(open_sources(path)[0], predictor, targets, PredictOptions())
    report = run(path, predictor, tmp_path, targets=targets)
    assert 0 < report.blocks_before < report.blocks == total.blocks
    assert any("were finished before" in note for note in report.notes)
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    assert is_finished(open_sources(path)[0], predictor, targets, PredictOptions())


@pytest.mark.usefixtures("many_blocks")
def test_another_model_image_or_option_is_refused(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, out = write_stack(blobs), tmp_path / "out" / "labels.tif"
    with pytest.raises(Interrupted):
        run(path, make_predictor(), out, **stop_after(100))
    kept = names(Work(out).blocks)
    assert kept
    for other in (PredictOptions(overlap=0.25), PredictOptions(batch_size=2), PredictOptions(tta=True)):
        with pytest.raises(ConfigError, match=r"another (overlap|batch|tta)"):
            run(path, make_predictor(), out, other)
    changed = make_predictor()
    changed.weights.write_bytes(b"others")
    with pytest.raises(ConfigError, match="another weights") as caught:
        run(path, changed, out)
    assert "--overwrite" in caught.value.hint and names(Work(out).blocks) == kept
    changed.weights.write_bytes(b"")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError, match="another image"):
        run(path, make_predictor(), out)
    report = run(path, make_predictor(), out, PredictOptions(overwrite=True))
    assert report.blocks_before == 0 and recorded_fingerprint(out) is not None


def test_what_an_earlier_version_left_unfinished_is_told(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    out = tmp_path / "a.tif"
    work_folder(out).mkdir()
    (work_folder(out) / "journal").write_bytes(b"{}\n")
    with pytest.raises(ConfigError, match="of an earlier version"):
        run(write_stack(blobs), make_predictor(), out)
    assert run(write_stack(blobs), make_predictor(), out, PredictOptions(overwrite=True)).blocks == 3


class Full:
    """A disk that is full after so many writes of blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
        self.left, real = blocks, volume.Pyramid.write

        def write(pyramid: volume.Pyramid, *arguments: Any) -> None:
            self.left -= 1
            if self.left < 0:
                with atomic.translated_write_errors(pyramid.folder):
                    raise OSError(errno.ENOSPC, "No space left on device")
            real(pyramid, *arguments)

        monkeypatch.setattr(volume.Pyramid, "write", write)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("shard", [None, Shard(0, 1)])
def test_a_full_disk_keeps_finished_blocks(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, shard: Shard | None
) -> None:
    path, out = write_stack(blobs), tmp_path / "a.zarr"
    with pytest.MonkeyPatch.context() as patch:
        Full(patch, 9)
        with pytest.raises(ResourceError, match="the disk is full"):
            run(path, make_predictor(), out, shard=shard)
    assert not out.exists()
    report = run(path, make_predictor(), out, shard=shard)
    assert 0 < report.blocks_before < report.blocks and np.array_equal(labels_of(out), blobs)


def test_a_full_disk_while_the_tiff_is_written_ends_the_work(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("affmae_engine.predict.finish.write_tiff", fail)
    with pytest.raises(ResourceError, match="the disk is full"):
        run(write_stack(blobs), make_predictor(), tmp_path / "out.tif")
    monkeypatch.undo()
    run(write_stack(blobs), make_predictor(), tmp_path / "out.tif", PredictOptions(overwrite=True))
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), blobs)


class Greedy(torch.nn.Module):
    """Runs out of memory for more than `limit` tiles at a time."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.sizes = limit, list[int]()

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.sizes.append(len(image))
        if len(image) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return {"logits": -20 * (image - torch.tensor([0.0, 1.0, 2.0])[None, :, None, None]).square()}


def test_out_of_memory_halves_the_batch_and_goes_on(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, model, seen = write_stack(blobs), Greedy(3), list[PredictProgress]()
    report = run(path, make_predictor(model), tmp_path / "a.tif", PredictOptions(batch_size=8), on_progress=seen.append)
    assert model.sizes[:3] == [8, 4, 2] and max(model.sizes[3:]) == 2
    assert [text for text in report.warnings if "out of device memory" in text][-1].endswith("with 2 tiles at a time")
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), blobs) and seen[-1].tiles_done == seen[-1].tiles
    with pytest.raises(ResourceError, match="one tile of 32 x 32") as caught:
        run(path, make_predictor(Greedy(0)), tmp_path / "b.tif")
    assert "--tile" in caught.value.hint


PASSING = [
    (OSError(errno.ESTALE, "Stale file handle"), ResourceError, "the network file system has lost it"),
    (OSError(errno.EMFILE, "Too many open files"), ResourceError, "too many files open"),
    (MemoryError(), ResourceError, "not enough memory"),
    (PermissionError(errno.EACCES, "Permission denied"), InputError, "permission was denied"),
    (ValueError("corrupt strip"), InputError, "undamaged"),
]


@pytest.mark.parametrize(
    ("failure", "kind", "told"), PASSING, ids=["stale", "descriptors", "memory", "permission", "damage"]
)
def test_a_read_that_fails_in_the_middle_costs_no_finished_block(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch,
    failure: Exception, kind: type[Exception], told: str,
) -> None:  # fmt: skip
    path, out = write_stack(blobs), tmp_path / "results" / "out.tif"
    real, measured = ArraySource._read, jobs.measure
    armed: list[bool] = []

    def measure(source: Any) -> Any:
        found = measured(source)
        armed.append(True)
        return found

    def read(self: ArraySource, handle: Any, z: tuple[int, int], *where: Any) -> np.ndarray:
        if armed and z[1] > 2:
            raise failure
        return real(self, handle, z, *where)

    monkeypatch.setattr(jobs, "measure", measure)
    monkeypatch.setattr(ArraySource, "_read", read)
    with pytest.raises(kind) as caught:
        run(path, make_predictor(), out)
    assert isinstance(caught.value, AffmaeError)
    assert "stack.tif" in caught.value.message and told in caught.value.message + caught.value.hint
    assert not out.exists()
    monkeypatch.undo()
    report = run(path, make_predictor(), out)
    assert report.blocks_before == 2 and np.array_equal(tifffile.imread(out), blobs)


@pytest.mark.parametrize("how", ["changed", "gone"])
@pytest.mark.parametrize("name", ["out.tif", "out.zarr"])
def test_blocks_of_an_input_that_changed_meanwhile_are_not_kept(
    tmp_path: Path, make_predictor: Make, blobs: np.ndarray, how: str, name: str
) -> None:
    path, folder = tmp_path / "stack.zarr", tmp_path / "results"
    zarr.create_array(path, data=np.asarray((0, 100, 200), np.uint8)[blobs], chunks=(1, 90, 70))

    def change(progress: PredictProgress) -> None:
        if progress.tiles_done > 40 and path.exists():
            if how == "gone":  # as when a share is unmounted: chunks that are not found would read as zeros
                path.rename(tmp_path / "elsewhere")
            else:
                os.utime(path / "zarr.json", ns=(1, time.time_ns() + 10**9))

    with pytest.raises(InputError, match=r"stack\.zarr"):
        run(path, make_predictor(), folder / name, on_progress=change)
    assert list(folder.iterdir()) == []


def test_overwriting_keeps_the_old_output_until_the_new_one_is_complete(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, again = write_stack(blobs), PredictOptions(overwrite=True)
    for name in ("tiff.tif", "zarr.zarr"):
        targets = Outputs(tmp_path / "results" / name, with_probabilities=True)
        run(path, make_predictor(), tmp_path, targets=targets)
        with pytest.raises(ConfigError, match="exists already"):
            run(path, make_predictor(), tmp_path, targets=targets)
        with pytest.raises(Interrupted):
            run(path, make_predictor(), tmp_path, again, targets=targets, **stop_after(50))
        assert np.array_equal(labels_of(targets.labels), blobs)
        run(path, make_predictor(), tmp_path, again, targets=targets)
        assert np.array_equal(labels_of(targets.labels), blobs)
        assert not [entry for entry in names(tmp_path / "results") if entry.startswith(".")]


def test_a_call_that_was_killed_after_it_published_is_complete(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, predictor = write_stack(blobs), make_predictor()
    for name in ("a.tif", "a.zarr"):
        targets = Outputs(tmp_path / name / name)
        with monkeypatch.context() as patch:
            patch.setattr(Work, "discard", lambda self: None)
            run(path, predictor, tmp_path, targets=targets)
        assert work_folder(targets.labels).exists()
        assert is_finished(open_sources(path)[0], predictor, targets, PredictOptions())
        assert not work_folder(targets.labels).exists()
        with monkeypatch.context() as patch:
            patch.setattr(Work, "discard", lambda self: None)
            run(path, predictor, tmp_path, PredictOptions(overwrite=True), targets=targets)
        run(path, predictor, tmp_path, PredictOptions(overwrite=True), targets=targets)
        assert np.array_equal(labels_of(targets.labels), blobs)


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_a_missing_picture_of_a_finished_output_is_drawn(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, name: str
) -> None:
    path, targets = write_stack(blobs), Outputs(tmp_path / "out" / name)
    run(path, make_predictor(), tmp_path, targets=targets)
    before = content(tmp_path / "out")
    (tmp_path / "out" / "a-overlay.png").unlink()
    assert is_finished(open_sources(path)[0], make_predictor(), targets, PredictOptions())
    assert content(tmp_path / "out") == before


def test_outputs_never_touch_inputs_or_foreign_folders(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, again = write_stack(blobs), PredictOptions(overwrite=True)
    with pytest.raises(ConfigError, match="would replace the input"):
        run(path, make_predictor(), path, again)
    foreign = tmp_path / "data.zarr"
    foreign.mkdir()
    (foreign / "zarr.json").write_text('{"attributes": {"affmae": {}}}')
    with pytest.raises(ConfigError, match="was not written by affmae predict"):
        run(path, make_predictor(), foreign, again)
    with pytest.raises(ConfigError, match="inside the input"):
        outputs.check(Outputs(foreign / "labels.tif"), [foreign], overwrite=False)
    with pytest.raises(ConfigError, match=r"\.tif, \.tiff or \.zarr"):
        run(path, make_predictor(), tmp_path / "out.png")
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        run(path, make_predictor(), tmp_path / "folder.tif", again)


def test_disk_space_and_unwritable_places_are_found_before_the_work(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_stack(blobs)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError):
        run(path, make_predictor(), tmp_path / "file" / "out.tif")
    monkeypatch.setattr(outputs, "SLACK_BYTES", 1 << 60)
    with pytest.raises(ResourceError, match="GiB left and this prediction needs"):
        run(path, make_predictor(), tmp_path / "out.tif")
    assert not (tmp_path / "out.tif").exists()


def test_a_killed_predictors_leftovers_are_removed_by_the_next(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    (tmp_path / ".out.tif.0a1b2c3d.partial").touch()
    (tmp_path / ".other.tif.0a1b2c3d.partial").touch()
    run(write_stack(blobs), make_predictor(), tmp_path / "out.tif")
    assert [name for name in names(tmp_path) if ".partial" in name] == [".other.tif.0a1b2c3d.partial"]


def test_a_second_process_is_refused(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, out = write_stack(blobs), tmp_path / "labels.zarr"
    with Work(out).locked(), pytest.raises(BusyError, match=f"process {os.getpid()}"):
        run(path, make_predictor(), out)
    with Work(out).locked(), pytest.raises(BusyError):
        run(path, make_predictor(), out, shard=Shard(0, 2))


def test_who_wrote_a_file_is_not_guessed(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, targets, options = write_stack(blobs), Outputs(tmp_path / "labels.tif"), PredictOptions()
    run(path, make_predictor(), tmp_path, targets=targets)
    (tmp_path / "notes.tif").write_text("text")
    os.mkfifo(tmp_path / "pipe.tif")
    for foreign in (path, tmp_path / "notes.tif", tmp_path / "pipe.tif", tmp_path, tmp_path / "absent.tif"):
        assert recorded_fingerprint(foreign) is None
    with open_sources(path)[0] as source:
        assert is_finished(source, make_predictor(), targets, options)
        with pytest.raises(ConfigError, match="another model, image or options"):
            is_finished(source, make_predictor(), targets, PredictOptions(overlap=0.25))
        with pytest.raises(ConfigError, match="exists already"):
            is_finished(source, make_predictor(), Outputs(path), options)
        for length in (100, 0):
            os.truncate(targets.labels, length)
            with pytest.raises(InputError, match=r"cannot read .*labels\.tif"):
                recorded_fingerprint(targets.labels)
            with pytest.raises(ConfigError, match="cannot be used") as caught:
                is_finished(source, make_predictor(), targets, options)
            assert "--overwrite" in caught.value.hint


def test_a_blank_stack_does_not_crash(tmp_path: Path, make_predictor: Make, write_stack: Write) -> None:
    report = run(write_stack(np.zeros((2, 40, 40), int)), make_predictor(), tmp_path / "out.tif")
    assert any("blank" in text for text in report.warnings)
    assert report.class_fractions["background"] == 1


def test_the_ignored_value_is_not_predicted(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    report = run(write_stack(blobs), make_predictor(ignore_label=2), tmp_path / "out.tif")
    assert report.class_fractions["mitochondria"] == 0


@pytest.mark.parametrize("name", ["out.tif", "out.zarr"])
def test_large_sections_are_reduced_in_the_picture(
    tmp_path: Path, make_predictor: Make, write_stack: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    labels = np.zeros((1, 200, 130), np.uint8)
    labels[:, 100:] = 2
    monkeypatch.setattr("affmae_engine.predict.overlay.LONGEST_EDGE", 50)
    monkeypatch.setattr("affmae_engine.predict.grid.PYRAMID_EDGE", 64)
    report = run(write_stack(labels), make_predictor(), tmp_path / name)
    picture = np.asarray(Image.open(report.overlay).convert("RGB")).astype(int)
    assert picture.shape[1] < 130
    assert (picture[:50].max(-1) == picture[:50].min(-1)).all()  # the plain section above is grey
    assert (picture[90:108, 20] != picture[90:108, 20, :1]).any()  # class 2 in the lower half below is not


@pytest.mark.parametrize("shape", [(1, 5, 1999), (1, 1999, 3), (2, 1, 1400)])
def test_thin_images_have_a_picture_too(
    tmp_path: Path, make_predictor: Make, write_stack: Write, shape: tuple[int, int, int]
) -> None:
    labels = np.zeros(shape, np.uint8)
    labels[:, shape[1] // 4 :, shape[2] // 4 :] = 2
    report = run(write_stack(labels), make_predictor(), tmp_path / "out.tif", PredictOptions(tile=32))
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), labels[0] if shape[0] == 1 else labels)
    assert report.overlay is not None and not report.warnings
    picture = np.asarray(Image.open(report.overlay).convert("RGB")).astype(int)[8:, 8:]  # without the margin
    step = -(-max(shape) // 768)
    rows, columns = (edge // min(step, edge) for edge in shape[1:])
    section = picture[rows + 8 : 2 * rows + 8, :columns]  # the first one with labels, below the same one without
    assert (section[-1, -1] != section[-1, -1, 0]).any() and (np.ptp(picture[:rows, :columns], axis=-1) == 0).all()


@pytest.mark.parametrize("failure", [ResourceError("the disk is full"), ValueError("cannot reshape")])
def test_a_picture_that_fails_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_predictor: Make, write_stack: Write, blobs: np.ndarray,
    failure: Exception,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("affmae_engine.predict.overlay.save_png", fail)
    report = run(write_stack(blobs), make_predictor(), tmp_path / "results" / "out.tif")
    assert np.array_equal(tifffile.imread(report.labels), blobs) and report.overlay is None
    (warning,) = report.warnings
    assert "no picture of stack" in warning and str(failure) in warning
    assert names(tmp_path / "results") == ["out.tif"]


class Slow(torch.nn.Module):
    """Takes a tenth of a second in each of a hundred modules."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.Sequential(*(Pause() for _ in range(100)))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.parts(image).expand(-1, 3, -1, -1).clone()}


class Pause(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return image


def test_a_signal_is_obeyed_within_a_batch(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    stop = StopRequest()
    began: list[float] = []

    def first(progress: PredictProgress) -> None:
        if not began:
            began.append(time.monotonic())
            stop.request(15)

    with pytest.raises(Interrupted):
        run(write_stack(blobs), make_predictor(Slow()), tmp_path / "out.tif", on_progress=first, stop=stop)
    assert time.monotonic() - began[0] < 2


def test_a_job_that_is_opened_elsewhere_computes_the_same_blocks(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, toys: SimpleNamespace
) -> None:
    path, predictor, out = write_stack(blobs), make_predictor(toys.conv()), tmp_path / "out.zarr"

    def elsewhere(job: Job, numbers: Sequence[int], observer: Any) -> None:
        other = Job.open(out, lambda weights, device: predictor)
        assert other.key == job.key
        for number in numbers:
            other.compute(number)
            observer.whole_block(number)

    seen: list[PredictProgress] = []
    run(path, predictor, out, engine=elsewhere, on_progress=seen.append)
    run(path, predictor, tmp_path / "here.zarr")
    assert np.array_equal(labels_of(out), labels_of(tmp_path / "here.zarr")) and seen[-1].tiles_done == seen[-1].tiles
    with pytest.raises(ConfigError, match="is under way"):
        Job.open(out, lambda weights, device: predictor)


def test_a_job_of_another_kind_of_device_is_not_opened(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    predictor, out = make_predictor(), tmp_path / "out.zarr"
    other = dataclasses.replace(predictor, choice=dataclasses.replace(predictor.choice, precision="bf16"))

    def elsewhere(job: Job, numbers: Sequence[int], observer: Any) -> None:
        Job.open(out, lambda weights, device: other)

    with pytest.raises(ConfigError, match="was begun on cpu in fp32"):
        run(write_stack(blobs), predictor, out, engine=elsewhere)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.readers import Source, SourceInfo
from affmae_engine.data.statistics import measure
from affmae_engine.predict import job, grid
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.job import PredictOptions
from affmae_engine.predict.run import predict
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.weights import WeightsMetadata
grid.LARGEST_EDGE, grid.SUMS_BYTES = 1024, {"cpu": 1}  # blocks of one section
job.measure = lambda source: measure(source, limit_pixels=1 << 18)

class Ramp(Source):
    def _open(self): return None
    def _close(self, handle): pass
    def _read(self, handle, z, y, x):
        return np.broadcast_to(np.arange(*y)[None, :, None] % 251,
                               (z[1] - z[0], y[1] - y[0], x[1] - x[0])).astype(np.uint8)

class Model(torch.nn.Module):
    def forward(self, image):
        return {"logits": torch.cat([image, -image, 0 * image], 1)}

folder = Path(sys.argv[1])
weights = folder / "w"
weights.touch()
about = WeightsMetadata(task="finetune", model={}, image_size=128, normalisation={}, class_names=("a", "b", "c"))
choice = DeviceChoice(torch.device("cpu"), torch.float32, "fp32", "CPU")
predictor = Predictor(weights, about, Model().eval(), choice, Normalisation("dataset", 100.0, 50.0), 1)
(folder / "none").touch()
for depth, height, ending in ((8, 1024, "tif"), (8, 1024, "zarr"), (32, 1024, "tif"), (32, 1024, "zarr"),
                              (1, 32768, "tif"), (1, 32768, "zarr")):
    size = 40.0, 4.0, 4.0
    info = SourceInfo(folder / "none", "", "ramp", (depth, height, 256), np.dtype("u1"), size, "made up")
    targets = Outputs(folder / f"{depth}-{height}-{ending}.{ending}")
    predict(Ramp(info), predictor, targets, PredictOptions(batch_size=8))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_grows_neither_with_sections_nor_with_height(tmp_path: Path) -> None:
    """Peak resident memory so far, in a process that predicts a small stack, then one four times as deep, then a high
    one; a whole section of probabilities would take 100 MiB in the last two."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    _, small, _, deep, _, high = map(int, done.stdout.split())
    assert deep - small < 32 and high - small < 32, done.stdout
