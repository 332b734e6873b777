"""A prediction that ended half way: what is kept, what is computed again, and that the result has the same bytes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from affmae_engine.data.readers import open_sources
from affmae_engine.errors import BusyError, ConfigError, InputError, ResourceError
from affmae_engine.predict import journal as journals
from affmae_engine.predict.identity import is_finished, recorded_fingerprint
from affmae_engine.predict.journal import Journal, Rows
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.stream import PredictOptions, PredictProgress, PredictReport, predict
from affmae_engine.predict.tiling import Axis, restart

Make = Callable[..., Predictor]
Write = Callable[..., Path]
SHAPE = (3, 10, 7)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the engine catches it."""


class Batched(torch.nn.Module):
    """Its output depends on the whole batch, as rounding does in real networks, and it counts its tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles = 0

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.tiles += len(image)
        levels = torch.tensor([0.0, 1.0, 2.0])[None, :, None, None] + image.mean() / 3
        return {"logits": -(image - levels).square()}


def run(
    path: Path, predictor: Predictor, targets: Outputs, options: PredictOptions, stop_at: int = -1
) -> PredictReport:
    def on_progress(progress: PredictProgress) -> None:
        if 0 <= stop_at <= progress.tiles_done:
            raise Killed

    with open_sources(path)[0] as source:
        return predict(source, predictor, targets, options, on_progress=on_progress)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.tif", PredictOptions(batch_size=4)),
        ("out.zarr", PredictOptions(batch_size=5, overlap=0.7)),
        ("out.tif", PredictOptions(batch_size=3, rescale=True, pixel_nm=(40.0, 3.0, 3.0))),
    ],
)
def test_killed_at_any_batch_it_ends_with_the_same_bytes(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, name: str, options: PredictOptions
) -> None:
    path = write_stack(blobs)
    whole, model = tmp_path / "whole", Batched()
    report = run(path, make_predictor(model), Outputs(whole / name, with_probabilities=True), options)
    expected, all_tiles = content(whole), model.tiles
    for moment in range(options.batch_size, all_tiles, max(1, all_tiles // 9)):
        folder, model = tmp_path / str(moment), Batched()
        targets = Outputs(folder / name, with_probabilities=True)
        with pytest.raises(Killed):
            run(path, make_predictor(model), targets, options, stop_at=moment)
        assert not targets.labels.exists()
        again = run(path, make_predictor(model), targets, options)
        assert content(folder) == expected
        assert again.class_fractions == report.class_fractions
        # Computed twice: the tiles that reach unfinished rows, up to the batch's beginning; whole sections if rescaled.
        columns = all_tiles // 3 if options.rescale else 8 * 4
        assert model.tiles - all_tiles <= columns * (options.batch_size if options.rescale else 2)


def test_killed_many_times_it_still_ends(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, options = write_stack(blobs), PredictOptions()
    run(path, make_predictor(), Outputs(tmp_path / "whole" / "out.tif"), options)
    rng = np.random.default_rng(3)
    for _ in range(200):
        stop_at = int(rng.integers(1, 200))
        try:
            run(path, make_predictor(), Outputs(tmp_path / "killed" / "out.tif"), options, stop_at=stop_at)
            break
        except Killed:
            continue
    else:
        pytest.fail("never came to an end")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_long_names_that_begin_alike_have_journals_of_their_own(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    outs = [Outputs(tmp_path / "out" / f"{'小' * 40}_{number}.tif", with_overlay=False) for number in (1, 2)]
    path, options = write_stack(blobs), PredictOptions()
    with pytest.raises(Killed):
        run(path, make_predictor(), outs[0], options, stop_at=30)
    assert not run(write_stack(blobs[:1], "b.tif"), make_predictor(), outs[1], options).notes
    assert any("went on from" in note for note in run(path, make_predictor(), outs[0], options).notes)
    assert sorted(content(tmp_path / "out")) == [out.labels.name for out in outs]


def test_another_model_image_or_option_is_refused(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, toys: SimpleNamespace
) -> None:
    path, targets = write_stack(blobs), Outputs(tmp_path / "out" / "labels.tif")
    with pytest.raises(Killed):
        run(path, make_predictor(), targets, PredictOptions(), stop_at=60)
    with pytest.raises(ConfigError, match="another overlap"):
        run(path, make_predictor(), targets, PredictOptions(overlap=0.25))
    kept = content(tmp_path / "out")
    other = make_predictor()
    other.weights.write_bytes(b"others")
    with pytest.raises(ConfigError, match="another weights") as caught:
        run(path, other, targets, PredictOptions())
    assert (
        "--overwrite" in caught.value.hint
        and content(tmp_path / "out")[".labels.tif.unfinished/journal"] == (kept[".labels.tif.unfinished/journal"])
    )
    other.weights.write_bytes(b"")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError, match="another image"):
        run(path, make_predictor(), targets, PredictOptions())
    report = run(path, make_predictor(), targets, PredictOptions(overwrite=True))
    assert not any("went on" in note for note in report.notes)
    assert recorded_fingerprint(targets.labels) is not None


def test_who_wrote_a_file_is_not_guessed(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path, targets, options = write_stack(blobs), Outputs(tmp_path / "labels.tif"), PredictOptions()
    run(path, make_predictor(), targets, options)
    (tmp_path / "notes.tif").write_text("text")
    os.mkfifo(tmp_path / "pipe.tif")
    for foreign in (path, tmp_path / "notes.tif", tmp_path / "pipe.tif", tmp_path, tmp_path / "absent.tif"):
        assert recorded_fingerprint(foreign) is None
    with open_sources(path)[0] as source:
        assert is_finished(source, make_predictor(), targets, options)
        for length in (100, 0):
            os.truncate(targets.labels, length)
            with pytest.raises(InputError, match=r"cannot read .*labels\.tif"):
                recorded_fingerprint(targets.labels)
            with pytest.raises(ConfigError, match="cannot be used") as caught:
                is_finished(source, make_predictor(), targets, options)
            assert "--overwrite" in caught.value.hint


def test_a_second_process_is_refused_and_a_damaged_image_leaves_no_journal(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, targets = write_stack(blobs), Outputs(tmp_path / "labels.tif")
    with journal(targets.labels), pytest.raises(BusyError, match=f"process {os.getpid()}"):
        run(path, make_predictor(), targets, PredictOptions())

    def fail(*_: Any) -> None:
        raise InputError("damaged")

    monkeypatch.setattr("affmae_engine.predict.stream.sections", fail)
    with pytest.raises(InputError):
        run(path, make_predictor(), targets, PredictOptions())
    assert not journals.folder_of(targets.labels).exists()


def test_an_image_that_changes_meanwhile_is_refused(
    tmp_path: Path, make_predictor: Make, write_stack: Write, blobs: np.ndarray
) -> None:
    path = write_stack(blobs)

    def touch(progress: PredictProgress) -> None:
        os.utime(path, ns=(5, 5))

    with open_sources(path)[0] as source, pytest.raises(InputError, match="changed while it was read"):
        predict(source, make_predictor(), Outputs(tmp_path / "out" / "a.tif"), PredictOptions(), on_progress=touch)
    assert list((tmp_path / "out").iterdir()) == []


def journal(output: Path, **about: Any) -> Journal:
    return Journal(output, {"a": 1, **about}, shape_ZYX=SHAPE, dtype=np.dtype("u1"), classes=2)


def rows_of(z: int, first: int, count: int) -> Rows:
    rng = np.random.default_rng([z, first])
    labels = rng.integers(0, 9, (count, SHAPE[2]), np.uint8)
    return Rows(z, first, labels, rng.integers(0, 255, (2, count, SHAPE[2]), np.uint8))


def filled(output: Path) -> bytes:
    with journal(output) as one:
        for z, first, count in ((0, 0, 4), (0, 4, 6), (1, 0, 3)):
            one.append(rows_of(z, first, count))
    return (journals.folder_of(output) / "journal").read_bytes()


def test_every_truncation_and_flipped_bit_costs_only_what_comes_after(tmp_path: Path) -> None:
    output = tmp_path / "out.tif"
    whole = filled(output)
    file = journals.folder_of(output) / "journal"
    kept = {(0, 0): 0, (0, 4): 1, (1, 0): 2, (1, 3): 3}
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with journal(output) as one:
            pieces = list(one.pieces())
            assert len(pieces) == kept[one.position]
        file.parent.mkdir(exist_ok=True)
    start = whole.index(b"\n") + 1
    for position in range(start, len(whole)):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with journal(output) as one:
            for piece in one.pieces():
                expected = rows_of(piece.z, piece.first_row, len(piece.labels_RX))
                assert np.array_equal(piece.labels_RX, expected.labels_RX)
                assert np.array_equal(piece.probabilities_CRX, expected.probabilities_CRX)
            assert one.position != (1, 3)


def test_whole_sections_and_an_empty_journal(tmp_path: Path) -> None:
    output = tmp_path / "out.tif"
    filled(output)
    with journal(output) as one:
        one.keep_whole_sections()
        assert one.position == (1, 0) and len(list(one.pieces())) == 2
        one.append(rows_of(1, 0, 10))
    with journal(output) as one:
        assert one.position == (2, 0)
        one.discard()
    with journal(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.tif"
    whole = filled(output)

    def fail(file: Any, data: memoryview) -> None:
        file.write(data[:20])
        raise OSError(errno.ENOSPC, "full")

    with journal(output) as one:
        monkeypatch.setattr(journals, "_write_all", fail)
        with pytest.raises(ResourceError, match="the disk is full"):
            one.append(rows_of(1, 3, 2))
        monkeypatch.undo()
        assert (journals.folder_of(output) / "journal").read_bytes() == whole
        one.append(rows_of(1, 3, 2))
        assert len(list(one.pieces())) == 4


def test_where_inference_takes_up_again() -> None:
    y = Axis(100, 32, 0.5)
    for done in [(plane, row) for plane in range(3) for row in range(0, 100, 7)]:
        for columns, batch in ((3, 4), (5, 5), (4, 6), (1, 1)):
            plane, row = restart(y, columns, batch, done)
            assert (plane * len(y.starts) + row) * columns % batch == 0
            assert plane < done[0] or y.inside(row)[0] <= done[1]
            # No tile before it reaches an unfinished row.
            if plane == done[0]:
                assert all(y.inside(before)[1] <= done[1] for before in range(row))
            plane, row = restart(y, columns, batch, (done[0], 0), whole=True)
            assert row == 0 and plane * len(y.starts) * columns % batch == 0
