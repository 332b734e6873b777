"""Reading a dataset store (layout: `store_layout.py`).

A `Store` can be pickled and carried over a fork: it remembers the path and reopens arrays lazily in each process.
Everything that is read was verified by checksum (crc32c of each chunk), and a shard file that is not there is an error,
never a block of zeros.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from affmae_engine.data.ledger import replay
from affmae_engine.data.readers.files import natural_key
from affmae_engine.data.readers.zarr_metadata import check_array
from affmae_engine.data.statistics import Statistics, pool
from affmae_engine.data.store_layout import StoredImage, StorePaths
from affmae_engine.errors import CorruptError, InputError, ResourceError, of_system, one_line


class Store:
    """A dataset on disk, read-only."""

    def __init__(self, path: Path, images: list[StoredImage], attributes: Mapping[str, Any]) -> None:
        self.path = path
        self.images = images
        """Finished images, in the natural order of their names, which does not depend on how they were taken in."""
        self._by_name = {image.name: image for image in images}
        self._attributes = dict(attributes)
        self._arrays: dict[tuple[str, bool], Any] = {}
        self._owner = 0

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a dataset made by `affmae ingest`.

        Raises:
            InputError: there is nothing, it is not a dataset of ours, it may not be read, or it has no finished image.
            CorruptError: its metadata is damaged.
            ResourceError: the disk cannot be read.
        """
        if not path.exists():
            raise InputError(f"no such dataset: {path}", "make one with `affmae ingest SOURCE... -o " + f"{path}`")
        state = replay(StorePaths(path).ledger)
        try:
            attributes = json.loads((path / "zarr.json").read_text("utf-8"))["attributes"]["affmae"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise of_system(error) or CorruptError(
                f"{path}: zarr.json is missing or damaged", "run the same `affmae ingest` again: it repairs it"
            ) from error
        if not state.images:
            raise InputError(f"{path} has no finished image", "run the same `affmae ingest` again")
        images = sorted(state.images.values(), key=lambda image: natural_key(image.name))
        return cls(path, images, attributes)

    def __getitem__(self, name: str) -> StoredImage:
        """The image of that name; KeyError when there is none."""
        return self._by_name[name]

    @property
    def statistics(self) -> Statistics:
        """Statistics of the whole dataset (see `statistics.pool`)."""
        return pool([image.statistics for image in self.images])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label values 0, 1, 2, ...; empty when there are no labels."""
        return tuple(self._attributes.get("class_names", ()))

    def read(self, name: str, z: slice, y: slice, x: slice) -> np.ndarray:
        """Grey values [z, y, x] in the stored dtype; slices are clipped to the image like numpy's.

        Raises:
            KeyError: no image of that name.
            CorruptError: a chunk there is missing or damaged.
            InputError, ResourceError: the system refuses to read it, or there is not enough memory.
        """
        return self._read(name, (z, y, x), labels=False)

    def read_labels(self, name: str, z: slice, y: slice, x: slice) -> np.ndarray:
        """Label values [z, y, x] of an image, like `read`.

        Raises:
            KeyError: no image of that name, or it has no labels.
            CorruptError: a chunk there is missing or damaged.
        """
        if not self._by_name[name].labelled:
            raise KeyError(f"{name} has no labels")
        return self._read(name, (z, y, x), labels=True)

    @property
    def pixel_edge_nm(self) -> float | None:
        """Median in-plane edge of a pixel in nanometres over the images that know theirs; None when none does."""
        known = sorted(nm for image in self.images for nm in image.pixel_nm[1:] if nm is not None)
        return known[len(known) // 2] if known else None

    def fingerprint(self) -> str:
        """SHA-256 over what the dataset holds: contents, shapes and types, labels; not paths nor order of ingestion."""
        lines = [
            f"{i.sha256} {i.source_series} {i.channel} {i.shape_ZYX} {i.dtype} {i.pixel_nm} {i.labels_sha256}"
            for i in self.images
        ]
        return sha256("\n".join([*sorted(lines), *self.class_names]).encode()).hexdigest()

    def _read(self, name: str, selection: tuple[slice, slice, slice], *, labels: bool) -> np.ndarray:
        shape = self._by_name[name].shape_ZYX
        bounds = [s.indices(n) for s, n in zip(selection, shape, strict=True)]
        ranges = [range(*bound) for bound in bounds]
        if 0 in map(len, ranges):
            image = self._by_name[name]
            return np.empty([len(r) for r in ranges], image.labels_dtype if labels else image.dtype)
        array = self._array(name, labels)
        try:
            self._require_shards(array, name, ranges, labels)
            return np.asarray(array[selection])
        except CorruptError:
            raise
        except MemoryError as error:
            raise ResourceError(f"not enough memory to read {name} of {self.path}") from error
        except Exception as error:
            what = f"{self.path}: {'labels of ' if labels else ''}{name}"
            # A disk that cannot be read just now, or by this user, holds nothing damaged.
            raise of_system(error, unnamed=what) or CorruptError(
                f"{what}: a chunk is damaged ({one_line(error, 80)})",
                "delete the dataset and ingest it again",
            ) from error

    def _array(self, name: str, labels: bool) -> Any:
        if self._owner != os.getpid():
            self._arrays, self._owner = {}, os.getpid()
        found = self._arrays.get((name, labels))
        if found is None:
            folder = StorePaths(self.path).array(name, labels=labels)
            if Path(os.path.realpath(folder)) != Path(os.path.realpath(self.path)) / folder.relative_to(self.path):
                raise CorruptError(f"{self.path}: {name} is a link out of the dataset", "copy the data into it")
            try:
                check_array(folder)
                found = zarr.open_array(folder, mode="r")
            except Exception as error:
                raise of_system(error) or CorruptError(
                    f"{self.path}: the array of {name} is missing or damaged", "delete the dataset and ingest it again"
                ) from error
            self._arrays[name, labels] = found
        return found

    def _require_shards(self, array: Any, name: str, ranges: list[range], labels: bool) -> None:
        """Zarr takes an absent file for a block of zeros; here every shard of a finished image must exist."""
        folder = StorePaths(self.path).array(name, labels=labels)
        grid = [range(r.start // s, (r.stop - 1) // s + 1) for r, s in zip(ranges, array.shards, strict=True)]
        for i in grid[0]:
            for j in grid[1]:
                for k in grid[2]:
                    if not _is_plain_file(f"{folder}/c/{i}/{j}/{k}"):
                        what = f"{'labels of ' if labels else ''}{name}: chunk file {i}/{j}/{k}"
                        raise CorruptError(
                            f"{self.path}: {what} is missing, or is a link",
                            "delete the dataset and ingest it again",
                        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}, "_owner": 0}


def _is_plain_file(path: str) -> bool:
    """A call of the system and nothing else: this is done for every crop that training reads."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
