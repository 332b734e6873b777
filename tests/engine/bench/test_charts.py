"""Charts: what is in the figure, and that the files are pictures of it."""

import numpy as np
import pytest
from PIL import Image

from affmae_engine.bench import charts


def texts(figure) -> str:
    figure.canvas.draw()
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " | ".join(artist.get_text() for artist in artists if artist.get_text())


def speed():
    results = []
    for family, edge, batch, rate, gib in (
        ("affmae", 512, 32, 800.0, 8.0), ("vit-mae", 512, 32, 200.0, 24.0),
        ("affmae", 1024, 8, 200.0, 8.0), ("vit-mae", 1024, 8, None, None),
    ):  # fmt: skip
        case = {"family": family, "size": "base", "resolution": edge, "batch": batch, "task": "pretrain"}
        case["protocol"] = "trainer"
        results.append({"case": case, "ms": rate and 1e3 * batch / rate, "images_per_s": rate, "allocated_gib": gib})
    return {"kind": "speed", "device": "a GPU", "results": results}


def colored(path, color: str) -> int:
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(rgb - wanted).sum(axis=-1) < 30).sum())


def test_label_efficiency_has_four_curves_with_spread(quality_document) -> None:
    (axes,) = charts.label_efficiency(quality_document()).axes
    lines = {container.get_label(): container for container in axes.containers}
    assert set(lines) == {f"{m}, {i}" for m in ("AFFMAE", "ViT-MAE") for i in ("pretrained", "from scratch")}
    curve, caps, _ = lines["AFFMAE, pretrained"]
    assert curve.get_ydata() == pytest.approx([0.48, 0.66])
    assert caps[0].get_ydata() == pytest.approx([0.47, 0.65]), "the bars are one standard deviation long"


def test_speed_and_memory_has_the_ratios() -> None:
    records = [{**record["case"], **record} for record in speed()["results"]]
    said = texts(charts.speed_and_memory(records, "pretrain"))
    for words in ("4.0×", "3.0×", "512 px", "batch 8", "none"):
        assert words in said
    assert said.count("×") == 2, "no ratio where one side did not run"
    for record in records:
        record["allocated_gib"] = None
    assert len(charts.speed_and_memory(records, "on a CPU").axes) == 1, "a CPU has no memory figures"


@pytest.mark.parametrize("kind", ["quality", "speed"])
def test_files_are_pictures_of_both_models(kind: str, quality_document, tmp_path) -> None:
    values = quality_document() if kind == "quality" else speed()
    name = {"quality": "label-efficiency.png", "speed": "speed-and-memory-pretrain.png"}[kind]
    assert charts.draw(values, tmp_path) == (name,)
    with Image.open(tmp_path / name) as picture:
        picture.verify()
    for color in charts.COLORS.values():
        assert colored(tmp_path / name, color) > 300


def test_nothing_measured_draws_nothing(quality_document, tmp_path) -> None:
    assert charts.draw(quality_document(lambda m, i, f, s: None), tmp_path) == ()
    assert charts.draw({"kind": "kernels", "results": []}, tmp_path) == ()
