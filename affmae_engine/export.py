"""A segmenter as a program that runs without affmae: `torch.export` (.pt2) and TorchScript (.pt).

Both come from the reference implementation of the operations, in fp32 on the CPU, for one tile size. What they compute
is compared with the network itself before anything is written.

Axes: K classes, T tile edge.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from affmae_engine.errors import AffmaeError, ConfigError
from affmae_engine.predict.predictor import Predictor

TOLERANCE = 1e-4
"""Largest difference of a class probability between an exported program and the network."""


class ClassProbabilities(nn.Module):
    """Normalized tile [1, 1, T, T] -> class probabilities [1, K, T, T]."""

    def __init__(self, segmenter: nn.Module, excluded: tuple[int, ...]) -> None:
        super().__init__()
        self.segmenter, self.excluded = segmenter, list(excluded)

    def forward(self, image_11TT: Tensor) -> Tensor:
        """Probabilities; 0 for classes that are never predicted."""
        logits_1KTT = self.segmenter(image_11TT)["logits"]
        if self.excluded:
            index_E = torch.tensor(self.excluded, device=logits_1KTT.device)
            logits_1KTT = logits_1KTT.index_fill(1, index_E, -torch.inf)
        return logits_1KTT.softmax(1)


@dataclass(frozen=True)
class Exported:
    """The exported program of a segmenter. difference: the largest one of a probability that was found."""

    program: torch.export.ExportedProgram
    network: ClassProbabilities
    tile: int
    difference: float

    def save_program(self, path: Path) -> None:
        """Write it for `torch.export.load`."""
        torch.export.save(self.program, path)

    def save_torchscript(self, path: Path) -> float:
        """Write it as TorchScript, for programs that read BioImage.IO models; returns the largest difference.

        Raises:
            AffmaeError: it does not compute what the network computes.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about checks of shapes, which are constant here
            script = torch.jit.trace(self.program.module(), sample_tile(self.tile, 0), check_trace=False)
            script.save(path)
            return _agreement(torch.jit.load(path), self.network, self.tile, "TorchScript")


def export(path: Path, *, tile: int | None = None) -> Exported:
    """Export a finetuned network.

    Args:
        path: any model that `load_weights` takes.
        tile: edge of its input in pixels; by default the training image's.

    Raises:
        InputError: nothing there, or a pretrained network.
        ConfigError: a ViT.
        AffmaeError: the exported program does not compute what the network computes.
    """
    predictor = Predictor.from_weights(path, device="cpu", backend="reference")
    if predictor.metadata.model.get("family", "affmae") != "affmae":
        raise ConfigError("only AFFMAE networks are exported; this is a ViT", "share it without --export")
    largest = tile or predictor.metadata.image_size
    edge = predictor.tile(tile, (1, largest, largest))
    network = ClassProbabilities(predictor.model, predictor.excluded).eval()
    quiet = logging.getLogger("torch.export")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        program = torch.export.export(network, (sample_tile(edge, 0),))
    finally:
        quiet.setLevel(level)
    return Exported(program, network, edge, _agreement(program.module(), network, edge, "torch.export"))


def sample_tile(edge: int, seed: int) -> Tensor:
    """A normalized tile [1, 1, T, T] of smooth noise, so that tokens are spread unevenly as in an image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, max(2, edge // 16), max(2, edge // 16), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (edge, edge), mode="bilinear")
    return smooth + 0.3 * torch.randn(1, 1, edge, edge, generator=generator)


@torch.no_grad()
def _agreement(program: nn.Module, network: nn.Module, edge: int, name: str) -> float:
    """Compare on tiles that the program was not made from."""
    tiles = [sample_tile(edge, seed) for seed in (1, 2)]
    difference = max(float((program(each) - network(each)).abs().max()) for each in tiles)
    if not difference <= TOLERANCE:
        raise AffmaeError(
            f"the exported program ({name}) differs from the network by {difference:.2g}, more than {TOLERANCE:g}",
            "share the model without it, and report this with the versions that affmae doctor shows",
        )
    return difference
