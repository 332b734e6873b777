"""Charts: what is in the figure, and that the files are pictures of it."""

import numpy as np
import pytest
from PIL import Image

from affmae_engine.bench import charts


def texts(figure) -> str:
    figure.canvas.draw()
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " | ".join(artist.get_text() for artist in artists if artist.get_text())


def comparison():
    results = []
    for model, edge, batch, ms, gib in (
        ("affmae", 512, 32, 40.0, 8.0), ("vit-mae", 512, 32, 160.0, 24.0),
        ("affmae", 1024, 8, 40.0, 8.0), ("vit-mae", 1024, 8, None, None),
    ):  # fmt: skip
        case = {"model": model, "size": "base", "resolution": edge, "batch": batch, "work": "pretrain"}
        pace = batch * edge**2 / ms / 1e3 if ms else None
        results.append({"case": case, "ms": ms, "mpx_per_s": pace, "allocated_gib": gib})
    return {"kind": "comparison", "device": "a card", "results": results}


def coloured(path, colour: str) -> int:
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(rgb - wanted).sum(axis=-1) < 30).sum())


def test_label_efficiency_has_four_curves_with_spread(quality_document) -> None:
    figure = charts.label_efficiency(quality_document(), "small")
    (axes,) = figure.axes
    lines = {container.get_label(): container for container in axes.containers}
    assert set(lines) == {f"{m}, {i}" for m in ("AFFMAE", "ViT-MAE") for i in ("pretrained", "from scratch")}
    curve, caps, _ = lines["AFFMAE, pretrained"]
    assert curve.get_ydata() == pytest.approx([0.48, 0.66])
    assert caps[0].get_ydata() == pytest.approx([0.47, 0.65]), "the bars are one standard deviation long"
    said = texts(figure)
    for words in ("10%\n1 section", "100%\n14 sections", "mean IoU on the test part", "3 seeds", "labels used for"):
        assert words in said


def test_speed_and_memory_has_the_ratios() -> None:
    records = [{**record["case"], **record} for record in comparison()["results"]]
    said = texts(charts.speed_and_memory(records, "pretrain", "a card"))
    for words in ("4.0× faster", "3.0× less memory", "512 px\nbatch 32", "Mpx/s", "GiB", "no figure", "a card"):
        assert words in said
    assert said.count("×") == 2, "no ratio where one side did not run"
    for record in records:
        record["ms"] = 1.0
        record["mpx_per_s"] = {"affmae": 20.0, "vit-mae": 40.0}[record["model"]]
        record["allocated_gib"] = None
    figure = charts.speed_and_memory(records, "pretrain", "a CPU")
    assert "2.0× slower" in texts(figure) and len(figure.axes) == 1, "a CPU has no memory figures"


@pytest.mark.parametrize("kind", ["quality", "comparison"])
def test_files_are_pictures_of_both_models(kind: str, quality_document, tmp_path) -> None:
    values = quality_document() if kind == "quality" else comparison()
    name = {"quality": "label-efficiency-small.png", "comparison": "speed-and-memory-pretrain.png"}[kind]
    assert charts.draw(values, tmp_path) == (name,)
    with Image.open(tmp_path / name) as picture:
        picture.verify()
        assert picture.width >= 1000 and picture.format == "PNG"
    for colour in charts.COLOURS.values():
        assert coloured(tmp_path / name, colour) > 300
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_scored_draws_nothing(quality_document, tmp_path) -> None:
    assert charts.draw(quality_document(lambda m, i, f, s: None), tmp_path) == ()
    assert charts.draw({"kind": "kernels", "results": []}, tmp_path) == ()


def test_without_matplotlib_there_is_a_remark(quality_document, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(charts.NoCharts, match="no charts: matplotlib cannot be imported") as caught:
        charts.draw(quality_document(), tmp_path)
    assert "pip install matplotlib" in caught.value.hint and not list(tmp_path.iterdir())
