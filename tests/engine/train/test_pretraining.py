"""The pretraining task on a real store with the real (tiny) model: steps, held-out loss, pictures, starting weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affmae_engine.config import RunConfig
from affmae_engine.data.phantom import generate
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, CorruptError, InputError
from affmae_engine.model.affmae import Segmenter
from affmae_engine.run_dir import create
from affmae_engine.train.pretraining import PretrainTask
from affmae_engine.train.pretraining_evaluation import choose_crops
from affmae_engine.weights import WeightsMetadata, write_weights
from tests.engine.train.fitting import fit

StoreMaker = Callable[..., Store]
CPU = torch.device("cpu")


def config(**train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"size": "tiny"},
            "data": {"crop_size": 48, "workers": 0, "holdout": 0.2},
            "mask": {"lattices": (2, 3)},
            "optim": {"lr": 2e-3, "warmup_steps": 2},
            "train": {"batch_size": 4, "steps": 3, "device": "cpu", "log_every": 1, "eval_every": 0, **train},
        }
    )


@pytest.fixture(scope="module")
def phantom_ZYX() -> np.ndarray:
    return generate((12, 112, 112), seed=0).image_ZYX


@pytest.fixture
def store(make_store: StoreMaker, phantom_ZYX: np.ndarray) -> Store:
    return make_store({"phantom": phantom_ZYX}, (40.0, 6.0, 6.0))


def test_epochs_become_steps(store: Store) -> None:
    asked = config(epochs=2.5)
    task = PretrainTask(asked, store)
    resolved = task.config
    assert task.dataset.samples_per_epoch == 9 * 5  # 12 sections less 2 held out and 1 between
    assert resolved.train.steps == 29  # 112.5 samples in batches of 4
    assert PretrainTask(config(), store).config.train.steps == 3


def test_task_describes_itself(store: Store) -> None:
    task = PretrainTask(config(), store)
    assert task.name == task.metadata.task == "pretrain"
    assert task.metadata.image_size == 48
    assert task.metadata.pixel_nm == 6.0
    assert task.metadata.normalisation["mode"] == "image"
    assert task.fingerprint == store.fingerprint()
    assert task.notes == ()


def test_weights_and_global_generator(store: Store) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (PretrainTask(config(), store).model.state_dict() for _ in range(2))
    other = PretrainTask(config(seed=1), store).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_parameter_groups_cover_everything_once(store: Store) -> None:
    task = PretrainTask(config(), store)
    resolved = task.config
    groups = task.parameter_groups(resolved.optim)
    assert sum(len(group["params"]) for group in groups) == len(list(task.model.parameters()))
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert all(p.ndim > 1 for group in groups if group["weight_decay"] for p in group["params"])


def test_evaluation_is_fixed_and_held_out(store: Store) -> None:
    task = PretrainTask(config(), store)
    task.model.eval()
    with torch.no_grad():
        first, second = task.evaluate(task.model, CPU), task.evaluate(task.model, CPU)
    assert first == second
    assert list(first.metrics) == ["loss", "last", "step2", "step1", "mean_fill", "explained"]
    assert first.score == -first.metrics["loss"]
    assert 0.3 < first.metrics["last"] < 3
    assert len(first.effective_rank) == 4
    assert all(rank >= 1 for rank in first.effective_rank)
    # The figure must not depend on how the crops are batched, nor on the run's seed beyond its weights and split.
    batched = PretrainTask(config(micro_batch=2), store)
    _ = batched.config
    with torch.no_grad():
        assert batched.evaluate(task.model, CPU).metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-5)


def test_preview(store: Store) -> None:
    task = PretrainTask(config(), store)
    task.model.eval()
    with torch.no_grad():
        (name, picture), *others = task.preview(task.model, CPU).items()
    assert name == ""
    assert not others
    assert picture.rgb.dtype == np.uint8
    assert 1560 < picture.rgb.shape[1] <= 1600
    assert picture.rgb.shape[0] > 700
    assert [tile.title for tile in picture.tiles if tile.main and tile.row == 0] == [
        "original",
        "masked",
        "reconstruction",
    ]


def test_explained_is_the_share_of_the_error_of_a_plain_fill(store: Store) -> None:
    task = PretrainTask(config(), store)
    with torch.no_grad():
        metrics = task.evaluate(task.model.eval(), CPU).metrics
    assert 0 < metrics["mean_fill"] < 10  # images are standardized
    assert metrics["explained"] == pytest.approx(1 - metrics["last"] / metrics["mean_fill"])


def test_an_overflow_in_an_evaluation_costs_figures_not_the_run(store: Store) -> None:
    task = PretrainTask(config(), store)
    task.model.eval()
    with torch.no_grad():
        for layer in (0, 2):  # finite weights, whose product is none in fp16
            task.model.encoder.stages[0].blocks[0].mlp[layer].weight.mul_(1e4)
        with torch.autocast("cpu", dtype=torch.float16):
            found = task.evaluate(task.model, CPU)
            picture = task.preview(task.model, CPU)[""]
    assert not np.isfinite(found.score)
    assert len(found.effective_rank) == 4 and np.isnan(found.effective_rank).all()
    assert picture.rgb.shape[0] > 700


def test_short_run_learns_and_leaves_everything(store: Store, tmp_path: Path) -> None:
    task = PretrainTask(config(steps=12), store)
    resolved = task.config
    run = create(tmp_path / "run")
    run.write_config(resolved, "pretrain")
    summary = fit(run, resolved, task)
    assert summary.status == "finished"
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = [event["losses"]["last"] for event in events if event["kind"] == "step"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert set(summary.metrics) == {"loss", "last", "step2", "step1", "mean_fill", "explained"}
    assert run.preview(12, "").is_file()

    continued = PretrainTask(config(), store, init_from=run.root)
    later = continued.config
    trained = {name: tensor.detach() for name, tensor in task.model.state_dict().items()}
    assert all(torch.equal(trained[name], tensor) for name, tensor in continued.model.state_dict().items())
    assert continued.notes == ()
    assert later.train.steps == 3


def test_weights_of_another_size_are_refused(store: Store, tmp_path: Path) -> None:
    model = {**config().model.model_dump(mode="json"), "size": "small"}
    path = tmp_path / "small.safetensors"
    metadata = WeightsMetadata(task="pretrain", model=model, image_size=48, normalisation={})
    write_weights(path, {"a": torch.zeros(1)}, metadata)
    with pytest.raises(ConfigError, match=r"tiny.*small"):
        PretrainTask(config(), store, init_from=path)


def test_incomplete_and_missing_weights(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    metadata = WeightsMetadata(
        task="pretrain", model=config().model.model_dump(mode="json"), image_size=48, normalisation={}
    )
    write_weights(path, {"a": torch.zeros(1)}, metadata)
    with pytest.raises(CorruptError, match="lacks"):
        PretrainTask(config(), store, init_from=path)
    with pytest.raises(InputError, match="no such"):
        PretrainTask(config(), store, init_from=tmp_path / "nothing")


def test_segmenter_gives_all_but_its_heads(store: Store, tmp_path: Path) -> None:
    segmenter = Segmenter(config().model, 3)
    path = tmp_path / "segmenter.safetensors"
    metadata = WeightsMetadata(
        task="finetune", model=config().model.model_dump(mode="json"), image_size=48, normalisation={}
    )
    write_weights(path, segmenter.state_dict(), metadata)
    task = PretrainTask(config(), store, init_from=path)
    there, here = segmenter.state_dict(), task.model.state_dict()
    assert all(torch.equal(here[name], there[name]) for name in here if not name.startswith("heads."))
    assert "heads were left out" in task.notes[0]


def test_too_little_data_to_hold_out(make_store: StoreMaker, phantom_ZYX: np.ndarray) -> None:
    task = PretrainTask(config(), make_store({"tiny": phantom_ZYX[:1, :20, :20]}))
    assert any("too little data" in note for note in task.notes)
    task.model.eval()
    with torch.no_grad():
        assert task.evaluate(task.model, CPU).metrics["loss"] > 0


def test_no_holdout_is_said(store: Store) -> None:
    asked = config()
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"holdout": 0.0})})
    task = PretrainTask(asked, store)
    assert task.notes == ("data.holdout is 0: the evaluation uses training images, so it does not show overfitting",)


def test_crops_are_spread_and_bounded(make_store: StoreMaker) -> None:
    rng = np.random.default_rng(0)
    store = make_store({"a": rng.integers(0, 255, (30, 100, 150), np.uint8)})
    task = PretrainTask(config(), store)
    planes = task.dataset.planes  # type: ignore[attr-defined]
    for limit in (1, 10, 64, 500):
        crops = choose_crops(planes, 48, (0.5, 1.0), limit)
        assert 1 <= len(crops) <= limit
        assert all(0 <= c.crop.y <= 100 - c.crop.edge and 0 <= c.crop.x <= 150 - c.crop.edge for c in crops)
        assert all(24 <= c.crop.edge <= 48 for c in crops)
        places = [(c.z, c.crop.y, c.crop.x) for c in crops]
        assert len(set(places)) == len(places)
    edges = [c.crop.edge for c in choose_crops(planes, 48, (0.5, 1.0))]
    assert abs(np.mean(edges) - 36) < 1  # the mean of the training crops
    sections = {c.z for c in choose_crops(planes, 48, (0.5, 1.0), 10)}
    assert len(sections) == 10
    assert max(sections) - min(sections) > 15
