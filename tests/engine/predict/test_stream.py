"""Prediction of whole files: labels, metadata, pixel sizes, failures halfway, memory."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaozarrs
import zarr
from PIL import Image

from affmae_engine.data.readers import open_sources
from affmae_engine.data.readers.arrays import ArraySource
from affmae_engine.errors import AffmaeError, ConfigError, InputError, Interrupted, ResourceError
from affmae_engine.predict import outputs, sections, stream
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.stream import PredictOptions, PredictProgress, PredictReport, predict
from affmae_engine.runtime.signals import StopRequest

Make = Callable[..., Predictor]
Write = Callable[..., Path]


def run(
    path: Path,
    predictor: Predictor,
    out: Path,
    options: PredictOptions | None = None,
    *,
    targets: Any = None,
    **more: Any,
) -> PredictReport:
    with open_sources(path)[0] as source:
        return predict(source, predictor, targets or Outputs(out), options or PredictOptions(), **more)


def left_behind(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if ".partial" in entry.name)


@pytest.mark.parametrize("name", ["out.tif", "out.ome.zarr"])
def test_labels_fractions_scale_and_picture(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, name: str
) -> None:
    out = tmp_path / "results" / name
    seen: list[PredictProgress] = []
    report = run(write_stack(blobs), make_predictor(), out, on_progress=seen.append)
    labels = tifffile.imread(out) if name.endswith("tif") else zarr.open_group(out, mode="r")["0"][:]
    assert labels.dtype == np.uint8 and np.array_equal(labels, blobs)
    assert report.labels == out and report.shape_ZYX == blobs.shape
    assert report.class_fractions == pytest.approx(
        dict(zip(("background", "membrane", "mitochondria"), np.bincount(blobs.ravel()) / blobs.size, strict=True))
    )
    assert report.pixel_nm == pytest.approx((40.0, 4.0, 4.0))
    assert open_sources(out, labels=True)[0].info.pixel_nm == pytest.approx((40.0, 4.0, 4.0))
    assert report.overlay == tmp_path / "results" / "out-overlay.png" and report.overlay.is_file()
    assert seen[-1] == PredictProgress("stack", 3, 3, seen[-1].tiles, seen[-1].tiles)
    assert [p.tiles_done for p in seen] == sorted(p.tiles_done for p in seen)
    assert not report.warnings and not left_behind(out.parent)


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


@pytest.mark.parametrize(("pixel_nm", "warned"), [(4.0, False), (4.9, False), (3.3, False), (5.2, True), (3.0, True)])
def test_a_pixel_size_far_from_training_is_warned_about(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, pixel_nm: float, warned: bool
) -> None:
    report = run(write_stack(blobs, pixel_nm=pixel_nm), make_predictor(), tmp_path / "out.tif")
    assert bool(report.warnings) == warned
    if warned:
        (text,) = report.warnings
        assert f"{pixel_nm:g} nm" in text and "4 nm" in text and "--rescale" in text


def test_an_unknown_pixel_size_is_said_and_can_be_given(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path = write_stack(blobs, pixel_nm=None)
    report = run(path, make_predictor(), tmp_path / "a.tif")
    assert any("does not say its pixel size" in note for note in report.notes)
    given = PredictOptions(pixel_nm=(30.0, 4.0, 4.0))
    assert run(path, make_predictor(), tmp_path / "b.tif", given).pixel_nm == (30.0, 4.0, 4.0)
    assert open_sources(tmp_path / "b.tif")[0].info.pixel_nm == pytest.approx((30.0, 4.0, 4.0))
    with pytest.raises(ConfigError, match="cannot rescale") as caught:
        run(path, make_predictor(), tmp_path / "c.tif", PredictOptions(rescale=True))
    assert "--pixel-size" in caught.value.hint
    with pytest.raises(ConfigError, match="weights do not say"):
        run(path, make_predictor(pixel_nm=None), tmp_path / "c.tif", PredictOptions(rescale=True))


class Blind(torch.nn.Module):
    """Remembers the tiles that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(image)
        return {"logits": -20 * (image - torch.tensor([0.0, 1.0, 2.0])[None, :, None, None]).square()}


@pytest.mark.parametrize("pixel_nm", [2.0, 8.0])
def test_rescale_shows_the_training_magnification_and_keeps_the_grid(
    tmp_path: Path, make_predictor: Make, write_stack: Write, pixel_nm: float
) -> None:
    labels = np.zeros((2, 96, 120), np.uint8)
    labels[:, 24:72, 30:90] = 2
    model = Blind()
    path = write_stack(labels, pixel_nm=pixel_nm)
    report = run(path, make_predictor(model), tmp_path / "out.tif", PredictOptions(rescale=True))
    factor = pixel_nm / 4.0
    assert report.rescaled_to == (96 * factor, 120 * factor)
    predicted = tifffile.imread(tmp_path / "out.tif")
    assert predicted.shape == labels.shape
    # A blurred step between classes 0 and 2 passes through grey level 1; only pixels at the edge may differ.
    wrong = np.argwhere(predicted != labels)
    edge = np.minimum.reduce([np.abs(wrong[:, 1, None] - [24, 71]).min(1), np.abs(wrong[:, 2, None] - [30, 89]).min(1)])
    assert (edge <= 2).all()
    assert report.pixel_nm[1] == pytest.approx(pixel_nm)
    assert not any("--rescale" in text for text in report.warnings)


def test_a_stop_or_an_error_leaves_nothing_but_the_journal(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, folder = write_stack(blobs), tmp_path / "results"
    stop = StopRequest()

    def after_some(progress: PredictProgress) -> None:
        if progress.tiles_done > 30:
            stop.request(15)

    def fail(progress: PredictProgress) -> None:
        if progress.tiles_done > 30:
            raise KeyboardInterrupt

    for name in ("out.tif", "out.zarr"):
        targets = Outputs(folder / name, with_probabilities=True)
        with pytest.raises(Interrupted, match="no output was written") as caught:
            run(path, make_predictor(), folder, targets=targets, on_progress=after_some, stop=stop)
        assert caught.value.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            run(path, make_predictor(), folder, targets=targets, on_progress=fail)
        assert [entry.name for entry in folder.iterdir()] == [f".{name}.unfinished"]
        shutil.rmtree(folder / f".{name}.unfinished")


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
def test_a_read_that_fails_in_the_middle_costs_no_finished_row(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch,
    failure: Exception, kind: type[Exception], told: str,
) -> None:  # fmt: skip
    path, out = write_stack(blobs), tmp_path / "results" / "out.tif"
    real, measured = ArraySource._read, stream.measure
    monkeypatch.setattr(sections, "SLAB_PIXELS", blobs[0].size)
    armed: list[bool] = []

    def measure(source: Any) -> Any:
        found = measured(source)
        armed.append(True)
        return found

    def read(self: ArraySource, handle: Any, z: tuple[int, int], *where: Any) -> np.ndarray:
        if armed and z[1] > 2:
            raise failure
        return real(self, handle, z, *where)

    monkeypatch.setattr(stream, "measure", measure)
    monkeypatch.setattr(ArraySource, "_read", read)
    with pytest.raises(kind) as caught:
        run(path, make_predictor(), out)
    assert isinstance(caught.value, AffmaeError)
    assert "stack.tif" in caught.value.message and told in caught.value.message + caught.value.hint
    assert not out.exists()
    monkeypatch.undo()
    report = run(path, make_predictor(), out)
    assert any("went on from row 0 of section 2" in note for note in report.notes), report.notes
    assert np.array_equal(tifffile.imread(out), blobs)


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_rows_of_an_input_that_changed_meanwhile_are_not_kept(
    tmp_path: Path, make_predictor: Make, blobs: np.ndarray, how: str
) -> None:
    path, folder = tmp_path / "stack.zarr", tmp_path / "results"
    zarr.create_array(path, data=np.asarray((0, 100, 200), np.uint8)[blobs], chunks=(1, 90, 70))

    def change(progress: PredictProgress) -> None:
        if progress.sections_done == 1 and path.exists():
            if how == "gone":  # as when a share is unmounted: chunks that are not found would read as zeros
                path.rename(tmp_path / "elsewhere")
            else:
                os.utime(path / "zarr.json", ns=(1, time.time_ns() + 10**9))

    with pytest.raises(InputError, match=r"stack\.zarr"):
        run(path, make_predictor(), folder / "out.tif", on_progress=change)
    assert list(folder.iterdir()) == []


def test_overwriting_keeps_the_old_file_until_the_new_one_is_complete(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path = write_stack(blobs)
    again = PredictOptions(overwrite=True)
    for name in ("tiff.tif", "zarr.zarr"):
        targets = Outputs(tmp_path / "results" / name, with_probabilities=True)
        first = run(path, make_predictor(), tmp_path, targets=targets)
        with pytest.raises(ConfigError, match="exists already"):
            run(path, make_predictor(), tmp_path, targets=targets)

        def fail(_: PredictProgress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(path, make_predictor(), tmp_path, again, targets=targets, on_progress=fail)
        assert np.array_equal(
            open_sources(first.labels, labels=True)[0].read(slice(0, 3), slice(0, 90), slice(0, 70)), blobs
        )
        run(path, make_predictor(), tmp_path, again, targets=targets)
        assert np.array_equal(
            open_sources(first.labels, labels=True)[0].read(slice(0, 3), slice(0, 90), slice(0, 70)), blobs
        )
        assert not left_behind(tmp_path / "results")


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
    assert left_behind(tmp_path) == [".other.tif.0a1b2c3d.partial"]


def test_a_blank_stack_and_a_damaged_picture_of_it_do_not_crash(
    tmp_path: Path, make_predictor: Make, write_stack: Write
) -> None:
    report = run(write_stack(np.zeros((2, 40, 40), int)), make_predictor(), tmp_path / "out.tif")
    assert any("blank" in text for text in report.warnings)
    assert report.class_fractions["background"] == 1


def test_the_ignored_value_is_not_predicted(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    report = run(write_stack(blobs), make_predictor(ignore_label=2), tmp_path / "out.tif")
    assert report.class_fractions["mitochondria"] == 0


def test_large_sections_are_reduced_in_the_picture(
    tmp_path: Path, make_predictor: Make, write_stack: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((1, 200, 130), np.uint8)
    labels[:, 100:] = 2
    monkeypatch.setattr("affmae_engine.predict.overlay.LONGEST_EDGE", 50)
    report = run(write_stack(labels), make_predictor(), tmp_path / "out.tif")
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_predictor: Make,
    write_stack: Write,
    blobs: np.ndarray,
    failure: Exception,
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("affmae_engine.predict.overlay.save_png", fail)
    report = run(write_stack(blobs), make_predictor(), tmp_path / "results" / "out.tif")
    assert np.array_equal(tifffile.imread(report.labels), blobs) and report.overlay is None
    (warning,) = report.warnings
    assert "no picture of stack" in warning and str(failure) in warning
    assert [entry.name for entry in (tmp_path / "results").iterdir()] == ["out.tif"]


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.readers import Source, SourceInfo
from affmae_engine.data.statistics import measure
from affmae_engine.predict import sections, stream
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.stream import PredictOptions, predict
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.weights import WeightsMetadata
sections.SLAB_PIXELS, sections.AHEAD_PIXELS = 1 << 18, 1 << 16
stream.measure = lambda source: measure(source, limit_pixels=1 << 18)

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
for depth, height in ((2, 1024), (32, 1024), (1, 32768)):
    info = SourceInfo(folder / "none", "", "ramp", (depth, height, 256), np.dtype("u1"), (40.0, 4.0, 4.0), "made up")
    predict(Ramp(info), predictor, Outputs(folder / f"{depth}-{height}.tif"), PredictOptions(batch_size=8))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_grows_neither_with_sections_nor_with_height(tmp_path: Path) -> None:
    """Peak resident memory so far, in a process that predicts a small stack, then a deep one, then a high one; a whole
    section of probabilities would take 100 MiB in the last two."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    small, deep, high = map(int, done.stdout.split())
    assert deep - small < 32 and high - small < 32
