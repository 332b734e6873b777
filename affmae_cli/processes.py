"""A command that `torchrun` started in several processes: the first one runs it, the others follow.

    torchrun --standalone --nproc-per-node 2 -m affmae_cli pretrain em.zarr -o runs/em

The first process alone reads options, checks, makes the run directory and speaks. When it is about to train it
announces the run, its settings and its data to the others, which load the same and join the training; when it fails
before, it announces that. Unusual: a process that failed ends without an interpreter's clean-up, which could wait for
ever for a collective that a dead process will not enter; the launcher then ends the rest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from affmae_cli import output
from affmae_cli.errors import report
from affmae_engine.errors import AffmaeError, DivergedError, Interrupted, PeerLost

if TYPE_CHECKING:
    from affmae_engine.run_dir import RunDir
    from affmae_engine.runtime.distributed import Ranks
    from affmae_engine.train.task import Task

_SHARED = (Interrupted, DivergedError)
"""Ends of a training that all processes come to in the same step; only the first one tells them."""


class _WhileTraining(Exception):
    """Wraps what ended a training, in which the other processes no longer wait for announcements."""


def several() -> bool:
    """Whether this process is one of several that a launcher started."""
    described = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return described and int(os.environ["WORLD_SIZE"]) > 1


def led(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which may train, run in the first process and followed by the others."""
    if not several():
        return command

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from affmae_engine.runtime.distributed import peer_lost_error, process_group

        with process_group() as ranks, ranks.at_forced_end(lambda: _report_once(peer_lost_error(), ranks)):
            try:
                if ranks.first:
                    command(*arguments, **options)
                    ranks.broadcast_text(json.dumps({"done": True}))
                else:
                    _follow(ranks)
            except BaseException as error:
                _leave(error, ranks)

    return run


@contextlib.contextmanager
def announced(run: RunDir, task: Task, data: Path, *, resume: bool) -> Iterator[None]:
    """Around a training of the first process: the others, if there are any, are told to join it."""
    if not several():
        yield
        return
    from affmae_engine.runtime.distributed import current_ranks

    where = {"run": str(run.root.absolute()), "data": str(data.absolute())}
    settings = task.config.model_dump(mode="json")
    current_ranks().broadcast_text(json.dumps({**where, "task": task.name, "config": settings, "resume": resume}))
    try:
        yield
    except BaseException as error:
        raise _WhileTraining from error


def _follow(ranks: Ranks) -> None:
    """Train whatever is announced, until the first process is done."""
    while True:
        message = json.loads(ranks.broadcast_text(""))
        if "failed" in message:
            os._exit(int(message["failed"]))
        if "done" in message:
            return
        try:
            _join(message)
        except BaseException as error:
            raise _WhileTraining from error


def _join(message: dict[str, Any]) -> None:
    from affmae_engine.config import RunConfig
    from affmae_engine.data.store import Store
    from affmae_engine.run_dir import RunDir
    from affmae_engine.runtime.signals import StopRequest
    from affmae_engine.train.finetuning import FinetuneTask
    from affmae_engine.train.pretraining import PretrainTask
    from affmae_engine.train.trainer import Trainer

    config, store = RunConfig.model_validate(message["config"]), Store.open(Path(message["data"]))
    # The weights will be those of the first process.
    task: Task = PretrainTask(config, store) if message["task"] == "pretrain" else FinetuneTask(config, store)
    with StopRequest().installed() as stop:
        Trainer(RunDir(Path(message["run"])), task, resume=message["resume"], stop=stop).fit()


def _report_once(error: AffmaeError, ranks: Ranks) -> None:
    """Print an error of a training, unless rank 0 does."""
    if ranks.first:
        report(error)
    elif not isinstance(error, (*_SHARED, PeerLost)):
        report(AffmaeError(f"process {ranks.rank}: {error.message}", error.hint))


def _leave(raised: BaseException, ranks: Ranks) -> NoReturn:
    """Print what went wrong, unless another process does, and end."""
    training = isinstance(raised, _WhileTraining)
    error = raised.__cause__ if training and raised.__cause__ is not None else raised
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("interrupted")
    code = error.exit_code if isinstance(error, (AffmaeError, typer.Exit)) else 1
    if isinstance(error, AffmaeError):
        _report_once(error, ranks)
    elif not isinstance(error, (typer.Exit, BrokenPipeError)):
        traceback.print_exception(error)
    with contextlib.suppress(Exception):
        output.flush_results()
        sys.stderr.flush()
    with contextlib.suppress(AffmaeError, RuntimeError):
        if training and isinstance(error, _SHARED):
            ranks.wait()  # the launcher ends the others as soon as one has left
        elif not training and ranks.first:
            ranks.broadcast_text(json.dumps({"failed": code}))
    os._exit(code)
