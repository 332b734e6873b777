"""Several processes that train one model, as `torchrun` starts them: one per GPU.

    process_group   makes this process a member of the group that torchrun's environment describes
    Ranks           what training needs of the other processes; a lone process is a `Ranks()` and pays nothing
    SumOverRanks    the exchange of gradients: one collective per step, over NCCL between GPUs and gloo between CPUs
    PeerWatch       notices the death of another process, also while this one waits for its GPU

Everything that decides what happens next (stop, out of memory) is agreed on by the hosts, over gloo, once per step and
before gradients are exchanged. So no process waits in a collective that a living one never enters, and processes that
wait for an evaluation or a checkpoint of rank 0 wait outside NCCL.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from affmae_engine.errors import ConfigError, PeerLost

PATIENCE = timedelta(minutes=60)
"""Longest wait for a process that lives but does not answer, as during an evaluation on rank 0."""
GRACE_S = 15.0
"""Seconds that a process has to end by itself after another one died. torchrun kills it after 30."""
LAST_ACTIONS_S = 10.0
"""Seconds for what it does last after that, such as waiting for a checkpoint that is being written."""

_FAREWELL_TAG = 1
_NO_TIMEOUT = timedelta(days=365)
_ALIGNMENT = 64  # elements, so that parts of the buffer can be read 16 bytes at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`, of `world`) and the others. Collective methods must be called by all of them, in one order.

    watch: notices when another process dies; None in a lone process.
    """

    rank: int = 0
    world: int = 1
    watch: PeerWatch | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """True on rank 0, which writes, evaluates and prints."""
        return self.rank == 0

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process. Collective.

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
        """The smallest of all processes' values. Collective."""
        if self.world == 1:
            return value
        values = torch.tensor([value])
        with self.peers_expected():
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def broadcast_text(self, text: str) -> str:
        """The text of rank 0, in every process; the argument of the others is ignored. Collective."""
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

    def broadcast_module(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0. Collective."""
        if self.world == 1:
            return
        with self.peers_expected(), torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until every process has come here. Collective."""
        self.any_rank(False)

    def local_batch_size(self, batch_size: int) -> int:
        """Images of a step that fall to each process.

        Raises:
            ConfigError: they cannot be divided evenly.
        """
        if batch_size % self.world:
            raise ConfigError(
                f"train.batch_size ({batch_size}) must be a multiple of the number of processes ({self.world})",
                "it counts the images of a step over all processes",
            )
        return batch_size // self.world

    def check_device(self, device: torch.device) -> None:
        """Raises ConfigError when several processes of this machine would share a GPU."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world > 1 else 1
        if device.type == "cuda" and here > torch.cuda.device_count():
            raise ConfigError(
                f"{here} processes for {torch.cuda.device_count()} GPUs",
                f"use torchrun --nproc-per-node {torch.cuda.device_count()}",
            )

    @contextlib.contextmanager
    def peers_expected(self) -> Iterator[None]:
        """Turns what a collective, or the GPU, raises when another process is gone into `PeerLost`."""
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self.world == 1 or not (known or (self.watch is not None and self.watch.peer_lost())):
                raise
            raise peer_lost_error() from error

    @contextlib.contextmanager
    def at_forced_end(self, action: Callable[[], object]) -> Iterator[None]:
        """Inside the block, `action` is called before `PeerWatch` ends this process. It runs in another thread."""
        if self.watch is None:
            yield
            return
        self.watch.last_actions.append(action)
        try:
            yield
        finally:
            self.watch.last_actions.remove(action)


class SumOverRanks:
    """Sums a list of tensors over all processes, as one collective over one flat buffer.

    The buffer is made once. So the results of every call are the same tensors, and a sum can stand between two CUDA
    graphs of which the second reads the results.

    Args:
        like: tensors of the shapes to sum, fp32, on one device; the same shapes in every process.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        padded = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in like]
        self._flat_N = torch.zeros(sum(padded), device=like[0].device)
        parts = self._flat_N.split(padded)
        self.results = [part[: t.numel()].view(t.shape) for part, t in zip(parts, like, strict=True)]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums, which the next call overwrites. Collective; nothing waits for a GPU."""
        torch._foreach_copy_(self.results, list(tensors))
        dist.all_reduce(self._flat_N)
        return self.results


class PeerWatch:
    """Notices the death of another process, also while this one waits for its GPU.

    A process that dies inside an NCCL collective leaves the others waiting for their GPUs, where no signal handler and
    no timeout of the training can reach them. Gloo's connections, however, break at once when a process ends. So a
    thread per peer waits for that peer's farewell over a gloo group of its own. When the connection breaks instead,
    this process has `GRACE_S` to end by itself, as it does when it next speaks to its peers; after that the thread
    calls `last_actions`, newest first, and ends the process. NCCL is not asked to abort: that can hang too, and would
    let the training go on with half-summed gradients.

    Made by every process of the group, which exchange their farewells with `leave`.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.last_actions: list[Callable[[], object]] = []
        self._peers = [peer for peer in range(world) if peer != rank]
        self._group = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)
        self._lost = threading.Event()
        self._first_to_notice = threading.Lock()
        self._threads = [threading.Thread(target=self._wait_for, args=(peer,), daemon=True) for peer in self._peers]
        for thread in self._threads:
            thread.start()

    def peer_lost(self, within_s: float = 2.0) -> bool:
        """Whether another process has died, or is found to within that time."""
        return self._lost.wait(within_s)

    def leave(self) -> None:
        """Tell the others that this process ends as it should, and wait until they do the same. Collective."""
        for peer in self._peers:
            dist.send(torch.ones(1), peer, group=self._group, tag=_FAREWELL_TAG)
        for thread in self._threads:
            thread.join()

    def _wait_for(self, peer: int) -> None:
        try:
            dist.recv(torch.zeros(1), peer, group=self._group, tag=_FAREWELL_TAG)
        except RuntimeError:
            self._lost.set()
            if self._first_to_notice.acquire(blocking=False):
                self._force_end()

    def _force_end(self) -> None:
        time.sleep(GRACE_S)
        # An action may hang, as on a disk that is gone; the process still ends.
        deadline = threading.Timer(LAST_ACTIONS_S, os._exit, (PeerLost.exit_code,))
        deadline.daemon = True
        deadline.start()
        for action in reversed(self.last_actions):
            try:
                action()
            except Exception:
                _log.exception("an action before the forced end failed")
        os._exit(PeerLost.exit_code)


def peer_lost_error() -> PeerLost:
    """What a process reports when another one of the run has died."""
    return PeerLost(
        "another process of this run ended",
        "its message, or torchrun's, says why; every checkpoint is intact: continue with --resume",
    )


_current = Ranks()


def current_ranks() -> Ranks:
    """The group that this process is in."""
    return _current


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Be part of torchrun's group inside the block; alone where torchrun did not start this process, or only this one.

    A block that fails leaves the group as it is: taking leave would wait for processes that may be stuck.
    """
    global _current
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield Ranks()
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    rank, world = dist.get_rank(), dist.get_world_size()
    watch = PeerWatch(rank, world)
    _current = Ranks(rank, world, watch)
    yield _current
    with _current.peers_expected():
        watch.leave()
    _current = Ranks()
    dist.destroy_process_group()
