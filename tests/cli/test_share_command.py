"""`affmae share` and `affmae import` on small networks: results that other commands take, and refusals."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine import api, checkpoint
from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.objects.decode import DecodeOptions
from affmae_engine.objects.tune import stored_options
from tests.engine.published_layout import published_tensors
from tests.engine.trained import NAMES, trained_run

HEADS = (1, 2, 3, 3)


def affmae(*words: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=typed)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def published(path: Path, *, classes: int = 0, **config: object) -> Path:
    model = ModelConfig(size="tiny")
    network = Segmenter(model, classes) if classes else MaskedAutoencoder(model, LossConfig())
    tensors = published_tensors(network.state_dict(), HEADS, convolutions=3, merging="cluster", segmenter=bool(classes))
    save_file(tensors, path, metadata={"config": json.dumps({"img_size": 64, **config})})
    return path


def test_shared_models_are_used_by_predict(here: Path) -> None:
    trained_run(here / "runs" / "seg")
    tifffile.imwrite("stack.tif", np.random.default_rng(0).integers(0, 255, (80, 70)).astype(np.uint8))
    shared = affmae("share", "runs/seg", "-o", "seg.zip", "--name", "Mine", "--json")
    assert shared.exit_code == 0, shared.output
    document = json.loads(shared.stdout)
    assert (document["package"], document["model"]["name"]) == ("seg.zip", "Mine")
    for model, out in (("runs/seg", "a.tif"), ("seg.zip", "b.tif")):
        done = affmae("predict", "stack.tif", "-m", model, "-o", out, "--no-overlay", "--device", "cpu")
        assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(tifffile.imread("a.tif"), tifffile.imread("b.tif"))


@pytest.mark.parametrize("out", ["seg.zip", "seg"])
def test_packages_are_checked(here: Path, out: str) -> None:
    trained_run(here / "runs" / "seg")
    assert affmae("share", "runs/seg", "-o", out).exit_code == 0
    found = affmae("check", out, "--json")
    assert found.exit_code == 0 and '"model"' in found.stdout, found.output
    if out == "seg":
        (here / "seg" / "README.md").write_text("changed")
    else:
        content = bytearray((here / out).read_bytes())
        content[content.index(b"config.toml") + 30] ^= 1
        (here / out).write_bytes(content)
    damaged = affmae("check", out)
    assert damaged.exit_code == 6 and "Traceback" not in damaged.output


def test_tuned_thresholds_are_shared(here: Path) -> None:
    trained_run(here / "runs" / "seg")
    options = DecodeOptions(boundary=0.3, seed_distance=7)
    assert stored_options(here / "runs" / "seg") is None
    (here / "runs" / "seg" / "objects.json").write_text(json.dumps({"schema": 1, "options": asdict(options)}))
    for words in (("runs/seg", "-o", "seg.zip"), ("seg.zip", "-o", "again")):
        shared = affmae("share", *words)
        assert shared.exit_code == 0, shared.output
        assert stored_options(here / words[2]) == options
    (here / "runs" / "seg" / "objects.json").write_text("[")
    assert affmae("share", "runs/seg", "-o", "other.zip").exit_code == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("share", "runs/seg"), "nowhere to write"),
        (("share", "runs/seg", "-o", "x", "--bioimageio"), "is a ZIP file"),
        (("share", "runs/seg", "-o", "x", "--private"), "--private goes with --push"),
        (("share", "runs/seg", "--push", "name"), "hf:ORG/NAME"),
        (("share", "runs/none", "-o", "x"), "no such run"),
        (("share", "runs/em", "-o", "x", "--export"), "pretrained"),
        (("share", "runs/seg", "-o", "runs"), "exists already"),
    ],
)
def test_share_refuses(here: Path, words: tuple[str, ...], message: str) -> None:
    trained_run(here / "runs" / "seg")
    trained_run(here / "runs" / "em", "pretrain")
    result = affmae(*words)
    assert result.exit_code in (2, 3)
    assert message in result.stderr
    assert not Path("x").exists()


@pytest.mark.parametrize("out", ["imported", "imported.zip", "imported.safetensors"])
def test_imported_segmenters_predict(here: Path, out: str) -> None:
    file = published(here / "published.safetensors", classes=3, mask_ratio=0.5, alpha=10.0)
    result = affmae("import", file, "-o", out, "--mean", 120, "--std", 40, "--class-names", ",".join(NAMES), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["classes"] == list(NAMES)
    assert document["normalisation"] == {"mode": "dataset", "mean": 120, "std": 40, "clahe": False}
    assert document["dropped"] == ["encoder.layers.0.downsample.global_norm.weight"]
    assert document["unused_settings"] == ["alpha"]
    model = api.load(out, device="cpu")
    assert (model.class_names, model.metadata.image_size) == (NAMES, 64)
    assert model.predict(np.zeros((50, 60), np.uint8)).shape == (50, 60)


def test_imported_autoencoders_start_a_finetuning(here: Path) -> None:
    from affmae_engine.config import RunConfig
    from affmae_engine.model.build import build_segmenter
    from affmae_engine.train.transfer import follow_origin, load_pretrained, read_origin

    model = ModelConfig(size="tiny", depths=(1, 1, 1, 1))
    network = MaskedAutoencoder(model, LossConfig())
    tensors = published_tensors(network.state_dict(), HEADS, convolutions=3, merging="cluster", segmenter=False)
    save_file(tensors, here / "published.safetensors")
    assert affmae("import", "published.safetensors", "-o", "imported", "-q").exit_code == 0
    # Sizes that are not ours by name are taken over from the weights.
    config, _ = follow_origin(RunConfig(), read_origin(Path("imported")), Path("imported"))
    assert config.model.depths == (1, 1, 1, 1)
    report = load_pretrained(build_segmenter(config.model, 2), Path("imported"), config=config, class_names=("a", "b"))
    assert (report.count("missing"), report.count("skipped")) == (0, 0)


def test_normalization_that_is_not_given_is_said(here: Path) -> None:
    published(here / "published.safetensors")
    result = affmae("import", "published.safetensors", "-o", "imported")
    assert result.exit_code == 0
    assert "--mean" in result.stderr
    assert checkpoint.load_weights(Path("imported"))[0].normalisation["mode"] == "image"


def test_a_terminal_is_asked_for_the_normalization(monkeypatch: pytest.MonkeyPatch) -> None:
    from affmae_cli.commands import import_
    from affmae_engine.errors import ConfigError

    def typed(*answers: str) -> None:
        given = iter(answers)
        monkeypatch.setattr(import_.typer, "prompt", lambda *_, **__: next(given))

    typed("120", "40.5")
    assert import_._asked() == (120, 40.5)
    typed("")
    assert import_._asked() == (None, None)
    typed("many")
    with pytest.raises(ConfigError, match="'many' is not a number"):
        import_._asked()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("none.safetensors",), 3, "no such checkpoint"),
        (("published.safetensors", "--mean", "1"), 2, "belong together"),
        (("published.safetensors", "--mean", "1", "--std", "0"), 2, "std must be above 0"),
        (("published.safetensors", "--class-names", "a,b"), 2, "2 class names"),
        (("global.safetensors",), 3, "global_attention"),
    ],
)
def test_import_refuses(here: Path, words: tuple[str, ...], code: int, message: str) -> None:
    published(here / "published.safetensors")
    published(here / "global.safetensors", global_attention=True)
    result = affmae("import", *words, "-o", "imported")
    assert result.exit_code == code
    assert message in result.stderr
    assert not Path("imported").exists()
