"""`affmae slurm`: a job script for any training or prediction, printed or submitted."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from affmae_cli import output
from affmae_engine.errors import ConfigError, ResourceError

_OWN = {
    "pretrain": {"--seed": "use --seeds"},
    "finetune": {"--seed": "use --seeds"},
    "predict": {
        "--shard": "use --shards",
        "--overwrite": "remove the old output first: a job that continues would replace its own finished part",
    },
}
"""Options of the commands that job scripts cannot have, and what to do instead."""


def slurm(
    ctx: typer.Context,
    command: Annotated[Literal["pretrain", "finetune", "predict"], typer.Argument(help="The command to run.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="PATH", help="As for the command.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Continue this training.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes (training).")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs on each node; 0: none.")] = 1,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="CPU cores on each node.")] = 8,
    time: Annotated[str, typer.Option("--time", help="Time limit of one job, as Slurm writes it.")] = "24:00:00",
    warning: Annotated[
        int, typer.Option("--warning", min=10, help="Seconds before the limit at which the command is stopped.")
    ] = 300,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0-4", help="Training: an array job with a run per seed.")
    ] = None,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Prediction: an array job with this many parts.")] = 1,
    setup: Annotated[
        list[str] | None, typer.Option("--setup", metavar="LINE", help="Shell before the command. May be repeated.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="Of sbatch, such as --sbatch=--partition=gpu. Repeatable."),
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Interpreter on the nodes; by default this one.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script instead of printing it.")] = False,
) -> None:
    """Print a Slurm job script that runs a command, or submit it.

    Write the command as usual, with its own options: affmae slurm pretrain data/em.zarr --preset h200-em -o runs/em
    --nodes 2 --gpus-per-node 4. Before the time limit training saves a checkpoint and prediction keeps its finished
    part; the job is queued again and continues (docs/cluster.md).
    """
    from affmae_engine.slurm import Job, job_script

    words = tuple(ctx.args)
    if resume is not None:
        if command == "predict" or words or out is not None or seeds is not None:
            raise ConfigError(
                "--resume continues one training with its own settings", "affmae slurm pretrain --resume RUN"
            )
        if not (resume / "config.toml").is_file():
            raise ConfigError(f"{resume} is not a run directory", "name a run that has begun")
    elif out is None:
        raise ConfigError("a job needs a place for its result", "name it with -o")
    for option, instead in _OWN[command].items():
        if any(word == option or word.startswith(f"{option}=") for word in words):
            raise ConfigError(f"{option} cannot be used in a job", instead)
    target = resume if resume is not None else out
    assert target is not None
    given = {} if python is None else {"python": python}
    job = Job(
        command, words, target, nodes=nodes, gpus=gpus, cpus=cpus, time=time, warning=warning, seeds=seeds,
        shards=shards, setup=tuple(setup or ()), options=tuple(sbatch or ()), **given,
    )  # fmt: skip
    if resume is None:
        _parse(command, [*words, "-o", str(out)])
        begun = [path for path in job.outputs() if (path / "config.toml").is_file()] if command != "predict" else []
        if begun:
            raise ConfigError(f"the run {begun[0]} exists already", f"continue it with --resume {begun[0]}")
    script = job_script(job)
    if submit:
        _submit(script)
    else:
        output.show(script)


def _parse(command: str, words: Sequence[str]) -> None:
    """Raises a usage error now for what the command would refuse in the job."""
    from affmae_cli.main import app

    root = typer.main.get_command(app)
    root.get_command(typer.Context(root), command).make_context(command, list(words)).close()  # type: ignore[attr-defined]


def _submit(script: str) -> None:
    try:
        done = subprocess.run(["sbatch"], input=script, text=True, capture_output=True)
    except FileNotFoundError as error:
        raise ResourceError("sbatch was not found", "submit from a login node of the cluster") from error
    if done.returncode:
        raise ResourceError(
            f"sbatch refused the job: {' '.join(done.stderr.split())}", "look at the script without --submit"
        )
    output.show(done.stdout.strip())
