"""Settings of a resumed run: its own, with what the user asks for over them, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from affmae_engine.errors import ConfigError

if TYPE_CHECKING:
    from affmae_engine.config import RunConfig, Task
    from affmae_engine.run_dir import RunDir


def resolve_continuation(
    run: RunDir, task: Task, *, overrides: Sequence[str] | None, flags: Mapping[str, Any]
) -> RunConfig:
    """The run's settings with `--set`, flags and the environment over them.

    Raises:
        ConfigError: a setting differs that a resumed run must keep; all of them are listed with both values.
    """
    from affmae_cli.settings import resolve
    from affmae_engine.train.resume import check_continuation

    resolved = resolve(task, overrides=overrides, flags=flags, run=run)
    check_continuation(run, resolved.config)
    return resolved.config


def refuse_with_resume(**given: object) -> None:
    """Options that belong to new runs only.

    Args:
        given: option name (underscores for dashes) and its value; None, False and empty mean "not given".

    Raises:
        ConfigError: one was given.
    """
    names = ["--" + name.replace("_", "-") for name, value in given.items() if value]
    if names:
        raise ConfigError(
            f"{' and '.join(names)} cannot go with --resume, which continues a run as it is",
            "to begin a new run from its weights, use --init-from instead of --resume",
        )
