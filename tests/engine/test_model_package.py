"""Model packages: what is in them, reading them back from folder, ZIP file and Hub, and damaged ones."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from affmae_engine import api, checkpoint, model_package
from affmae_engine.errors import ConfigError, CorruptError, InputError
from affmae_engine.model_package import ABOUT, CARD, EXPORTED, SETTINGS, WEIGHTS
from affmae_engine.share import Description, model_content
from affmae_engine.weights import read_metadata
from tests.engine.hub_server import TOKEN, Hub, running_hub
from tests.engine.trained import NAMES, trained_run

DESCRIPTION = Description(
    "Membranes", ("Ada",), "CC-BY-4.0", "CC BY-NC 4.0, Example | archive", "Ada et al., https://doi.org/10.1000/182"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("runs") / "seg")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shared(run: Path, out: Path, description: Description = DESCRIPTION, **options: bool) -> Path:
    with model_content(run, description, **options) as content:
        content.write(out)
    return out


@pytest.mark.parametrize("name", ["package", "package.zip"])
def test_a_package_predicts_what_the_run_predicts(run: Path, tmp_path: Path, name: str) -> None:
    package = shared(run, tmp_path / name)
    image = np.random.default_rng(0).integers(0, 255, (2, 70, 80)).astype(np.uint8)
    expected = api.load(run, device="cpu").predict(image, pixel_size=5)
    model = api.load(package, device="cpu")
    assert (model.class_names, model.pixel_nm) == (NAMES, 4.0)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(model.predict(image, pixel_size=5), expected)


def test_a_package_says_what_its_author_says_and_nothing_private(run: Path, tmp_path: Path) -> None:
    package = shared(run, tmp_path / "package")
    assert {path.name for path in package.iterdir()} == {ABOUT, WEIGHTS, CARD, SETTINGS}
    about = model_package.read_about(package)
    assert about.scores == {"metrics": {"iou": 0.5, "score": 0.5}, "per_class": {"membrane": {"iou": 0.4}}}
    assert (about.name, about.license, about.data_license) == ("Membranes", "CC-BY-4.0", DESCRIPTION.data_license)
    card = (package / CARD).read_text("utf-8")
    for text in ("# Membranes", "Ada", "CC-BY-4.0", "10.1000/182", "4 nm", "1 membrane", "| iou | 0.5 |"):
        assert text in card
    everything = b"".join(path.read_bytes() for path in package.iterdir())
    for private in ("secret-name", str(run.parent)):
        assert private.encode() not in everything
    assert read_metadata(package / WEIGHTS).config["train"]["steps"] == 10_000  # settings travel


def test_examples_are_made_of_named_images_only(run: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (600, 70)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "own.tif", image)
    package = shared(run, tmp_path / "package", Description(examples=(tmp_path / "own.tif",)))
    assert [path.name for path in (package / "examples").iterdir()] == ["example-1.png"]
    assert "(examples/example-1.png)" in (package / CARD).read_text("utf-8")
    pretrained = trained_run(tmp_path / "em", "pretrain")
    with pytest.raises(ConfigError, match="pretrained"):
        shared(pretrained, tmp_path / "other", Description(examples=(tmp_path / "own.tif",)))


def test_a_package_that_is_shared_again_keeps_what_it_says(run: Path, tmp_path: Path) -> None:
    first = shared(run, tmp_path / "first.zip")
    again = model_package.read_about(shared(first, tmp_path / "second", Description(cite="Eve")))
    assert again.scores["metrics"]["iou"] == 0.5
    assert (again.name, again.license, again.cite) == ("Membranes", "CC-BY-4.0", "Eve")


def test_existing_paths_are_kept(run: Path, tmp_path: Path) -> None:
    package = shared(run, tmp_path / "package")
    with pytest.raises(ConfigError, match="exists already"):
        shared(run, package)
    with model_content(run, Description("New")) as content:
        content.write(package, overwrite=True)
    assert model_package.read_about(package).name == "New"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    with model_content(run, DESCRIPTION) as content, pytest.raises(ConfigError, match="not a model package"):
        content.write(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "text").exists()


def test_damaged_packages_are_refused(run: Path, tmp_path: Path) -> None:
    package = shared(run, tmp_path / "package")
    weights = package / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        checkpoint.load_weights(package)
    weights.unlink()
    with pytest.raises(CorruptError, match="cannot be read"):
        checkpoint.load_weights(package)
    about = json.loads((package / ABOUT).read_text())
    (package / ABOUT).write_text(json.dumps({**about, "schema_version": 99}))
    with pytest.raises(InputError, match="schema 99"):
        checkpoint.load_weights(package)
    (package / ABOUT).write_text("{")
    with pytest.raises(CorruptError, match="not valid JSON"):
        checkpoint.load_weights(package)


def test_damaged_zip_files_are_refused(run: Path, tmp_path: Path) -> None:
    good = shared(run, tmp_path / "good.zip")
    with zipfile.ZipFile(good) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}

    def written(name: str, changes: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for entry, data in {**content, **changes}.items():
                archive.writestr(entry, data)
        return tmp_path / name

    flipped = bytearray(content[WEIGHTS])
    flipped[-5] ^= 1
    with pytest.raises(CorruptError, match="checksum"):
        checkpoint.load_weights(written("flipped.zip", {WEIGHTS: bytes(flipped)}))
    with pytest.raises(CorruptError, match="wrong size"):
        checkpoint.load_weights(written("longer.zip", {WEIGHTS: content[WEIGHTS] + b"x"}))
    with pytest.raises(CorruptError, match="more than"):
        checkpoint.load_weights(written("huge.zip", {ABOUT: bytes(2 << 20)}))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="not a model package"):
        checkpoint.load_weights(tmp_path / "other.zip")
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The library reads these once, when it is imported; Xet is a second protocol for large files.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield hub


def test_a_model_is_pushed_to_the_hub_and_used_from_there(run: Path, tmp_path: Path, hub: Hub) -> None:
    from affmae_engine.hub import upload

    assert upload(shared(run, tmp_path / "package"), "lab/seg", private=True) == f"{hub.url}/lab/seg"
    assert set(hub.repositories["lab/seg"]) == {ABOUT, WEIGHTS, CARD, SETTINGS}
    assert hub.private["lab/seg"]
    metadata, tensors = checkpoint.load_weights(Path("hf:lab/seg"))
    assert metadata.class_names == NAMES
    original = checkpoint.load_weights(run)[1]
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in tensors)


def test_what_the_hub_refuses_is_said(tmp_path: Path, run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from affmae_engine.hub import upload

    with pytest.raises(InputError, match="hf:lab/none was not found"):
        checkpoint.load_weights(Path("hf:lab/none"))
    hub.repositories["lab/other"] = {"README.md": b"hello"}
    with pytest.raises(InputError, match="not a model package"):
        checkpoint.load_weights(Path("hf:lab/other"))
    with pytest.raises(ConfigError, match="hf:only-a-name is not a model"):
        checkpoint.load_weights(Path("hf:only-a-name"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"refused|login"):
        upload(shared(run, tmp_path / "package"), "lab/seg")


@pytest.mark.slow
def test_exported_programs_agree_with_the_network(run: Path, tmp_path: Path) -> None:
    package = shared(run, tmp_path / "package.zip", export=True, bioimageio=True)
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "content")
    network = api.load(package, device="cpu").network
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = network(image)["logits"].softmax(1)
        program = torch.export.load(tmp_path / "content" / EXPORTED).module()
        torch.testing.assert_close(program(image), expected, atol=1e-5, rtol=0)
        script = torch.jit.load(tmp_path / "content" / "model.pt")
        torch.testing.assert_close(script(image), expected, atol=1e-5, rtol=0)
        # The test input of rdf.yaml, normalized as it says, gives its test output.
        raw = torch.from_numpy(np.load(tmp_path / "content" / "test_input.npy"))
        normalized = (raw - raw.mean()) / (raw.std(correction=0) + 1e-6)
        output = torch.from_numpy(np.load(tmp_path / "content" / "test_output.npy"))
        torch.testing.assert_close(script(normalized), output, atol=1e-4, rtol=0)
    description = json.loads((tmp_path / "content" / "rdf.yaml").read_text())
    assert description["outputs"][0]["axes"][1]["channel_names"] == list(NAMES)
    assert description["cite"][0]["doi"] == "10.1000/182"


@pytest.mark.slow
def test_bioimageio_core_accepts_the_package(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("bioimageio.core", reason="the extra affmae[bioimageio] is not installed")
    from affmae_engine.bioimageio import validate

    outcome = validate(shared(run, tmp_path / "package.zip", bioimageio=True))
    if outcome.startswith("not validated"):
        pytest.skip(outcome)
    assert outcome == "valid (passed, bioimageio.core)"


def test_an_export_that_disagrees_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from affmae_engine import export
    from affmae_engine.errors import AffmaeError

    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.expand(-1, 3, -1, -1)

    network = export.ClassProbabilities(api.load(run, device="cpu").network, ())
    with pytest.raises(AffmaeError, match="differs from the network"):
        export._agreement(Wrong(), network, 64, "test")
