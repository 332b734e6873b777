"""From what a user typed to a list of predictions with their output names, and running that list.

One file in gives one file out; anything else (a folder, a pattern, several names) gives a folder with one TIFF per
image, subfolders kept. All names are decided, and clashes refused, before anything is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from affmae_engine.data.readers import Source, find_files, scan_sources
from affmae_engine.data.store_layout import safe_name
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.predict import outputs
from affmae_engine.predict.identity import is_result
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.stream import PredictOptions, PredictProgress, PredictReport, predict
from affmae_engine.runtime.signals import StopRequest

DEFAULT_FOLDER = Path("predictions")
"""Where results go when no output is named, in the working directory: inputs may lie on read-only microscope shares."""


@dataclass(frozen=True)
class Refused:
    """An input that was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every image to predict with its outputs; `out` is the file or folder that all of them are in.

    files: where the images are, as they were found below the inputs. finished: label files that an earlier call of the
    same prediction completed.
    """

    jobs: list[tuple[Source, Outputs]]
    refused: list[Refused]
    out: Path
    files: tuple[Path, ...] = ()
    finished: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a plan; `finished` are label files that were complete before."""

    reports: list[PredictReport]
    refused: list[Refused]
    finished: tuple[Path, ...] = ()


def plan(
    inputs: Sequence[Path],
    out: Path | None,
    *,
    probabilities: bool = False,
    overlay: bool = True,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
    truth: Sequence[Path] = (),
    finished: Callable[[Source, Outputs], bool] | None = None,
) -> Plan:
    """Find the images and decide every output's name.

    Args:
        inputs: files, folders, patterns. What folders and patterns hold of earlier results is passed over.
        out: a .tif, .tiff or .zarr for one image, or a folder; None is, in the working directory,
            `predictions/NAME-labels.tif` for a file, `predictions/FOLDER/` for a folder, `predictions/` for anything
            else.
        protect: further paths that no output may touch (the weights).
        truth: files, folders, patterns of true labels, which are passed over like earlier results.
        finished: whether an image's outputs are there, complete and the very ones wanted (`identity.is_finished`);
            such an image is left out, and incomplete ones are completed. None refuses outputs that exist.

    Raises:
        InputError: nothing was found, or nothing of it can be read.
        ConfigError: outputs clash with one another, with an input, or with what is there.
        ResourceError: the output folder cannot be written to.
    """
    single = len(inputs) == 1 and find_files(inputs) == [Path(inputs[0]).expanduser()]
    named_file = out is not None and _is_one_file(out, single)
    folder = _folder(inputs, out, single=single, named_file=named_file)
    ending = "-labels" if single else ""
    jobs, refused, readable = [], [], []
    for file, relative in _found(inputs, folder, truth):
        try:
            sources, problems = scan_sources(file)
        except InputError as error:
            if single:
                raise
            refused.append(Refused(file, error.message))
            continue
        readable.append(file)
        refused += [Refused(file, problem.message) for problem in problems]
        if named_file and len(sources) > 1:
            raise ConfigError(f"{file} holds {len(sources)} images, which need a folder", "name one with -o/--out")
        for source, name in _named(file, sources):
            labels = out if named_file and out is not None else folder / relative / f"{name}{ending}.tif"
            jobs.append((source, Outputs(labels, probabilities, overlay)))
    if not jobs:
        raise InputError(f"none of the {len(refused)} files could be read; the first: {refused[0].reason}")
    where = jobs[0][1].labels if len(jobs) == 1 and single else folder
    _check_all(jobs, overwrite or finished is not None, protect)
    done = [targets.labels for source, targets in jobs if finished is not None and finished(source, targets)]
    jobs = [(source, targets) for source, targets in jobs if targets.labels not in done]
    return Plan(jobs, refused, where, tuple(readable), tuple(done))


def _named(file: Path, sources: Sequence[Source]) -> Iterator[tuple[Source, str]]:
    """The images of a file and the stems of their outputs, which no two share whatever the case of letters."""
    names: set[str] = set()
    for source in sources:
        name = outputs.stem(file)
        if len(sources) > 1:
            series = safe_name(source.info.series, names)
            names.add(series.lower())
            name = f"{name}-{series}"
        yield source, name


def run(
    planned: Plan,
    predictor: Predictor,
    options: PredictOptions,
    *,
    on_progress: Callable[[PredictProgress], None] = lambda _: None,
    on_report: Callable[[PredictReport], None] = lambda _: None,
    on_refused: Callable[[Refused], None] = lambda _: None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Predict everything that was planned. A file that turns out to be damaged is passed over when there are others.

    Raises:
        InputError: not one image could be read.
        ConfigError, ResourceError, Interrupted: see `stream.predict`; finished outputs stay.
    """
    reports: list[PredictReport] = []
    refused = list(planned.refused)
    for problem in refused:
        on_refused(problem)
    for source, targets in planned.jobs:
        try:
            with source:
                report = predict(source, predictor, targets, options, on_progress=on_progress, stop=stop)
        except InputError as error:
            if len(planned.jobs) == 1 and not planned.refused and not planned.finished:
                raise
            refused.append(Refused(source.info.path, error.message))
            on_refused(refused[-1])
            continue
        reports.append(report)
        on_report(report)
    if not reports and not planned.finished:
        raise InputError(f"none of the {len(refused)} images could be read; the first: {refused[0].reason}")
    return Outcome(reports, refused, planned.finished)


def _is_one_file(out: Path, single: bool) -> bool:
    """Whether the output that was named is a file for one image; else it is a folder.

    Raises:
        ConfigError: a file of another kind, or one file for several inputs.
    """
    named_file = outputs.is_label_file(out)
    if out.suffix and not named_file and not out.is_dir():
        raise ConfigError(
            f"{out}: labels are written as .tif, .tiff or .zarr (OME-Zarr)",
            "name the output with one of these extensions, or name a folder without one",
        )
    if named_file and not single:
        raise ConfigError(f"several inputs cannot go into the one file {out}", "name a folder with -o/--out")
    return named_file


def _folder(inputs: Sequence[Path], out: Path | None, *, single: bool, named_file: bool) -> Path:
    """The folder that results go to."""
    if out is not None:
        return out.parent if named_file else out
    first = Path(inputs[0]).expanduser()
    one_folder = len(inputs) == 1 and not single and first.is_dir()
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


def _check_all(jobs: Sequence[tuple[Source, Outputs]], overwrite: bool, protect: Sequence[Path]) -> None:
    sources = list(dict.fromkeys(source.info.path for source, _ in jobs))
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
        outputs.check(targets, [*sources, *protect], overwrite=overwrite)
