"""Compares the settings of a resumed run with those it had; `config.OnResume` says what may differ."""

from __future__ import annotations

from typing import Any

from affmae_engine.config import OnResume, RunConfig, on_resume
from affmae_engine.errors import ConfigError
from affmae_engine.run_dir import RunDir


def check_continuation(run: RunDir, asked: RunConfig) -> None:
    """Compare the settings for a continuation with the run's own.

    Raises:
        ConfigError: a setting differs that must not; lists all of them with both values.
    """
    changed = _changes(run.read_config(), asked, OnResume.KEPT)
    if not changed:
        return
    lines = "\n  ".join(
        f"{path}: {'not set' if before is None else before} in the run, {'not set' if now is None else now} now"
        for path, (before, now) in changed.items()
    )
    raise ConfigError(
        f"a resumed run keeps its settings; these differ:\n  {lines}",
        "leave them out (and AFFMAE_ variables unset), or begin a new run from these weights with --init-from "
        f"{run.root}",
    )


def rounding_notes(before: RunConfig, now: RunConfig) -> list[str]:
    """What a continuation changes that shows in the last digits, or in what dropout draws; one sentence each."""
    draws = now.model.drop_path > 0 or now.model.decoder_dropout > 0
    kept = "up to rounding and the draws of dropout" if draws else "up to rounding"
    return [
        f"{path} is {new} from here on, was {old}: the result stays the same {kept}"
        for path, (old, new) in _changes(before, now, OnResume.ROUNDING).items()
    ]


def check_length(run: RunDir, steps: int) -> None:
    """Raises ConfigError when a run of `steps` steps would not go beyond what the run has done already."""
    planned = run.read_config().train.steps
    finished = run.read_json(run.summary).get("status") == "finished"
    done = finished and next(iter(run.checkpoint_steps()), 0) >= planned  # its last checkpoint may be lost
    if steps < planned:
        raise ConfigError(f"{run.root} is a run of {planned} steps; a continuation cannot make it shorter ({steps})")
    if done and steps == planned:
        raise ConfigError(f"{run.root} is finished ({planned} steps)", "train it longer with --steps")


def _changes(before: RunConfig, now: RunConfig, policy: OnResume) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each field of this policy that differs."""
    old, new = _flat(before), _flat(now)
    return {path: (old[path], new[path]) for path in new if on_resume(path) is policy and old[path] != new[path]}


def _flat(config: RunConfig) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
