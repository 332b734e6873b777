"""The pages on Python, sharing and clusters: every command and every block of Python in them runs as it is written."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from safetensors.torch import save_file
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder
from tests.engine.hub_server import TOKEN, running_hub
from tests.engine.published_layout import published_tensors
from tests.engine.trained import trained_run

DOCS = Path(__file__).resolve().parents[1] / "docs"
SETTINGS = {
    "MODEL__SIZE": "tiny", "DATA__CROP_SIZE": "64", "DATA__WORKERS": "0", "TRAIN__STEPS": "2", "TRAIN__BATCH_SIZE": "2",
    "TRAIN__DEVICE": "cpu", "TRAIN__EVAL_EVERY": "0", "TRAIN__LOG_EVERY": "1", "TRAIN__MICRO_BATCH": "2",
}  # fmt: skip
"""Makes trainings short where a page leaves a setting out."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the runs, images and checkpoints that the pages name, and a local Hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(f"AFFMAE_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name, task in (("seg", "finetune"), ("em", "pretrain"), ("begun", "pretrain")):
        trained_run(tmp_path / "runs" / name, task)
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 255, (2, 80, 96)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    zarr.create_array(tmp_path / "stack.zarr", data=stack)
    for folder in ("scans", "lab/images", "lab/labels"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(4):
        image = rng.integers(0, 255, (128, 128)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"scans/{number}.tif", image)
        tifffile.imwrite(tmp_path / f"lab/images/{number}.tif", image)
        tifffile.imwrite(tmp_path / f"lab/labels/{number}.tif", (image > 128).astype(np.uint8))
    network = MaskedAutoencoder(ModelConfig(size="tiny"), LossConfig())
    tensors = published_tensors(network.state_dict(), (1, 2, 3, 3), convolutions=3, merging="cluster", segmenter=False)
    save_file(tensors, tmp_path / "published.safetensors")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield tmp_path


def commands(page: str) -> list[str]:
    """Lines that are set off as commands."""
    return re.findall(r"^ {4}(affmae .*)$", (DOCS / page).read_text("utf-8"), re.MULTILINE)


def run_commands(page: str) -> None:
    found = commands(page)
    assert found
    for command in found:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.slow
def test_share_page(place: Path) -> None:
    run_commands("share.md")
    assert (place / "stack-labels.tif").is_file()
    np.testing.assert_array_equal(tifffile.imread("stack-labels.tif"), tifffile.imread("hub-labels.tif"))


def test_cluster_page(place: Path) -> None:
    run_commands("cluster.md")


@pytest.mark.slow
def test_python_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "python.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, Any] = {"stack": tifffile.imread("stack.tif")}
    for number, block in enumerate(blocks):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
    np.testing.assert_array_equal(zarr.open_array("labels.zarr")[:].shape, names["stack"].shape)
    assert names["embedding"].map.shape == (2, 288, 10, 12)
    assert list(names["training"]["step"]) == [1, 2]
    assert names["run"].summary["status"] == "finished"
    assert "no such run" in capsys.readouterr().out
    assert (place / "section.png").is_file()
