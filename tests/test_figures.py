"""Figures for a paper: what they show, that nothing is cut off, and one colour per method."""

import re

import pytest
import torch
from matplotlib.image import BboxImage
from page import HOSTILE, case, named, rows_of
from PIL import Image
from test_counterfactual_results import example
from test_lds_section import table  # noqa: F401

from dtrak.data.samples import Samples
from dtrak.pages import counterfactual, influence
from dtrak.pages.canvas import default_style
from dtrak.pages.figures import write_figures
from dtrak.pages.plots import colour_of
from dtrak.pages.strips import PRINT


def pictures(figure):
    return [artist for artist in figure.artists if isinstance(artist, BboxImage)]


def extents(figure):
    figure.draw_without_rendering()
    return [text.get_window_extent().extents for text in figure.texts], figure.bbox.extents


@pytest.mark.parametrize("kind", ["generated picture", "picture"])
@pytest.mark.parametrize("size", [8, 300])
def test_strips_show_every_match_with_score_and_class(size, kind):
    options = case(M=2, size=size)
    rows = rows_of(options)
    with default_style():
        figure = influence.draw(rows, kind, look=PRINT).figure
        boxes, (_, _, right, top) = extents(figure)
    assert len(pictures(figure)) == 2 * 9
    said = [text.get_text() for text in figure.texts]
    assert " ".join(said[:3]).startswith(kind.capitalize())
    scores = [float(t.replace("−", "-")) for t in said if re.fullmatch(r"[+−][\d.]+", t)]
    expected = [m.score for row in rows for side in row.matches.values() for m in side]
    assert scores == pytest.approx(expected, rel=6e-3)
    assert said.count("label 3") == sum(
        m.label == "label 3" for row in rows for side in row.matches.values() for m in side
    )
    for left, bottom, end, high in boxes:
        assert left >= -1
        assert bottom >= -1
        assert end <= right + 1
        assert high <= top + 1
    shape = pictures(figure)[0].get_array().shape
    assert shape[0] == shape[1] == (160 if size == 8 else 300)


def test_long_classes_take_two_lines_and_keep_clear_of_pictures():
    options = case(M=2)
    ids = [f"a class of long-haired cats/a-long-name-{i:05d}.png" for i in range(12)]
    options["train"] = Samples(options["train"].images, ids, None, "")
    with default_style():
        figure = influence.draw(rows_of(options), "picture", look=PRINT).figure
        boxes, _ = extents(figure)
    said = [text.get_text() for text in figure.texts]
    assert any(text.startswith("a class of") for text in said)
    for image in pictures(figure):
        left, bottom, right, top = image.get_window_extent().extents
        for x, low, end, high in boxes:
            across, along = min(right, end) - max(left, x), min(top, high) - max(bottom, low)
            assert across <= 1 or along <= 1


def test_a_side_without_matches_has_no_column():
    options = case(M=2)
    options["scores"] = options["scores"].abs()
    with default_style():
        figure = influence.draw(rows_of(options), "picture", look=PRINT).figure
    assert len(pictures(figure)) == 2 * 6
    assert not any("Opponents:" in text.get_text() for text in figure.texts)


# slow: fourteen figures twice; test_report.py has those of a run
@pytest.mark.full
def test_all_figures_of_a_run(tmp_path, table):  # noqa: F811
    options = case(M=2)
    options["queries"] = named(options["queries"], [HOSTILE, "b"])
    files = write_figures(tmp_path / "f", rows_of(options), "picture", table, example(Q=3))
    names = {file.name for file in files}
    stems = ["strips", "counterfactual-pixel_l2", "counterfactual-strips"]
    for kind in ("validation", "generated"):
        stems += [f"lds-{what}-{kind}" for what in ("methods", "damping", "timesteps")]
    assert names == {f"{stem}.{suffix}" for stem in stems for suffix in ("pdf", "png")}
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                assert picture.width >= 5.5 * 300
        else:
            assert file.read_bytes().startswith(b"%PDF")


def test_counterfactual_strips_have_a_column_per_method():
    changed = example(Q=3)
    with default_style():
        figure = counterfactual.draw(changed, look=PRINT).figure
    assert len(pictures(figure)) == 3 * 4
    heads = [text.get_text() for text in figure.texts][:4]
    assert heads == ["Original", "D-TRAK", "Random", "No removal"]
    distances = [f"{float(d):.3g}" for d in changed.values["pixel_l2"]["d-trak"][:, 0]]
    said = [text.get_text() for text in figure.texts]
    assert all(f"L2 {distance}" in said for distance in distances)
    pixels = pictures(figure)[0].get_array()
    times = len(pixels) // changed.originals.shape[-1]
    assert torch.equal(torch.tensor(pixels[::times, ::times, 0]), changed.originals[0, 0])


def test_a_method_has_one_colour_in_the_plots_of_every_evaluation():
    from dtrak.pages.counterfactual import name_method

    for name, title in (("d-trak", "D-TRAK"), ("gas", "GAS"), ("raw-dot", "raw-dot")):
        assert colour_of(name_method(name)) == colour_of(title)
