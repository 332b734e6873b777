"""One call from files to files: maps in, objects out, restartable and shared between processes and machines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from affmae_engine import atomic
from affmae_engine.data.readers.limits import memory_budget
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.objects import make, volumes, write
from affmae_engine.objects.blocks import Shape
from affmae_engine.objects.decode import DecodeOptions, Decoding
from affmae_engine.objects.job import Job
from affmae_engine.objects.maps import MapFiles, Maps
from affmae_engine.runtime.signals import StopRequest


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes the result, except `block` for a watershed.

    Attributes:
        block: voxels of a block along z, y, x; None takes a default. workers: processes; 0 takes as many as cores and
            memory allow. shard: (i, n), this process computes every n-th block, the first one also writes.
        overwrite: an existing output, and intermediate results of another run, give way.
    """

    block: Shape | None = None
    workers: int = 0
    shard: tuple[int, int] = (0, 1)
    overwrite: bool = False


@dataclass(frozen=True)
class ObjectsReport:
    """What was made. counts: objects by kind. output is None for all shards but the first."""

    output: Path | None
    overlay: Path | None
    shape_ZYX: Shape
    block: Shape
    workers: int
    counts: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())


def decode_options(maps: Maps, given: DecodeOptions | None = None) -> DecodeOptions:
    """Options that suit the maps: by section for stacks of sections, watershed where a map tells objects apart.

    Args:
        given: taken as they are.
    """
    if given is not None:
        return given
    if maps.divides:  # a neck that the map does not cut is hardly a boundary
        return DecodeOptions("watershed", sections=make.is_sections(maps), join_neck=0.5)
    return DecodeOptions("components", sections=make.is_sections(maps))


def run(
    files: MapFiles,
    output: Path,
    options: DecodeOptions | None = None,
    how: RunOptions | None = None,
    *,
    image: Path | None = None,
    stop: StopRequest | None = None,
    on_progress: Callable[[str, int, int], None] = lambda _name, _done, _all: None,
) -> ObjectsReport:
    """Make the objects of a volume and write them.

    Args:
        output: .zarr, .tif or .tiff; intermediate results lie beside it until it is complete.
        options: None chooses by the maps, see `decode_options`.
        image: for an overlay picture beside the output.

    Raises:
        InputError: a file cannot be read, or shapes differ.
        ConfigError: a bad name or option, an output that exists, or intermediate results of another run.
        ResourceError: disk or memory.
        Interrupted: stopped on request; the next call continues.
    """
    how = how or RunOptions()
    started = time.perf_counter()
    write.check_output(output)
    write.check_replaceable(output, overwrite=how.overwrite)
    _check_apart(output, files)
    if not 0 <= how.shard[0] < how.shard[1]:
        raise ConfigError(f"shard {how.shard[0] + 1} of {how.shard[1]} does not exist")
    with Maps(files) as maps:
        picture = None if image is None else volumes.open_image(image)
        if picture is not None and picture.info.shape_ZYX != maps.shape:
            raise InputError(
                f"{image} has {picture.info.shape_ZYX} voxels and the maps have {maps.shape} (z, y, x)",
                "give the image that the maps belong to",
            )
        options = decode_options(maps, options)
        block = make.block_shape(options, maps.shape, how.block)
        voxel = make.relative_voxel(maps, sections=options.sections)
        workers = _workers(Decoding(maps, options, voxel), block, how)
        atomic.ensure_folder(output.parent)
        job = Job(
            make.intermediate_folder(output), maps.shape, block, workers, how.shard, stop or StopRequest(), on_progress
        )
        made_from = make.provenance(maps, options, block)
        job.open(made_from, overwrite=how.overwrite)
        made = make.make_objects(job, maps, options, voxel)
        job.meet_shards()
        if how.shard[0] > 0:
            return ObjectsReport(None, None, maps.shape, block, workers, {}, time.perf_counter() - started)
        write.check_output(output, len(made.kind_M))
        about = write.Output(output, maps.pixel_nm, maps.kind_classes, made.kind_M, {"made_from": made_from})
        write.write_objects(job, made, about, overwrite=how.overwrite)
        overlay = None
        if picture is not None:
            overlay = output.with_name(f"{output.name.split('.')[0]}-overlay.png")
            write.write_overlay(overlay, picture, made.read)
        counts = np.bincount(made.kind_M, minlength=len(maps.kind_names) + 1)[1:]
        job.discard()
        named = dict(zip(maps.kind_names, counts.tolist(), strict=True))
    return ObjectsReport(output, overlay, maps.shape, block, workers, named, time.perf_counter() - started)


def with_values(options: DecodeOptions, assignments: list[str]) -> DecodeOptions:
    """Options with fields replaced by `name=value` texts.

    Raises:
        ConfigError: an unknown field, or a value of another type or out of range.
    """
    changes: dict[str, object] = {}
    for text in assignments:
        name, _, value = text.partition("=")
        if name not in DecodeOptions.__dataclass_fields__:
            known = ", ".join(DecodeOptions.__dataclass_fields__)
            raise ConfigError(f"{name!r} is not an option of affmae objects", f"the options: {known}")
        changes[name] = _parsed(name, value, getattr(options, name))
    return replace(options, **changes)  # type: ignore[arg-type]  # the types are those of the fields


def _parsed(name: str, text: str, like: object) -> object:
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, str):
            return {"components": "components", "watershed": "watershed"}[text]
        return type(like)(text)  # type: ignore[call-arg]  # int or float
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{name}={text!r} is not a valid value", f"the default is {like}") from error


def _workers(decoding: Decoding, block: Shape, how: RunOptions) -> int:
    """Processes that cores and memory allow, or those asked for if memory allows them."""
    budget = memory_budget()
    if how.workers:
        make.check_memory(decoding, block, how.workers, budget)
        return how.workers
    make.check_memory(decoding, block, 1, budget)
    fitting = budget // make.working_bytes(decoding, block)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(fitting)))


def _check_apart(output: Path, files: MapFiles) -> None:
    """Raises ConfigError when the output would replace an input or lie in it."""
    target = Path(os.path.realpath(output))
    for source in [*files.sources, *([files.boundary] if files.boundary else [])]:
        origin = Path(os.path.realpath(source))
        if target == origin or target in origin.parents or (origin.is_dir() and origin in target.parents):
            raise ConfigError(f"the output {output} would touch the input {source}", "choose another -o/--out")
