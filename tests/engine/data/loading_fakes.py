"""Datasets that misbehave, in a module of their own: worker processes must be able to import them."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from affmae_engine.errors import CorruptError


class Counting:
    """Sample i holds i."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "square": torch.full((2, 2), index * index)}


class Described(Counting):
    """Names its source."""

    def describe(self, index: int) -> str:
        return f"image 'slice{index}'"


class Raising(Described):
    """Sample 5 raises `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def sample(self, index: int, /) -> dict[str, Tensor]:
        if index == 5:
            raise self.error
        return super().sample(index)


class Ragged(Described):
    """Sample 5 has another shape than its neighbours."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        return {"index": torch.zeros(2 if index == 5 else 1)}


class Damaged(Described):
    """Sample 5 is damaged in a way that has a type and a hint."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        if index == 5:
            raise CorruptError("chunk 1/2/3 is damaged (section 0 of image 'a')", "ingest it again")
        return super().sample(index)


class Dying(Described):
    """Sample 5 kills its process, the first `times` times."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def sample(self, index: int, /) -> dict[str, Tensor]:
        deaths = len(list(self.folder.iterdir()))
        if index == 5 and deaths < self.times:
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index)


class Hanging(Described):
    """Sample 5 never comes."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        if index == 5:
            time.sleep(3600)
        return super().sample(index)


class Signalled(Described):
    """Sample 5 sends its own process the signals that a whole process group may get."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        if index == 5:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return super().sample(index)


class Threads:
    """How many threads linear algebra adds to a worker."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        square = np.ones((800, 800), np.float32)
        before = psutil.Process().num_threads()
        square @ square
        return {"index": torch.tensor(psutil.Process().num_threads() - before)}
