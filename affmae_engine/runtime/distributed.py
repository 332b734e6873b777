"""Several processes that train one model, as `torchrun` starts them: one per card.

    joined     makes this process a member of the group that torchrun's environment describes
    Ranks      what the training needs of the others; a process that is alone is a `Ranks()` and pays nothing

Gradients are averaged by PyTorch's DistributedDataParallel, overlapped with the backward pass, over NCCL between cards
and gloo between CPUs. Unusual: everything that decides what happens next (stop, out of memory) is agreed on the host,
over gloo, once per step and before gradients are exchanged. So no process can be left waiting in a collective that
another one will never enter, and a process that waits for an evaluation or a checkpoint of rank 0 waits outside NCCL.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from affmae_engine.errors import ConfigError, PeerLost

PATIENCE = timedelta(minutes=60)
"""Longest wait for another process that lives but does not answer, as in an evaluation on rank 0. A process that dies
is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`, of `world`) and the others. Every method must be called by all of them, in one order."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, evaluates and speaks."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process.

        Raises:
            PeerLost: a process is gone.
        """
        if self.world == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        with self.peers_expected():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(bool(value) for value in values)

    def smallest(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.world == 1:
            return value
        values = torch.tensor([value])
        with self.peers_expected():
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def text(self, text: str) -> str:
        """The text of rank 0, in every process; the argument of the others is ignored."""
        if self.world == 1:
            return text
        data = text.encode("utf-8", "surrogatepass")
        with self.peers_expected():
            length = torch.tensor([len(data)])
            dist.broadcast(length, 0)
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.first and data else None
            if content is None:
                content = torch.zeros(int(length), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return bytes(content.tolist()).decode("utf-8", "surrogatepass")

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.any(False)

    def averaging(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` itself when alone; else the same module in a wrapper whose backward pass averages gradients.

        Wrapping gives every process the parameters of rank 0.
        """
        if self.world == 1:
            return model
        # Of a [1, C] parameter, where the order of axes means nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with self.peers_expected(), warnings.catch_warnings():
            # Buffers are constants here, and a collective in the forward pass would come before the agreement. Newer
            # releases of torch want another name for this argument, which older ones do not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
            )

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars on the device, averaged over all processes. Nothing waits on a card."""
        if self.world == 1:
            return values
        stacked = torch.stack(list(values.values()))
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).unbind(), strict=True))

    def share(self, batch_size: int) -> int:
        """Images of a step that fall to each process.

        Raises:
            ConfigError: they cannot be shared evenly.
        """
        if batch_size % self.world:
            raise ConfigError(
                f"train.batch_size ({batch_size}) must be a multiple of the number of processes ({self.world})",
                "it counts the images of a step over all processes",
            )
        return batch_size // self.world

    def check_device(self, device: torch.device) -> None:
        """Raises ConfigError when several processes of this machine would share a card."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world > 1 else 1
        if device.type == "cuda" and here > torch.cuda.device_count():
            raise ConfigError(
                f"{here} processes for {torch.cuda.device_count()} cards",
                f"use torchrun --nproc-per-node {torch.cuda.device_count()}",
            )

    @contextlib.contextmanager
    def peers_expected(self) -> Iterator[None]:
        """Turns what a collective raises when a process is gone into `PeerLost`."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise PeerLost(
                "another process of this run ended",
                "its message, or torchrun's, says why; every checkpoint is intact: continue with --resume",
            ) from error


def current_ranks() -> Ranks:
    """The group that this process has joined."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Be part of torchrun's group inside the block; alone where torchrun did not start this process, or only this one.

    A block that fails leaves the group as it is: taking leave would wait for processes that may be stuck.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield Ranks()
        return
    on_cards = torch.cuda.is_available() and dist.is_nccl_available()
    if on_cards:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cards else "gloo", timeout=PATIENCE)
    ranks = current_ranks()
    yield ranks
    ranks.wait()
    dist.destroy_process_group()
