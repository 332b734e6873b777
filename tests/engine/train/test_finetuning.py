"""The finetuning task: splits, classes, weights, learning-rate groups, validation by tiles, learning at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affmae_engine.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    RunConfig,
    TrainConfig,
)
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.labels.gather import gather_labels, write_labelled_store
from affmae_engine.data.segmentation import Section
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, InputError, Interrupted
from affmae_engine.model.affmae import Segmenter
from affmae_engine.model.build import encoder_layers
from affmae_engine.train.finetuning import FinetuneTask
from affmae_engine.train.optim import layer_decay_groups
from affmae_engine.train.segmentation_evaluation import chosen_sections

CPU = torch.device("cpu")


def blobs(depth: int, edge: int, *, count: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Square blobs of `count` classes that differ in brightness, with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, count, (depth, -(-edge // 16), -(-edge // 16)))
    labels = coarse.repeat(16, 1).repeat(16, 2)[:, :edge, :edge].astype(np.uint8)
    return (labels * 90 + rng.integers(0, 20, labels.shape)).astype(np.uint8), labels


def make_config(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": ModelConfig(size="tiny", drop_path=0, decoder_dropout=0),
        "data": DataConfig(crop_size=64, workers=0),
        "train": TrainConfig(steps=10, batch_size=2, device="cpu"),
        "predict": PredictConfig(batch_size=2),
    }
    return RunConfig(**{**base, **sections})


@pytest.fixture
def store(make_labelled_store: Callable[..., Store]) -> Store:
    return make_labelled_store({"stack": blobs(12, 80)})


def test_a_stack_is_split_into_blocks_with_a_gap(store: Store):
    task = FinetuneTask(make_config(), store)
    report = task.transfer
    trained = {s.z for s in task.dataset.sections}
    held_out = {s.z for s in task.evaluation.sections}
    assert report is None
    assert len(held_out) == 2
    assert min(abs(a - b) for a in trained for b in held_out) >= 2
    assert task.fingerprint == store.fingerprint()


def test_what_is_found_is_written_into_the_configuration(store: Store):
    asked = make_config(train=TrainConfig(epochs=3, batch_size=2, device="cpu"))
    task = FinetuneTask(asked, store)
    config = task.config
    assert config.finetune.class_names == store.class_names == ("class0", "class1")
    assert len(config.finetune.class_weights) == 2
    assert sum(config.finetune.class_weights) == pytest.approx(2, abs=1e-3)
    assert config.train.steps == -(-3 * task.dataset.samples_per_epoch // 2)
    assert task.metadata.class_names == config.finetune.class_names
    assert (task.metadata.task, task.metadata.image_size) == ("finetune", 64)
    task = FinetuneTask(config, store)
    again = task.config
    assert again == config


def test_given_validation_images_are_used(make_labelled_store: Callable[..., Store]):
    store = make_labelled_store({name: blobs(1, 80, seed=k) for k, name in enumerate("abc")})
    config = make_config(finetune=FinetuneConfig(val_images=("b",)))
    task = FinetuneTask(config, store)
    assert {s.name for s in task.dataset.sections} == {"a", "c"}
    assert {s.name for s in task.evaluation.sections} == {"b"}
    with pytest.raises(ConfigError, match=r"finetune.val_images: not in .*: z"):
        FinetuneTask(make_config(finetune=FinetuneConfig(val_images=("z",))), store)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_weights": (1.0, 2.0, 3.0)}, "class_weights has 3 values, there are 2"),
        ({"class_names": ("a", "b", "c")}, "class_names has 3 names, the labels have 2"),
        ({"focal_gamma": 0.3}, "focal_gamma"),
    ],
)
def test_settings_that_do_not_fit_the_labels_are_refused(store: Store, fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        FinetuneTask(make_config(finetune=FinetuneConfig(**fields)), store)


def test_a_store_without_labels_is_refused(make_store: Callable[..., Store]):
    with pytest.raises(InputError, match="has no labels"):
        FinetuneTask(make_config(), make_store({"a": blobs(4, 80)[0]}))


def test_too_little_to_validate_on_is_refused(make_labelled_store: Callable[..., Store]):
    store = make_labelled_store(
        {"a": (np.arange(6, dtype=np.uint8).reshape(1, 1, 6), np.eye(1, 6, dtype=np.uint8)[None])}
    )
    with pytest.raises(InputError, match="too little labelled data"):
        FinetuneTask(make_config(), store)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("labelled", [(0, 1, 2), (2, 3, 4, 5, 9), (1, 10)])
def test_only_labelled_sections_are_divided(
    make_labelled_store: Callable[..., Store], labelled: tuple[int, ...], seed: int
):
    images, labels = blobs(12, 80)
    labels[[z for z in range(12) if z not in labelled]] = 255
    store = make_labelled_store({"stack": (images, labels)}, ignore_label=255)
    config = make_config(finetune=FinetuneConfig(ignore_label=255))
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    task = FinetuneTask(config, store)
    trained = task.dataset.sections
    held_out = task.evaluation.sections
    assert {s.z for s in (*trained, *held_out)} <= set(labelled)
    if len(labelled) > 2:
        assert min(abs(s.z - t.z) for s in trained for t in held_out) >= 2
    else:  # two sections give a strip each
        assert all(s.height < 80 for s in (*trained, *held_out))
    assert task.evaluate(task.model.eval(), CPU).score >= 0  # which it would not be of nothing


def test_a_validation_set_without_a_labelled_pixel_is_refused(make_labelled_store: Callable[..., Store]):
    sets = {name: blobs(1, 80, seed=k) for k, name in enumerate("abc")}
    sets["b"][1][:] = 255
    store = make_labelled_store(sets, ignore_label=255)
    with pytest.raises(InputError, match="set aside for validation is labelled") as error:
        FinetuneTask(make_config(finetune=FinetuneConfig(val_images=("b",), ignore_label=255)), store)
    assert "--val-images" in error.value.hint
    task = FinetuneTask(make_config(finetune=FinetuneConfig(val_images=("b", "c"), ignore_label=255)), store)
    assert {s.name for s in task.evaluation.sections} == {"c"}


def test_the_learning_rate_falls_by_layer(store: Store):
    task = FinetuneTask(make_config(), store)
    groups = task.parameter_groups(OptimConfig(layer_decay=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    scale, decay = {}, {}
    for group in groups:
        for parameter in group["params"]:
            scale[names[id(parameter)]] = group["lr_scale"]
            decay[names[id(parameter)]] = group["weight_decay"]
    depths = encoder_layers(ModelConfig(size="tiny")).count
    assert scale["encoder.stem.convs.0.weight"] == 0.5**depths
    assert scale["encoder.stages.3.blocks.0.norm1.weight"] == 0.5
    assert scale["decoder.mask_token"] == scale["heads.last.linear.weight"] == 1.0
    assert decay["heads.last.linear.weight"] == 0.1
    assert decay["heads.last.linear.bias"] == decay["decoder.mask_token"] == 0.0
    assert len(scale) == len(names)


def test_one_rate_for_all_without_layer_decay():
    model = ModelConfig(size="tiny")
    groups = layer_decay_groups(Segmenter(model, 2), OptimConfig(), encoder_layers(model))
    assert {group["lr_scale"] for group in groups} == {1.0}


class Oracle(torch.nn.Module):
    """Two classes by brightness: a segmenter that is always right on `blobs`."""

    def forward(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": 20 * torch.cat([-image_BCHW, image_BCHW], dim=1)}


def test_validation_covers_whole_images_of_any_size(make_labelled_store: Callable[..., Store]):
    shapes = {"a": 70, "b": 131, "c": 150, "d": 33}
    store = make_labelled_store({name: blobs(1, edge, seed=k) for k, (name, edge) in enumerate(shapes.items())})
    config = make_config(finetune=FinetuneConfig(val_images=("b", "d")))
    task = FinetuneTask(config, store)
    found = task.evaluate(Oracle(), CPU)
    assert found.score == found.metrics["dice"] == found.metrics["iou_per_image"] == 1.0
    pixels = sum(scores["pixels"] for scores in found.per_class.values())
    assert pixels == 131**2 + 33**2
    wrong = task.evaluate(torch.nn.Sequential(Negate(), Oracle()), CPU)
    assert wrong.score == 0.0


class Negate(torch.nn.Module):
    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return -image_BCHW


def test_ignored_pixels_are_not_scored_and_never_predicted(make_labelled_store: Callable[..., Store]):
    image, labels = blobs(12, 80)
    labels[:, :40] = 2
    store = make_labelled_store({"a": (image, labels)}, ignore_label=2, class_names=("x", "y", "unsure"))
    task = FinetuneTask(make_config(finetune=FinetuneConfig(ignore_label=2)), store)

    class Unsure(Oracle):
        def forward(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = super().forward(image_BCHW)["logits"]
            return {"logits": torch.cat([logits, torch.full_like(logits[:, :1], 99.0)], dim=1)}

    found = task.evaluate(Unsure(), CPU)
    assert found.score == 1.0
    assert sum(scores["pixels"] for scores in found.per_class.values()) == 2 * 40 * 80
    assert (task.dataset.sample(0)["labels"] == IGNORE).any()


def test_the_preview_shows_the_sections_with_a_legend(store: Store):
    task = FinetuneTask(make_config(), store)
    pictures = task.preview(Oracle(), CPU)
    assert list(pictures) == [""]
    assert {tile.row for tile in pictures[""].tiles} == {0, 1}
    assert len(pictures[""].legend) > 1


def test_very_large_validation_sets_are_thinned_evenly():
    sections = [Section("a", z, 0, 100, 100) for z in range(10)]
    assert chosen_sections(sections) == sections
    assert [s.z for s in chosen_sections(sections, most_pixels=30_000)] == [1, 5, 8]
    assert len(chosen_sections(sections, most_pixels=10)) == 1


def test_a_few_steps_learn_what_is_easy(store: Store):
    task = FinetuneTask(make_config(), store)
    model = task.model.train()
    optimizer = torch.optim.AdamW(task.parameter_groups(OptimConfig()), lr=2e-3)
    first = None
    for step in range(12):
        samples = [task.dataset.sample(2 * step + k) for k in range(2)]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        losses = task.losses(model, batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        first = first if first is not None else losses["loss"].item()
    assert list(losses) == ["loss", "focal", "dice", "step2", "step1"]
    assert losses["loss"].item() < 0.75 * first
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_equal_seeds_start_equal(store: Store):
    one, two = (FinetuneTask(make_config(), store).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_validation_image_that_is_trained_on_is_refused(store: Store, tmp_path: Path):
    folders = [tmp_path / "images"], [tmp_path / "labels"]
    with pytest.raises(InputError, match=r"stack\.tif is in both the training and the validation set"):
        gather_labels(*folders, val_images=folders[0], val_labels=folders[1])
    with pytest.raises(ConfigError, match="go together"):
        gather_labels(*folders, val_images=folders[0])
    for folder in ("images", "labels"):
        (tmp_path / "copy" / folder).mkdir(parents=True)
        (tmp_path / "copy" / folder / "other.tif").write_bytes((tmp_path / folder / "stack.tif").read_bytes())
    both = gather_labels(*folders, val_images=[tmp_path / "copy/images"], val_labels=[tmp_path / "copy/labels"])
    with pytest.raises(InputError, match="content of training images: "):
        write_labelled_store(both, tmp_path / "second.zarr")


def test_collecting_can_be_stopped(store: Store, tmp_path: Path):
    labelled = gather_labels([tmp_path / "images"], [tmp_path / "labels"])
    assert labelled.summary.startswith("1 labelled image: class0 ")
    with pytest.raises(Interrupted):
        write_labelled_store(labelled, tmp_path / "third.zarr", should_stop=lambda: True)


def test_losses_and_validation_run_under_autocast(store: Store):
    task = FinetuneTask(make_config(), store)
    batch = {name: tensor[None] for name, tensor in task.dataset.sample(0).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task.losses(task.model.train(), batch)
        with torch.no_grad():
            found = task.evaluate(task.model.eval(), CPU)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert np.isfinite(found.score)
