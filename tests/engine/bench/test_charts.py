"""Charts: what is in the figure, and that the files are pictures of it."""

import numpy as np
import pytest
from PIL import Image

from affmae_engine.bench import charts
from tests.engine.bench.quality_records import document, usual


def texts(figure) -> str:
    figure.canvas.draw()
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " | ".join(artist.get_text() for artist in artists if artist.get_text())


def steps(**changes):
    results = [
        {"model": model, "size": "base", "resolution": edge, "batch": batch, "work": "pretrain", "status": "ok",
         "ms": ms, "images_per_s": 1e3 * batch / ms if ms else None, "allocated_gib": gib}
        for model, edge, batch, ms, gib in (
            ("affmae", 512, 32, 40.0, 8.0), ("vit-mae", 512, 32, 160.0, 24.0),
            ("affmae", 1024, 8, 40.0, 8.0), ("vit-mae", 1024, 8, None, None),
        )
    ]  # fmt: skip
    return {"kind": "steps", "device": "a card", "results": results, **changes}


def coloured(path, colour: str) -> int:
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(rgb - wanted).sum(axis=-1) < 30).sum())


def test_label_efficiency_has_four_curves_with_spread() -> None:
    figure = charts.label_efficiency(document(usual), "small")
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
    values = steps()
    said = texts(charts.speed_and_memory(values["results"], "pretrain", values["device"]))
    for words in ("4.0× faster", "3.0× less memory", "512 px\nbatch 32", "Mpx/s", "GiB", "does not\nrun", "a card"):
        assert words in said
    assert said.count("×") == 2, "no ratio where one side did not run"
    for record in values["results"]:
        record["ms"] = {"affmae": 80.0, "vit-mae": 40.0}[record["model"]]
        record["images_per_s"] = 1e3 * record["batch"] / record["ms"]
    assert "2.0× slower" in texts(charts.speed_and_memory(values["results"], "pretrain", "a card"))


@pytest.mark.parametrize(
    ("values", "name"),
    [(document(usual), "label-efficiency-small.png"), (steps(), "speed-and-memory-pretrain.png")],
    ids=["quality", "steps"],
)
def test_files_are_pictures_of_both_models(values, name: str, tmp_path) -> None:
    assert charts.draw(values, tmp_path) == (name,)
    with Image.open(tmp_path / name) as picture:
        picture.verify()
        assert picture.width >= 1000 and picture.format == "PNG"
    for colour in charts.COLOURS.values():
        assert coloured(tmp_path / name, colour) > 300
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_scored_draws_nothing(tmp_path) -> None:
    assert charts.draw(document(lambda m, i, f, s: None), tmp_path) == ()
    assert charts.draw({"kind": "kernels", "results": []}, tmp_path) == ()


def test_without_matplotlib_there_is_a_remark(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(charts.NoCharts, match="no charts: matplotlib cannot be imported") as caught:
        charts.draw(document(usual), tmp_path)
    assert "pip install matplotlib" in caught.value.hint and not list(tmp_path.iterdir())
