"""A screen as SVG or PNG: by suffix, without fonts from the network, with the same picture in both."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from affmae_cli.dashboard.app import export_screen
from affmae_cli.dashboard.export import check_suffix
from affmae_engine.errors import ConfigError, ResourceError
from tests.cli.dashboard.conftest import Trained


def test_a_screen_is_saved_as_svg(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "screen.svg"
    export_screen(trained.pretrain, out, size=(120, 40))
    text = out.read_text()
    root = ElementTree.fromstring(text)
    assert root.get("width") == "1200" and root.get("height") == "800"
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and "@font-face" not in text
    words = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")).replace("\xa0", " ")
    assert "finished" in words and "1 Overview" in words and "reconstruction" in words
    assert not re.search("[\u2500-\u25ff\u2800-\u28ff]", words.replace("▲", ""))  # these are shapes
    assert len([node for node in root.iter() if node.tag.endswith("circle")]) > 100  # dots of the curves
    for node in root.iter():
        if node.tag.endswith("text"):  # every run of letters has exactly the width of its cells
            assert float(node.get("textLength", 0)) == 10 * len("".join(node.itertext()))


def test_a_screen_is_saved_as_png(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "screen.png"
    export_screen(trained.pretrain, out, size=(80, 24))
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.size == (1600, 960)
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[480] == (15, 20, 24)).all(axis=-1).mean() > 0.3  # the background
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    export_screen(trained.pretrain, tmp_path / "light.png", size=(80, 24), light=True)
    with Image.open(tmp_path / "light.png") as picture:
        assert np.asarray(picture.convert("L")).mean() > 180


def test_other_suffixes_and_missing_folders_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="suffix"):
        check_suffix(tmp_path / "screen.jpg")
    with pytest.raises(ResourceError):
        export_screen(trained.pretrain, tmp_path / "missing" / "a.svg", size=(80, 24))
