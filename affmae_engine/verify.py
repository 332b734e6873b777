"""Whether what `affmae` wrote is whole: a dataset, run, prediction or model package. Reads everything, changes nothing.

Every chunk is decoded (its CRC-32C is checked on the way) and every file of a checkpoint is hashed, so it takes as long
as reading the data once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import zarr

from affmae_engine import checkpoint, events, model_package
from affmae_engine.data.ledger import replay
from affmae_engine.data.readers import open_sources
from affmae_engine.data.readers.files import natural_key
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import StorePaths, bands, chunk_shapes
from affmae_engine.errors import AffmaeError, CorruptError, InputError, one_line
from affmae_engine.predict.identity import recorded_fingerprint
from affmae_engine.predict.outputs import TIFF_SUFFIXES
from affmae_engine.predict.volume import is_ours, labels_group
from affmae_engine.predict.work import UNFINISHED, work_folder
from affmae_engine.run_dir import RunDir

Kind = Literal["dataset", "run", "prediction", "model"]
_ALL = slice(None)


@dataclass
class Findings:
    """What was found. checked: parts that are whole. problems: damage. notes: what is unfinished, but not damaged.

    kind: None where it could not be told, let alone checked.
    """

    path: Path
    kind: Kind | None
    checked: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, part: Callable[[], object]) -> None:
        """Count a part, or the damage that reading it comes upon."""
        try:
            part()
        except AffmaeError as error:
            self.problems.append(error.message)
        else:
            self.checked += 1


def verify(path: Path, on_part: Callable[[str], None] = lambda _: None) -> Findings:
    """Check a dataset, a run directory, a model package, the labels or probabilities of a prediction, or a folder of
    predictions.

    Args:
        on_part: called with the name of each part before it is read.

    Raises:
        InputError: nothing there, or nothing that affmae wrote.
        CorruptError: so damaged that its parts, or what it is, are not even known.
    """
    if StorePaths(path).ledger.exists():
        return _dataset(path, on_part)
    about = model_package.described(path)
    if about is not None:  # its folder has a config.toml, as runs have
        return _model(path, about, on_part)
    if RunDir(path).exists():
        return _run(path, on_part)
    if not path.exists() and work_folder(path).is_dir():
        return Findings(path, "prediction", problems=[f"{path} is unfinished: run the same `affmae predict` again"])
    if not path.exists():
        raise InputError(f"no such dataset, run or prediction: {path}", "check the path")
    if not path.is_dir() and not _is_label_file(path):
        raise InputError(
            f"{path} was not written by affmae", "name a dataset, a run, a model package or the labels of a prediction"
        )
    if path.is_dir() and not is_ours(path):
        return _predictions(path, on_part)
    return _prediction(path, on_part)


def _model(path: Path, about: model_package.ModelAbout, on_part: Callable[[str], None]) -> Findings:
    found = Findings(path, "model")
    for name, expected in about.files.items():
        on_part(name)
        found.take(partial(model_package.check_file, path, name, expected))
    return found


def _is_label_file(path: Path) -> bool:
    """Whether `affmae predict` wrote this file."""
    try:
        return recorded_fingerprint(path) is not None
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # its content was not even seen
            raise
        raise CorruptError(error.message, "if it is a prediction, predict it again") from error


def _dataset(path: Path, on_part: Callable[[str], None]) -> Findings:
    found = Findings(path, "dataset")
    begun = replay(StorePaths(path).ledger).begun
    found.notes += [f"{name} is unfinished: ingest it again to complete it" for name in begun]
    store = Store.open(path)
    for image in store.images:
        on_part(image.name)
        _, shard = chunk_shapes(image.shape_ZYX, image.dtype.itemsize)
        readers = [store.read, store.read_labels] if image.labelled else [store.read]
        for band in bands(image.shape_ZYX, shard):
            for read in readers:

                def part(read: Callable = read, name: str = image.name, z: slice = band.z, y: slice = band.y) -> None:
                    read(name, z, y, _ALL)

                found.take(part)
    return found


def _run(path: Path, on_part: Callable[[str], None]) -> Findings:
    run, found = RunDir(path), Findings(path, "run")
    on_part("config.toml")
    found.take(run.read_config)
    for step in run.checkpoint_steps():
        on_part(f"step {step}")
        found.take(lambda step=step: checkpoint.verify(run.checkpoint(step)))  # type: ignore[misc]
    if not run.checkpoint_steps():
        found.notes.append("it has no checkpoint yet")
    best = checkpoint.best_step(run)
    if best is not None and best not in run.checkpoint_steps():
        found.problems.append(f"{run.best} names step {best}, which has no checkpoint")
    if run.metrics.exists():
        lines = run.metrics.read_text("utf-8", "replace").splitlines()
        torn = sum(events.from_line(line) is None and not _is_json(line) for line in lines[:-1])
        if torn:
            found.problems.append(f"{run.metrics}: {torn} of {len(lines)} lines are damaged")
    if StorePaths(run.data).ledger.exists():
        inner = _dataset(run.data, on_part)
        found.checked += inner.checked
        found.problems += inner.problems
        found.notes += inner.notes
    return found


def _predictions(folder: Path, on_part: Callable[[str], None]) -> Findings:
    """All predictions in a folder, and what is unfinished there."""
    found = Findings(folder, "prediction")
    results = 0
    for path in _results_in(folder):
        if path.name.endswith(UNFINISHED):
            found.problems.append(f"{path} is an unfinished prediction: run the same `affmae predict` again")
            continue
        try:
            inner = _prediction(path, on_part)
        except CorruptError as error:
            inner = Findings(path, "prediction", problems=[error.message])
        results += 1
        found.checked += inner.checked
        found.problems += inner.problems
    if not results and not found.problems:
        raise InputError(f"{folder} is neither a dataset, a run nor a prediction", "name one that affmae wrote")
    return found


def _results_in(folder: Path) -> Iterator[Path]:
    """Label files and volumes that `affmae predict` wrote, and the work folders of unfinished ones, in natural order.

    A TIFF that cannot be read is taken for a result: nobody knows what wrote it.
    """
    for entry in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        if entry.is_dir():
            if entry.name.endswith(UNFINISHED) or is_ours(entry):
                yield entry
            elif not entry.name.startswith(".") and not entry.is_symlink():
                yield from _results_in(entry)
        elif entry.suffix.lower() in TIFF_SUFFIXES and not entry.name.startswith("."):
            try:
                ours = recorded_fingerprint(entry) is not None
            except InputError as error:
                if isinstance(error.__cause__, OSError):  # its content was not even seen
                    raise
                ours = True
            if ours:
                yield entry


def _prediction(path: Path, on_part: Callable[[str], None]) -> Findings:
    found = Findings(path, "prediction")
    if work_folder(path).is_dir():
        found.notes.append("another prediction to the same place is unfinished")
    if path.is_file():
        try:
            sources = open_sources(path, labels=True)
        except InputError as error:
            found.problems.append(error.message)
            return found
        for source in sources:
            with source:
                for z in range(source.info.shape_ZYX[0]):
                    on_part(f"section {z}")
                    found.take(lambda s=source, z=z: s.read(slice(z, z + 1), _ALL, _ALL))  # type: ignore[misc]
        return found
    for file, part in _shards(path):
        on_part(str(file.relative_to(path)))
        found.take(part)
    return found


def _arrays(volume: Path) -> Iterator[Path]:
    """Every array that a volume must have: all levels of the image, where there is one, and of the labels."""
    labels = labels_group(volume)
    for group in dict.fromkeys((volume, labels)):
        try:
            attributes = json.loads((group / "zarr.json").read_text("utf-8"))["attributes"]
            levels = attributes.get("ome", {}).get("multiscales", [{}])[0].get("datasets", [])
            names = [str(level["path"]) for level in levels]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CorruptError(f"{group}: its metadata is damaged", "predict it again") from error
        if not names and group == labels:
            names = ["0"]
        yield from (group / name for name in names)


def _shards(volume: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """Every shard that a volume must have, with a function that reads it or raises CorruptError."""
    for folder in _arrays(volume):
        try:
            array = zarr.open_array(folder, mode="r")
            grid = [range(-(-length // shard)) for length, shard in zip(array.shape, array.shards, strict=True)]
        except Exception as error:  # whatever zarr makes of damaged metadata
            raise CorruptError(f"{folder}: its array is damaged ({one_line(error, 80)})", "predict it again") from error

        for place in itertools.product(*grid):
            file = folder / "c" / Path(*map(str, place))
            where = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, array.shards, strict=True))

            def read(array: Any = array, file: Path = file, where: tuple[slice, ...] = where) -> None:
                if not file.is_file():
                    raise CorruptError(f"{file} is missing", "predict it again")
                try:
                    array[where]
                except Exception as error:
                    raise CorruptError(f"{file} is damaged ({one_line(error, 80)})", "predict it again") from error

            yield file, read


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
