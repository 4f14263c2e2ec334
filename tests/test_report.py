import base64
import io
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dtrak import report
from dtrak.report import write_report

HOSTILE = "a/<script>alert(1)</script>&\"'>$x_1$"
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text inside), with the section each lies in."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.section = [], [], -1
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("class") == "query":
            self.section += 1
        element = {"tag": tag, "text": "", "section": self.section, **attributes}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **wanted):
        return [
            element
            for element in self.elements
            if element["tag"] == tag and all(element.get(k) == v for k, v in wanted.items())
        ]


def ranking(scores, best, worst):
    """The oracle's order, by a plain sort: strongest proponents, strongest opponents."""
    order = [sorted(range(len(row)), key=lambda i, r=row: -r[i]) for row in scores.tolist()]
    high = torch.tensor([row[:best] for row in order])
    low = torch.tensor([row[::-1][:worst] for row in order])
    return (high, scores.gather(1, high)), (low, scores.gather(1, low))


def case(M=3, N=12, C=3, size=8, best=5, worst=3, scale=1.0):
    generator = torch.Generator().manual_seed(M + 10 * C + size)
    queries = torch.rand(M, C, size, size, generator=generator) * 2.2 - 1.1
    train = torch.rand(N, C, size, size, generator=generator) * 2 - 1
    scores = torch.randn(M, N, generator=generator, dtype=torch.float64).abs() * scale
    # half of the images speak for a query and half against it
    scores *= torch.where(torch.rand(M, N, generator=generator).argsort(1) % 2 == 0, 1, -1)
    proponents, opponents = ranking(scores, best, worst)
    return {
        "queries": queries,
        "train": train,
        "proponents": proponents,
        "opponents": opponents,
        "train_ids": [f"train/{i:04d}" for i in range(N)],
        "query_ids": [f"query/{i}" for i in range(M)],
        "settings": {"proj_dim": 512, "damping": 0.25},
        "stages": [("features", 61.26), ("scores", 150.0)],
        "facts": {"peak memory": "612 MB"},
        "train_labels": [i % 10 for i in range(N)],
    }


def write(tmp_path, options):
    write_report(tmp_path / "r.html", tmp_path / "r.png", **options)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    with Image.open(tmp_path / "r.png") as picture:
        return page, np.asarray(picture.convert("RGB"))


def quantised(image):
    """[C, H, W] -> uint8 [H, W, 3], in float64 and without the code under test."""
    levels = ((image.double().clamp(-1, 1) + 1) / 2 * 255).round().numpy().astype(np.uint8)
    return np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)


def decoded(element):
    kind, _, content = element["src"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
        assert (image.format, image.mode) in {("PNG", "L"), ("PNG", "RGB")}
        return np.asarray(image.convert("RGB"))


def shows(picture, pixels):
    """Whether the picture holds these pixels, exactly."""
    height, width = pixels.shape[:2]
    corners = (picture[: 1 - height, : 1 - width] == pixels[0, 0]).all(-1)
    corners &= (picture[height - 1 :, width - 1 :] == pixels[-1, -1]).all(-1)
    return any(
        np.array_equal(picture[y : y + height, x : x + width], pixels)
        for y, x in np.argwhere(corners)
    )


@pytest.mark.parametrize("C", [1, 3])
def test_page_holds_every_image_of_every_row_in_order(tmp_path, C):
    options = case(C=C)
    page, _ = write(tmp_path, options)
    assert page.section == 2
    for m in range(3):
        images = page.all("img", section=m)
        rows = [*options["proponents"][0][m].tolist(), *options["opponents"][0][m].tolist()]
        expected = [options["queries"][m], *(options["train"][row] for row in rows)]
        for image, source in zip(images, expected, strict=True):
            assert np.array_equal(decoded(image), quantised(source))
        names = [options["train_ids"][row] for row in rows]
        assert [e["title"] for e in page.all("span", section=m) if "title" in e] == names
        assert [e["text"] for e in page.all("span", section=m, **{"class": "name"})] == names
        assert f"query/{m}" in images[0]["alt"]
        assert all(name in e["alt"] for e, name in zip(images[1:], names, strict=True))
        labels = [e["text"] for e in page.all("span", section=m, **{"class": "soft"})]
        assert labels == [f"label {row % 10}" for row in rows]


def test_scores_and_bars_are_those_of_the_input(tmp_path):
    options = case()
    page, _ = write(tmp_path, options)
    for m in range(3):
        scores = torch.cat([options["proponents"][1][m], options["opponents"][1][m]]).tolist()
        elements = page.all("data", section=m)
        assert [float(e["value"]) for e in elements] == scores
        for element, score in zip(elements, scores, strict=True):
            shown = float(element["text"].replace("−", "-"))
            assert abs(shown - score) <= 0.006 * abs(score)
            assert element["text"][0] in "+−"
            assert element["class"] == ("plus" if score > 0 else "minus")
        widths = [float(e["style"][6:-1]) for e in page.all("i", section=m)]
        strongest = max(map(abs, scores))
        assert widths == pytest.approx([100 * abs(s) / strongest for s in scores], abs=0.051)


@pytest.mark.parametrize("scale, has_unit", [(1e-6, True), (1e7, True), (1.0, False)])
def test_scores_of_any_size_stay_readable(tmp_path, scale, has_unit):
    page, _ = write(tmp_path, case(scale=scale))
    powers = [e["text"].replace("−", "-") for e in page.all("sup")]
    assert len(powers) == has_unit
    assert ("in units of 10" in page.all("header")[0]["text"]) == has_unit
    unit = 10.0 ** int(powers[0]) if has_unit else 1.0
    for element in page.all("data"):
        assert len(element["text"]) <= 8
        shown = float(element["text"].replace("−", "-")) * unit
        assert shown == pytest.approx(float(element["value"]), rel=0.006)


def test_scores_that_are_all_zero(tmp_path):
    options = case()
    for kind in ("proponents", "opponents"):
        options[kind] = (options[kind][0], torch.zeros_like(options[kind][1]))
    page, _ = write(tmp_path, options)
    assert not page.all("i")
    assert [e["text"] for e in page.all("li", section=0)] == ["none", "none"]


def test_the_least_of_the_proponents_is_no_opponent(tmp_path):
    options = case()
    indices, scores = options["opponents"]
    scores = scores.clone()
    scores[0] = torch.tensor([-0.5, 0.25, 0.5])
    page, _ = write(tmp_path, options | {"opponents": (indices, scores)})
    shown = [float(e["value"]) for e in page.all("data", section=0)]
    assert sum(value < 0 for value in shown) == 1
    assert len(shown) == options["proponents"][0].shape[1] + 1


def test_page_is_self_contained_and_needs_no_script(tmp_path):
    page, _ = write(tmp_path, case())
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not any(word in text.lower() for word in ("http:", "https:", "url(", "@import", "//www"))
    for element in page.elements:
        assert element["tag"] not in {"script", "link", "iframe", "object", "base"}
        assert not any(name.startswith("on") for name in element)
        for name in ("src", "href", "srcset"):
            assert element.get(name, "data:").startswith("data:")
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy
    assert page.all("html", lang="en")
    assert page.all("meta", name="viewport")
    assert len(page.all("h1")) == 1
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert all(image["alt"] for image in page.all("img"))


def test_text_is_escaped_everywhere(tmp_path):
    options = case(M=1) | {
        "query_ids": [HOSTILE],
        "train_ids": [f"{HOSTILE}{i}" for i in range(12)],
        "settings": {HOSTILE: HOSTILE},
        "stages": [(HOSTILE, 1.0)],
        "facts": {HOSTILE: HOSTILE},
        "query_kind": HOSTILE,
    }
    page, _ = write(tmp_path, options)
    assert "<script" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert [e["title"] for e in page.all("h2", section=0) if "title" in e] == [HOSTILE]
    assert HOSTILE in page.all("img")[0]["alt"]
    cells = [e["text"] for e in page.all("th") + page.all("td")]
    assert cells.count(HOSTILE) == 5
    assert page.all("p", **{"class": "lead"})[0]["text"].startswith(f"For each {HOSTILE}: the tra")


def test_tables_give_settings_facts_and_times(tmp_path):
    page, _ = write(tmp_path, case())
    names, values = [[e["text"] for e in page.all(tag)] for tag in ("th", "td")]
    assert list(zip(names, values, strict=True)) == [
        ("proj_dim", "512"),
        ("damping", "0.25"),
        ("peak memory", "612 MB"),
        ("features", "61.3 s"),
        ("scores", "2 min 30 s"),
        ("Total", "3 min 31 s"),
    ]
    bare = case() | {"stages": [], "facts": None, "settings": {}, "train_labels": None}
    page, _ = write(tmp_path, bare)
    assert not page.all("table")
    assert "label" not in page.all("section")[0]["text"]
    stages = [("long", 3600 * 2 + 65.0), ("twice", 1.0), ("twice", 2.0)]
    page, _ = write(tmp_path, case() | {"stages": stages})
    times = [e["text"] for e in page.all("td", **{"class": "number"})]
    assert times == ["2 h 01 min", "1.0 s", "2.0 s", "2 h 01 min"]


def test_small_images_are_enlarged_sharply_and_large_ones_smoothly(tmp_path):
    page, _ = write(tmp_path, case(M=1, size=32))
    assert {e.get("class") for e in page.all("img")} == {"pixelated"}
    page, _ = write(tmp_path, case(M=1, size=96))
    assert {e.get("class") for e in page.all("img")} == {None}


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
    original = report._Canvas.write

    def write_text(self, x, y, text, **style):
        written.append(text)
        original(self, x, y, text, **style)

    monkeypatch.setattr(report._Canvas, "write", write_text)
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
    rows = report._gather(*(options[name] for name in names))
    canvas = report._draw(rows, options.get("query_kind", "generated picture"))
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
    rows = report._gather(
        *(case(M=1)[name] for name in ("queries", "train", "proponents", "opponents")),
        train_ids=[f"some-very-long-name-of-a-file.parquet/{i}" for i in range(12)],
        query_ids=["q"],
        train_labels=None,
    )
    canvas = report._draw(rows, "picture")
    texts = [text.get_text() for text in canvas.figure.texts]
    for row in case(M=1)["proponents"][0][0].tolist():
        assert any(text.startswith("some-") and text.endswith(f"…/{row}") for text in texts)


def test_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path, case())
    first = [(tmp_path / name).read_bytes() for name in ("r.html", "r.png")]
    user = {"font.size": 40, "savefig.bbox": "tight", "figure.dpi": 30, "savefig.facecolor": "red"}
    with matplotlib.rc_context(user):
        write(tmp_path, case())
        assert matplotlib.rcParams["font.size"] == 40
    assert [(tmp_path / name).read_bytes() for name in ("r.html", "r.png")] == first


def test_no_queries_and_no_opponents(tmp_path):
    page, _ = write(tmp_path, case(worst=0))
    assert [e["text"].split()[0] for e in page.all("h3", section=0)] == ["Proponents"]
    nothing = case() | {
        "queries": torch.zeros(0, 3, 8, 8),
        "query_ids": [],
        "proponents": (torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5)),
        "opponents": (torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)),
    }
    page, _ = write(tmp_path, nothing)
    assert not page.all("img")


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
