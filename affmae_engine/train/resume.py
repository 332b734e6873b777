"""What may differ between a run and its continuation, and how a refused difference is told."""

from __future__ import annotations

from typing import Any

from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError
from affmae_engine.run_dir import RunDir

MAY_CHANGE = frozenset(
    {
        "train.steps",
        "train.epochs",
        "train.log_every",
        "train.eval_every",
        "train.preview_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "data.workers",
    }
)
"""Fields that cannot change what the samples of a step are or what is done with them. A longer run is allowed too: it
continues on the longer cosine. Everything else must be as it was."""


def check_continuation(run: RunDir, asked: RunConfig) -> None:
    """Compare the settings for a continuation with the run's own.

    Raises:
        ConfigError: a setting differs that must not; lists all of them with both values.
    """
    before, now = _flat(run.read_config()), _flat(asked)
    changed = [path for path in now if now[path] != before[path] and path not in MAY_CHANGE]
    if not changed:
        return
    lines = "\n  ".join(f"{path}: {before[path]} in the run, {now[path]} now" for path in changed)
    raise ConfigError(
        f"a resumed run keeps its settings; these differ:\n  {lines}",
        "leave them out (and AFFMAE_ variables unset), or begin a new run from these weights with --init-from "
        f"{run.root}",
    )


def check_length(run: RunDir, steps: int) -> None:
    """Raises ConfigError when a run of `steps` steps would not go beyond what the run has done already."""
    planned = run.read_config().train.steps
    done = run.read_json(run.summary).get("status") == "finished"
    if steps < planned:
        raise ConfigError(f"{run.root} is a run of {planned} steps; a continuation cannot make it shorter ({steps})")
    if done and steps == planned:
        raise ConfigError(f"{run.root} is finished ({planned} steps)", "train it longer with --steps")


def _flat(config: RunConfig) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
