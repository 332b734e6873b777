"""objects.json: options of `affmae objects` that were tuned for a model, in its run or beside its weights.

Apart from `objects/`, so that sharing a model loads nothing of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from affmae_engine.errors import CorruptError, InputError

FILE = "objects.json"


def options_file(model: Path) -> Path:
    """Where the options of a run, checkpoint or weights file are kept.

    Raises:
        InputError: there is no such model.
    """
    if not model.exists():
        raise InputError(f"there is no model {model}", "name a run, a checkpoint or a weights file")
    return (model if model.is_dir() else model.parent) / FILE


def stored_record(model: Path) -> dict[str, Any] | None:
    """What the file of a model says: "schema", "options" and "scores"; None when there is no file.

    Raises:
        InputError: there is no such model.
        CorruptError: the file was damaged.
    """
    path = options_file(model)
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptError(f"{path} does not hold options of affmae objects", "tune again with --tune") from error
    if not isinstance(record, dict):
        raise CorruptError(f"{path} does not hold options of affmae objects", "tune again with --tune")
    return record
