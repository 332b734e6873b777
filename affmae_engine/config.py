"""The resolved configuration of a run: frozen sections, no I/O, no environment, no defaults hidden elsewhere.

A `RunConfig` is what a command runs with after every source (defaults, preset, file, environment, `--set`) was merged
by `affmae_cli.settings`. One and the same section is live for pretraining and finetuning (`optim`, `train`, `data`):
presets give them task-dependent values through `[task.finetune.*]` tables, which are resolved away before this module
sees them, so that what a user sets is what is used. The docstring under each field is its help text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Task = Literal["pretrain", "finetune"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown fields are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


_SIZE_FIELDS = ("dims", "depths", "heads", "mlp_ratio", "decoder_dim", "decoder_heads")


class ModelConfig(Section):
    """The network (paper section 3). Widths and depths come from `family` and `size`; see `affmae_engine.model.sizes`
    and `affmae_engine.model.vit_mae`."""

    family: Literal["affmae", "vit-mae"] = "affmae"
    """Architecture: AFFMAE, or the plain ViT-MAE of the same size that it is compared with. A ViT merges nothing, so
    the fields marked "AFFMAE only" mean nothing to it, nor does `[loss]`; it takes about three times the memory, so a
    preset's `train.micro_batch` may have to be lowered."""
    size: Literal["tiny", "small", "base"] = "small"
    """Widths and depths: `small` (23 M parameters; ViT-MAE 22 M), `base` (65 M; 64 M), `tiny` (1 M, for CPUs and
    tests). The next six fields override parts of it."""
    dims: tuple[Positive, Positive, Positive, Positive] | None = None
    """Width of each encoder stage; by default that of `size`. AFFMAE only, as the next five."""
    depths: tuple[Positive, Positive, Positive, Positive] | None = None
    """Blocks of each encoder stage."""
    heads: tuple[Positive, Positive, Positive, Positive] | None = None
    """Attention heads of each encoder stage; each divides the stage's width. The kernels take heads of width 16, 32
    and 64."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    """Hidden width of the encoder's MLPs, as a multiple of the stage's width."""
    decoder_dim: Positive | None = None
    """Width of the decoder; even."""
    decoder_heads: Positive | None = None
    """Attention heads of the decoder; they divide its width. The kernels take heads of width 16, 32, 64 and 128."""
    channels: Positive = 1
    """Image channels; EM is grey, so 1."""
    patch_size: Literal[2, 4, 8, 16, 32] = 8
    """Edge of one token, in pixels."""
    cluster_size: Positive = 8
    """Tokens in one cluster (m). AFFMAE only."""
    neighbours: Positive = 64
    """Tokens that one token attends to (M); a multiple of `cluster_size`. AFFMAE only: a ViT's attend to all."""
    merging: Literal["cluster", "l2norm"] = "cluster"
    """How tokens are merged between stages: learned scores with gathering, or selection by feature norm. AFFMAE
    only."""
    merge_keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the tokens that survives each merging (rho). AFFMAE only."""
    drop_path: Fraction = 0.1
    """Stochastic depth of the deepest encoder block; rises linearly from 0. In a ViT for finetuning only, as He et al.
    have it."""
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
        return [name for name in _SIZE_FIELDS if getattr(self, name) is not None]

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

    crop_size: Positive = 512
    """Edge of a training image, in pixels; rounded up to whole tokens."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest edge of the random crop relative to `crop_size`/magnification: an edge of `crop_size *
    u`, with u drawn from this range, is cut and resized to `crop_size`."""
    flips: bool = True
    """Random horizontal and vertical flips and quarter turns."""
    clahe: bool = False
    """Contrast-limited adaptive histogram equalisation of each crop (the paper's recipe)."""
    normalisation: Literal["image", "dataset"] = "image"
    """Zero mean and unit variance by each source image's own statistics, or by those of the whole dataset."""
    holdout: Fraction = 0.05
    """Share of the data kept for the held-out loss: whole images, or contiguous sections of a stack."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Data-loading processes; `auto` takes up to 15, leaving one core free."""

    @model_validator(mode="after")
    def _ordered_scale(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 4:
            raise ValueError(f"crop_scale ({low}, {high}) must be two rising numbers in (0, 4]")
        return self


class MaskConfig(Section):
    """Which tokens are hidden during pretraining (method section 1)."""

    kind: Literal["perlin", "random"] = "perlin"
    """Coherent holes from a Perlin noise field, or independent cells."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the tokens that is hidden."""
    lattices: Annotated[tuple[Positive, ...], Field(min_length=1)] = (8, 4, 8, 8)
    """Perlin lattice cells per side, spread evenly over the images of a batch: holes of several sizes."""


class LossConfig(Section):
    """Deep supervision of AFFMAE's decoder steps (method sections 5 and 6); a ViT has none of them."""

    step2: Annotated[float, Field(ge=0)] = 0.12
    """Weight of the loss after decoder step 2 (stages 4 and 3)."""
    step1: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the loss after decoder step 1 (stage 4 alone)."""


class OptimConfig(Section):
    """AdamW, its schedule and clipping."""

    lr: Annotated[float, Field(gt=0)] = 3.5e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine."""
    betas: tuple[Fraction, Fraction] = (0.883, 0.935)
    """AdamW's running-average coefficients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; none on one-dimensional parameters."""
    warmup_steps: NonNegative = 500
    """Steps of linear warm-up; shortened to a tenth of the run when the run is shorter than ten times that."""
    clip_norm: Annotated[float, Field(ge=0)] = 5.0
    """Largest gradient norm; 0 turns clipping off."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate factor per encoder layer counted from the decoder (finetuning: 0.6)."""


class TrainConfig(Section):
    """The loop: length, batch, precision and how often things happen. Intervals are in optimizer steps."""

    steps: Positive = 10_000
    """Optimizer steps of the run; ignored when `epochs` is given."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length in passes over the data instead; turned into `steps` when the data is known."""
    batch_size: Positive = 32
    """Images per optimizer step, over all processes and accumulation."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Images per forward pass on one device; `auto` measures what fits this card, None takes the whole share of
    `batch_size`. Changes memory and speed; the result only by rounding and by what dropout draws. Halved by itself
    when memory runs out."""
    precision: Precision = "auto"
    """`auto` is bf16 on a CUDA card that has it, fp16 on an older one, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when it is there; `cuda` is an error when it is not."""
    seed: NonNegative = 0
    """Seed of the weights, of every sample, mask and augmentation."""
    log_every: Positive = 10
    """Steps between two metric events."""
    eval_every: NonNegative = 500
    """Steps between two evaluations on held-out data; 0 only at the end."""
    preview_every: NonNegative = 500
    """Steps between two preview pictures; 0 only at the end."""
    checkpoint_every: NonNegative = 500
    """Steps between two checkpoints; 0 only at the end."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 15.0
    """Minutes after which a checkpoint is saved, however few steps they were; 0 counts steps only."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept, besides the best one."""
    max_nonfinite: Positive = 25
    """Steps in a row with a non-finite loss or gradient (each is skipped) before the run is stopped."""
    max_nonfinite_share: Fraction = 0.01
    """Share of the last 1000 steps that may be non-finite before the run is stopped; 0 turns this off. Not with fp16,
    whose loss scale is found by overflows."""
    spike_factor: Annotated[float, Field(ge=0)] = 8.0
    """A logged loss this many spreads (of the 50 logged before it) above their median is reported; 0 turns it off."""


class FinetuneConfig(Section):
    """Segmentation (method section 6)."""

    class_names: tuple[str, ...] = ()
    """Names of the label values 0, 1, 2, ...; empty: found from the labels and called class0, class1, ..."""
    ignore_label: NonNegative | None = None
    """Label value that is neither trained on nor scored."""
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Loss weight per class; empty: from the class frequencies of the training labels."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the labelled data used for validation, when none is given."""
    val_images: tuple[str, ...] = ()
    """Names of the validation images in the run's store, as `--val-images` sets them; empty: split automatically."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """Focusing exponent of the focal loss."""
    focal_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the focal loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the Dice loss."""
    elastic: Annotated[float, Field(ge=0)] = 8.0
    """Largest elastic displacement, in pixels; 0 turns it off."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 45.0
    """Largest random rotation, in degrees."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest random change of magnification, as a fraction."""
    photometric: Annotated[float, Field(ge=0)] = 0.2
    """Strength of random brightness, contrast, gamma and noise; 0 turns them off."""

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

    tile: Positive | None = None
    """Edge of a tile in pixels; None takes the model's training crop."""
    overlap: Annotated[float, Field(ge=0, lt=0.95)] = 0.5
    """Overlap of neighbouring tiles, as a fraction of the tile's edge; blended with Gaussian weights."""
    batch_size: Positive = 4
    """Tiles per forward pass."""


class KernelsConfig(Section):
    """Which implementation of each operation runs."""

    backend: Literal["auto", "triton", "reference"] = "auto"
    """`auto` takes the Triton kernels where this machine can run them and plain PyTorch elsewhere; the others force.
    A ViT is compiled where the kernels run."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Record the training step once as CUDA graphs and replay it; `auto`: on a card that runs the kernels."""


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


REMOVED_FIELDS = frozenset({"kernels.compile"})
"""Fields of earlier versions. Files may still contain them; they are ignored."""


def without_removed(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a file, without the fields in `REMOVED_FIELDS`."""
    return {
        section: {name: value for name, value in fields.items() if f"{section}.{name}" not in REMOVED_FIELDS}
        if isinstance(fields, dict)
        else fields
        for section, fields in sections.items()
    }
