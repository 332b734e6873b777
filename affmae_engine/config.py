"""The resolved configuration of a run: frozen sections with all defaults; no I/O, no environment.

A `RunConfig` is what a command runs with after `affmae_cli.settings` has merged every source (defaults, preset, file,
environment, `--set`). Pretraining and finetuning use the same sections; presets give them different values through
`[task.finetune.*]` tables, which are resolved before this module sees them.

A field says all about itself: its type with the allowed values, its default, its `Unit`, what a resumed run may do with
it (`OnResume`), and its meaning in the docstring below it. `docs/settings.md` is generated from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Task = Literal["pretrain", "finetune"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Unit:
    """Metadata of a field: the unit of its value."""

    name: str


class OnResume(Enum):
    """Metadata of a field: whether a resumed run may have another value than the run had. KEPT where none is given."""

    KEPT = "kept"
    """It decides what is learned or how it is scored: another value is refused."""
    ROUNDING = "changes rounding"
    """It changes the result by rounding, and by what dropout and drop path draw: each forward pass is seeded, and the
    field changes how many images a pass sees or which code draws. Allowed, and recorded as a warning."""
    FREE = "free"
    """It changes neither the samples of a step nor what is done with them."""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1), Unit("fraction")]
Pixels = Annotated[int, Field(gt=0), Unit("pixels")]
Four = tuple[Positive, Positive, Positive, Positive]
Interval = Annotated[int, Field(ge=0), Unit("steps"), OnResume.FREE]


class Section(BaseModel):
    """Base of all sections: unknown fields are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


SIZE_FIELDS = ("dims", "depths", "heads", "mlp_ratio", "decoder_dim", "decoder_heads")
"""Fields of `ModelConfig` that override parts of its size."""


class ModelConfig(Section):
    """The network. Widths and depths come from `family` and `size`."""

    family: Literal["affmae", "vit-mae"] = "affmae"
    """Architecture: AFFMAE, or the plain ViT-MAE of equal size that it is compared with. A ViT does not merge tokens;
    it uses neither `[loss]` nor the fields marked "AFFMAE only", and takes about three times the memory."""
    size: Literal["tiny", "small", "base"] = "small"
    """Widths and depths: `tiny` (1 M parameters, for CPUs), `small` (23 M; ViT-MAE 22 M), `base` (65 M; 64 M). The next
    six fields override parts of it."""
    dims: Annotated[Four | None, Unit("features")] = None
    """Width of each encoder stage; by default that of `size`. AFFMAE only, as the next five."""
    depths: Annotated[Four | None, Unit("blocks")] = None
    """Blocks of each encoder stage; by default those of `size`."""
    heads: Annotated[Four | None, Unit("heads")] = None
    """Attention heads of each encoder stage; they divide the stage's width. By default those of `size`. The kernels
    take heads of width 16, 32 and 64."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    """Hidden width of the encoder's MLPs as a multiple of the stage's width; by default that of `size`."""
    decoder_dim: Annotated[Positive | None, Unit("features")] = None
    """Width of the decoder; even. By default that of `size`."""
    decoder_heads: Annotated[Positive | None, Unit("heads")] = None
    """Attention heads of the decoder; they divide its width. By default those of `size`. The kernels take heads of
    width 16, 32, 64 and 128."""
    channels: Positive = 1
    """Image channels; EM images are gray, so 1."""
    patch_size: Annotated[Literal[2, 4, 8, 16, 32], Unit("pixels")] = 8
    """Edge of one token."""
    cluster_size: Annotated[Positive, Unit("tokens")] = 8
    """Tokens in one cluster (m). AFFMAE only."""
    neighbours: Annotated[Positive, Unit("tokens")] = 64
    """Tokens that one token attends to (M); a multiple of `cluster_size`. AFFMAE only: a ViT's attend to all."""
    merging: Literal["cluster", "l2norm"] = "cluster"
    """How tokens are merged between stages: learned scores with gathering, or selection by feature norm. AFFMAE
    only."""
    merge_keep: Annotated[float, Field(gt=0, le=1), Unit("fraction")] = 0.4
    """Share of the tokens that is kept at each merging (rho). AFFMAE only."""
    drop_path: Fraction = 0.1
    """Stochastic depth of the last encoder block, rising linearly from 0 at the first one. In a ViT for finetuning
    only, as in MAE."""
    decoder_dropout: Fraction = 0.1
    """Dropout of the decoder's residual branches. AFFMAE only: a ViT's decoder has none."""
    decoder_ffn_ratio: Annotated[float, Field(gt=0, le=64)] = 2.0
    """Hidden width of the decoder's feed-forward layer, as a multiple of its width. AFFMAE only: a ViT's is 4."""

    @model_validator(mode="after")
    def _whole_clusters(self) -> ModelConfig:
        if self.neighbours % self.cluster_size:
            raise ValueError(f"neighbours ({self.neighbours}) must be a multiple of cluster_size ({self.cluster_size})")
        return self

    @property
    def size_overrides(self) -> list[str]:
        """The fields of a size that this configuration sets itself."""
        return [name for name in SIZE_FIELDS if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _custom_size(self) -> ModelConfig:
        own = self.size_overrides
        if not own:
            return self
        if self.family != "affmae":
            raise ValueError(f"{', '.join(own)} configure AFFMAE only; family is {self.family}")
        from affmae_engine.model.sizes import size_of  # imports this module

        size = size_of(self)
        for stage, (dim, heads) in enumerate(zip(size.dims, size.heads, strict=True), 1):
            if dim % heads:
                raise ValueError(f"heads, dims: {heads} heads do not divide the width of {dim} of stage {stage}")
        if size.dims[0] % 2:
            raise ValueError(f"dims: the width of stage 1 must be even; got {size.dims[0]}")
        if size.decoder_dim % size.decoder_heads or size.decoder_dim % 2:
            raise ValueError(
                f"decoder_dim must be even and a multiple of decoder_heads; got {size.decoder_dim} for "
                f"{size.decoder_heads} heads"
            )
        return self


class DataConfig(Section):
    """What the trainer reads and how a training sample is cut from it."""

    crop_size: Pixels = 512
    """Edge of a training image; rounded up to whole tokens."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest edge of a random crop as a multiple of `crop_size`; the crop is resized to `crop_size`."""
    flips: bool = True
    """Random horizontal and vertical flips and quarter turns."""
    clahe: bool = False
    """Contrast-limited adaptive histogram equalization of each crop (the paper's recipe)."""
    normalisation: Literal["image", "dataset"] = "image"
    """Whose mean and deviation intensities are normalized by: each source image's own, or those of the dataset."""
    holdout: Fraction = 0.05
    """Share of the data kept for the held-out loss: whole images, or adjacent sections of a stack."""
    workers: Annotated[NonNegative | Literal["auto"], Unit("processes"), OnResume.FREE] = "auto"
    """Data-loading processes; `auto` takes up to 15, leaving one core free."""

    @model_validator(mode="after")
    def _ordered_scale(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 4:
            raise ValueError(f"crop_scale ({low}, {high}) must be two rising numbers in (0, 4]")
        return self


class MaskConfig(Section):
    """Which tokens are hidden during pretraining."""

    kind: Literal["perlin", "random"] = "perlin"
    """Connected holes from Perlin noise, or independent tokens."""
    ratio: Annotated[float, Field(gt=0, lt=1), Unit("fraction")] = 0.5
    """Share of the tokens that is hidden."""
    lattices: Annotated[tuple[Positive, ...], Field(min_length=1), Unit("cells")] = (8, 4, 8, 8)
    """Cells per side of the Perlin lattice; each image takes one of the values, so holes have several sizes."""


class LossConfig(Section):
    """Deep supervision: the losses after AFFMAE's decoder steps, besides that after the last one; a ViT has none."""

    step2: NonNegativeFloat = 0.12
    """Weight of the loss after decoder step 2 (stages 4 and 3)."""
    step1: NonNegativeFloat = 0.05
    """Weight of the loss after decoder step 1 (stage 4 alone)."""


class OptimConfig(Section):
    """AdamW, its schedule and clipping."""

    lr: Annotated[float, Field(gt=0)] = 3.5e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.883, 0.935)
    """AdamW's coefficients of the running means of the gradient and of its square."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay; none on one-dimensional parameters."""
    warmup_steps: Annotated[NonNegative, Unit("steps")] = 500
    """Linear warm-up of the learning rate; at most a tenth of the run."""
    clip_norm: NonNegativeFloat = 5.0
    """Largest gradient norm; 0 turns clipping off."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate per encoder layer, counted from the decoder; 1: the same for all layers. The presets
    finetune with 0.6."""


class TrainConfig(Section):
    """Length, batch, device and precision of a run, and how often things happen."""

    steps: Annotated[Positive, Unit("steps"), OnResume.FREE] = 10_000
    """Optimizer steps of the run; not used when `epochs` is set. A resumed run may be longer, not shorter."""
    epochs: Annotated[Annotated[float, Field(gt=0)] | None, Unit("epochs"), OnResume.FREE] = None
    """Length of the run in passes over the data, in place of `steps`."""
    batch_size: Annotated[Positive, Unit("images")] = 32
    """Images per optimizer step, over all processes and micro-batches."""
    micro_batch: Annotated[Positive | Literal["auto"] | None, Unit("images"), OnResume.ROUNDING] = None
    """Images per forward pass on one device: it changes memory and speed, and the result only by rounding and by what
    dropout draws. `auto` measures what fits into the GPU's memory (8 on a CPU); not set: the whole `batch_size`,
    divided by the number of processes. Halved automatically when memory runs out."""
    precision: Precision = "auto"
    """`auto`: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OnResume.ROUNDING] = "auto"
    """`auto` takes a CUDA GPU if there is one; `cuda` is an error if there is none."""
    seed: NonNegative = 0
    """Seed of the weights and of every sample, mask and augmentation."""
    log_every: Annotated[Positive, Unit("steps"), OnResume.FREE] = 10
    """Steps between two lines of metrics."""
    eval_every: Interval = 500
    """Steps between two evaluations on held-out data; 0: only at the end."""
    preview_every: Interval = 500
    """Steps between two preview pictures, besides one soon after the start; 0: only at the end."""
    checkpoint_every: Interval = 500
    """Steps between two checkpoints; 0: only at the end."""
    checkpoint_minutes: Annotated[NonNegativeFloat, Unit("minutes"), OnResume.FREE] = 15.0
    """Longest time between two checkpoints; 0: steps alone decide."""
    keep_checkpoints: Annotated[Positive, Unit("checkpoints"), OnResume.FREE] = 2
    """Newest checkpoints that are kept, besides the best one."""
    max_nonfinite: Annotated[Positive, Unit("steps"), OnResume.FREE] = 25
    """Steps in a row with a non-finite loss or gradient (each is skipped) after which the run is stopped."""
    max_nonfinite_share: Annotated[Fraction, OnResume.FREE] = 0.01
    """Share of the last 1000 steps that may be non-finite before the run is stopped; 0: any. Not used with fp16, whose
    loss scale is found by overflows."""
    spike_factor: Annotated[NonNegativeFloat, OnResume.FREE] = 8.0
    """A logged loss is reported as a spike when it exceeds the median of the 50 before it by this many times their
    spread; 0: never."""

    def length(self, samples_per_epoch: int) -> int:
        """Optimizer steps of a run whose pass over the data has that many samples."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * samples_per_epoch / self.batch_size))


class FinetuneConfig(Section):
    """Segmentation: classes, validation, loss and augmentation."""

    class_names: tuple[str, ...] = ()
    """Names of the label values 0, 1, 2, ...; empty: as many as the labels have, named class0, class1, ..."""
    ignore_label: NonNegative | None = None
    """Label value of pixels that are neither trained on nor scored; not set: every pixel counts."""
    class_weights: tuple[NonNegativeFloat, ...] = ()
    """Weight of each class in the loss; empty: from the class frequencies of the training labels."""
    val_fraction: Annotated[float, Field(gt=0, lt=1), Unit("fraction")] = 0.2
    """Share of the labeled data that is used for validation when no validation images are given."""
    val_images: tuple[str, ...] = ()
    """Names of the validation images in the run's dataset, set by `--val-images`; empty: split automatically."""
    focal_gamma: NonNegativeFloat = 2.0
    """Focusing exponent of the focal loss."""
    focal_weight: NonNegativeFloat = 1.0
    """Weight of the focal loss."""
    dice_weight: NonNegativeFloat = 1.0
    """Weight of the Dice loss."""
    elastic: Annotated[NonNegativeFloat, Unit("pixels")] = 8.0
    """Largest elastic displacement; 0: none."""
    rotation: Annotated[float, Field(ge=0, le=180), Unit("degrees")] = 45.0
    """Largest random rotation."""
    scale: Fraction = 0.2
    """Largest random change of magnification."""
    photometric: NonNegativeFloat = 0.2
    """Strength of random brightness, contrast, gamma and noise; 0: none."""

    @model_validator(mode="after")
    def _consistent_classes(self) -> FinetuneConfig:
        if self.class_weights and self.class_names and len(self.class_weights) != len(self.class_names):
            raise ValueError(
                f"class_weights ({len(self.class_weights)} values) and class_names ({len(self.class_names)} names) "
                "must have the same length"
            )
        twice = sorted({name for name in self.class_names if self.class_names.count(name) > 1})
        if twice:
            raise ValueError(f"class_names must differ from each other: {', '.join(twice)}")
        if self.focal_weight == 0 and self.dice_weight == 0:
            raise ValueError("focal_weight and dice_weight must not both be 0")
        return self


class PredictConfig(Section):
    """Tiled inference, in validation and in `affmae predict`."""

    tile: Annotated[Positive | None, Unit("pixels")] = None
    """Edge of a tile; not set: the edge of the model's training images."""
    overlap: Annotated[float, Field(ge=0, lt=0.95), Unit("fraction")] = 0.5
    """Overlap of adjacent tiles as a fraction of the tile's edge; they are blended with Gaussian weights."""
    batch_size: Annotated[Positive, Unit("tiles"), OnResume.FREE] = 4
    """Tiles per forward pass."""


class KernelsConfig(Section):
    """Which implementation of each operation runs."""

    backend: Annotated[Literal["auto", "triton", "reference"], OnResume.ROUNDING] = "auto"
    """`auto` takes the Triton kernels where they can run and plain PyTorch (`reference`) elsewhere. A ViT is compiled
    where the kernels can run."""
    cuda_graph: Annotated[bool | Literal["auto"], OnResume.ROUNDING] = "auto"
    """Record the training step as CUDA graphs and replay it; `auto`: on a GPU that runs the kernels."""


class RunConfig(Section):
    """Everything that a run depends on besides its data."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    predict: PredictConfig = PredictConfig()
    kernels: KernelsConfig = KernelsConfig()

    @model_validator(mode="after")
    def _whole_batches(self) -> RunConfig:
        micro = self.train.micro_batch
        if isinstance(micro, int) and self.train.batch_size % micro:
            raise ValueError(
                f"train.batch_size ({self.train.batch_size}) must be a multiple of train.micro_batch ({micro})"
            )
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr ({self.optim.min_lr}) must not exceed optim.lr ({self.optim.lr})")
        return self

    @property
    def image_size(self) -> int:
        """`data.crop_size` rounded up to whole tokens, in pixels."""
        patch = self.model.patch_size
        return -(-self.data.crop_size // patch) * patch


SECTIONS: dict[str, type[Section]] = {name: info.annotation for name, info in RunConfig.model_fields.items()}  # type: ignore[misc]
"""The sections by name."""

FIELDS: dict[str, FieldInfo] = {
    f"{section}.{name}": info for section, model in SECTIONS.items() for name, info in model.model_fields.items()
}
"""Every field by its dotted path "section.field"."""

REMOVED_FIELDS = frozenset({"kernels.compile"})
"""Fields of earlier versions. Files may still contain them; they are ignored."""


def on_resume(path: str) -> OnResume:
    """What a resumed run may do with the field "section.field"."""
    return next((found for found in FIELDS[path].metadata if isinstance(found, OnResume)), OnResume.KEPT)


def without_removed(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a file, without the fields in `REMOVED_FIELDS`."""
    return {
        section: {name: value for name, value in fields.items() if f"{section}.{name}" not in REMOVED_FIELDS}
        if isinstance(fields, dict)
        else fields
        for section, fields in sections.items()
    }
