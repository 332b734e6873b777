"""Inputs of a prediction that are not simply one image of a file: sections of a folder as a stack, a volume seen from
another side; and how any of them is named in a plan and opened again in another process.

Axes: Z Y X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers import Source, open_sources
from affmae_engine.data.readers.files import Original, size_and_mtime
from affmae_engine.data.readers.source import reading
from affmae_engine.data.volumes import Stacked
from affmae_engine.errors import InputError

ORIENTATIONS: dict[str, tuple[int, int, int]] = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}
"""Axes of the volume that become the sections, rows and columns of its planes."""


class SectionStack(Stacked):
    """Single sections of equal size, in the order given, as one stack.

    Args:
        sections: at least one.
        name: of the stack, for messages and the output.
    """

    def __init__(self, sections: Sequence[Source], name: str) -> None:
        super().__init__(sections)
        self.info = replace(self.info, path=sections[0].info.path.parent, series="", name=name, notes=())


class Reoriented(Source):
    """A volume whose planes are those of another orientation; `read` takes and gives them in that order."""

    def __init__(self, volume: Source, axes: tuple[int, int, int]) -> None:
        info = volume.info
        z, y, x = axes
        shape = info.shape_ZYX[z], info.shape_ZYX[y], info.shape_ZYX[x]
        pixel_nm = info.pixel_nm[z], info.pixel_nm[y], info.pixel_nm[x]
        super().__init__(replace(info, shape_ZYX=shape, pixel_nm=pixel_nm))
        self._volume, self._axes = volume, axes

    def _open(self) -> Source:
        return self._volume

    def _close(self, handle: Any) -> None:
        self._volume.close()

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        wanted = [slice(0)] * 3
        for axis, bounds in zip(self._axes, (z, y, x), strict=True):
            wanted[axis] = slice(*bounds)
        block_ZYX: np.ndarray = handle.read(*wanted)
        return block_ZYX.transpose(self._axes)


def parts_of(source: Source) -> tuple[Source, ...]:
    """The images that an input is made of: its sections, or itself."""
    return source.sections if isinstance(source, SectionStack) else (source,)


def files_of(source: Source) -> list[Path]:
    """The files of an input, each once."""
    return list(dict.fromkeys(part.info.path for part in parts_of(source)))


def identity_of(source: Source) -> list[Any]:
    """What tells an input from another and from its own later versions, as plain JSON values.

    Raises:
        InputError: a file is gone.
    """
    named = []
    for part in parts_of(source):
        with reading(part.info.path):
            named.append([part.info.path.name, part.info.series, *size_and_mtime(part.info.path)])
    return [*named, list(source.info.shape_ZYX)]


def described(source: Source) -> list[list[str]]:
    """Where the images of an input are, for `reopened`."""
    return [[str(part.info.path.absolute()), part.info.series] for part in parts_of(source)]


def reopened(named: Sequence[Sequence[str]], name: str) -> Source:
    """The input that `described` named, in this process.

    Raises:
        InputError: it is not there, or not the same any more.
    """
    found = []
    for path, series in named:
        matching = [source for source in open_sources(Path(path)) if source.info.series == series]
        if not matching:
            raise InputError(f"{path} has no image {series or 'of its own'} any more", "start the prediction again")
        found.append(matching[0])
    return found[0] if len(found) == 1 else SectionStack(found, name)


@dataclass(frozen=True)
class Originals:
    """The files of an input as they were when the work began."""

    files: tuple[tuple[Path, Original], ...]

    @classmethod
    def of(cls, source: Source, identity: Sequence[Any]) -> Originals:
        """As `identity_of` found them."""
        noted = {}
        for part, (_, _, size, mtime) in zip(parts_of(source), identity[:-1], strict=True):
            with reading(part.info.path):
                noted[part.info.path] = Original(part.info.path, (size, mtime))
        return cls(tuple(noted.items()))

    def require_unchanged(self) -> None:
        """Raises InputError when a file is not the one that was read, ResourceError when that cannot be asked."""
        for path, original in self.files:
            with reading(path):
                if original.changed():
                    raise InputError(f"{path} changed while it was read", "predict it when it is complete")
