"""Weights from another run: every tensor accounted for, heads adapted, misfits refused by name."""

from pathlib import Path

import pytest
import torch

from affmae_engine.config import LossConfig, ModelConfig, RunConfig
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.train.transfer import follow_origin, load_pretrained, read_origin
from affmae_engine.weights import WeightsMetadata, write_weights

TINY = ModelConfig(size="tiny")
CONFIG = RunConfig(model=TINY)
NAMES = ("background", "membrane", "mitochondria")


def write_run(path: Path, *, task: str = "pretrain", model: ModelConfig = TINY, names: tuple[str, ...] = ()) -> Path:
    torch.manual_seed(1)
    net = MaskedAutoencoder(model, LossConfig()) if task == "pretrain" else Segmenter(model, len(names))
    record = {"task": task, "step": 7, "model": model.model_dump(), "image_size": 64, "normalisation": {}}
    write_weights(path, net.state_dict(), WeightsMetadata(**record, class_names=names))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "weights.safetensors")


def make_model(seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(TINY, len(NAMES))


def test_encoder_and_decoder_are_loaded_and_heads_adapted(pretrained: Path):
    model = make_model()
    report = load_pretrained(model, pretrained, config=CONFIG, class_names=NAMES)
    torch.manual_seed(1)
    there, here = MaskedAutoencoder(TINY, LossConfig()).state_dict(), model.state_dict()
    assert {row.name for row in report.rows} == set(here)
    assert len(report.rows) == len(here)
    assert (report.count("adapted"), report.count("skipped"), report.count("missing")) == (6, 0, 0)
    for row in report.rows:
        if row.outcome == "loaded":
            assert torch.equal(here[row.name], there[row.name]), row.name
    weight = here["heads.last.linear.weight"].unflatten(0, (64, 3))
    pixel = there["heads.last.linear.weight"]
    torch.testing.assert_close(weight.mean(1), pixel, atol=5e-4, rtol=0)
    assert not torch.equal(weight[:, 0], weight[:, 1])  # the noise tells the classes apart


def test_the_noise_of_adapted_heads_is_seeded(pretrained: Path):
    heads = []
    for seed in (0, 0, 1):
        model = make_model()
        load_pretrained(model, pretrained, config=CONFIG, class_names=NAMES, seed=seed)
        heads.append(model.state_dict()["heads.last.linear.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_report_is_grouped_by_part(pretrained: Path):
    report = load_pretrained(make_model(), pretrained, config=CONFIG, class_names=NAMES)
    groups = {(g.part, g.outcome): g for g in report.groups()}
    assert [(g.part, g.outcome) for g in report.groups()][:2] == [
        ("encoder.stem", "loaded"),
        ("encoder.stages", "loaded"),
    ]
    assert {("decoder.mask_token", "loaded"), ("decoder.steps", "loaded"), ("heads", "adapted")} <= groups.keys()
    assert sum(g.tensors for g in groups.values()) == len(make_model().state_dict())
    assert sum(g.parameters for g in groups.values()) == sum(p.numel() for p in make_model().parameters())
    assert groups["heads", "adapted"].reason == "made from the pixel head"
    assert (report.task, report.step) == ("pretrain", 7)


def test_heads_of_a_finetune_run_are_taken_for_the_same_classes_only(tmp_path: Path):
    path = write_run(tmp_path / "w.safetensors", task="finetune", names=NAMES)
    model = make_model()
    assert load_pretrained(model, path, config=CONFIG, class_names=NAMES).count("loaded") == len(model.state_dict())
    before = make_model().state_dict()
    model = make_model()
    report = load_pretrained(model, path, config=CONFIG, class_names=("a", "b", "c"))
    skipped = [row for row in report.rows if row.outcome == "skipped"]
    assert {row.name.split(".")[0] for row in skipped} == {"heads"}
    assert all(row.reason == "trained for other classes" for row in skipped)
    assert all(torch.equal(before[row.name], model.state_dict()[row.name]) for row in skipped)


def test_missing_and_surplus_tensors_are_reported(tmp_path: Path, pretrained: Path):
    torch.manual_seed(1)
    tensors = MaskedAutoencoder(TINY, LossConfig()).state_dict()
    tensors["decoder.extra"] = torch.zeros(3)
    lost = tensors.pop("encoder.stem.convs.0.weight")
    tensors["encoder.stem.convs.1.bias"] = torch.zeros(99)
    path = tmp_path / "w.safetensors"
    write_weights(path, tensors, read_origin(pretrained))
    rows = {row.name: row for row in load_pretrained(make_model(), path, config=CONFIG, class_names=NAMES).rows}
    extra = rows["decoder.extra"]
    assert (extra.outcome, extra.there, extra.here) == ("skipped", (3,), None)
    missing = rows["encoder.stem.convs.0.weight"]
    assert (missing.outcome, missing.there, missing.here) == ("missing", None, tuple(lost.shape))
    other = rows["encoder.stem.convs.1.bias"]
    assert (other.outcome, other.reason) == ("skipped", "other shape")


def test_the_model_section_follows_the_weights(tmp_path: Path):
    origin = read_origin(write_run(tmp_path / "w.safetensors", model=ModelConfig(size="tiny", patch_size=4)))
    config = RunConfig(model=ModelConfig(size="small", drop_path=0.3))
    followed, note = follow_origin(config, origin, Path("runs/a"))
    assert (followed.model.size, followed.model.patch_size, followed.model.drop_path) == ("tiny", 4, 0.3)
    assert note == "model settings follow runs/a: size tiny, patch_size 4"
    assert follow_origin(followed, origin, Path("runs/a")) == (followed, "")


def test_a_chosen_model_of_another_shape_is_refused_with_both_values(pretrained: Path):
    config = RunConfig(model=ModelConfig(size="small", patch_size=16, merge_keep=0.5))
    chosen = ["model.size", "model.patch_size", "model.merge_keep"]
    with pytest.raises(ConfigError, match=r"model\.size = small was asked for, .* has tiny") as error:
        follow_origin(config, read_origin(pretrained), pretrained, chosen=chosen)
    assert "model.patch_size = 16" in error.value.message
    with pytest.raises(ConfigError, match=r"model\.size = small"):
        load_pretrained(make_model(), pretrained, config=config, class_names=NAMES)
    config = RunConfig(model=ModelConfig(size="tiny", merge_keep=0.5))
    kept, note = follow_origin(config, read_origin(pretrained), pretrained, chosen=["model.merge_keep"])
    assert (kept.model.merge_keep, note) == (0.5, "")  # no shape depends on it


def test_what_is_not_a_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="neither a run directory nor a checkpoint"):
        read_origin(tmp_path)
    with pytest.raises(InputError, match="no such run"):
        read_origin(tmp_path / "nothing")
