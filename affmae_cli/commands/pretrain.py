"""`affmae pretrain`: masked-autoencoder pretraining, from new or continuing a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from affmae_cli import output
from affmae_cli.options import (
    BatchOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    EpochsOption,
    InitFromOption,
    JsonOption,
    NoTuiOption,
    OutOption,
    OverwriteOption,
    PresetOption,
    QuietOption,
    ResumeOption,
    SeedOption,
    SetOption,
    StepsOption,
    TensorBoardOption,
)
from affmae_cli.processes import several
from affmae_cli.trainer_process import dashboard_wanted, train_in_dashboard
from affmae_engine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from affmae_cli.settings import Resolved
    from affmae_engine.data.store import Store
    from affmae_engine.run_dir import RunDir
    from affmae_engine.train.pretraining import PretrainTask
    from affmae_engine.train.trainer import Summary

DEFAULT_DATA = Path("data/em.zarr")


def pretrain(
    data: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DATA]", help="Dataset made by `affmae ingest`.", show_default=str(DEFAULT_DATA)),
    ] = None,
    preset: PresetOption = "auto",
    config: ConfigOption = None,
    set_: SetOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    init_from: InitFromOption = None,
    resume: ResumeOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    no_tui: NoTuiOption = False,
    tensorboard: TensorBoardOption = False,
) -> None:
    """Learn from images without labels.

    The result is a run directory; `affmae finetune --init-from RUN` builds on it. In a terminal the dashboard opens;
    leaving it asks whether to stop or go on. With --no-tui Ctrl-C saves a checkpoint and ends. `affmae pretrain
    --resume RUN` goes on from there.
    """
    if dashboard_wanted(no_tui=no_tui or dry_run or several(), quiet=quiet, as_json=json):
        raise typer.Exit(train_in_dashboard())
    if tensorboard:
        from affmae_cli.tensorboard_copy import check_installed

        check_installed()
    flags = {"steps": steps, "epochs": epochs, "batch": batch, "seed": seed, "device": device}
    if resume is not None:
        from affmae_cli.resume import refuse_with_resume

        refuse_with_resume(
            preset=preset != "auto", config=config, out=out, init_from=init_from, overwrite=overwrite, dry_run=dry_run
        )
        run, task, store = _continued(resume, data, set_, flags)
    else:
        from affmae_cli.settings import resolve

        resolved = resolve("pretrain", preset=preset, config_file=config, overrides=set_, flags=flags, quiet=quiet)
        if dry_run:
            store = _open_store(data)
            # Only now, for loading torch takes seconds.
            from affmae_cli.dry_run import show_dry_run
            from affmae_engine.train.plan import plan_pretraining

            show_dry_run(resolved, plan_pretraining(resolved.config, store, init_from=init_from), as_json=json)
            return
        run, task, store = _new(resolved, data, out, init_from, overwrite=overwrite)

    from affmae_cli.progress import watched_trainer

    with watched_trainer(
        run, task, data=store.path, resume=resume is not None, quiet=quiet, tensorboard=tensorboard
    ) as trainer:
        summary = trainer.fit()
    _show(run, summary, as_json=json, quiet=quiet)


def _new(
    resolved: Resolved, data: list[Path] | None, out: Path | None, init_from: Path | None, *, overwrite: bool
) -> tuple[RunDir, PretrainTask, Store]:
    """A new run directory, and what is trained in it."""
    from affmae_engine.run_dir import RunDir, create, free_name

    if out is not None and out.exists() and not overwrite:
        create(out)  # refuses now, not after the data was read
    if out is not None:
        RunDir(out).refuse_to_replace([*(data or [DEFAULT_DATA]), *([init_from] if init_from else [])])
    store = _open_store(data)
    # Only now, for loading torch takes seconds: a mistyped name is told at once.
    from affmae_engine.runtime.device import pick_device
    from affmae_engine.train.environment import command_line, write_environment
    from affmae_engine.train.pretraining import PretrainTask

    choice = pick_device(resolved.config.train)
    task = PretrainTask(resolved.config, store, init_from=init_from)
    run = create(out or free_name(Path("runs"), f"pretrain-{store.path.stem}"), overwrite=overwrite)
    command = {
        "line": command_line(),
        "preset": resolved.preset,
        "sources": resolved.sources,
        "init_from": init_from and str(init_from.absolute()),
    }
    # The environment comes first: a folder with a config.toml is a run, and a run knows its data.
    write_environment(run, "pretrain", choice, store=store, command=command, backend=task.config.kernels.backend)
    run.write_config(task.config, "pretrain")
    return run, task, store


def _continued(
    root: Path, data: list[Path] | None, set_: list[str] | None, flags: dict[str, Any]
) -> tuple[RunDir, PretrainTask, Store]:
    """The run to resume, and what is trained in it."""
    from affmae_cli.resume import resolve_continuation
    from affmae_engine.run_dir import open_run
    from affmae_engine.train.environment import check_same_data, recorded_data, recorded_origin, recorded_task
    from affmae_engine.train.pretraining import PretrainTask
    from affmae_engine.train.resume import check_length

    run = open_run(root)
    if recorded_task(run) == "finetune":
        raise ConfigError(f"{root} is not a pretraining run", f"continue it with: affmae finetune --resume {root}")
    recorded = recorded_data(run)
    asked = resolve_continuation(run, "pretrain", overrides=set_, flags=flags)
    before = Path(recorded["path"])
    if not data and not before.exists():
        raise InputError(
            f"the data of {root} is not at {before} any more",
            f"if it was moved: affmae pretrain NEW_PATH --resume {shlex.quote(str(root))}",
        )
    store = _open_store(data or [before])
    check_same_data(run, store)
    task = PretrainTask(asked, store, init_from=recorded_origin(run))
    check_length(run, task.config.train.steps)
    return run, task, store


def _open_store(data: list[Path] | None) -> Store:
    from affmae_engine.data.store import Store
    from affmae_engine.data.store_layout import StorePaths

    paths = data or [DEFAULT_DATA]
    raw = [path for path in paths if path.exists() and not StorePaths(path).ledger.is_file()]
    if raw or len(paths) > 1:
        what = f"{raw[0]} is not a dataset" if raw else "pretraining takes one dataset"
        raise InputError(
            f"{what}; images are collected into one first",
            f"run `affmae ingest {shlex.join(map(str, paths))}`, then `affmae pretrain`",
        )
    return Store.open(paths[0])


def _show(run: RunDir, summary: Summary, *, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from affmae_engine.runtime.formatting import number

    if as_json:
        output.print_json({"run": run.root, **asdict(summary)})
        return
    best = (
        f", best held-out loss {number(-summary.best_score)} at step {summary.best_step}" if summary.best_score else ""
    )
    output.show(f"{run.root}: {summary.step} steps{best}")
    if not quiet:
        then = f"affmae finetune --images IMAGES --labels LABELS --init-from {run.root}"
        output.say(then, label="next", style="bold cyan")
