"""What one benchmark process is asked, and what it answers: records that travel as JSON between the processes.

A case is one network at one size, resolution and batch doing one task. It is measured several times, each time in a
process of its own; a `Measurement` is what one of these processes found.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from affmae_engine.config import MaskConfig, ModelConfig, Precision

Model = Literal["affmae", "vit-mae"]
Work = Literal["pretrain", "finetune", "predict"]
VitMode = Literal["auto", "compile", "compile-fp32-residual", "graph", "reduce-overhead", "eager"]
Status = Literal["ok", "out of memory", "failed", "timed out", "waiting"]

CLASSES = 5
"""Classes of a segmenter in the benchmark."""


class Record(BaseModel):
    """Base of the records: unknown fields are errors, a value's docstring is its meaning."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Case(Record):
    """One network at one size, resolution and batch, doing one task."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: Model
    work: Work = "pretrain"
    """The task: a pretraining step, a finetuning step (5 classes, all tokens), or the forward pass of `predict`."""
    size: Literal["tiny", "small", "base"]
    resolution: int
    """Edge of the images, in pixels."""
    batch: int
    vit_mode: VitMode = "auto"
    """How ViT-MAE runs: compiled, with and without its steps recorded as CUDA graphs, whichever is faster (`auto`);
    compiled; compiled with the residual stream in fp32 although autocast is on, as in most published code; compiled
    and recorded; torch.compile's own graphs; as it is."""
    compile: bool = True
    """Whether AFFMAE's regions are compiled, as the trainer does for long runs."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Of AFFMAE's operations."""

    @property
    def network(self) -> ModelConfig:
        """The `[model]` section that the network is built from."""
        return ModelConfig(family=self.model, size=self.size)

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """Height and width of the canvas, in cells."""
        edge = self.resolution // self.network.patch_size
        return edge, edge

    @property
    def title(self) -> str:
        """For messages."""
        mode = f" ({self.vit_mode})" if self.model == "vit-mae" and self.vit_mode != "auto" else ""
        return f"{self.model}{mode} {self.size}, {self.work}, {self.resolution} px, batch {self.batch}"


class Request(Record):
    """What a benchmark process reads from its standard input."""

    case: Case
    what: Literal["measure", "try"] = "measure"
    """Time it; or only take the steps that compile and record it, which tells whether it fits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    steps: int = Field(default=20, ge=1)
    """Timed steps."""
    warmup: int = Field(default=5, ge=1)
    """Steps before them."""
    profile: bool = False
    """Also find where the step spends its time."""
    data: str | None = None
    """Path of a dataset: time pretraining steps with the trainer's loader, too."""


class Measurement(Record):
    """What one process found. Memory in GiB, on a card only; times in milliseconds; None where there is no figure."""

    status: Status = "ok"
    note: str = ""
    """Why there is no figure."""
    how: str = ""
    """How the network was run, in words."""
    parameters: int = 0
    ms: float | None = None
    """Whole step (for `predict`: forward pass), median."""
    low_ms: float | None = None
    """20th percentile."""
    high_ms: float | None = None
    """80th percentile."""
    repeats: int = 0
    forward_ms: float | None = None
    """Forward pass with the loss, as in training; for `predict` the same as `ms`."""
    loss: float | None = None
    first_step_s: float | None = None
    """Seconds from building the network to the end of the first step: compilation, or reading what was compiled."""
    ready_s: float | None = None
    """Seconds from building the network until steps are as fast as they will be (compiled, recorded, warmed up)."""
    allocated_gib: float | None = None
    """Most memory that tensors took in a step."""
    reserved_gib: float | None = None
    """Most memory that PyTorch held during the timed steps, with what CUDA graphs keep."""
    modes_ms: dict[str, float] = Field(default_factory=dict)
    """For ViT-MAE's `auto`: whole step by mode."""
    data_images_per_s: float | None = None
    """Images per second with the trainer's loader."""
    data_wait: float | None = None
    """Share of that time in which the device waited for data."""
    profile: dict[str, Any] | None = None
    """`Profile.as_dict()`."""


class Answer(Record):
    """What a benchmark process prints: a measurement, or the error that a user must see."""

    measurement: Measurement | None = None
    error: str = ""
    hint: str = ""
    exit_code: int = 1
    """Of the error."""


def mask_settings() -> MaskConfig:
    """The masking of every case: the defaults of pretraining."""
    return MaskConfig()
