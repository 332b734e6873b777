"""A task small enough to train in milliseconds, with dropout so that the random generators matter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from affmae_engine.config import OptimConfig, RunConfig
from affmae_engine.run_dir import RunDir, create
from affmae_engine.train.optim import decay_groups
from affmae_engine.train.task import Evaluation, Task
from affmae_engine.weights import WeightsMetadata


@dataclass
class ToySource:
    """Sample i is a pure function of i; what was asked for is remembered, and chosen samples are poisoned."""

    poisoned: frozenset[int] = frozenset()
    asked: list[int] = field(default_factory=list)
    samples_per_epoch: int = 64

    def sample(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"x": x * float("nan") if index in self.poisoned else x}


@dataclass
class Toy:
    """A task with its parts at hand. `scores` are the held-out scores, one per evaluation, if given."""

    task: Task
    source: ToySource


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    error = (model(batch["x"]) - batch["x"].flip(-1)).square().mean()
    return {"loss": error + 0.1 * error.detach(), "last": error}


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    """Build a toy: `make_toy(poisoned={12}, scores=[1, 3, 2], fingerprint="b", before=callable)`."""

    def make(
        *,
        poisoned: set[int] | None = None,
        scores: list[float] | None = None,
        fingerprint: str = "a",
        before: Callable[[dict[str, Tensor]], None] = lambda batch: None,
    ) -> Toy:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 6))
        source = ToySource(frozenset(poisoned or ()))
        left = list(scores or [])
        held_out = torch.stack([ToySource().sample(10**6 + i)["x"] for i in range(8)])

        class ToyTask(Task):
            name = "pretrain"
            dataset = source
            metadata = WeightsMetadata(task="pretrain", model={}, image_size=6, normalisation={"mode": "image"})

            def losses(self, net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
                before(batch)
                return _losses(net, batch)

            def evaluate(self, net: nn.Module, device: torch.device) -> Evaluation:
                assert not net.training and not torch.is_grad_enabled()
                loss = float(_losses(net, {"x": held_out.to(device)})["last"])
                return Evaluation(score=left.pop(0) if left else -loss, metrics={"loss": loss})

            def preview(self, net: nn.Module, device: torch.device) -> dict[str, np.ndarray]:
                return {"": np.zeros((4, 4, 3), np.uint8)}

            def parameter_groups(self, optim: OptimConfig) -> list[dict[str, object]]:
                return decay_groups(self.model.named_parameters(), optim.weight_decay, lambda name: 1.0)

        task = ToyTask()
        task.model, task.fingerprint = model, fingerprint
        return Toy(task, source)

    return make


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """A short run on the CPU; keyword arguments are fields of [train]."""

    def make(**train: object) -> RunConfig:
        fields = {"steps": 6, "batch_size": 4, "device": "cpu", "log_every": 2, "eval_every": 3, "checkpoint_every": 3}
        return RunConfig.model_validate(
            {
                "train": {**fields, "preview_every": 0, **train},
                "data": {"workers": 0},
                "optim": {"lr": 1e-2, "warmup_steps": 2},
            }
        )

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDir]:
    """A new run directory with its config written."""

    def make(config: RunConfig, name: str = "run") -> RunDir:
        run = create(tmp_path / name)
        run.write_config(config, "pretrain")
        return run

    return make
