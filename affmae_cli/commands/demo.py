"""`affmae demo`: the whole story, with the very commands a user would type, and a table of what pretraining was worth.

Without images of one's own the specimen is a generated phantom: unlabelled sections to pretrain on, a few labelled ones
to finetune on, others to validate on, and a volume that nothing was trained on for the final scores.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affmae_cli import output
from affmae_cli.commands import finetune, ingest, predict, pretrain
from affmae_cli.options import DeviceOption, JsonOption, OverwriteOption, PresetOption, QuietOption, SeedOption
from affmae_engine.errors import ConfigError

if TYPE_CHECKING:
    from affmae_engine.predict.score import Score

_PHANTOMS = {
    "unlabelled": ((24, 384, 384), 11),
    "train": ((4, 256, 256), 25),
    "val": ((2, 256, 256), 28),
    "test": ((6, 256, 256), 36),
}
"""Shape and seed of each generated volume; the seeds are ones with mitochondria in so little tissue."""
_CLASS_NAMES = ("cytoplasm", "membrane", "mitochondria")
_CLASS_OF = (0, 1, 2, 0, 0)
"""What the phantom's classes are in the demo: vesicles and glia are too rare here to be learnt within a minute."""
_MARK = ".affmae-demo"
"""File that says a folder was made by this command, so that --overwrite may delete it."""


def demo(
    images: Annotated[
        list[Path] | None, typer.Option("--images", help="Your own images, in place of the phantom.")
    ] = None,
    labels: Annotated[list[Path] | None, typer.Option("--labels", help="Their labels, as for finetune.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PATH", help="Folder for everything.")] = Path("demo"),
    preset: PresetOption = "demo",
    seed: SeedOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ingest, pretrain, finetune and predict, and compare with a model that was not pretrained.

    On a generated phantom this takes a few minutes on a CPU. With --images and --labels it does the same with your
    own data; its scores are then those of the validation part.
    """
    if bool(images) != bool(labels):
        raise ConfigError("--images and --labels go together", "give both, or none for the generated phantom")
    begun = time.monotonic()
    _make_folder(out, overwrite)
    story = _Story(out, preset, seed, device, quiet)
    # Standard output is for the result; what the commands on the way print goes where their progress goes.
    with contextlib.redirect_stdout(sys.stderr):
        specimen = _own(images, labels) if images and labels else _phantom(out / "specimen", quiet)
        story.pretrain(specimen)
        scores = {
            "pretrained": story.finetune(specimen, "finetune"),
            "from scratch": story.finetune(specimen, "scratch"),
        }
    _show(story, specimen, scores, time.monotonic() - begun, as_json=json)


@dataclass(frozen=True)
class _Specimen:
    """What the story is told with. `test` and `test_labels`: scored at the end; None: the validation part is."""

    unlabelled: list[Path]
    images: list[Path]
    labels: list[Path]
    val_images: list[Path]
    val_labels: list[Path]
    test: Path
    test_labels: Path | None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Story:
    """The commands, in order, on one folder."""

    folder: Path
    preset: str
    seed: int | None
    device: Literal["auto", "cpu", "cuda"] | None
    quiet: bool

    def pretrain(self, specimen: _Specimen) -> None:
        """Ingest the unlabelled images and pretrain on them."""
        store = self.folder / "em.zarr"
        with self._step("ingest", *specimen.unlabelled, "-o", store):
            ingest.ingest([str(path) for path in specimen.unlabelled], store, quiet=self.quiet)
        run = self._run("pretrain")
        with self._step("pretrain", store, "--preset", self.preset, "-o", run):
            pretrain.pretrain(
                [store], preset=self.preset, seed=self.seed, device=self.device, out=run, quiet=self.quiet, no_tui=True
            )

    def finetune(self, specimen: _Specimen, name: str) -> Score:
        """Finetune, predict the test images, and return their score."""
        from affmae_engine.predict.job import PredictOptions
        from affmae_engine.predict.predictor import Predictor

        run = self._run(name)
        origin = self._run("pretrain") if name == "finetune" else None
        words = ["--images", *specimen.images, "--labels", *specimen.labels]
        if specimen.val_images:
            words += ["--val-images", *specimen.val_images, "--val-labels", *specimen.val_labels]
        words += ["--init-from", origin] if origin else []
        settings = [f"finetune.class_names={list(specimen.class_names)}"] if specimen.class_names else []
        words += [word for setting in settings for word in ("--set", setting)]
        with self._step("finetune", *words, "--preset", self.preset, "-o", run):
            finetune.finetune(
                images=[str(path) for path in specimen.images],
                labels=[str(path) for path in specimen.labels],
                val_images=[str(path) for path in specimen.val_images],
                val_labels=[str(path) for path in specimen.val_labels],
                init_from=origin,
                preset=self.preset,
                set_=settings,
                seed=self.seed,
                device=self.device,
                out=run,
                quiet=self.quiet,
                no_tui=True,
            )
        truth = [specimen.test_labels] if specimen.test_labels else None
        words = ["--labels", specimen.test_labels] if specimen.test_labels else []
        with self._step("predict", specimen.test, "-m", run, "-o", self.labels(name), *words):
            predictor = Predictor.from_weights(run, device=self.device or "auto")
            targets = predict.Targets(self.labels(name))
            _, scored = predict.segment(
                [specimen.test], predictor, targets, PredictOptions(), labels=truth, quiet=self.quiet
            )
        return scored or _validation_score(run)

    def labels(self, name: str) -> Path:
        """Where a model's predicted labels go."""
        return self.folder / f"labels-{name}.tif"

    def reconstruction(self) -> Path:
        """The newest picture of the pretraining."""
        return sorted((self._run("pretrain") / "previews").glob("*.png"))[-1]

    def _run(self, name: str) -> Path:
        return self.folder / "runs" / name

    @contextlib.contextmanager
    def _step(self, *words: object) -> Iterator[None]:
        if not self.quiet:
            output.say("")
            output.say(f"$ {shlex.join(['affmae', *map(str, words)])}", style="bold cyan")
        yield


def _make_folder(out: Path, overwrite: bool) -> None:
    from affmae_engine import atomic

    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise ConfigError(f"{out} exists and was not made by affmae demo", "choose another folder with -o/--out")
        if not overwrite:
            raise ConfigError(f"{out} holds an earlier demo", "replace it with --overwrite, or choose another -o/--out")
        shutil.rmtree(out)
    atomic.ensure_folder(out)
    atomic.commit_text(out / _MARK, "made by affmae demo; --overwrite deletes this folder\n")


def _own(images: list[Path], labels: list[Path]) -> _Specimen:
    from affmae_engine.data.readers import find_files

    return _Specimen(images, images, labels, [], [], find_files(images)[0], None)


def _phantom(folder: Path, quiet: bool) -> _Specimen:
    import numpy as np

    from affmae_engine import atomic
    from affmae_engine.data.phantom import generate, write_tiff

    atomic.ensure_folder(folder)
    for name, (shape, seed) in _PHANTOMS.items():
        if not quiet:
            output.say(f"generating {' x '.join(map(str, shape))} voxels of EM phantom: {folder / name}.tif")
        phantom = generate(shape, seed=seed)
        phantom = replace(phantom, labels_ZYX=np.array(_CLASS_OF, np.uint8)[phantom.labels_ZYX])
        write_tiff(phantom, folder / f"{name}.tif", folder / f"{name}-labels.tif")
    images = {name: folder / f"{name}.tif" for name in _PHANTOMS}
    truth = {name: folder / f"{name}-labels.tif" for name in _PHANTOMS}
    return _Specimen(
        [images["unlabelled"]], [images["train"]], [truth["train"]], [images["val"]], [truth["val"]],
        images["test"], truth["test"], _CLASS_NAMES,
    )  # fmt: skip


def _validation_score(run: Path) -> Score:
    from affmae_engine.events import best_evaluation
    from affmae_engine.predict.score import Score
    from affmae_engine.run_dir import RunDir

    best = best_evaluation(RunDir(run).metrics)
    if best is None:
        raise ConfigError(f"{run} was never evaluated", "use a preset with train.eval_every")
    return Score(best.metrics["iou"], best.metrics["dice"], best.per_class, {})


def _show(story: _Story, specimen: _Specimen, scores: dict[str, Score], seconds: float, *, as_json: bool) -> None:
    from dataclasses import asdict

    from affmae_cli.score_table import show_scores
    from affmae_engine.runtime.formatting import duration

    overlay = story.labels("finetune").with_name("labels-finetune-overlay.png")
    if as_json:
        output.print_json(
            {
                "seconds": seconds,
                "scored_on": specimen.test_labels or "validation part",
                "scores": {name: asdict(score) for name, score in scores.items()},
                "reconstruction": story.reconstruction(),
                "overlay": overlay,
                "labels": story.labels("finetune"),
            }
        )
        return
    what = f"{specimen.test}, which nothing was trained on" if specimen.test_labels else "the validation part"
    output.show(f"\nScores on {what}, after {duration(seconds)}:\n")
    show_scores(scores)
    output.show(f"\nreconstruction  {story.reconstruction()}")
    output.show(f"overlay         {overlay}")
    output.show(f"labels          {story.labels('finetune')}")
