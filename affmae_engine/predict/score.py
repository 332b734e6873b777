"""Scoring predicted labels against labels drawn by hand, over all images and for each.

Truth is found and checked as `affmae finetune` does it (by name, as stacks, binary masks per class), so that what was
good for training is good for scoring. Reads a few rows at a time: size does not matter.

Boundary F1 (Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013):
the harmonic mean of the share of predicted boundary pixels that have a true one of the class within `TOLERANCE` pixels,
and the share of true ones that have a predicted one. A boundary pixel has a neighbor, left, right, above or below,
of another class; pixels that are not labelled count neither as boundary nor as neighbor.

Axes: K classes, R rows, X columns of a part of a section.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affmae_engine import atomic
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.labels.checks import CheckedLabels, check_labels
from affmae_engine.data.labels.pairing import LabelledImage, pair_labels
from affmae_engine.data.labels.sources import Section
from affmae_engine.data.readers import Source
from affmae_engine.data.readers.source import reading
from affmae_engine.data.store import Store
from affmae_engine.data.volumes import content_hash
from affmae_engine.errors import AffmaeError, InputError
from affmae_engine.predict.identity import open_labels
from affmae_engine.run_dir import RunDir
from affmae_engine.segmentation_metrics import Confusion, mean

TOLERANCE = 2
"""Pixels by which a boundary may be off."""
_NEAR = [
    (dy, dx)
    for dy in range(-TOLERANCE, TOLERANCE + 1)
    for dx in range(-TOLERANCE, TOLERANCE + 1)
    if dy * dy + dx * dx <= TOLERANCE * TOLERANCE
]
_MARGIN = TOLERANCE + 1
"""Rows beyond a part of a section that its boundaries depend on."""
_ROWS_PIXELS = 1 << 24
FIGURES = ("iou", "dice", "precision", "recall", "boundary_f1")
"""What is computed for every class."""


@dataclass(frozen=True)
class ImageScore:
    """One image. per_class: {class name: `FIGURES` and "pixels"}; nan for classes that its truth does not have
    (boundary_f1: of which it has no boundary).
    confusion: pixels by (true class, predicted class). trained_on: sections of it that the model was trained on."""

    name: str
    mean_iou: float
    mean_dice: float
    per_class: dict[str, dict[str, float]]
    confusion: list[list[int]]
    trained_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """mean_iou, mean_dice: over the classes that the truth has. per_class, confusion: as in `ImageScore`, over all
    pixels. per_image: mean IoU by input name."""

    mean_iou: float
    mean_dice: float
    per_class: dict[str, dict[str, float]]
    per_image: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    images: tuple[ImageScore, ...] = ()

    @property
    def trained_on(self) -> list[str]:
        """Everything scored that the model was trained on."""
        return [text for image in self.images for text in image.trained_on]


@dataclass(frozen=True)
class Predicted:
    """A prediction to be scored. sections: path and series of every image that its input is made of."""

    sections: Sequence[Sequence[str]]
    labels: Path


def read_truth(
    inputs: Sequence[Path],
    truth: Sequence[Path],
    *,
    class_names: Sequence[str],
    ignore_label: int | None,
    files: Sequence[Path] | None = None,
) -> CheckedLabels:
    """Pair inputs with their true labels and check these; nothing is predicted yet.

    Args:
        inputs: as the user named them; names of labels are compared below these.
        files: what is predicted of them (`files.Plan.files`); None is everything.

    Raises:
        InputError: lists every input without labels, labels of another size, values that are no class.
        ConfigError: the labels are masks of other classes than the model's.
    """
    pairing = pair_labels(inputs, truth, image_files=files)
    return check_labels(pairing, class_names=class_names, ignore_label=ignore_label)


def score(predictions: Sequence[Predicted], truth: CheckedLabels, trained: TrainedOn | None = None) -> Score:
    """Compare what `predict` wrote with the truth.

    Args:
        trained: what the model was trained on; None: not known.

    Raises:
        InputError: a prediction has no truth, or cannot be read any more.
    """
    true_of = {(pair.image.info.path.resolve(), pair.image.info.series): pair for pair in truth.pairs}
    total = _Counts(len(truth.class_names))
    images = []
    for prediction in predictions:
        with open_labels(prediction.labels) as predicted:
            for z, (path, series) in enumerate(prediction.sections):
                pair = true_of.get((Path(path).resolve(), series))
                if pair is None:
                    raise InputError(f"{path} has no labels to be scored against", "give labels for every input")
                of_image = predicted if len(prediction.sections) == 1 else Section(predicted, z)
                here = _Counts(len(truth.class_names))
                with pair.labels as true:
                    _count(of_image, true, truth.ignore_label, here)
                total.add(here)
                known = () if trained is None else trained.sections_of(pair)
                images.append(here.of_image(pair.name, truth.class_names, known))
    overall = total.of_image("overall", truth.class_names)
    per_image = {image.name: image.mean_iou for image in images}
    return Score(
        overall.mean_iou, overall.mean_dice, overall.per_class, per_image, overall.confusion, tuple(images)
    )  # fmt: skip


def write_scores(folder: Path, found: Score, about: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write scores.json and scores.csv.

    Args:
        about: what else scores.json is to say (the model).

    Raises:
        ResourceError: they cannot be written.
    """
    document, table = folder / "scores.json", folder / "scores.csv"
    values = {**about, "boundary_tolerance_pixels": TOLERANCE, **asdict(found), "trained_on": found.trained_on}
    atomic.commit_json(document, _without_nan(values))
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", "class", *FIGURES, "pixels", "trained_on"))
    overall = ImageScore("overall", found.mean_iou, found.mean_dice, found.per_class, found.confusion)
    for image in (*found.images, overall):
        for name, figures in image.per_class.items():
            cells = ["" if math.isnan(figures[key]) else f"{figures[key]:.6f}" for key in FIGURES]
            rows.writerow((image.name, name, *cells, int(figures["pixels"]), "; ".join(image.trained_on)))
    atomic.commit_text(table, text.getvalue())
    return document, table


class TrainedOn:
    """The sections that a run was finetuned on, recognized by the SHA-256 of their files.

    Args:
        images: by hash and series, name in the run's dataset and depth. regions: [name, z0, z1, y0, y1] of what was
            trained on; None: not recorded, so what is held out is not told from it.
    """

    def __init__(
        self, images: Mapping[tuple[str, str], tuple[str, int]], regions: Sequence[Sequence[Any]] | None
    ) -> None:
        self._images, self._regions = images, regions

    @classmethod
    def of_weights(cls, weights: Path) -> TrainedOn | None:
        """What the run that these weights lie in was trained on; None where that is not to be found."""
        for root in weights.absolute().parents[:3]:
            run = RunDir(root)
            if not run.exists():
                continue
            try:
                store = Store.open(run.data)
                split = run.read_json(run.environment).get("split")
            except AffmaeError:
                return None
            regions = split.get("train") if isinstance(split, dict) else None
            images = {(image.sha256, image.source_series): (image.name, image.shape_ZYX[0]) for image in store.images}
            return cls(images, regions)
        return None

    def sections_of(self, pair: LabelledImage) -> tuple[str, ...]:
        """Which sections of an image were trained on, in words."""
        info = pair.image.info
        with reading(info.path):
            found = self._images.get((content_hash(info.path), info.series))
        if found is None:
            return ()
        name, depth = found
        if self._regions is None:
            return (f"{pair.name} (trained on or held out)",)
        texts = []
        for region, z0, z1, y0, y1 in self._regions:
            if region == name:
                sections = "" if (z0, z1) == (0, depth) else f" sections {z0} to {z1 - 1}"
                rows = "" if y0 is None else f" rows {y0} to {y1 - 1}"
                texts.append(f"{pair.name}{sections}{rows}")
        return tuple(texts)


class _Counts:
    """Pixels by (true, predicted) class, and boundary pixels [K, 4]: predicted, of these near a true one; true, of
    these near a predicted one."""

    def __init__(self, classes: int) -> None:
        self.confusion = Confusion(classes)
        self.boundary_K4 = np.zeros((classes, 4), np.int64)

    def add(self, other: _Counts) -> None:
        """Take in the counts of another part."""
        self.confusion += other.confusion
        self.boundary_K4 += other.boundary_K4

    def of_image(self, name: str, class_names: Sequence[str], trained_on: tuple[str, ...] = ()) -> ImageScore:
        """The figures."""
        counts = self.confusion.counts
        true, predicted, hit = counts.sum(axis=1), counts.sum(axis=0), np.diagonal(counts)
        per_class = self.confusion.per_class(class_names)
        for k, figures in enumerate(per_class.values()):
            figures["precision"] = _ratio(hit[k], predicted[k]) if true[k] else math.nan
            figures["recall"] = _ratio(hit[k], true[k]) if true[k] else math.nan
            precision, recall = _ratio(*self.boundary_K4[k, 1::-1]), _ratio(*self.boundary_K4[k, :1:-1])
            figures["boundary_f1"] = _f1(precision, recall) if self.boundary_K4[k, 2] else math.nan
        iou, dice = mean(self.confusion.iou()), mean(self.confusion.dice())
        return ImageScore(name, iou, dice, per_class, counts.tolist(), trained_on)


def _count(predicted: Source, true: Source, ignore_label: int | None, into: _Counts) -> None:
    depth, height, width = true.info.shape_ZYX
    if predicted.info.shape_ZYX != true.info.shape_ZYX:
        raise InputError(
            f"{predicted.info.path} is {predicted.info.shape_ZYX}, its true labels are {true.info.shape_ZYX} (z, y, x)"
        )
    rows = max(1, _ROWS_PIXELS // width)
    for z in range(depth):
        for first in range(0, height, rows):
            last = min(first + rows, height)
            low, high = max(0, first - _MARGIN), min(height, last + _MARGIN)
            part = slice(z, z + 1), slice(low, high), slice(0, width)
            true_RX = true.read(*part)[0].astype(np.int64)
            if ignore_label is not None:
                true_RX[true_RX == ignore_label] = IGNORE
            predicted_RX = predicted.read(*part)[0].astype(np.int64)
            inside = slice(first - low, last - low)
            into.confusion.add(predicted_RX[inside], true_RX[inside])
            predicted_RX[true_RX == IGNORE] = IGNORE
            into.boundary_K4 += _boundary_counts(predicted_RX, true_RX, inside, len(into.boundary_K4))


def _boundary_counts(
    predicted_RX: NDArray[np.int64], true_RX: NDArray[np.int64], inside: slice, classes: int
) -> NDArray[np.int64]:
    """See `_Counts`; of the rows `inside`."""
    edges = [_is_boundary(labels_RX) for labels_RX in (predicted_RX, true_RX)]
    counts_K4 = np.zeros((classes, 4), np.int64)
    for k in range(classes):
        of_predicted, of_true = (
            edge & (labels_RX == k) for edge, labels_RX in zip(edges, (predicted_RX, true_RX), strict=True)
        )
        for column, (own, other) in ((0, (of_predicted, of_true)), (2, (of_true, of_predicted))):
            counts_K4[k, column] = np.count_nonzero(own[inside])
            if counts_K4[k, column]:
                counts_K4[k, column + 1] = np.count_nonzero((own & _dilated(other))[inside])
    return counts_K4


def _is_boundary(labels_RX: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Labelled pixels with a labelled neighbor of another class."""
    edge_RX = np.zeros(labels_RX.shape, bool)
    for axis in (0, 1):
        before = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        after = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        first, second = labels_RX[before], labels_RX[after]
        differ = (first != second) & (first != IGNORE) & (second != IGNORE)
        edge_RX[before] |= differ
        edge_RX[after] |= differ
    return edge_RX


def _dilated(mask_RX: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels within `TOLERANCE` of a pixel of the mask."""
    height, width = mask_RX.shape
    padded = np.pad(mask_RX, TOLERANCE)
    result = np.zeros_like(mask_RX)
    for dy, dx in _NEAR:
        y, x = TOLERANCE + dy, TOLERANCE + dx
        result |= padded[y : y + height, x : x + width]
    return result


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
