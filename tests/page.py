"""Reading a report back: its HTML, its images, and an attribution to report on."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

from dtrak.data.samples import Samples
from dtrak.pages.influence import gather
from dtrak.pages.report import Explained, write_report

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
        elif "part" in attributes.get("class", "") and self.section >= 0:
            # what comes after the rows is in none of them
            self.section = 10**6
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


def decoded(element):
    kind, _, content = element["src"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
        assert (image.format, image.mode) in {("PNG", "L"), ("PNG", "RGB")}
        return np.asarray(image.convert("RGB"))


def embedded(text):
    """Pictures ``[H, W, 3]`` of a page by their class, each in it once."""
    found = {}
    rule = r"\.([qt]\d+)\{background-image:url\(data:image/(webp);base64,([^)]*)\)\}"
    for name, _, content in re.findall(rule, text):
        assert name not in found
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            found[name] = np.asarray(image.convert("RGB"))
    return found


def shown(page, **wanted):
    """Classes of the pictures that elements of a page show, in order."""
    images = page.all("span", role="img", **wanted)
    return [image["class"].split()[-1] for image in images]


def quantised(image):
    """[C, H, W] -> uint8 [H, W, 3], in float64 and without the code under test."""
    levels = ((image.double().clamp(-1, 1) + 1) / 2 * 255).round().numpy().astype(np.uint8)
    return np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)


def shows(picture, pixels):
    """Whether the picture holds these pixels, exactly."""
    height, width = pixels.shape[:2]
    corners = (picture[: 1 - height, : 1 - width] == pixels[0, 0]).all(-1)
    corners &= (picture[height - 1 :, width - 1 :] == pixels[-1, -1]).all(-1)
    return any(
        np.array_equal(picture[y : y + height, x : x + width], pixels)
        for y, x in np.argwhere(corners)
    )


def ranking(options):
    """The oracle's order, by a plain sort: strongest proponents, strongest opponents."""
    scores, best, worst = (options[k] for k in ("scores", "num_proponents", "num_opponents"))
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
    labels = [i % 10 for i in range(N)]
    return {
        "queries": Samples(queries, [f"query/{i}" for i in range(M)], None, ""),
        "train": Samples(train, [f"train/{i:04d}" for i in range(N)], labels, ""),
        "scores": scores,
        "num_proponents": best,
        "num_opponents": worst,
        "settings": {"proj_dim": 512, "damping": 0.25},
        "stages": [("features", 61.26), ("scores", 150.0)],
        "facts": {"peak memory": "612 MB"},
    }


def rows_of(options):
    names = ("train", "queries", "scores", "num_proponents", "num_opponents")
    return gather(*(options.pop(name) for name in names))


def named(samples, names):
    """The same pictures under other names."""
    return Samples(samples.images, names, samples.labels, "")


def explained_of(options, **more):
    """What a report is made from."""
    options = {"query_kind": "generated picture", "findings": None, **options, **more}
    return Explained(
        options["train"], options["queries"], options["scores"], options["num_proponents"],
        options["query_kind"], options["settings"], options["facts"] or {}, options["stages"], {},
        options["findings"],
    )  # fmt: skip


def write(tmp_path, options):
    write_report(tmp_path / "r.html", tmp_path / "r.png", explained_of(options))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    with Image.open(tmp_path / "r.png") as picture:
        return page, np.asarray(picture.convert("RGB"))
