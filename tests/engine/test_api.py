"""Models and runs in Python: arrays of any kind, features, errors, records."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from typer.testing import CliRunner

import affmae_engine as affmae
from affmae_cli.main import app
from affmae_engine import training_api
from affmae_engine.arrays import ArraySource, voxel_size
from affmae_engine.embedding import spread
from affmae_engine.errors import BusyError, ConfigError, InputError, Interrupted
from tests.engine.trained import NAMES, trained_run

STACK = np.random.default_rng(0).integers(0, 255, (2, 70, 66)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> affmae.Model:
    return affmae.load(trained_run(folder / "seg"), device="cpu")


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> affmae.Model:
    return affmae.load(trained_run(folder / "em", "pretrain"), device="cpu")


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, affmae_engine; print([n for n in ('torch', 'numpy', 'zarr', 'pydantic') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert {*affmae.__all__} <= {*dir(affmae)}
    assert all(getattr(affmae, name) is not None for name in affmae.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        affmae.nothing  # noqa: B018


def test_arrays_are_predicted_as_files_are(segmenter: affmae.Model, folder: Path) -> None:
    tifffile.imwrite(folder / "stack.tif", STACK, photometric="minisblack")
    words = ["predict", folder / "stack.tif", "-m", folder / "seg", "-o", folder / "out.tif", "--device", "cpu"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    labels = segmenter.predict(STACK)
    assert (labels.shape, labels.dtype) == (STACK.shape, np.uint8)
    assert len(np.unique(labels)) == len(NAMES)
    np.testing.assert_array_equal(labels, tifffile.imread(folder / "out.tif"))


def test_lazy_arrays_and_output_arrays(segmenter: affmae.Model, tmp_path: Path) -> None:
    expected = segmenter.predict(STACK)
    lazy = zarr.create_array(tmp_path / "in.zarr", data=STACK, chunks=(1, 32, 32))
    out = zarr.create_array(tmp_path / "out.zarr", shape=STACK.shape, dtype="uint8", chunks=(1, 32, 32))
    assert segmenter.predict(lazy, out=out) is out
    np.testing.assert_array_equal(out[:], expected)
    with pytest.raises(InputError, match=r"out has shape \(1,\)"):
        segmenter.predict(STACK, out=np.empty(1))


def test_dask_arrays(segmenter: affmae.Model) -> None:
    dask_array = pytest.importorskip("dask.array")
    lazy = dask_array.from_array(STACK, chunks=(1, 40, 40))
    np.testing.assert_array_equal(segmenter.predict(lazy), segmenter.predict(STACK))


def test_only_the_rows_in_work_are_read(segmenter: affmae.Model) -> None:
    class Recorded:
        shape, dtype, largest = STACK.shape, STACK.dtype, 0

        def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
            block = STACK[key]
            self.largest = max(self.largest, block.size)
            return block

        def __array__(self) -> np.ndarray:
            raise AssertionError("the whole array was read")

    np.testing.assert_array_equal(segmenter.predict(Recorded()), segmenter.predict(STACK))


def test_a_section_and_probabilities(segmenter: affmae.Model) -> None:
    section = segmenter.predict(STACK[1])
    probabilities = segmenter.probabilities(STACK[1])
    assert (section.shape, probabilities.shape) == ((70, 66), (3, 70, 66))
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), section)
    assert segmenter.probabilities(STACK[:1]).shape == (3, 1, 70, 66)


def test_pixel_size_resamples_for_the_network(segmenter: affmae.Model) -> None:
    plain = segmenter.predict(STACK)
    np.testing.assert_array_equal(segmenter.predict(STACK, pixel_size=4), plain)  # the training's
    np.testing.assert_array_equal(segmenter.predict(STACK, pixel_size=8, rescale=False), plain)
    rescaled = segmenter.predict(STACK, pixel_size=(30, 8, 8))
    assert rescaled.shape == STACK.shape
    assert (rescaled != plain).any()


def test_settings_of_tiles(segmenter: affmae.Model) -> None:
    assert segmenter.predict(STACK, tile=40, overlap=0.0, batch_size=1).shape == STACK.shape
    for wrong in ({"tile": 0}, {"overlap": 1.0}, {"batch_size": -1}):
        with pytest.raises(ConfigError, match="cannot be used"):
            segmenter.predict(STACK, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2, 2)), "4 axes"),
        (np.zeros((0, 5)), "no pixels"),
        (np.zeros((5, 5), complex), "complex128"),
        (np.array([["a", "b"]]), "not real numbers"),
    ],
)
def test_arrays_that_are_no_images(segmenter: affmae.Model, array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        segmenter.predict(array)


def test_values_become_gray_as_those_of_files() -> None:
    signed = ArraySource(np.array([[-128, 0, 127]], np.int8))
    assert signed.read(slice(None), slice(None), slice(None)).tolist() == [[[0, 128, 255]]]
    assert ArraySource(np.zeros((2, 2), ">u2")).info.dtype == np.uint16
    assert ArraySource([[1.5, 2.5]]).info.dtype == np.float32


def test_pixel_sizes() -> None:
    assert voxel_size(None) == (None, None, None)
    assert voxel_size(5) == (None, 5, 5)
    assert voxel_size((4, 5)) == (None, 4, 5)
    assert voxel_size([30, 4, 5]) == (30, 4, 5)
    assert voxel_size(np.array([30, 4, 5], np.float32)) == (30, 4, 5)
    for wrong in (0, (1, 2, 3, 4), (30, -5, 5), ()):
        with pytest.raises(InputError, match="no pixel size"):
            voxel_size(wrong)


def test_pretrained_models_have_features_and_no_classes(pretrained: affmae.Model) -> None:
    assert (pretrained.task, pretrained.class_names) == ("pretrain", ())
    with pytest.raises(ConfigError, match="knows no classes"):
        pretrained.predict(STACK)
    embedding = pretrained.embed(STACK)
    assert embedding.map.shape == (2, 32 + 64 + 96 + 96, 9, 9)
    # All patches are tokens of stage 1; each later stage keeps 40 % of a tile's.
    assert len(embedding.stages[0].features) == 2 * 9 * 9
    assert [stage.features.shape[1] for stage in embedding.stages] == [32, 64, 96, 96]
    for stage in embedding.stages:
        assert len(np.unique(stage.positions, axis=0)) == len(stage.features)
        assert (stage.positions >= 0).all()


def test_tokens_stand_where_the_map_has_their_features(pretrained: affmae.Model) -> None:
    embedding = pretrained.embed(STACK[0])
    start = 0
    for stage in embedding.stages:
        width = stage.features.shape[1]
        z, y, x = ((stage.positions + 0.5) // embedding.patch).astype(int).T
        assert not z.any()
        np.testing.assert_allclose(embedding.map[start : start + width, y, x].T, stage.features, atol=1e-5)
        start += width


def test_spread_interpolates_between_tokens() -> None:
    dense = spread(np.array([[0.0], [4.0]], np.float32), np.array([[0, 0], [4, 0]]), (1, 5))
    np.testing.assert_allclose(dense[0, 0], [0, 1, 2, 3, 4])  # 1/d weights of two points on a line


def test_chosen_stages(pretrained: affmae.Model) -> None:
    assert pretrained.embed(STACK[0], stages=(4,)).map.shape == (96, 9, 9)
    with pytest.raises(ConfigError, match="between 1 and 4"):
        pretrained.embed(STACK, stages=(5,))


def test_metrics_are_flat_records(folder: Path, pretrained: affmae.Model) -> None:
    run = affmae.open_run(folder / "em")
    assert [record["loss"] for record in run.metrics()] == [1.0, 0.5, 1 / 3]
    assert all(not isinstance(value, dict) for record in run.metrics() for value in record.values())
    (held_out,) = run.metrics("evaluated")
    assert (held_out["iou"], held_out["membrane.iou"]) == (0.5, 0.4)
    assert run.summary["status"] == "finished"
    assert run.model().task == "pretrain"


def test_a_torn_line_and_repeated_steps(tmp_path: Path) -> None:
    run = affmae.open_run(trained_run(tmp_path / "run"))
    again = '{"kind": "step", "step": 2, "losses": {"loss": 9.0}}\n{"kind": "step", "st'
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + again)
    assert [record["loss"] for record in run.metrics()] == [1.0, 9.0, 1 / 3]
    metrics.unlink()
    with pytest.raises(InputError, match="cannot read"):
        run.metrics()


def test_errors_of_a_command_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"nothing\.zarr") as caught:
        affmae.pretrain("nothing.zarr", preset="demo")
    assert caught.value.hint
    with pytest.raises(ConfigError, match="settings hold a value"):
        affmae.pretrain("nothing.zarr", settings={"optim.lr": object()})


@pytest.mark.slow
def test_an_interrupt_saves_a_checkpoint_first(tmp_path: Path) -> None:
    """As the stop button of a notebook: SIGINT to the process that called `pretrain`."""
    (tmp_path / "scans").mkdir()
    tifffile.imwrite(tmp_path / "scans" / "a.tif", np.random.default_rng(0).integers(0, 255, (96, 96)).astype(np.uint8))
    code = """
import affmae_engine as affmae
from affmae_engine.errors import Interrupted
affmae.ingest("scans", "data.zarr", quiet=True)
settings = {"model.size": "tiny", "data.crop_size": 32, "data.workers": 0, "train.log_every": 1}
settings |= {"train.batch_size": 2, "train.micro_batch": None}
try:
    affmae.pretrain("data.zarr", out="run", preset="demo", steps=5000, device="cpu", settings=settings)
except Interrupted as error:
    print("interrupted:", error.message, error.hint)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and not (metrics.is_file() and '"step": 2,' in metrics.read_text())
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert printed.startswith("interrupted: ")
    assert "--resume" in printed
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("status", "lines", "expected"),
    [
        (5, ["error: in use", "hint: wait"], BusyError("in use", "wait")),
        (
            2,
            ["error: 2 settings are wrong:", "  a", "  b", "hint: see"],
            ConfigError("2 settings are wrong:\n  a\n  b", "see"),
        ),
        (143, ["stopped: by SIGTERM", "hint: continue"], Interrupted("by SIGTERM", "continue", signal_number=15)),
    ],
)
def test_exit_codes_become_errors(status: int, lines: list[str], expected: Exception) -> None:
    error = training_api._error(status, lines)
    assert type(error) is type(expected)
    assert (str(error), error.hint, error.exit_code) == (str(expected), expected.hint, status)  # type: ignore[attr-defined]
