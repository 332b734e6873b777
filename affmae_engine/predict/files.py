"""From what a user typed to a list of predictions with their output names, and running that list.

Numbered sections of one size in a folder are one stack. One stack or file gives one output; anything else gives a
folder with one TIFF per image, subfolders kept. All names are decided, and clashes refused, before any work is done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from affmae_engine.data.readers import Source, find_files, scan_sources
from affmae_engine.data.store_layout import safe_name
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.predict import outputs
from affmae_engine.predict.finish import PredictReport
from affmae_engine.predict.identity import is_result
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.sources import SectionStack, files_of

DEFAULT_FOLDER = Path("predictions")
"""Where results go when no output is named, in the working directory: inputs may lie on read-only microscope shares."""

_NUMBER = re.compile(r"[0-9]+")
_STACK_NAME = re.compile(r"^(.*?)[ _.-]*(?:z|slice|section|s)?[ _.-]*[0-9]+$", re.IGNORECASE)


@dataclass(frozen=True)
class Refused:
    """An input that was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every input to predict with its outputs; `out` is the file or folder that all of them are in.

    files: where the images are, as they were found below the inputs. finished: inputs that an earlier call of the same
    command has completed.
    """

    jobs: list[tuple[Source, Outputs]]
    refused: list[Refused]
    out: Path
    files: tuple[Path, ...] = ()
    finished: tuple[tuple[Source, Outputs], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a plan. finished: inputs that were complete before. waiting: outputs that other shards work on."""

    reports: list[PredictReport]
    refused: list[Refused]
    finished: tuple[tuple[Source, Outputs], ...] = ()
    waiting: tuple[Path, ...] = ()


def plan(
    inputs: Sequence[Path],
    out: Path | None,
    *,
    probabilities: bool = False,
    overlay: bool = True,
    separate: bool = False,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
    truth: Sequence[Path] = (),
    finished: Callable[[Source, Outputs], bool] = lambda source, targets: False,
) -> Plan:
    """Find the images and decide every output's name.

    Args:
        inputs: files, folders, patterns. What folders and patterns hold of earlier results is passed over.
        out: a .tif, .tiff or .zarr for one image or stack, or a folder; None is, in the working directory,
            `predictions/NAME-labels.tif` for a file or a stack, `predictions/FOLDER/` for a folder of anything else,
            `predictions/` for the rest.
        separate: keep numbered sections apart.
        overwrite: what is there gives way; otherwise only what `finished` knows may be there.
        protect: further paths that no output may touch (the weights).
        truth: files, folders, patterns of true labels, which are passed over like earlier results.
        finished: whether an input's outputs are there, complete and the very ones wanted (`identity.is_finished`);
            such an input is left out.

    Raises:
        InputError: nothing was found, or nothing of it can be read.
        ConfigError: outputs clash with one another, with an input, or with what is there.
        ResourceError: the output folder cannot be written to.
    """
    single = len(inputs) == 1 and find_files(inputs) == [Path(inputs[0]).expanduser()]
    named_file = out is not None and _is_one_file(out)
    found, refused, readable = _opened(inputs, out, truth, single=single)
    stacks = [] if separate else _stacks(found)
    in_stacks = {id(source) for stack in stacks for _, source in stack}
    alone = [(relative, source) for relative, source in found if id(source) not in in_stacks]
    count = len(alone) + len(stacks)
    if not count:
        raise InputError(f"none of the {len(refused)} files could be read; the first: {refused[0].reason}")
    if named_file and count > 1:
        if single:
            raise ConfigError(f"{inputs[0]} holds {count} images, which need a folder", "name one with -o/--out")
        raise ConfigError(f"several inputs cannot go into the one file {out}", "name a folder with -o/--out")
    one = count == 1 and (single or bool(stacks))
    folder = _folder(inputs, out, one=one, named_file=named_file)
    ending = "-labels" if one else ""
    jobs = []
    for stack in stacks:
        relative, first = stack[0]
        source: Source = SectionStack([section for _, section in stack], _stack_name(first))
        jobs.append((source, folder / (Path() if one else relative) / f"{source.info.name}{ending}.tif"))
    for source, relative, name in _named(alone):
        jobs.append((source, folder / relative / f"{name}{ending}.tif"))
    made = [
        (source, Outputs(out if named_file and out is not None else labels, probabilities, overlay))
        for source, labels in jobs
    ]
    done = [] if overwrite else [(source, targets) for source, targets in made if finished(source, targets)]
    of_done = {targets.labels for _, targets in done}
    _check_all(made, overwrite, protect, of_done)
    left = [(source, targets) for source, targets in made if targets.labels not in of_done]
    return Plan(left, refused, made[0][1].labels if one else folder, tuple(readable), tuple(done))


def run(
    planned: Plan,
    predict_one: Callable[[Source, Outputs], PredictReport | None],
    *,
    on_report: Callable[[PredictReport], None] = lambda _: None,
    on_refused: Callable[[Refused], None] = lambda _: None,
) -> Outcome:
    """Predict everything that was planned. A file that turns out to be damaged is passed over when there are others.

    Args:
        predict_one: `run.predict` with everything else set.

    Raises:
        InputError: not one image could be read.
        ConfigError, ResourceError, Interrupted: see `run.predict`; finished outputs stay.
    """
    reports: list[PredictReport] = []
    waiting: list[Path] = []
    refused = list(planned.refused)
    for problem in refused:
        on_refused(problem)
    for source, targets in planned.jobs:
        try:
            with source:
                report = predict_one(source, targets)
        except InputError as error:
            if len(planned.jobs) == 1 and not planned.refused and not planned.finished:
                raise
            refused.append(Refused(source.info.path, error.message))
            on_refused(refused[-1])
            continue
        if report is None:
            waiting.append(targets.labels)
            continue
        reports.append(report)
        on_report(report)
    if not reports and not waiting and not planned.finished:
        raise InputError(f"none of the {len(refused)} images could be read; the first: {refused[0].reason}")
    return Outcome(reports, refused, planned.finished, tuple(waiting))


def _opened(
    inputs: Sequence[Path], out: Path | None, truth: Sequence[Path], *, single: bool
) -> tuple[list[tuple[Path, Source]], list[Refused], list[Path]]:
    """Images with their folder below the input, what was refused, and the files that could be read."""
    results = DEFAULT_FOLDER if out is None else out.parent if outputs.is_label_file(out) else out
    found: list[tuple[Path, Source]] = []
    refused: list[Refused] = []
    readable: list[Path] = []
    for file, relative in _found(inputs, results, truth):
        try:
            sources, problems = scan_sources(file)
        except InputError as error:
            if single:
                raise
            refused.append(Refused(file, error.message))
            continue
        readable.append(file)
        refused += [Refused(file, problem.message) for problem in problems]
        found += [(relative, source) for source in sources]
    return found, refused, readable


def _stacks(found: Sequence[tuple[Path, Source]]) -> list[list[tuple[Path, Source]]]:
    """Sections that belong together: of one folder, alike in size, type and pixel size, told apart by numbers alone."""
    groups: dict[tuple[object, ...], list[tuple[Path, Source]]] = {}
    for relative, source in found:
        info = source.info
        pattern = _NUMBER.sub("#", info.path.stem)
        if info.shape_ZYX[0] == 1 and not info.series and "#" in pattern:
            key = info.path.parent, pattern, info.path.suffix.lower(), info.shape_ZYX, info.dtype, info.pixel_nm
            groups.setdefault(key, []).append((relative, source))
    return [group for group in groups.values() if len(group) > 1]


def _stack_name(first: Source) -> str:
    """What the names of the sections have in common, or the name of their folder."""
    match = _STACK_NAME.match(first.info.path.stem)
    return (match[1] if match else "") or first.info.path.resolve().parent.name or "stack"


def _named(found: Sequence[tuple[Path, Source]]) -> Iterator[tuple[Source, Path, str]]:
    """Images with their folder and the stems of their outputs, which differ within a file whatever the case."""
    several: dict[Path, int] = {}
    for _, source in found:
        several[source.info.path] = several.get(source.info.path, 0) + 1
    names: dict[Path, set[str]] = {}
    for relative, source in found:
        path = source.info.path
        name = outputs.stem(path)
        if several[path] > 1:
            taken = names.setdefault(path, set())
            series = safe_name(source.info.series, taken)
            taken.add(series.lower())
            name = f"{name}-{series}"
        yield source, relative, name


def _is_one_file(out: Path) -> bool:
    """Whether the output that was named is a file for one image; else it is a folder.

    Raises:
        ConfigError: a file of another kind.
    """
    named_file = outputs.is_label_file(out)
    if out.suffix and not named_file and not out.is_dir():
        raise ConfigError(
            f"{out}: labels are written as .tif, .tiff or .zarr (OME-Zarr)",
            "name the output with one of these extensions, or name a folder without one",
        )
    return named_file


def _folder(inputs: Sequence[Path], out: Path | None, *, one: bool, named_file: bool) -> Path:
    """The folder that results go to."""
    if out is not None:
        return out.parent if named_file else out
    first = Path(inputs[0]).expanduser()
    one_folder = len(inputs) == 1 and not one and first.is_dir()
    return DEFAULT_FOLDER / first.resolve().name if one_folder else DEFAULT_FOLDER


def _found(inputs: Sequence[Path], folder: Path, truth: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Files with their folder relative to the input they came from.

    Passed over, unless named outright: true labels, earlier results wherever they lie, and everything in a folder of
    results that lies inside the folder that is searched. One that it lies in may hold any other images as well.
    """
    drawn = {os.path.realpath(file) for file in find_files(truth)} if truth else set()
    seen: set[str] = set()
    results = Path(os.path.realpath(folder))
    found_any = False
    for source in inputs:
        base = Path(source).expanduser()
        files = find_files([source])
        named = files == [base]
        below = base.is_dir() and not named
        within = below and Path(os.path.realpath(base)) in results.parents
        for file in files:
            real = os.path.realpath(file)
            inner = within and results in Path(real).parents
            if real in seen or (not named and (inner or real in drawn or is_result(file))):
                continue
            seen.add(real)
            found_any = True
            yield file, file.parent.relative_to(base) if below else Path()
    if not found_any:
        what = "true labels and results of predictions" if truth else "results of predictions"
        raise InputError(f"there are only {what} in {', '.join(map(str, inputs))}", "name the images")


def _check_all(
    jobs: Sequence[tuple[Source, Outputs]], overwrite: bool, protect: Sequence[Path], finished: set[Path]
) -> None:
    sources = list(dict.fromkeys(path for source, _ in jobs for path in files_of(source)))
    taken: dict[str, Source] = {}
    for source, targets in jobs:
        for path in targets.all:
            # Compared without case: many file systems of labs are case-insensitive.
            other = taken.setdefault(str(path).casefold(), source)
            if other is not source:
                raise ConfigError(
                    f"{other.info.path} and {source.info.path} would both be written to {path}",
                    "rename one, or predict them into different folders",
                )
    for _, targets in jobs:
        outputs.check(targets, [*sources, *protect], overwrite=overwrite or targets.labels in finished)
