"""The picture of queries beside their matches, and what `gather` refuses."""

import pytest
import torch
from page import HOSTILE, case, quantised, shows, write

from dtrak.pages import influence
from dtrak.pages.canvas import Canvas


@pytest.mark.parametrize(
    "C, size, query_zoom, zoom", [(1, 8, 32, 24), (3, 32, 8, 6), (3, 28, 9, 6)]
)
def test_picture_shows_whole_squares_per_pixel(tmp_path, C, size, query_zoom, zoom):
    options = case(M=2, C=C, size=size)
    _, picture = write(tmp_path, options)

    def enlarged(image, times):
        return quantised(image).repeat(times, axis=0).repeat(times, axis=1)

    for m in range(2):
        assert shows(picture, enlarged(options["queries"][m], query_zoom))
        for kind in ("proponents", "opponents"):
            for row in options[kind][0][m].tolist():
                assert shows(picture, enlarged(options["train"][row], zoom))
    absent = set(range(12)) - set(options["proponents"][0].flatten().tolist())
    absent -= set(options["opponents"][0].flatten().tolist())
    assert not any(shows(picture, enlarged(options["train"][row], zoom)) for row in absent)


def test_picture_stops_at_sixteen_queries_and_says_so(tmp_path, monkeypatch):
    written = []
    original = Canvas.write

    def write_text(self, x, y, text, **style):
        written.append(text)
        original(self, x, y, text, **style)

    monkeypatch.setattr(Canvas, "write", write_text)
    page, picture = write(tmp_path, case(M=17, best=1, worst=1))
    assert page.section == 16
    assert [text for text in written if text.startswith("query/")] == [
        f"query/{i}" for i in range(16)
    ]
    assert any("The first 16 of 17." in text for text in written)
    written.clear()
    _, smaller = write(tmp_path, case(M=16, best=1, worst=1))
    assert smaller.shape == picture.shape
    assert not any("The first" in text for text in written)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"query_ids": ["q" * 200, "folder/" * 30 + "1.png"], "query_kind": "very long kind " * 30},
        {"train_ids": [HOSTILE * 5 + f"/{i}" for i in range(12)]},
    ],
)
@pytest.mark.parametrize("size", [8, 28, 300])
def test_nothing_overlaps_in_the_picture(change, size):
    options = case(M=2, size=size, scale=1e-5) | change
    names = (
        "queries",
        "train",
        "proponents",
        "opponents",
        "train_ids",
        "query_ids",
        "train_labels",
    )
    rows = influence.gather(*(options[name] for name in names))
    canvas = influence.draw(rows, options.get("query_kind", "generated picture"))
    texts = [text.get_window_extent(canvas.renderer).extents for text in canvas.figure.texts]
    images = [image.get_window_extent(canvas.renderer).extents for image in canvas.figure.images]
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
    rows = influence.gather(
        *(case(M=1)[name] for name in ("queries", "train", "proponents", "opponents")),
        train_ids=[f"some-very-long-name-of-a-file.parquet/{i}" for i in range(12)],
        query_ids=["q"],
        train_labels=None,
    )
    canvas = influence.draw(rows, "picture")
    texts = [text.get_text() for text in canvas.figure.texts]
    for row in case(M=1)["proponents"][0][0].tolist():
        assert any(text.startswith("some-") and text.endswith(f"…/{row}") for text in texts)


def with_scores(options, value):
    indices, scores = options["opponents"]
    return {"opponents": (indices, torch.full_like(scores, value))}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda o: {"queries": o["queries"][0]},
            r"queries must be \[M, 1 or 3, H, W\], got \[3, 8",
        ),
        (lambda o: {"query_ids": ["a"]}, "query_ids must be 3 long, got 1"),
        (lambda o: {"train_labels": [1]}, "train_labels must be 12 long, got 1"),
        (
            lambda o: {"proponents": (o["proponents"][0], o["proponents"][1][:, :2])},
            r"proponents must be .* both \[3, any\], got \[3, 5\] and \[3, 2\]",
        ),
        (
            lambda o: {"opponents": tuple(part[:2] for part in o["opponents"])},
            r"opponents must be .* both \[3, any\], got \[2, 3\]",
        ),
        (
            lambda o: {"proponents": (o["proponents"][0] + 12, o["proponents"][1])},
            r"positions of proponents must lie in \[0, 12\), got",
        ),
        (lambda o: with_scores(o, float("nan")), "scores of opponents must be finite"),
        (lambda o: with_scores(o, float("inf")), "scores of opponents must be finite"),
    ],
)
def test_input_that_does_not_hold_together(tmp_path, change, message):
    options = case()
    with pytest.raises(ValueError, match=message):
        write(tmp_path, options | change(options))
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
        assert f"{heading}: {meaning}" in said


@pytest.mark.parametrize("labels", [None, ["a class of cats"] * 12, [3] * 12])
def test_the_class_of_an_image_is_shown_whole(tmp_path, monkeypatch, labels):
    ids = [f"a class of cats/a-long-name-of-an-image-{i:05d}.png" for i in range(12)]
    said = texts(tmp_path, monkeypatch, train_ids=ids, train_labels=labels, train_captions=None)
    expected = "label 3" if labels == [3] * 12 else "a class of cats"
    assert said.count(expected) == 2
    given = {**case(M=1, best=1, worst=1), "train_ids": ids, "train_labels": labels}
    page, _ = write(tmp_path, given)
    assert expected in page.all("body")[0]["text"]
