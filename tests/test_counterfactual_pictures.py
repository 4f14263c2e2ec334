"""Counterfactual results to look at: what is shown is what was measured."""

import numpy as np
import pytest
import torch
from page import Page, decoded, shows
from PIL import Image
from test_counterfactual_results import example

from dtrak.evaluation.counterfactual.results import save_counterfactual
from dtrak.pages.canvas import Canvas, default_style
from dtrak.pages.counterfactual import (
    PNG_QUERIES,
    TITLE,
    name_method,
    plot_distances,
    render_section,
    write_box_plot,
    write_strips,
)
from dtrak.pages.plots import REFERENCE, SERIES


def rgb(pixels, times=1):
    array = pixels.expand(3, -1, -1).movedim(0, -1).numpy()
    return array.repeat(times, axis=0).repeat(times, axis=1)


def test_strips_show_every_picture_of_the_first_retraining(tmp_path):
    results = example(Q=3)
    write_strips(tmp_path / "s.png", results)
    with Image.open(tmp_path / "s.png") as file:
        picture = np.asarray(file.convert("RGB"))
    for q in range(3):
        assert shows(picture, rgb(results.originals[q], 20))
        for method in results.methods:
            assert shows(picture, rgb(results.pictures[method][q, 0], 20))
            assert not shows(picture, rgb(results.pictures[method][q, 1], 20))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_line_of_the_strips_is_cut(count, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Canvas, "save", lambda self, path: seen.extend(self.figure.texts))
    write_strips(tmp_path / "s.png", example(Q=1, methods=count))
    texts = [text.get_text() for text in seen]
    assert len(texts) == 3 + (1 + count) * 2
    assert TITLE in texts
    assert not [text for text in texts if "…" in text]


def test_strips_stop_and_say_so(tmp_path):
    sizes = []
    for count in (PNG_QUERIES, PNG_QUERIES + 1):
        write_strips(tmp_path / "s.png", example(Q=count, R=1))
        with Image.open(tmp_path / "s.png") as file:
            sizes.append(file.size)
    assert sizes[0] == sizes[1]


def test_the_box_plot_shows_queries_under_readable_names():
    results = example()
    with default_style():
        axes = plot_distances(results, "pixel_l2").axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["D-TRAK", "Random", "No removal"]
    assert axes.get_xlabel() == "L2 distance of pixels (larger = more change)"
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for line, method in zip(points, results.methods, strict=True):
        means = results.values["pixel_l2"][method].mean(1).tolist()
        assert list(line.get_xdata()) == means
    assert [line.get_color() for line in points] == [SERIES[0], REFERENCE, REFERENCE]


def test_a_plot_for_every_metric(tmp_path):
    results = example()
    results.values["clip_cosine"] = {m: torch.rand(6, 2) for m in results.methods}
    write_box_plot(tmp_path / "d.png", results)
    assert {file.name for file in tmp_path.iterdir()} == {"d.png", "d-clip_cosine.png"}


def test_the_section_gives_the_medians_and_the_pictures():
    results = example()
    page = Page(f"<main>{render_section(results, 4)}</main>")
    cells = [e["text"] for e in page.all("td", **{"class": "number"})]
    rows = [cells[n : n + 3] for n in range(0, 9, 3)]
    for row, method in zip(rows, results.methods, strict=True):
        summary = results.summary("pixel_l2", method)
        median, low, high = (float(x.strip("[],")) for x in row[0].split())
        assert (median, low, high) == pytest.approx((summary.median, *summary.interval), rel=5e-3)
        assert float(row[1]) == pytest.approx(summary.mean, rel=5e-3)
    beyond = results.beyond_random("pixel_l2", "d-trak")
    assert float(rows[0][2].split()[0].replace("−", "-")) == pytest.approx(beyond.median, rel=5e-3)
    assert [row[2] for row in rows[1:]] == ["", ""]
    images = page.all("img")
    expected = [
        pixels
        for q in range(4)
        for pixels in (
            results.originals[q], *(results.pictures[m][q, 0] for m in results.methods)
        )
    ]  # fmt: skip
    for image, pixels in zip(images, expected, strict=True):
        assert (decoded(image) == rgb(pixels)).all()
    text = page.all("main")[0]["text"]
    assert "20 of 100 images" in text
    assert "The first 4 of 6 queries." in text
    assert "Medians over 6 queries, with 95 % percentile bootstrap intervals" in text
    assert len(page.all("svg")) == 1


def test_few_queries_get_no_interval_and_no_random_no_difference():
    results = example(Q=3)
    for part in (results.pictures, results.values["pixel_l2"]):
        del part["random"]
    page = Page(f"<main>{render_section(results, 9)}</main>")
    assert [e["text"] for e in page.all("th", scope="col")] == ["Removed by", "Median", "Mean"]
    assert not any("[" in e["text"] for e in page.all("td"))
    assert "too few for an interval" in page.all("main")[0]["text"]


def test_names():
    assert name_method("trak") == "TRAK"
    assert [name_method(name) for name in ("random", "none")] == ["Random", "No removal"]
    assert name_method("mine<b>") == "mine<b>"


def test_hostile_names_are_escaped(tmp_path):
    results = example(Q=3)
    for part in (results.pictures, results.values["pixel_l2"]):
        part["<script>"] = part.pop("d-trak")
    results.query_ids[0] = "<script>.png"
    assert "<script" not in render_section(results, 3)
    save_counterfactual(results, tmp_path)
