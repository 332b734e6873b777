"""Arrays behind URLs (https, s3, gs) and in formats of chunked arrays that only tensorstore reads (N5, precomputed).

One library for all of it: it reads chunks lazily, retries what fails, and knows the codecs. Nothing is asked of the
network unless a URL was given. Over https no server lists folders, so a URL has to name an array, an OME-Zarr image,
or a hierarchy with consolidated metadata. On S3 the user's credentials are used where there are any, otherwise
requests are anonymous. gs:// goes the same way and is not tested.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from affmae_engine.data.readers.files import is_remote
from affmae_engine.data.readers.formats import missing
from affmae_engine.data.readers.hierarchy import parse
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, reading
from affmae_engine.errors import InputError, ResourceError, one_line

_RETRIES = {"max_retries": 5, "initial_delay": "100ms", "max_delay": "4s"}
_CONTEXT = {
    "http_request_retries": _RETRIES,
    "s3_request_retries": _RETRIES,
    "gcs_request_retries": _RETRIES,
    "data_copy_concurrency": {"limit": 2},
    "cache_pool": {"total_bytes_limit": 64 << 20},
}
_MARKERS = ("zarr.json", ".zarray", ".zgroup", ".zattrs", "attributes.json", "info")
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip


class Chunked:
    """An array opened by tensorstore, indexed with ints and slices, with an origin of zeros."""

    def __init__(self, root: Path, key: str, driver: str, extra: dict[str, Any]) -> None:
        ts = library("N5 and precomputed")
        spec = {"driver": driver, "kvstore": kvstore(root, key), "context": _CONTEXT, **extra}
        self._root = root
        with network(root):
            array = ts.open(spec, open=True, read=True).result()
        self._array = array[ts.d[:].translate_to[0]]
        self.shape = tuple(int(n) for n in self._array.shape)
        self.dtype = np.dtype(self._array.dtype.numpy_dtype)
        self.piece_bytes = int(np.prod(self._array.chunk_layout.read_chunk.shape, dtype=object)) * self.dtype.itemsize

    def __getitem__(self, selection: tuple[int | slice, ...]) -> np.ndarray:
        with network(self._root):
            return np.asarray(self._array[selection].read().result())


@contextlib.contextmanager
def network(path: Path) -> Iterator[None]:
    """Tell failures of network or server from those of the data at a URL.

    Raises:
        ResourceError: the server does not answer, or does not do so for now.
        InputError: it refuses access.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if not is_remote(path):
            raise
        if "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text or re.search(r"\b40[13]\b", text):
            hint = "on S3: name your credentials, for example with AWS_PROFILE"
            raise InputError(f"cannot read {path}: access was denied", hint) from error
        if re.search(r"retry attempts failed|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", text):
            what = one_line(ValueError(re.sub(r"\[.*|.*?: (?=CURL|HTTP)", "", text)), 100)
            hint = "check the URL and the network, then run the same command again"
            raise ResourceError(f"cannot read {path}: the server does not answer ({what})", hint) from error
        raise


def opener(root: Path, key: str, driver: str, **extra: Any) -> Any:
    """A function that opens an array, to be carried to another process."""
    return partial(Chunked, root, key, driver, extra)


def library(kind: str) -> Any:
    """tensorstore. Raises InputError with a hint where it is not installed."""
    try:
        import tensorstore
    except ImportError as error:
        raise missing("tensorstore", kind) from error
    return tensorstore


def kvstore(root: Path, key: str = "") -> dict[str, Any]:
    """tensorstore's description of where the files of a key are."""
    if not is_remote(root):
        return {"driver": "file", "path": f"{root.absolute() / key}/"}
    url = urlsplit(str(root))
    path = f"{url.path.strip('/')}/{key}".strip("/") + "/"
    if url.scheme in ("http", "https"):
        query = f"?{url.query}" if url.query else ""
        return {"driver": "http", "base_url": f"{url.scheme}://{url.netloc}{query}", "path": f"/{path}"}
    if url.scheme == "gs":
        return {"driver": "gcs", "bucket": url.netloc, "path": path}
    spec: dict[str, Any] = {"driver": "s3", "bucket": url.netloc, "path": path}
    known = any(os.environ.get(name) for name in _CREDENTIALS) or Path("~/.aws/credentials").expanduser().exists()
    spec["aws_credentials"] = {"type": "default" if known else "anonymous"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec["endpoint"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region or endpoint:
        spec["aws_region"] = region or "us-east-1"
    return spec


class RemoteHierarchy:
    """The JSON files of a hierarchy behind a URL; see `hierarchy.Hierarchy`.

    What consolidated metadata tells of (Zarr) is listed, or the first level of a pyramid; nothing else can be.
    """

    def __init__(self, root: Path) -> None:
        ts = library("remote")
        self._root = root
        self._store = ts.KvStore.open({**kvstore(root), "context": _CONTEXT}).result()
        self._read: dict[str, dict[str, Any] | None] = {}
        consolidated = self.json("", "zarr.json") or {}
        self._known = (consolidated.get("consolidated_metadata") or {}).get("metadata") or {}
        if not consolidated:
            metadata = (self.json("", ".zmetadata") or {}).get("metadata") or {}
            self._known = {key.rpartition("/")[0]: value for key, value in metadata.items()}

    def json(self, key: str, name: str) -> dict[str, Any] | None:
        """See `Hierarchy`."""
        path = f"{key}/{name}".strip("/")
        if path not in self._read:
            with network(self._root):
                found = self._store.read(path).result()
            self._read[path] = parse(found.value, path) if found.state == "value" else None
        return self._read[path]

    def children(self, key: str) -> list[str]:
        """See `Hierarchy`."""
        below = f"{key}/" if key else ""
        names = {one[len(below) :].split("/")[0] for one in self._known if one.startswith(below)} - {""}
        if not names:  # the full resolution of a pyramid can be asked for
            names = {name for name in ("0", "s0") if any(self.json(f"{below}{name}", m) for m in _MARKERS)}
        return sorted(f"{below}{name}" for name in names)

    def visited(self, key: str, seen: set[str]) -> bool:
        """See `Hierarchy`."""
        known = key in seen
        seen.add(key)
        return known


def open_remote(path: Path, options: ReadOptions) -> Found:
    """The images behind a URL, whose format is found out by the metadata that is there.

    Raises:
        InputError: there is no Zarr, N5 or precomputed metadata, or it cannot be fetched.
    """
    from affmae_engine.data.readers.n5 import open_n5
    from affmae_engine.data.readers.precomputed import open_precomputed
    from affmae_engine.data.readers.zarr_array import arrays_found
    from affmae_engine.data.readers.zarr_metadata import find_arrays

    with reading(path):
        tree = RemoteHierarchy(path)
        marker = next((name for name in _MARKERS if tree.json("", name) is not None), None)
        if marker is None:
            raise Refused(
                "there is no zarr.json, .zarray, .zgroup, attributes.json (N5) or info (precomputed)",
                "name the folder of an array or of an OME-Zarr image",
            )
        if marker == "attributes.json":
            return open_n5(path, options, tree)
        if marker == "info":
            return open_precomputed(path, options, tree)
        found = list(find_arrays(tree, labels=options.labels))
        if not found:
            raise Refused("its arrays cannot be listed over the network", "name one array in it")
        driver = "zarr3" if marker == "zarr.json" else "zarr"
        return arrays_found(path, found, options, lambda root, key: opener(root, key, driver))
