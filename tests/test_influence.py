"""The picture of queries beside their matches, and what `gather` refuses."""

import pytest
import torch
from page import HOSTILE, case, named, quantised, ranking, rows_of, shows, write

from dtrak.data.samples import Samples
from dtrak.pages import influence
from dtrak.pages.canvas import Canvas, default_style


@pytest.mark.parametrize(
    "C, size, query_zoom, zoom",
    [
        (1, 8, 32, 24),
        *[pytest.param(*c, marks=pytest.mark.full) for c in ((3, 32, 8, 6), (3, 28, 9, 6))],
    ],
)
def test_picture_shows_whole_squares_per_pixel(tmp_path, C, size, query_zoom, zoom):
    options = case(M=2, C=C, size=size)
    _, picture = write(tmp_path, options)

    def enlarged(image, times):
        return quantised(image).repeat(times, axis=0).repeat(times, axis=1)

    absent = set(range(12))
    for m in range(2):
        assert shows(picture, enlarged(options["queries"][m], query_zoom))
        for places, _ in ranking(options):
            absent -= set(places.flatten().tolist())
            for row in places[m].tolist():
                assert shows(picture, enlarged(options["train"][row], zoom))
    assert not any(shows(picture, enlarged(options["train"][row], zoom)) for row in absent)


def test_picture_stops_at_sixteen_queries_and_says_so(tmp_path, monkeypatch):
    written = []
    original = Canvas.write

    def write_text(self, x, y, text, **style):
        written.append(text)
        original(self, x, y, text, **style)

    monkeypatch.setattr(Canvas, "write", write_text)
    page, picture = write(tmp_path, case(M=17, best=1, worst=1))
    assert sum(e.get("class") == "query" for e in page.all("section")) == 16
    assert "The first 16 of 17 are here" in page.all("noscript")[0]["text"]
    assert [text for text in written if text.startswith("query/")] == [
        f"query/{i}" for i in range(16)
    ]
    assert any("The first 16 of 17." in text for text in written)
    written.clear()
    _, smaller = write(tmp_path, case(M=16, best=1, worst=1))
    assert smaller.shape == picture.shape
    assert not any("The first" in text for text in written)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "side, names, kind",
    [
        ("train", [f"train/{i}" for i in range(12)], "generated picture"),
        ("queries", ["q" * 200, "folder/" * 30 + "1.png"], "very long kind " * 30),
        ("train", [HOSTILE * 5 + f"/{i}" for i in range(12)], "generated picture"),
    ],
)
@pytest.mark.parametrize("size", [8, 28, 300])
def test_nothing_overlaps_in_the_picture(side, names, kind, size):
    options = case(M=2, size=size, scale=1e-5)
    rows = rows_of(options | {side: named(options[side], names)})
    with default_style():
        canvas = influence.draw(rows, kind)
        canvas.figure.draw_without_rendering()
    texts = [text.get_window_extent().extents for text in canvas.figure.texts]
    images = [image.get_window_extent().extents for image in canvas.figure.artists]
    assert len(images) == 2 * 9
    boxes = [*texts, *images]
    for index, (left, bottom, right, top) in enumerate(boxes):
        assert left >= 0
        assert bottom >= 0
        assert right <= canvas.width
        assert top <= canvas.height
        for other in boxes[index + 1 :]:
            across = min(right, other[2]) - max(left, other[0])
            along = min(top, other[3]) - max(bottom, other[1])
            assert across <= 1 or along <= 1, (boxes[index], other)


def test_long_ids_keep_their_end():
    options = case(M=1)
    names = [f"some-very-long-name-of-a-file.parquet/{i}" for i in range(12)]
    rows = rows_of(options | {"train": named(options["train"], names)})
    canvas = influence.draw(rows, "picture")
    texts = [text.get_text() for text in canvas.figure.texts]
    for row in ranking(options)[0][0][0].tolist():
        assert any(text.startswith("some-") and text.endswith(f"…/{row}") for text in texts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_and_samples_that_are_no_pictures(tmp_path, value):
    options = case()
    scores = options["scores"].clone()
    scores[2, 7] = value
    with pytest.raises(ValueError, match="scores must be finite"):
        write(tmp_path, options | {"scores": scores})
    vectors = Samples(torch.zeros(3, 5), ["a", "b", "c"], None, "")
    with pytest.raises(ValueError, match=r"queries must be \[M, 1 or 3, H, W\], got \[3, 5\]"):
        write(tmp_path, options | {"queries": vectors})
    assert not list(tmp_path.iterdir())


def texts(tmp_path, monkeypatch, **changes):
    """What the picture says of one query with one match on each side, as it is drawn."""
    canvases = []
    original = Canvas.save
    monkeypatch.setattr(Canvas, "save", lambda self, p: (canvases.append(self), original(self, p)))
    write(tmp_path, {**case(M=1, best=1, worst=1), **changes})
    return [text.get_text() for text in canvases[-1].figure.texts]


def test_headings_are_whole_however_few_matches_there_are(tmp_path, monkeypatch):
    said = texts(tmp_path, monkeypatch, query_kind="generated picture")
    assert influence.TITLE in said
    assert influence.lead("generated picture") in said
    assert "Generated picture" in said
    for _, heading, meaning in influence.HEADINGS:
        assert f"{heading}: {meaning}" in " ".join(said)


@pytest.mark.parametrize("labels", [None, ["a class of cats"] * 12, [3] * 12])
def test_the_class_of_an_image_is_shown_whole(tmp_path, monkeypatch, labels):
    ids = [f"a class of cats/a-long-name-of-an-image-{i:05d}.png" for i in range(12)]
    options = case(M=1, best=1, worst=1)
    numbers = None if labels is None else [3] * 12
    train = Samples(options["train"].images, ids, numbers, "")
    if labels is not None and labels[0] != 3:
        train.class_names = {3: labels[0]}
    said = texts(tmp_path, monkeypatch, train=train)
    expected = "label 3" if labels == [3] * 12 else "a class of cats"
    assert said.count(expected) == 1 + 3
    page, _ = write(tmp_path, options | {"train": train})
    assert expected in page.all("body")[0]["text"]
