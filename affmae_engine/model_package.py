"""A model package: a folder or ZIP file with everything that others need to use a trained model, and no images of it.

    NAME/  model.json           the list of files with sizes and SHA-256, scores, license, how to cite
           weights.safetensors  weights, configuration, normalization, pixel size, class names (see `weights`)
           README.md            the model card
           config.toml          the configuration, to read
           examples/*.png       pictures, where the author added some
           model.pt2            the exported program, where the author added it

`located` finds the weights file of a package wherever a model is named: a folder, a ZIP file, or `hf:ORG/NAME` on the
Hugging Face Hub. Reading a package runs none of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from affmae_engine import atomic
from affmae_engine.errors import ConfigError, CorruptError, InputError, human_bytes, one_line

ABOUT = "model.json"
WEIGHTS = "weights.safetensors"
CARD = "README.md"
SETTINGS = "config.toml"
EXAMPLES = "examples"
EXPORTED = "model.pt2"
HUB_SCHEME = "hf:"
SCHEMA = 1
_LARGEST_ABOUT = 1 << 20
_ON_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HINT = "ask for it again where it came from"
_MADE_BY = "packages are made by affmae share"


class PackagedFile(BaseModel):
    """Size in bytes and SHA-256 of a file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ModelAbout(BaseModel):
    """What model.json says. Unknown fields of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    schema_version: int = SCHEMA
    """Version of this record; a reader refuses one that is newer than it knows."""
    name: str
    """Name of the model."""
    affmae: str = ""
    """Version of affmae that wrote the package."""
    scores: dict[str, Any] = {}
    """Held-out scores of the checkpoint, as the run recorded them."""
    objects: dict[str, Any] = {}
    """Options and thresholds of `affmae objects` that were tuned for the model, as in objects.json of a run."""
    data_license: str = ""
    """License of the training data, as its author gave it."""
    license: str = ""
    """License of the weights, as their author gave it."""
    cite: str = ""
    """How to cite, as the author gave it."""
    source: str = ""
    """Where converted weights came from."""
    files: dict[str, PackagedFile]
    """Every other file of the package by its path in it."""


def write(path: Path, content: Path, about: Mapping[str, Any], *, replace: bool = False) -> ModelAbout:
    """Write a package: a ZIP file (stored, since weights do not compress) where `path` ends in .zip, else a folder.

    Args:
        content: folder with every file but model.json.
        about: fields of `ModelAbout` without `files`.
        replace: replace a package that is there.

    Raises:
        ConfigError: something is there already.
        ResourceError: it cannot be written.
    """
    refuse_existing(path, replace=replace)
    atomic.ensure_folder(path.parent)
    files = {
        file.relative_to(content).as_posix(): PackagedFile(bytes=file.stat().st_size, sha256=_sha256(file))
        for file in sorted(content.rglob("*"))
        if file.is_file()
    }
    described = ModelAbout(**about, files=files)
    record = described.model_dump_json(indent=2)
    if path.suffix != ".zip":
        with atomic.committed_folder(path, replace=replace) as folder:
            shutil.copytree(content, folder, dirs_exist_ok=True)
            (folder / ABOUT).write_text(record, "utf-8")
        return described

    def write_archive(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(ABOUT, record)
            for name in files:
                archive.write(content / name, name)

    atomic.commit_file(path, write_archive)
    return described


def refuse_existing(path: Path, *, replace: bool) -> None:
    """Raises ConfigError unless nothing is at `path`, or a package that may be replaced."""
    if not path.exists() and not path.is_symlink():
        return
    if not replace:
        raise ConfigError(f"{path} exists already", "replace it with --overwrite, or choose another -o/--out")
    if path.is_dir() and not (path / ABOUT).is_file():
        raise ConfigError(f"{path} is a folder and not a model package", "choose another -o/--out")


def located(path: Path) -> Path | None:
    """The verified weights file of a package; None when `path` is not one.

    Args:
        path: a package's folder, its ZIP file, or `hf:ORG/NAME` (`hf:ORG/NAME@REVISION`), as a path.

    Raises:
        InputError: there is no such model on the Hub, or it is not a package; or one of a newer version.
        ConfigError: `huggingface_hub` is not installed.
        CorruptError: the package is damaged.
        ResourceError: a ZIP file's weights cannot be unpacked to the cache.
    """
    if is_on_hub(path):
        return _of_folder(_downloaded(path))
    if path.is_dir() and (path / ABOUT).is_file():
        return _of_folder(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return _of_zip(path)
    return None


def described(path: Path) -> ModelAbout | None:
    """What a package says about itself; None when `path` is not one. Arguments and errors as for `located`."""
    if is_on_hub(path):
        return read_about(_downloaded(path))
    if path.is_dir() and (path / ABOUT).is_file():
        return read_about(path)
    if path.is_file() and zipfile.is_zipfile(path):
        with _opened_zip(path) as (_, about):
            return about
    return None


def check_file(path: Path, name: str, expected: PackagedFile) -> None:
    """Compare one file of a package with what its model.json says.

    Args:
        path: the package's folder or ZIP file.

    Raises:
        CorruptError: it is missing, or differs.
    """
    digest, size = hashlib.sha256(), 0
    with ExitStack() as stack:
        try:
            archive = None if path.is_dir() else stack.enter_context(_opened_zip(path))[0]
            file = stack.enter_context((path / name).open("rb") if archive is None else archive.open(name))
        except (OSError, KeyError) as error:
            raise CorruptError(f"{path}: {name} is missing or cannot be read", _HINT) from error
        while size <= expected.bytes and (piece := file.read(1 << 20)):
            digest.update(piece)
            size += len(piece)
    if size != expected.bytes or digest.hexdigest() != expected.sha256:
        raise CorruptError(f"{path}: {name} does not match its checksum", _HINT)


def _downloaded(path: Path) -> Path:
    from affmae_engine.hub import download

    folder = download(path)
    if not (folder / ABOUT).is_file():
        raise InputError(f"{path} is not a model package: it has no {ABOUT}", _MADE_BY)
    return folder


def is_on_hub(path: Path) -> bool:
    """Whether a model is named by its place on the Hugging Face Hub."""
    return str(path).startswith(HUB_SCHEME)


def hub_name(path: Path) -> tuple[str, str | None]:
    """ORG/NAME and the revision (None: the newest) of `hf:ORG/NAME@REVISION`.

    Raises:
        ConfigError: it is written otherwise.
    """
    match = _ON_HUB.fullmatch(str(path))
    if match is None:
        raise ConfigError(
            f"{path} is not a model on the Hugging Face Hub", "write hf:ORG/NAME, or hf:ORG/NAME@REVISION"
        )
    return match["name"], match["revision"]


def read_about(folder: Path) -> ModelAbout:
    """model.json of a package's folder.

    Raises:
        InputError: there is none, or it is of a newer version.
        CorruptError: it cannot be read.
    """
    file = folder / ABOUT
    if not file.is_file():
        raise InputError(f"{folder} is not a model package: it has no {ABOUT}", _MADE_BY)
    with file.open("rb") as handle:
        return _parsed(handle, f"{file}")


def cache_folder() -> Path:
    """Where weights out of ZIP files are kept: `$XDG_CACHE_HOME/affmae/models`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "affmae" / "models"


def _of_folder(folder: Path) -> Path:
    about, file = read_about(folder), folder / WEIGHTS
    expected = _weights_entry(about, f"{folder}")
    try:
        digest = _sha256(file)
    except OSError as error:
        raise CorruptError(f"{file} cannot be read: {error.strerror or error}", _HINT) from error
    if digest != expected.sha256:
        raise CorruptError(f"{file} does not match its checksum", _HINT)
    return file


def _of_zip(path: Path) -> Path:
    """The weights of a ZIP file, unpacked once to the cache under their SHA-256."""
    with _opened_zip(path) as (archive, about):
        expected = _weights_entry(about, f"{path}")
        if WEIGHTS not in archive.namelist() or archive.getinfo(WEIGHTS).file_size != expected.bytes:
            raise CorruptError(f"{path}: {WEIGHTS} is missing or has the wrong size", _HINT)
        target = cache_folder() / expected.sha256 / WEIGHTS
        if not (target.is_file() and _sha256(target) == expected.sha256):
            atomic.ensure_folder(target.parent)
            with archive.open(WEIGHTS) as source:
                atomic.commit_file(target, lambda partial: _copy(source, partial, expected, path))
        return target


@contextmanager
def _opened_zip(path: Path) -> Iterator[tuple[zipfile.ZipFile, ModelAbout]]:
    """A package's ZIP file, and what its model.json says."""
    try:
        with zipfile.ZipFile(path) as archive:
            if ABOUT not in archive.namelist():
                raise InputError(f"{path} is not a model package: it has no {ABOUT}", _MADE_BY)
            with archive.open(ABOUT) as handle:
                about = _parsed(handle, f"{path}:{ABOUT}")
            yield archive, about
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise CorruptError(f"{path} is damaged: {one_line(error)}", _HINT) from error


def _copy(source: IO[bytes], partial: Path, expected: PackagedFile, path: Path) -> None:
    """Unpack at most the bytes that were announced, and compare them."""
    digest, left = hashlib.sha256(), expected.bytes
    with partial.open("wb") as target:
        while left > 0 and (piece := source.read(min(left, 1 << 20))):
            digest.update(piece)
            target.write(piece)
            left -= len(piece)
    if left or digest.hexdigest() != expected.sha256:
        raise CorruptError(f"{path}: {WEIGHTS} does not match its checksum", _HINT)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _weights_entry(about: ModelAbout, where: str) -> PackagedFile:
    if WEIGHTS not in about.files:
        raise CorruptError(f"{where}: its {ABOUT} lists no {WEIGHTS}", _HINT)
    return about.files[WEIGHTS]


def _parsed(handle: IO[bytes], where: str) -> ModelAbout:
    data = handle.read(_LARGEST_ABOUT + 1)
    if len(data) > _LARGEST_ABOUT:
        raise CorruptError(f"{where} has more than {human_bytes(_LARGEST_ABOUT)}", _HINT)
    try:
        about = ModelAbout.model_validate(json.loads(data))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise CorruptError(f"{where}: {place}: {problem['msg']}", "was it written by another version?") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not valid JSON: {one_line(error)}", _HINT) from error
    if about.schema_version > SCHEMA:
        raise InputError(f"{where} has schema {about.schema_version}; this version reads {SCHEMA}", "update affmae")
    return about
