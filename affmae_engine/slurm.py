"""Job scripts for Slurm: one command of affmae on one or several nodes, or as an array of seeds or shards.

The script runs the command, and before the time limit Slurm signals it (`--signal=B:USR1@SECONDS`): training then gets
a request in RUN/control/ (which reaches a trainer on any node), saves a checkpoint and ends; prediction gets SIGTERM
and keeps its finished blocks. The job is put back into the queue, and the next time it continues: training with
`--resume RUN`, prediction by the same command.

Several nodes or GPUs are started by torchrun, one launcher per node under srun.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from affmae_engine.errors import ConfigError

Command = Literal["pretrain", "finetune", "predict"]

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2}")
_SEEDS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_LAST_PORTS = 20000
"""Rendezvous ports are this number and up to 9999 more, by job, so that jobs on one node do not meet."""


@dataclass(frozen=True)
class Job:
    """What to run and with what.

    command: of affmae. words: its arguments, without -o, --seed and --shard. out: -o, what the command writes (a run
    directory for training). nodes: how many; gpus: per node. cpus: per node. time: limit, as Slurm writes it. warning:
    seconds between the signal and the limit. seeds: for training, an array job with one run per seed ("0-4", "1,5").
    shards: for prediction, an array job with that many parts. setup: lines of shell before the command. options: more
    options of sbatch, such as --partition=gpu. python: the interpreter.
    """

    command: Command
    words: tuple[str, ...]
    out: Path
    nodes: int = 1
    gpus: int = 1
    cpus: int = 8
    time: str = "24:00:00"
    warning: int = 300
    seeds: str | None = None
    shards: int = 1
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    python: str = field(default_factory=lambda: sys.executable)

    def __post_init__(self) -> None:
        if _TIME.fullmatch(self.time) is None:
            raise ConfigError(f"--time {self.time} is no time limit", "write HH:MM:SS, D-HH or minutes")
        if self.seeds is not None and _SEEDS.fullmatch(self.seeds) is None:
            raise ConfigError(f"--seeds {self.seeds} are no seeds", "write 0-4 or 1,5,7")
        if self.command == "predict" and self.seeds is not None:
            raise ConfigError("--seeds are for training", "divide a prediction with --shards N")
        if self.command != "predict" and self.shards > 1:
            raise ConfigError("--shards are for prediction", "train on several nodes with --nodes N")
        if self.command == "predict" and self.nodes > 1:
            raise ConfigError("a prediction job runs on one node", "divide it with --shards N instead of --nodes")
        for option in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=\S.*)?", option) or "\n" in option:
                raise ConfigError(f"{option!r} is not an option of sbatch", "write it as --name=value")

    @property
    def name(self) -> str:
        """Of the job: the command and what it writes."""
        return re.sub(r"[^\w.-]", "-", f"{self.command}-{self.out.name}")

    @property
    def array(self) -> str | None:
        """Task numbers of an array job."""
        return self.seeds if self.seeds is not None else f"0-{self.shards - 1}" if self.shards > 1 else None

    def outputs(self) -> list[Path]:
        """The runs that a training job makes, one per seed."""
        if self.seeds is None:
            return [self.out]
        bounds = [part.split("-") for part in self.seeds.split(",")]
        numbers = [n for first, *last in bounds for n in range(int(first), int(last[0] if last else first) + 1)]
        return [self.out.with_name(f"{self.out.name}-seed{number}") for number in numbers]


def job_script(job: Job) -> str:
    """The batch script, for sbatch."""
    return "\n".join(
        ["#!/bin/bash", *_header(job), "", *(_training(job) if job.command != "predict" else _prediction(job))]
    )


def _header(job: Job) -> list[str]:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        f"--cpus-per-task={job.cpus}",
        f"--time={job.time}",
        f"--signal=B:USR1@{job.warning}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-{'%A_%a' if job.array else '%j'}.log",
        *([f"--array={job.array}"] if job.array else []),
        *job.options,
    ]
    return [f"#SBATCH {option}" for option in options]


def _training(job: Job) -> list[str]:
    out, words = shlex.quote(str(job.out)), shlex.join(job.words)
    seeded = job.seeds is not None
    seed = ' --seed "$SLURM_ARRAY_TASK_ID"' if seeded else ""
    several = job.nodes * max(job.gpus, 1) > 1
    lines = [
        "set -u",
        *job.setup,
        f"python={shlex.quote(job.python)}",
        f"run={out}" + ('-seed"$SLURM_ARRAY_TASK_ID"' if seeded else ""),
        "",
        "# A run that has begun is continued.",
        'if [[ -f "$run/config.toml" ]]; then',
        f'    arguments=({job.command} --resume "$run" --no-tui)',
        "else",
        f'    arguments=({job.command} {words} -o "$run"{seed} --no-tui)',
        "fi",
        "",
        "",
    ]
    wait = _waiting(
        "ask the trainer for a checkpoint and its end",
        'if [[ -d "$run/control" ]]; then touch "$run/control/stop"; else kill -TERM "$child"; fi',
    )
    if not several:
        return [*lines, '"$python" -m affmae_cli "${arguments[@]}" &', *wait]
    launcher = [
        '    "$python" -m torch.distributed.run',
        f"--nnodes={job.nodes} --nproc-per-node={max(job.gpus, 1)}",
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$port"',
        '-m affmae_cli "${arguments[@]}" &',
    ]
    return [
        *lines,
        "# One launcher per node; they meet at the first one.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port=$(({_LAST_PORTS} + SLURM_JOB_ID % 10000))",
        f"srun --nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 \\",
        " \\\n        ".join(launcher),
        *wait,
    ]


def _prediction(job: Job) -> list[str]:
    shard = f' --shard "$SLURM_ARRAY_TASK_ID/{job.shards}"' if job.shards > 1 else ""
    return [
        "set -u",
        *job.setup,
        f"python={shlex.quote(job.python)}",
        "",
        f'"$python" -m affmae_cli predict {shlex.join(job.words)} -o {shlex.quote(str(job.out))}{shard} &',
        *_waiting("stop, which keeps what is finished", 'kill -TERM "$child"'),
    ]


def _waiting(how: str, stop: str) -> list[str]:
    """Shell that waits for the command, stops it on a signal and queues the job again."""
    return [
        "child=$!",
        "",
        f"# Before the time limit: {how}, then queue the job again.",
        f"ask_to_stop() {{ {stop}; }}",
        "again=0",
        "trap 'again=1; ask_to_stop' USR1",
        "trap ask_to_stop TERM",
        "# A signal ends `wait` early, so it is repeated until the command itself has ended.",
        "while true; do",
        '    wait "$child"; status=$?',
        '    kill -0 "$child" 2> /dev/null || break',
        "done",
        'if [[ "$again" == 1 && "$status" != 0 ]]; then',
        '    scontrol requeue "$SLURM_JOB_ID" && exit 0',
        "fi",
        'exit "$status"',
        "",
    ]
