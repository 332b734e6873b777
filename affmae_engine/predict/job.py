"""One prediction: an input, a model and settings, cut into blocks that any process can compute.

`Job.start` begins or continues one in its work folder; `Job.open` opens one that was begun elsewhere. `compute` is the
one function of a block: it reads the block's halo, runs the network, writes the block and marks it as finished. It may
be called again, by anyone, in any order, and gives the same bytes on the same kind of device. `finish.py` puts the
output together when all blocks are there.

With several orientations the blocks of each one are class probabilities in its own order of axes; the blocks of the
output, which average them, are computed last.

Axes: C classes, Z Y X block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affmae_engine.data.normalise import IntensityMap
from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.data.readers.limits import memory_budget
from affmae_engine.data.readers.source import UNKNOWN_SIZE
from affmae_engine.data.statistics import Statistics, measure
from affmae_engine.data.store_layout import safe_name
from affmae_engine.errors import ConfigError, ResourceError, human_bytes
from affmae_engine.predict import outputs, volume
from affmae_engine.predict.compute import PlaneGeometry, WindowInput, read_window, window_probabilities
from affmae_engine.predict.grid import Block, Grid
from affmae_engine.predict.network import TileNetwork, tile_too_large
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor, label_dtype
from affmae_engine.predict.scale import choose_scale, voxel_size
from affmae_engine.predict.sources import ORIENTATIONS, Originals, Reoriented, described, identity_of, reopened
from affmae_engine.predict.volume import ATTRIBUTE, Pyramid
from affmae_engine.predict.work import Marker, Work, digest
from affmae_engine.runtime.memory import out_of_memory

MERGE_BLOCK = (64, 512, 512)
"""Largest block in which orientations are averaged."""
ISOTROPIC = 2.0
"""Ratio of voxel edges above which planes across the sections are of little use."""


@dataclass(frozen=True)
class PredictOptions:
    """How to predict.

    tile: edge of a tile in pixels; None takes the training image's. overlap: share of a tile that its neighbour
    covers too. batch_size: tiles per forward pass; None takes what suits the device. rescale: bring planes to the
    training's pixel size; None does where both sizes are known and differ by more than 15 %. pixel_nm: overrides what
    the input says; None along an axis keeps the input's value. tta: average over flips. planes: orientations whose
    probabilities are averaged, of `ORIENTATIONS`. image: copy the image into an OME-Zarr output. overwrite: replace
    outputs, and what is unfinished of another prediction.
    """

    tile: int | None = None
    overlap: float = 0.5
    batch_size: int | None = None
    rescale: bool | None = None
    pixel_nm: PixelSize = (None, None, None)
    tta: bool = False
    planes: tuple[str, ...] = ("xy",)
    image: bool = True
    overwrite: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PredictOptions:
        """Inverse of `dataclasses.asdict`, from JSON."""
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        z, y, x = known["pixel_nm"]
        return cls(**{**known, "pixel_nm": (z, y, x), "planes": tuple(known["planes"])})


@dataclass(frozen=True)
class Pass:
    """The volume in one orientation, and where its blocks go.

    source: in the orientation's own order of axes, as are geometry and grid. first: number of its first block.
    """

    name: str
    source: Source
    geometry: PlaneGeometry
    grid: Grid
    first: int
    labels: Pyramid | None = None
    probabilities: Pyramid | None = None
    image: Pyramid | None = None

    def tiles_of(self, block: Block) -> int:
        """Tiles of a block."""
        return (block.z[1] - block.z[0]) * self.geometry.tile_count(block.y, block.x)


@dataclass(frozen=True)
class BlockResult:
    """What the network made of a block, on the host or on its way there.

    labels_ZYX: smallest unsigned type. probabilities_CZYX: uint8, value / 255. counts_C: pixels of each class.
    ready: waits until the tensors are on the host.
    """

    labels_ZYX: Tensor | None
    probabilities_CZYX: Tensor | None
    counts_C: Tensor | None
    batch: int
    ready: Callable[[], object] = lambda: None


@dataclass
class Job:
    """See above; made by `start` or `open`.

    made_from: everything that the output's bytes depend on, as asked for. key: hash of that and of what was chosen for
    this run (batch, blocks, statistics); markers carry it. notes, warnings: what to tell the user.
    """

    source: Source
    predictor: Predictor
    targets: Outputs
    options: PredictOptions
    made_from: dict[str, Any]
    statistics: Statistics
    batch: int
    key: str
    passes: tuple[Pass, ...]
    merge: Pass | None
    originals: Originals
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def start(
        cls, source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions, *, alone: bool = True
    ) -> Job:
        """Begin a prediction, or continue the one that is under way; the caller holds `Work.locked`.

        Args:
            alone: no other process works in the folder, so another prediction that has no finished block may go.

        Raises:
            ConfigError: another prediction to the same place is unfinished; or --rescale lacks a pixel size.
            InputError: the input is damaged, may not be read, or is gone.
            ResourceError: the place cannot be written to; memory or disk do not suffice.
        """
        work = Work(targets.labels)
        identity = identity_of(source)
        made_from = made_from_of(identity, source, predictor, targets, options)
        plan = work.read_plan() if not options.overwrite else _readable_plan(work)
        if plan is not None and plan["made_from"] != made_from:
            if not options.overwrite and (not alone or work.finished(plan["key"], range(plan["blocks"]))):
                work.refuse_other(made_from, plan["made_from"])
            work.discard()
            plan = None
        there = volume.fingerprint_of(work.folder / "volume") == digest(made_from)
        if plan is not None and not there and any(work.blocks.glob("*.json")):
            work.discard()  # killed just after it was published; what is there is what it replaced
            plan = None
        if plan is None and (work.folder / "journal").exists() and not options.overwrite:
            raise ConfigError(
                f"there is an unfinished prediction of an earlier version to {targets.labels}",
                "begin anew with --overwrite",
            )
        if plan is None:
            plan = work.publish_plan(_new_plan(source, predictor, targets, options, made_from, identity))
        job = cls._of(plan, source, predictor, targets, options)
        job._create_arrays()
        return job

    @classmethod
    def open(cls, output: Path, predictor_of: Callable[[Path, str], Predictor]) -> Job:
        """A prediction that is under way, for a process that computes some of its blocks.

        Args:
            output: the labels' final name.
            predictor_of: weights file and kind of device -> the model in this process.

        Raises:
            ConfigError: nothing is under way there, or it was begun on another kind of device.
            InputError: the input or the weights are not to be found here.
        """
        plan = Work(output).read_plan()
        if plan is None:
            raise ConfigError(f"no prediction to {output} is under way", "start one first")
        source = reopened(plan["inputs"], plan["name"])
        predictor = predictor_of(Path(plan["weights"]), plan["made_from"]["device"][0])
        choice, wanted = predictor.choice, plan["made_from"]["device"]
        if [choice.device.type, choice.precision] != wanted:
            raise ConfigError(
                f"this process computes on {choice.description}, but {output} was begun on {wanted[0]} in {wanted[1]}",
                "use devices of one kind for one output",
            )
        targets = Outputs(output, with_probabilities=plan["made_from"]["probabilities"])
        return cls._of(plan, source, predictor, targets, PredictOptions.from_dict(plan["options"]))

    @classmethod
    def _of(
        cls, plan: dict[str, Any], source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions
    ) -> Job:
        passes, merge, notes, warnings = _passes(source, predictor, targets, options, plan)
        originals = Originals.of(source, plan["made_from"]["image"])
        return cls(
            source, predictor, targets, options, plan["made_from"], Statistics.from_dict(plan["statistics"]),
            plan["batch"], plan["key"], passes, merge, originals, notes, warnings,
        )  # fmt: skip

    @property
    def work(self) -> Work:
        """Its folder."""
        return Work(self.targets.labels)

    @property
    def pixel_nm(self) -> PixelSize:
        """Voxel size of input and output."""
        return voxel_size(self.source.info, self.options.pixel_nm)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the labels."""
        return label_dtype(self.predictor.classes)

    @property
    def tile(self) -> int:
        """Edge of a tile."""
        return self.passes[0].geometry.y.tile

    @cached_property
    def network(self) -> TileNetwork:
        """The model for this prediction."""
        return self.predictor.network(tta=self.options.tta)

    @property
    def numbers(self) -> range:
        """The blocks that need the network."""
        return range(sum(len(each.grid) for each in self.passes))

    @property
    def merge_numbers(self) -> range:
        """The blocks that average orientations; they need all others."""
        first = len(self.numbers)
        return range(first, first + (0 if self.merge is None else len(self.merge.grid)))

    @property
    def output(self) -> Pass:
        """Whose blocks are those of the output."""
        return self.passes[0] if self.merge is None else self.merge

    def find(self, number: int) -> tuple[Pass, Block]:
        """Block `number`, and the pass that it belongs to."""
        for each in (*self.passes, *(() if self.merge is None else (self.merge,))):
            if number - each.first < len(each.grid):
                return each, each.grid[number - each.first]
        raise IndexError(number)

    def tiles_of(self, number: int) -> int:
        """Tiles of block `number`."""
        each, block = self.find(number)
        return each.tiles_of(block)

    def finished(self, numbers: Sequence[int]) -> set[int]:
        """Those of the blocks that are finished."""
        return self.work.finished(self.key, numbers)

    def complete(self) -> bool:
        """Whether all blocks that need the network are finished."""
        return self.work.marked(self.numbers) and len(self.finished(self.numbers)) == len(self.numbers)

    def compute(self, number: int, on_tiles: Callable[[int], None] = lambda count: None) -> None:
        """Compute block `number` from its halo, write it and mark it as finished; see `read`, `infer` and `store`."""
        window = self.read(number)
        self.store(number, window.core_ZYX, self.infer(number, window, on_tiles))

    def read(self, number: int) -> WindowInput:
        """What block `number` is computed from.

        Raises:
            InputError, ResourceError: see `Source.read`.
        """
        each, block = self.find(number)
        window = read_window(each.source, each.geometry, self._intensity, block.z, block.y, block.x)
        return window.pinned() if self.network.device.type == "cuda" else window

    def infer(
        self, number: int, window: WindowInput, on_tiles: Callable[[int], None] = lambda count: None
    ) -> BlockResult:
        """Run the network over a block. Where memory runs out, the block is begun again with half the batch.

        Raises:
            ResourceError: not even one tile fits the device's memory.
        """
        each, _ = self.find(number)
        while True:
            done = 0

            def count(tiles: int) -> None:
                nonlocal done
                done += tiles
                on_tiles(tiles)

            try:
                return self._infer(each, window, count)
            except Exception as error:
                if out_of_memory(error) is None:
                    raise
            # Outside the except block: an exception in flight keeps the failed pass's memory alive.
            on_tiles(-done)
            self.network.forget()
            if self.batch == 1:
                raise tile_too_large(self.tile, self.network.device)
            self.batch //= 2
            self.warnings.append(f"out of device memory: went on with {self.batch} tiles at a time")

    def store(self, number: int, core_ZYX: np.ndarray | None, result: BlockResult) -> None:
        """Write a block and mark it as finished.

        Args:
            core_ZYX: the block of the input, where it has been read (`WindowInput.core_ZYX`).

        Raises:
            ResourceError: the disk is full or failed; the block counts as not computed.
        """
        each, block = self.find(number)
        result.ready()
        if each.labels is not None and result.labels_ZYX is not None:
            each.labels.write(block, result.labels_ZYX.numpy().astype(self.dtype, copy=False))
        if each.probabilities is not None and result.probabilities_CZYX is not None:
            each.probabilities.write(block, result.probabilities_CZYX.numpy())
        if each.image is not None:
            each.image.write(block, each.source.read(*block.slices) if core_ZYX is None else core_ZYX)
        counts = () if result.counts_C is None else tuple(result.counts_C.tolist())
        self.work.mark(number, self.key, Marker(counts, result.batch))

    def average(self, number: int) -> None:
        """Compute block `number` of `merge_numbers`: the mean of the orientations' probabilities, and its labels."""
        merge, block = self.find(number)
        total_CZYX = np.zeros((self.predictor.classes, *(s.stop - s.start for s in block.slices)), np.uint16)
        for each in self.passes:
            assert each.probabilities is not None
            axes = ORIENTATIONS[each.name]
            where = [block.slices[axis] for axis in axes]
            values = each.probabilities.arrays[0][(slice(None), *where)]
            back = np.argsort(axes)
            total_CZYX += values.transpose(0, *(1 + axis for axis in back))
        labels_ZYX = total_CZYX.argmax(axis=0).astype(self.dtype)
        assert merge.labels is not None
        merge.labels.write(block, labels_ZYX)
        if merge.probabilities is not None:
            count = len(self.passes)
            merge.probabilities.write(block, ((total_CZYX + count // 2) // count).astype(np.uint8))
        if merge.image is not None:
            merge.image.write(block, merge.source.read(*block.slices))
        counts = np.bincount(labels_ZYX.ravel(), minlength=self.predictor.classes)
        self.work.mark(number, self.key, Marker(tuple(counts.tolist()), 0))

    def record(self) -> dict[str, Any]:
        """What the outputs say about themselves, as plain JSON values."""
        return {
            "class_names": list(self.predictor.metadata.class_names),
            "pixel_nm_zyx": list(self.pixel_nm),
            "source": self.source.info.path.name,
            "series": self.source.info.series,
            **self.predictor.describe(),
            "fingerprint": digest(self.made_from),
        }

    @cached_property
    def _intensity(self) -> IntensityMap:
        return self.predictor.normalisation.for_image(self.statistics)

    def _infer(self, each: Pass, window: WindowInput, on_tiles: Callable[[int], None]) -> BlockResult:
        with torch.no_grad():
            values_ZCYX = window_probabilities(
                self.network, window, self.batch, intensity=self._intensity, on_tiles=on_tiles
            )
            labels_ZYX = counts_C = probabilities_CZYX = None
            if each.labels is not None:
                classes_ZYX = values_ZCYX.argmax(dim=1)
                counts_C = torch.bincount(classes_ZYX.flatten(), minlength=self.predictor.classes)
                labels_ZYX = classes_ZYX.to(torch.uint8 if self.dtype.itemsize == 1 else torch.int32)
            if each.probabilities is not None:
                values_ZCYX *= 255
                probabilities_CZYX = values_ZCYX.round_().clamp_(0, 255).byte().transpose(0, 1).contiguous()
        if self.network.device.type != "cuda":
            return BlockResult(labels_ZYX, probabilities_CZYX, counts_C, self.batch)
        results = [_to_host(tensor) for tensor in (labels_ZYX, probabilities_CZYX, counts_C)]
        copied = torch.cuda.Event()
        copied.record()
        return BlockResult(results[0], results[1], results[2], self.batch, copied.synchronize)

    def _create_arrays(self) -> None:
        """Make the arrays that blocks are written to, unless they are there."""
        record, names = self.record(), self.predictor.metadata.class_names
        title, output = outputs.stem(self.targets.labels), self.output
        window = self.statistics.percentiles["0.5"], self.statistics.percentiles["99.5"]
        made: list[tuple[Pyramid, dict[str, Any]]] = []
        for each in self.passes if self.merge is None else (*self.passes, self.merge):
            nm = self.pixel_nm if each is output else UNKNOWN_SIZE
            if each.labels is not None:
                levels, image = len(each.labels.levels), each.image is not None
                about = volume.labels_attributes(title, nm, levels, names, record, image=image)
                made.append((each.labels, about))
            if each.probabilities is not None:
                about = volume.probabilities_attributes(title, nm, len(each.probabilities.levels), names, record)
                made.append((each.probabilities, about))
            if each.image is not None:
                levels = len(each.image.levels)
                made.append((each.image, volume.image_attributes(self.source.info.name, nm, levels, window, record)))
        groups: dict[Path, dict[str, Any]] = {}
        if self.targets.is_zarr and output.labels is not None:
            inner = output.labels.folder
            groups[inner.parent] = {"ome": {"version": "0.5", "labels": [inner.name]}}
            if output.image is None:
                groups[inner.parent.parent] = {ATTRIBUTE: record}
        volume.create(self.work.folder, made, groups)


def made_from_of(
    identity: list[Any], source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions
) -> dict[str, Any]:
    """Everything that the bytes of a prediction depend on, as plain JSON values.

    Args:
        identity: of the input (`sources.identity_of`).
    """
    return {
        "weights": predictor.weights_sha256,
        "image": identity,
        "tile": predictor.tile(options.tile, source.info.shape_ZYX),
        "overlap": options.overlap,
        "batch": options.batch_size,
        "rescaling": options.rescale,
        "pixel_size": list(options.pixel_nm),
        "planes": list(options.planes),
        "tta": options.tta,
        "probabilities": targets.with_probabilities,
        "copy_of_the_image": options.image and targets.is_zarr,
        "device": [predictor.choice.device.type, predictor.choice.precision],
    }


def _readable_plan(work: Work) -> dict[str, Any] | None:
    """The plan under way, which may be damaged or of another version, when it is to give way anyway."""
    try:
        return work.read_plan()
    except Exception:
        work.discard()
        return None


def _new_plan(
    source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions, made_from: dict[str, Any],
    identity: list[Any],
) -> dict[str, Any]:  # fmt: skip
    """Choose what is left open: statistics of the image, blocks, batch."""
    statistics = measure(source)
    device = predictor.choice.device
    plan: dict[str, Any] = {"made_from": made_from, "statistics": statistics.to_dict(), "grids": {}}
    shape = source.info.shape_ZYX
    sums_bytes = 0
    for name in options.planes:
        view, scale = _view(source, predictor, options, name)
        inner = math.prod(scale.shape) / math.prod(view.info.shape_ZYX[1:])
        grid = Grid.choose(view.info.shape_ZYX, classes=predictor.classes, device=device.type, inner=inner)
        plan["grids"][name] = list(grid.block)
        voxels = math.prod(min(edge, length) for edge, length in zip(grid.block, view.info.shape_ZYX, strict=True))
        sums_bytes = max(sums_bytes, int(4 * predictor.classes * voxels * max(1.0, inner)))
        if sums_bytes > memory_budget():
            raise ResourceError(
                f"a block of {source.info.name} takes {human_bytes(sums_bytes)} of memory, "
                f"{human_bytes(memory_budget())} may be used",
                "use --no-rescale, or a machine with more memory",
            )
    if options.planes != ("xy",):
        plan["grids"]["output"] = [min(edge, length) for edge, length in zip(MERGE_BLOCK, shape, strict=True)]
    tile = made_from["tile"]
    network = predictor.network(tta=options.tta)
    plan["batch"] = options.batch_size or network.choose_batch(tile, 4 * sums_bytes)
    plan["key"] = digest(plan)
    passes, merge, _, _ = _passes(source, predictor, targets, options, plan)
    plan["blocks"] = sum(len(each.grid) for each in passes) + (0 if merge is None else len(merge.grid))
    return plan | {
        "inputs": described(source),
        "name": source.info.name,
        "weights": str(predictor.weights.absolute()),
        "options": asdict(options),
    }


def _view(source: Source, predictor: Predictor, options: PredictOptions, name: str) -> tuple[Source, Any]:
    """The input in one orientation, and the scale of its planes."""
    axes = ORIENTATIONS[name]
    view: Source = source if name == "xy" else Reoriented(source, axes)
    pixel_nm = voxel_size(source.info, options.pixel_nm)
    scale = choose_scale(
        source.info.name,
        (view.info.shape_ZYX[1], view.info.shape_ZYX[2]),
        (pixel_nm[axes[1]], pixel_nm[axes[2]]),
        predictor.metadata.pixel_nm,
        rescale=options.rescale,
    )
    return view, scale


def _passes(
    source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions, plan: dict[str, Any]
) -> tuple[tuple[Pass, ...], Pass | None, list[str], list[str]]:
    """The orientations with their blocks, what averages them, and notes and warnings."""
    work, classes = Work(targets.labels), predictor.classes
    merged = options.planes != ("xy",)  # sections of another orientation are turned back when they are merged
    tile, overlap = plan["made_from"]["tile"], options.overlap
    dtype = label_dtype(classes)
    notes, warnings = list(source.info.notes), list[str]()

    def written(grid: Grid) -> dict[str, Pyramid | None]:
        """Where the blocks of the output go. A TIFF needs no pyramid: it is written from the full resolution."""
        name = safe_name(outputs.stem(targets.labels), ())
        root = work.folder / "volume"
        labels = root / "labels" / name if targets.is_zarr else root
        probabilities = work.folder / "probabilities" if targets.with_probabilities else None
        image = root if plan["made_from"]["copy_of_the_image"] else None
        return {
            "labels": Pyramid(labels, grid, dtype, depth=None if targets.is_zarr else 1),
            "probabilities": None
            if probabilities is None
            else Pyramid(probabilities, grid, np.dtype(np.uint8), classes),
            "image": None if image is None else Pyramid(image, grid, source.info.dtype),
        }

    passes: list[Pass] = []
    first = 0
    for name in options.planes:
        view, scale = _view(source, predictor, options, name)
        notes += [text for text in scale.notes if text not in notes]
        warnings += [text for text in scale.warnings if text not in warnings]
        z, y, x = plan["grids"][name]
        grid = Grid(view.info.shape_ZYX, (z, y, x))
        height, width = view.info.shape_ZYX[1:]
        geometry = PlaneGeometry.of((height, width), scale.shape, tile, overlap)
        if merged:
            own = Pyramid(work.folder / "planes" / name, grid, np.dtype(np.uint8), classes, depth=1)
            passes.append(Pass(name, view, geometry, grid, first, probabilities=own))
        else:
            passes.append(Pass(name, view, geometry, grid, first, **written(grid)))
        first += len(grid)
    merge = None
    if merged:
        z, y, x = plan["grids"]["output"]
        grid = Grid(source.info.shape_ZYX, (z, y, x))
        merge = Pass("output", source, passes[0].geometry, grid, first, **written(grid))
        sizes = [size for size in voxel_size(source.info, options.pixel_nm) if size is not None]
        if len(sizes) == 3 and max(sizes) > ISOTROPIC * min(sizes):
            warnings.append(
                f"{source.info.name} has voxels of {' x '.join(f'{size:g}' for size in sizes)} nm: planes across the "
                "sections help where voxels are nearly as deep as wide"
            )
    if Statistics.from_dict(plan["statistics"]).blank:
        warnings.append(f"{source.info.name} is blank: there is nothing to see in it")
    return tuple(passes), merge, notes, warnings


def _to_host(tensor: Tensor | None) -> Tensor | None:
    """A copy in pinned memory, which is made while the host goes on."""
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
