"""Engine of affmae: data, model, training and prediction. Imports no terminal library.

    import affmae_engine as affmae
    labels = affmae.load("runs/seg").predict(array, pixel_size=(30, 5, 5))

The names of the Python interface (docs/python.md) are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from affmae_engine.api import Model, load
    from affmae_engine.embedding import Embedding
    from affmae_engine.training_api import Run, finetune, ingest, open_run, pretrain, resume

__all__ = ["Embedding", "Model", "Run", "finetune", "ingest", "load", "open_run", "pretrain", "resume"]

_HOME = {
    "Embedding": "embedding",
    "Model": "api",
    "load": "api",
    "Run": "training_api",
    "finetune": "training_api",
    "ingest": "training_api",
    "open_run": "training_api",
    "pretrain": "training_api",
    "resume": "training_api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.platforms").require_supported()
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
