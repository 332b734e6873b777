"""Checkpoints: complete or absent, every damage found, the only valid one never deleted."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from affmae_engine import atomic, checkpoint
from affmae_engine.errors import CorruptError, InputError, ResourceError
from affmae_engine.run_dir import RunDir, create
from affmae_engine.weights import METADATA_KEY, WeightsMetadata, read_metadata

METADATA = WeightsMetadata(
    task="finetune", model={"size": "tiny"}, image_size=64, normalisation={"mode": "image"}, class_names=("a", "b")
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = create(tmp_path / "run")
    run.config.write_text("")
    return run


def save(run: RunDir, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    return checkpoint.save(
        run,
        weights={"w": torch.randn(4, 5, generator=generator), "scalar": torch.tensor(float(step))},
        optimizer={"w.exp_avg": torch.randn(4, 5, generator=generator)},
        state={"step": step},
        metadata=METADATA.model_copy(update={"step": step}),
    )


def flip_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position // 8] ^= 1 << position % 8
    file.write_bytes(data)


def ignore(message: str) -> None:
    pass


def test_round_trip(run: RunDir) -> None:
    folder = save(run, 500)
    assert folder.name == "step-000500"
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    saved = checkpoint.newest_valid(run, ignore)
    assert saved is not None and saved.step == 500 and saved.state() == {"step": 500}
    metadata, weights = checkpoint.load_weights(folder / "weights.safetensors")
    assert metadata == METADATA.model_copy(update={"step": 500})
    assert torch.equal(weights["w"], saved.weights()["w"])
    assert set(saved.optimizer()) == {"w.exp_avg"}
    assert list(run.checkpoints.glob(".*")) == []


def test_the_newest_is_found_by_step_not_by_time(run: RunDir) -> None:
    for step in (1_000_000, 5, 20):
        save(run, step)
    os.utime(run.checkpoint(5), (2e9, 2e9))
    assert run.checkpoint_steps() == [1_000_000, 20, 5]
    found = checkpoint.newest_valid(run, ignore)
    assert found is not None and found.step == 1_000_000


def test_every_flipped_bit_is_found(run: RunDir) -> None:
    folder = save(run, 1)
    generator = torch.Generator().manual_seed(0)
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE):
        bits = (folder / name).stat().st_size * 8
        for position in torch.randint(bits, (60,), generator=generator).tolist():
            flip_bit(folder / name, position)
            with pytest.raises(CorruptError, match=name):
                checkpoint.verify(folder)
            flip_bit(folder / name, position)
    checkpoint.verify(folder)


def test_truncated_missing_and_emptied_files_are_found(run: RunDir) -> None:
    folder = save(run, 1)
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST):
        whole = (folder / name).read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(CorruptError, match=name):
                checkpoint.verify(folder)
        (folder / name).unlink()
        with pytest.raises(CorruptError, match=name):
            checkpoint.verify(folder)
        (folder / name).write_bytes(whole)
    checkpoint.verify(folder)


def test_a_damaged_newest_falls_back_and_says_so(run: RunDir) -> None:
    save(run, 1), save(run, 2)
    flip_bit(run.checkpoint(2) / checkpoint.WEIGHTS, 999)
    warnings: list[str] = []
    found = checkpoint.newest_valid(run, warnings.append)
    assert found is not None and found.step == 1
    assert len(warnings) == 1 and "step 2" in warnings[0] and checkpoint.WEIGHTS in warnings[0]
    (moved,) = checkpoint.set_aside_newer(run, 1)
    assert run.checkpoint_steps() == [1] and moved.is_dir()


def test_all_damaged_is_an_error_and_none_is_none(run: RunDir) -> None:
    assert checkpoint.newest_valid(run, ignore) is None
    save(run, 1)
    (run.checkpoint(1) / checkpoint.MANIFEST).unlink()
    with pytest.raises(CorruptError, match="none of the 1 checkpoints"):
        checkpoint.newest_valid(run, ignore)


def test_a_failed_write_leaves_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sha256", fail)
    with pytest.raises(ResourceError, match="disk is full"):
        save(run, 1)
    assert list(run.checkpoints.iterdir()) == []


def test_what_a_killed_writer_left_is_not_a_checkpoint(run: RunDir) -> None:
    (run.checkpoints / ".step-000009.ab12.partial").mkdir()
    assert run.checkpoint_steps() == []
    assert atomic.sweep(run.checkpoints) == 1


def test_prune_keeps_newest_and_best(run: RunDir) -> None:
    for step in range(1, 7):
        save(run, step)
    checkpoint.prune(run, 2, 3, ignore)
    assert run.checkpoint_steps() == [6, 5, 3]
    assert list(run.checkpoints.glob(".*")) == []


def test_a_failed_deletion_is_a_warning(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1), save(run, 2)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    warnings: list[str] = []
    checkpoint.prune(run, 1, None, warnings.append)
    assert len(warnings) == 1 and run.checkpoint_steps() == [2]


def test_best_of_a_run_then_newest(run: RunDir) -> None:
    for step in (1, 2, 3):
        save(run, step)
    assert checkpoint.load_weights(run.root)[0].step == 3
    checkpoint.write_best(run, 2, "score", 0.5)
    assert checkpoint.load_weights(run.root)[0].step == 2
    assert checkpoint.load_weights(run.root, which="last")[0].step == 3
    flip_bit(run.checkpoint(2) / checkpoint.WEIGHTS, 999)
    with pytest.raises(CorruptError):
        checkpoint.load_weights(run.root)


def test_a_folder_of_another_step_is_kept_when_saved_again(run: RunDir) -> None:
    first = (save(run, 1) / checkpoint.MANIFEST).stat().st_mtime_ns
    assert (save(run, 1) / checkpoint.MANIFEST).stat().st_mtime_ns == first


def test_loading_what_is_not_ours_says_so(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        checkpoint.load_weights(tmp_path / "missing")
    with pytest.raises(InputError, match="no checkpoint yet"):
        checkpoint.load_weights(run.root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither"):
        checkpoint.load_weights(tmp_path / "empty")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match="not written by affmae"):
        checkpoint.load_weights(foreign)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = tmp_path / "model.pt"
    evil.write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(InputError, match="not an affmae weights file"):
        checkpoint.load_weights(evil)
    renamed = evil.rename(tmp_path / "model.safetensors")
    with pytest.raises(CorruptError):
        checkpoint.load_weights(renamed)
    assert not canary.exists()


def crafted(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**63),
        (b"{}", 2**31),
        (b'{"w":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}', None),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            None,
        ),
        (b'{"w":', None),
        (b"\xff\xfe", None),
    ],
)
def test_hostile_headers_are_errors_of_ours(header: bytes, length: int | None, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="damaged"):
        read_metadata(crafted(tmp_path / "w.safetensors", header, length))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda record: "not json", CorruptError),
        (lambda record: "[]", CorruptError),
        (lambda record: json.dumps({**record, "task": "other"}), CorruptError),
        (lambda record: json.dumps({**record, "schema_version": 99}), InputError),
    ],
)
def test_wrong_metadata(change: Callable[[dict], str], error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata={METADATA_KEY: change(METADATA.model_dump(mode="json"))})
    with pytest.raises(error):
        read_metadata(path)


def test_metadata_of_a_later_version_may_have_more_fields(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    record = {**METADATA.model_dump(mode="json"), "new_field": 1}
    save_file({"w": torch.zeros(2)}, path, metadata={METADATA_KEY: json.dumps(record)})
    assert read_metadata(path) == METADATA
