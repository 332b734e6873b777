"""What file names say: which image a file belongs to, and whether it is labels, a prediction or a picture of results.

`cell_07_cp_masks.png` belongs to `cell_007.tif` and is a label map. Words are taken from the ends of a name, as
Cellpose, nnU-Net, Ilastik, napari and affmae write them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["", "label map", "prediction", "overlay", "preview"]

_ROLES: tuple[tuple[str, Role], ...] = (
    (r"(?:cp|cellpose)[ _-]?masks?|labels?|masks?|seg(?:mentations?)?|gt|ground[ _-]?truth|annotations?|instances?"
     r"|semantic|truth", "label map"),
    (r"pred(?:ictions?)?|predicted|prob(?:abilit(?:y|ies)|s)?|simple segmentation", "prediction"),
    (r"overlays?|outlines?|contours?", "overlay"),
    (r"previews?|thumb(?:nail)?s?|screenshots?", "preview"),
)  # fmt: skip
_IMAGE_WORDS = r"images?|img|raw|em"
_ANY_WORD = "|".join([*(words for words, _ in _ROLES), _IMAGE_WORDS])
_SUFFIX = re.compile(rf"[ _.-]+(?:{_ANY_WORD})$", re.IGNORECASE)
_PREFIX = re.compile(rf"^(?:{_ANY_WORD})(?:[ _.-]+(?=[^ _.-])|(?=[0-9]))", re.IGNORECASE)
_INNER = re.compile(rf"[ _.-]+(?:{_ANY_WORD})(?=[ _.-]+[0-9]+$)", re.IGNORECASE)  # train_mask_0
_FOLDER = re.compile(rf"^(?:{_ANY_WORD})$", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Parsed:
    """A file's name taken apart. bare: without the words, in lower case. role: what the words make of it, "" for an
    image."""

    bare: str
    role: Role


def stem(path: Path) -> str:
    """The name without its extension, or without two where it ends in `.ome.tif` or `.tif.gz`."""
    first = path.name[: -len(path.suffix)] if path.suffix else path.name
    inner = Path(first)
    return inner.stem if inner.suffix.lower() in (".ome", ".tif", ".tiff", ".nii", ".mrc") else first


def parse(path: Path) -> Parsed:
    """Take words such as `_label`, `mask-` or `_cp_masks` from both ends of a name, and from before a last number."""
    name, role = stem(path), ""
    while True:
        found = _SUFFIX.search(name) or _PREFIX.search(name) or _INNER.search(name)
        if found is None:
            return Parsed(name.casefold(), role)  # type: ignore[arg-type]
        role = role or _role_of(found.group().strip(" _.-"))
        name = name[: found.start()] + name[found.end() :]


def folder_role(name: str) -> Role:
    """What a folder of that name holds, such as `labels`, `masks` or `overlays`; "" for images and any other name."""
    return _role_of(name) if _FOLDER.match(name) else ""


def is_word(name: str) -> bool:
    """Whether a name is nothing but one of the words, images included."""
    return bool(_FOLDER.match(name))


def without_padding(name: str) -> str:
    """A name with its numbers written without leading zeros."""
    return _NUMBER.sub(lambda found: str(int(found.group())), name)


def last_number(path: Path) -> int | None:
    """The last number in a file's name without its words: the section in `vol_z003_mask.png` is 3."""
    numbers = _NUMBER.findall(parse(path).bare)
    return int(numbers[-1]) if numbers else None


def _role_of(word: str) -> Role:
    return next((role for words, role in _ROLES if re.fullmatch(words, word, re.IGNORECASE)), "")
