"""Training a toy task, whose configuration the tests choose."""

from typing import Any

from affmae_engine.config import RunConfig
from affmae_engine.run_dir import RunDir
from affmae_engine.train.task import Task
from affmae_engine.train.trainer import Summary, Trainer


def fit(run: RunDir, config: RunConfig, task: Task, **options: Any) -> Summary:
    """Train `task` with `config`; options are those of `Trainer`."""
    task.config = config
    return Trainer(run, task, **options).fit()
