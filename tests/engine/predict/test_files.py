"""Which of the files that a user named are predicted, where the results go, and which truth belongs to them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from affmae_engine.errors import ConfigError, InputError
from affmae_engine.predict import files
from affmae_engine.predict.files import Plan, plan
from affmae_engine.predict.job import PredictOptions
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import predict
from affmae_engine.predict.score import Predicted, read_truth, score

NAMES = ("background", "membrane", "mitochondria")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def predicted(
    here: Path, make_predictor: Callable[..., Predictor], write_stack: Callable[..., Path], blobs: np.ndarray
) -> Callable[..., Plan]:
    """predicted(*inputs, out=None, images=()): write the images, plan, and predict all that was planned."""

    def run(*inputs: str, out: str | None = None, images: tuple[str, ...] = (), **options: object) -> Plan:
        for number, name in enumerate(images):
            write_stack(np.roll(blobs[:1, :40, :36], number), f"work/{name}")
        planned = plan([Path(name) for name in inputs], out and Path(out), **options)  # type: ignore[arg-type]
        chosen = PredictOptions(overwrite=bool(options.get("overwrite")))
        files.run(planned, lambda source, targets: predict(source, make_predictor(), targets, chosen))
        return planned

    return run


def names(planned: Plan) -> list[str]:
    return [str(path) for path in planned.files]


def test_a_folder_of_results_around_the_images_hides_none_of_them(predicted: Callable[..., Plan]) -> None:
    images = ("test/a.tif", "test/day2/b.tif", "other/x.tif")
    assert names(predicted("test", out=".", images=images)) == ["test/a.tif", "test/day2/b.tif"]
    assert Path("a.tif").is_file() and Path("day2/b-overlay.png").is_file()
    assert names(predicted("test", "other/x.tif", out=".", overwrite=True)) == [*images[:2], images[2]]
    # The results that lie around are known by what they say of themselves.
    assert names(plan([Path()], Path("again"))) == ["other/x.tif", "test/a.tif", "test/day2/b.tif"]


@pytest.mark.parametrize("out", ["seg.tif", "seg.ome.zarr", "seg.zarr"])
def test_results_are_known_wherever_they_lie(predicted: Callable[..., Plan], out: str) -> None:
    predicted("in/a.tif", out=f"in/{out}", images=("in/a.tif",), probabilities=True)
    assert len(list(Path("in").iterdir())) == 4
    assert names(plan([Path("in")], Path("out"))) == ["in/a.tif"]
    assert names(plan([Path("in/*")], Path("out"))) == ["in/a.tif"]
    Path("in/a.tif").unlink()
    with pytest.raises(InputError, match="only results of predictions in in"):
        plan([Path("in")], Path("out"))


def test_a_result_that_is_named_is_taken_and_a_picture_without_labels_is_an_image(
    predicted: Callable[..., Plan],
) -> None:
    predicted("a.tif", out="seg.tif", images=("a.tif",))
    assert names(plan([Path("seg.tif")], Path("out"))) == ["seg.tif"]
    Path("seg.tif").unlink()
    assert names(plan([Path()], Path("out"))) == ["a.tif", "seg-overlay.png"]


def test_what_lies_in_a_folder_of_results_within_the_images_is_no_input(predicted: Callable[..., Plan]) -> None:
    predicted("in", out="in/labels", images=("in/a.tif",))
    tifffile.imwrite("in/labels/edited.tif", np.zeros((40, 36), np.uint8), photometric="minisblack")
    assert names(plan([Path("in")], Path("in/labels"), overwrite=True)) == ["in/a.tif"]


def test_patterns_go_to_the_default_folder(predicted: Callable[..., Plan]) -> None:
    planned = predicted("raw/*.tif", images=("raw/a.tif", "raw/b.tif"))
    assert [targets.labels for _, targets in planned.jobs] == [Path("predictions/a.tif"), Path("predictions/b.tif")]
    assert plan([Path("raw")], None).out == Path("predictions/raw")
    assert plan([Path("raw/a.tif")], None).out == Path("predictions/a-labels.tif")


@pytest.mark.parametrize(("inputs", "out"), [("in", "in/labels"), (".", None), ("in", ".")])
def test_scoring_a_second_time(
    predicted: Callable[..., Plan],
    make_predictor: Callable[..., Predictor],
    write_stack: Callable[..., Path],
    inputs: str,
    out: str | None,
) -> None:
    images = ("in/day1/a.tif", "in/day2/a.tif")
    for turn in range(2):
        predicted(inputs, out=out, images=images, overwrite=turn > 0)
    for name in images:  # named alike: only their folders tell them apart
        levels = tifffile.imread(name)
        truth = Path("truth") / Path(name).relative_to(inputs)
        truth.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(truth, levels // 100, photometric="minisblack")
    chosen = [Path(inputs)], [Path("truth")]
    planned = plan(chosen[0], out and Path(out), overwrite=True, truth=chosen[1])  # type: ignore[arg-type]
    assert names(planned) == list(images)
    checked = read_truth(*chosen, class_names=NAMES, ignore_label=None, files=planned.files)
    again = PredictOptions(overwrite=True)
    outcome = files.run(planned, lambda source, targets: predict(source, make_predictor(), targets, again))
    predictions = [Predicted(report.sections, report.labels) for report in outcome.reports]
    assert score(predictions, checked).mean_iou == pytest.approx(1.0)


def sections(write_stack: Callable[..., Path], blobs: np.ndarray, *names: str) -> None:
    for number, name in enumerate(names):
        write_stack(np.roll(blobs[:1, :40, :36], number), f"work/{name}")


def outputs_of(planned: Plan) -> list[tuple[str, int]]:
    return [(str(targets.labels), source.info.shape_ZYX[0]) for source, targets in planned.jobs]


def test_numbered_sections_of_a_folder_are_one_stack(
    here: Path, write_stack: Callable[..., Path], blobs: np.ndarray
) -> None:
    sections(write_stack, blobs, "em/s_9.tif", "em/s_10.tif", "em/s_8.tif")
    planned = plan([Path("em")], None)
    assert outputs_of(planned) == [("predictions/em-labels.tif", 3)]
    (stack, _) = planned.jobs[0]
    assert [part.info.path.name for part in stack.sections] == ["s_8.tif", "s_9.tif", "s_10.tif"]  # type: ignore[attr-defined]
    assert outputs_of(plan([Path("em")], Path("x/out.zarr"))) == [("x/out.zarr", 3)]
    assert outputs_of(plan([Path("em/*.tif")], Path("x"))) == [("x/em-labels.tif", 3)]
    apart = plan([Path("em")], None, separate=True)
    assert outputs_of(apart) == [(f"predictions/em/s_{n}.tif", 1) for n in (8, 9, 10)]


def test_what_is_no_series_stays_apart(here: Path, write_stack: Callable[..., Path], blobs: np.ndarray) -> None:
    sections(write_stack, blobs, "em/s1.tif", "em/s2.tif", "em/other.tif", "em/deep/s1.tif", "em/deep/s2.tif")
    write_stack(blobs[:1, :30, :30], "work/em/s3.tif")  # of another size
    write_stack(blobs[:, :40, :36], "work/em/s4.tif")  # a stack of its own
    planned = plan([Path("em")], Path("out"))
    assert sorted(outputs_of(planned)) == [
        ("out/deep/deep.tif", 2), ("out/em.tif", 2), ("out/other.tif", 1), ("out/s3.tif", 1), ("out/s4.tif", 3),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="several inputs cannot go into the one file"):
        plan([Path("em")], Path("out.tif"))
