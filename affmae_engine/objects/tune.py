"""Choosing the decoder's options on a labeled part by object score.

A coordinate search: one option after the other takes the value with the best panoptic quality (of equal ones, the
lowest adapted Rand error), until a round changes nothing. The part is decoded in memory as one block.

Axes: Z Y X.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from affmae_engine import atomic, model_package
from affmae_engine.data.readers.limits import memory_budget
from affmae_engine.errors import ConfigError, CorruptError, InputError
from affmae_engine.objects import volumes
from affmae_engine.objects.blocks import Shape, Window
from affmae_engine.objects.decode import DecodeOptions, Decoding
from affmae_engine.objects.make import check_memory, objects_in_memory, relative_voxel
from affmae_engine.objects.maps import MapFiles, Maps
from affmae_engine.objects.scores import ObjectScores, score_blocks
from affmae_engine.objects_options import options_file, stored_record

_TRIED: dict[str, tuple[float, ...]] = {
    "seed_distance": (1, 1.5, 2, 3, 4, 5, 7, 10, 14, 20),
    "boundary": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "foreground": (0.3, 0.4, 0.5, 0.6, 0.7),
    "join_neck": (0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
    "boundary_weight": (0.0, 0.3, 0.5, 0.8, 1.0),
    "min_voxels": (1, 20, 50, 100, 200, 500, 1000, 2000),
    "link_iou": (0.1, 0.2, 0.3, 0.5),
    "link_overlap": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}
_LINKING = ("link_iou", "link_overlap")
_ROUNDS = 3


@dataclass(frozen=True)
class Tuned:
    """Options, their scores on the labeled part, and what changed last, in words."""

    options: DecodeOptions
    scores: ObjectScores
    changed: str = ""


class _Part(Maps):
    """A window of maps as maps of their own."""

    def __init__(self, files: MapFiles, window: Window) -> None:
        super().__init__(files)
        self._offset = [s.start for s in window]
        z, y, x = (s.stop - s.start for s in window)
        self.shape: Shape = z, y, x

    def kinds(self, z: slice, y: slice, x: slice, threshold: float) -> np.ndarray:
        return super().kinds(*self._moved(z, y, x), threshold)

    def boundary(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        return super().boundary(*self._moved(z, y, x))

    def distance(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        return super().distance(*self._moved(z, y, x))

    def _moved(self, *window: slice) -> Window:
        z, y, x = (slice(s.start + o, s.stop + o) for s, o in zip(window, self._offset, strict=True))
        return z, y, x


def tune(
    files: MapFiles,
    truth: Path,
    start: DecodeOptions,
    *,
    window: tuple[slice, slice, slice] | None = None,
    smallest: int = 1,
    on_better: Callable[[Tuned], None] = lambda _: None,
) -> Tuned:
    """Search for better options.

    Args:
        truth: labels of true objects, of the same shape as the maps.
        start: where the search begins; `method` and `sections` are kept.
        window: the labeled part, slices along z, y, x; None takes everything.
        smallest: true and found objects of fewer voxels do not count.
        on_better: called with the options at the start and with every improvement.

    Raises:
        InputError: a file cannot be read, or there is no true object in the part.
        ResourceError: the part does not fit in memory.
    """
    with volumes.open_labels(truth) as source:
        shape = source.info.shape_ZYX
        part = _bounds(window, shape)
        true = source.read(*part)
    if not true.any():
        raise InputError(f"{truth} has no object in the part to tune on", "name another --region")
    with _Part(files, part) as maps:
        with Maps(files) as whole:
            if whole.shape != shape:
                raise InputError(f"{truth} has the shape {shape} and the maps have {whole.shape}", "give the same")
        check_memory(Decoding(maps, start, relative_voxel(maps, sections=start.sections)), maps.shape, 1,
                     memory_budget())  # fmt: skip
        best = Tuned(start, _scored(maps, start, true, smallest), "options at the start")
        on_better(best)
        for _ in range(_ROUNDS):
            before = best.options
            for name in _relevant(maps, start):
                for value in _TRIED[name]:
                    kept = getattr(best.options, name)
                    if value == kept:
                        continue
                    options = replace(best.options, **{name: type(kept)(value)})
                    tried = Tuned(options, _scored(maps, options, true, smallest), f"{name} = {value:g}")
                    if _rank(tried.scores) > _rank(best.scores):
                        best = tried
                        on_better(best)
            if best.options == before:
                break
    return best


def store_options(model: Path, options: DecodeOptions, scores: ObjectScores) -> Path:
    """Write the options into a run, or beside a weights file; returns the file.

    Raises:
        InputError: there is no such model.
        ResourceError: the file cannot be written.
    """
    path = options_file(model)
    finite = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(scores).items()}
    atomic.commit_json(path, {"schema": 1, "options": asdict(options), "scores": finite})
    return path


def stored_options(model: Path) -> DecodeOptions | None:
    """The options that were tuned for a model, also in a package; None when there are none.

    Raises:
        InputError: there is no such model.
        CorruptError: the file was damaged.
    """
    about = model_package.described(model)
    record = (about.objects or None) if about is not None else stored_record(model)
    if record is None:
        return None
    try:
        values = record["options"]
        known = {f.name for f in fields(DecodeOptions)}
        return DecodeOptions(**{k: v for k, v in values.items() if k in known})
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CorruptError(f"{model} does not hold options of affmae objects", "tune again with --tune") from error


def _relevant(maps: Maps, options: DecodeOptions) -> list[str]:
    """The options that matter for these maps and this method."""
    names = ["min_voxels"]
    if maps.probabilities:
        names.insert(0, "foreground")
    if options.method == "watershed":
        names = ["seed_distance", "join_neck", *(["boundary", "boundary_weight"] if maps.divides else []), *names]
    if options.sections and maps.shape[0] > 1:
        names += _LINKING
    return names


def _scored(maps: Maps, options: DecodeOptions, true: np.ndarray, smallest: int) -> ObjectScores:
    found = objects_in_memory(maps, options, relative_voxel(maps, sections=options.sections))
    return score_blocks([(true, found)], smallest=smallest)


def _rank(scores: ObjectScores) -> tuple[float, float]:
    """What is compared: higher is better."""
    return (-1.0 if math.isnan(scores.pq) else scores.pq), -scores.adapted_rand_error


def _bounds(window: tuple[slice, slice, slice] | None, shape: Shape) -> Window:
    """Slices with both ends, inside the volume."""
    whole = (slice(None),) * 3 if window is None else window
    z, y, x = (slice(*s.indices(n)[:2]) for s, n in zip(whole, shape, strict=True))
    if any(s.stop <= s.start for s in (z, y, x)):
        raise InputError(f"the region to tune on is empty in a volume of {shape} voxels", "name another --region")
    return z, y, x
