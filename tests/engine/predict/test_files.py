"""Which of the files that a user named are predicted, where the results go, and which truth belongs to them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from affmae_engine.errors import InputError
from affmae_engine.predict import files
from affmae_engine.predict.files import Plan, plan
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.score import read_truth, score
from affmae_engine.predict.stream import PredictOptions

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
        files.run(planned, make_predictor(), PredictOptions(overwrite=bool(options.get("overwrite"))))
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
    outcome = files.run(planned, make_predictor(), PredictOptions(overwrite=True))
    assert score(outcome.reports, checked).mean_iou == pytest.approx(1.0)
