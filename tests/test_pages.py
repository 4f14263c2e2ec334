"""The pieces of a page."""

import pytest
import torch
from page import HOSTILE, Page, decoded

from dtrak.evaluation.lds.table import packaged_table
from dtrak.pages.html import render_image, render_name, render_page
from dtrak.pages.standing import describe_standing
from dtrak.pages.tables import format_seconds


def test_a_page_holds_what_it_is_given_and_escapes_its_title():
    page = Page(render_page(HOSTILE, "<p>head</p>", "<section>body</section>"))
    assert [e["text"] for e in page.all("title") + page.all("h1")] == [HOSTILE] * 2
    assert page.all("header")[0]["text"].split() == [*HOSTILE.split(), "head"]
    assert page.all("section")[0]["text"] == "body"


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (99.94, "99.9 s"), (100, "1 min 40 s"), (3599.6, "1 h 00 min"),
     (7265, "2 h 01 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    "name, parts",
    [("a/b.png", ["a", "/b.png"]), ("short", ["short"]), ("0123456789ab", ["01", "23456789ab"])],
)
def test_names_are_cut_before_their_tail(name, parts):
    assert [e["text"] for e in Page(render_name(name)).all("span")] == parts


@pytest.mark.parametrize("C, side, sharp", [(1, 64, True), (3, 65, False)])
def test_images_survive_exactly(C, side, sharp):
    pixels = torch.randint(256, (C, side, 5), generator=torch.Generator().manual_seed(0))
    (image,) = Page(render_image(pixels.to(torch.uint8), HOSTILE)).all("img")
    expected = pixels.expand(3, -1, -1).movedim(0, -1).numpy()
    assert (decoded(image) == expected).all()
    assert (image["width"], image["height"], image["alt"]) == ("5", str(side), HOSTILE)
    assert (image.get("class") == "pixelated") == sharp


def test_large_images_are_compressed():
    pixels = torch.randint(256, (3, 512, 384), generator=torch.Generator().manual_seed(0))
    (image,) = Page(render_image(pixels.to(torch.uint8), "large")).all("img")
    assert image["src"].startswith("data:image/webp;base64,")
    assert (image["width"], image["height"]) == ("192", "256")


SETTINGS = {
    "method": "d-trak",
    "output function": "mean_squared_l2_norm",
    "timesteps": "10 uniform",
}


def held_out(kind, method, S):
    (row,) = [
        row
        for row in packaged_table("digits")["rows"]
        if (row["queries"], row["method"], row["timesteps"]) == (kind, method, S)
        and row["projection"] in ("", "sjlt")
    ]
    return f"{100 * row['held_out']['lds']:.1f} %"


def test_how_a_method_stands_is_what_the_packaged_benchmark_says():
    said = describe_standing(SETTINGS)
    assert "D-TRAK (unwhitened, S = 10)" in said
    for kind in ("generated", "validation"):
        assert held_out(kind, "D-TRAK", 10) in said
        pixels = max(held_out(kind, f"Raw pixels, {how}", 0) for how in ("dot", "cosine"))
        assert f"pixel similarity ({pixels})" in said
    said = describe_standing(SETTINGS | {"timesteps": "70 uniform"})
    assert held_out("generated", "D-TRAK", 100) in said
    assert "This run has S = 70: that is the nearest" in said
    assert "This run has S = 2:" in describe_standing(SETTINGS | {"timesteps": "0,500 explicit"})


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"method": "mine"}, None),
        ({}, None),
        ({"method": "raw-pixels-dot"}, None),
        (SETTINGS | {"output function": "loss"}, "has nothing on D-TRAK with the output function"),
        ({"method": "gradient-dot", "timesteps": "100 uniform"}, "below pixel similarity"),
    ],
)
def test_what_is_not_measured_is_not_said(settings, text):
    said = describe_standing(settings)
    assert said is None if text is None else text in said
