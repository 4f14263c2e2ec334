"""The page in a real browser: what it shows, filters and exports is what was given."""

import csv
import time

import pytest
import torch
from browser import Browser, find_browser
from page import case, explained_of

from dtrak.data.samples import Samples
from dtrak.findings import Findings, Groups
from dtrak.pages.report import write_report

M, N = 20, 60


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    opened = Browser()
    yield opened
    opened.close()


def make_findings(scores):
    generator = torch.Generator().manual_seed(1)
    errors = scores.abs().float() * torch.rand(M, N, generator=generator) + 0.01
    p_values = torch.rand(M, N, generator=generator)
    groups = Groups(
        ("Ada", "Ben"),
        (20, 30),
        torch.stack([scores[:, :20].sum(1), scores[:, 20:50].sum(1)], 1).float(),
        torch.full((M, 2), 0.25),
        torch.full((M, 2), 0.125),
        torch.tensor([0] * 20 + [1] * 30 + [-1] * 10),
    )
    return Findings(
        errors,
        p_values,
        (p_values < 0.1) & (scores > 0),
        tuple(f"Verdict number {m}." for m in range(M)),
        scores.argsort(1)[:, -4:],
        "pixels",
        groups,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    options = case(M=M, N=N)
    findings = make_findings(options["scores"])
    file = tmp_path_factory.mktemp("explorer") / "report.html"
    write_report(file, file.with_suffix(".png"), explained_of(options, findings=findings))
    return file, options, findings


@pytest.fixture
def page(browser, made):
    browser.open(made[0])
    yield browser
    assert browser.said == []


def choose(browser, name, value):
    """Set a field of the form as a reader does, and wait until the page has followed."""
    browser.run(
        f"(() => {{ const e = document.getElementById('tools').elements[{name!r}];"
        f"e.value = {str(value)!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )
    browser.run("new Promise((done) => setTimeout(done, 200))")


def names(browser, where):
    return browser.run(f"[...document.querySelectorAll({where!r})].map((e) => e.title)")


def texts(browser, where):
    return browser.run(f"[...document.querySelectorAll({where!r})].map((e) => e.textContent)")


def row(m):
    return f"[data-query='{m}']"


def ranked(made, m, sign, count=10**6, fits=lambda k: True):
    """The oracle: names of a query's training images on a side that fit, the foremost first."""
    _, options, _ = made
    scores = options["scores"][m].float().tolist()
    chosen = sorted(range(N), key=lambda k: -sign * scores[k])
    return [options["train"].ids[k] for k in chosen if sign * scores[k] > 0 and fits(k)][:count]


def test_scripts_show_the_rows_that_are_there_without_them(browser, made):
    def shown():
        return [
            texts(browser, f"#rows .query:nth-of-type({m}) .{side} {what}")
            for m in range(1, 17)
            for side in ("proponents", "opponents")
            for what in ("data", ".name", ".out", "h3", "span.soft")
        ]

    def errors():
        found = texts(browser, "#rows .side small")
        return [float(t.removeprefix("±")) for t in found if t.startswith("±")]

    browser.open(made[0], scripts=False)
    (said,) = [text for text in texts(browser, "p") if text.startswith("Whiskers")]
    assert "two standard errors" in said
    assert "held-out" in said
    told = errors()
    assert len(told) == 16 * 8
    plain = [shown(), texts(browser, ".verdict")[:16], texts(browser, ".query h2")]
    assert len(plain[2]) == 16
    assert browser.run("document.getElementById('tools').hidden")
    browser.open(made[0])
    assert [shown(), texts(browser, ".verdict")[:16], texts(browser, ".query h2")] == plain
    # kept as halves of floats
    assert errors() == pytest.approx(told, rel=0.1)
    assert browser.said == []


def test_rows_are_ranked_and_give_more_on_demand(page, made):
    for m in (0, 7):
        for side, sign, count in (("proponents", 1, 5), ("opponents", -1, 3)):
            assert names(page, f"{row(m)} .{side} .name") == ranked(made, m, sign, count)
    page.run(f'document.querySelector("{row(7)} .proponents .more").click()')
    assert names(page, f"{row(7)} .proponents .name") == ranked(made, 7, 1, 15)
    # whoever uses a keyboard is where the new ones begin
    focused = "document.activeElement.closest('li').querySelector('.name').title"
    assert page.run(focused) == ranked(made, 7, 1)[5]
    assert names(page, f"{row(6)} .proponents .name") == ranked(made, 6, 1, 5)
    choose(page, "count", 50)
    assert names(page, f"{row(3)} .opponents .name") == ranked(made, 3, -1, 30)
    assert len(names(page, "#rows h2")) == 16
    page.run("[...document.querySelectorAll('#rows > .more')].pop().click()")
    assert len(names(page, "#rows h2")) == M


def test_filters_by_label_group_words_and_significance(page, made):
    _, options, found = made
    train = options["train"]
    sure = {
        "errors": lambda k: abs(float(options["scores"][4, k])) > 2 * float(found.errors[4, k]),
        "p": lambda k: float(found.p_values[4, k]) <= 0.05,
        "out": lambda k: bool(found.stands_out[4, k]),
    }
    fields = [
        ("label", 3, lambda k: train.labels[k] == 3),
        ("group", 1, lambda k: 20 <= k < 50),
        ("text", "TRAIN/001 label", lambda k: train.ids[k].startswith("train/001")),
        *(("sure", how, fits) for how, fits in sure.items()),
    ]
    for name, value, fits in fields:
        choose(page, name, value)
        for side, sign, count in (("proponents", 1, 5), ("opponents", -1, 3)):
            expected = ranked(made, 4, sign, count, fits)
            assert names(page, f"{row(4)} .{side} .name") == expected, name
        choose(page, name, "")
    choose(page, "query", "query/1")
    assert texts(page, "#rows h2") == ["query/1", *(f"query/{m}" for m in range(10, 20))]
    page.run("document.querySelector('#tools [type=reset]').click()")
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert len(texts(page, "#rows h2")) == 16
    assert texts(page, "#found") == [f"{M} pictures, {N} training images"]


def test_queries_are_sorted(page, made):
    _, options, found = made
    choose(page, "sort", "out")
    counts = found.stands_out.sum(1).tolist()
    expected = sorted(range(M), key=lambda m: -counts[m])[:16]
    assert texts(page, "#rows h2") == [f"query/{m}" for m in expected]
    choose(page, "sort", "concentration")
    mass = options["scores"].float().clamp(min=0)
    shares = (mass.topk(5).values.sum(1) / mass.sum(1)).tolist()
    expected = sorted(range(M), key=lambda m: -shares[m])[:16]
    assert texts(page, "#rows h2") == [f"query/{m}" for m in expected]


def test_a_training_image_says_which_pictures_it_serves(page, made):
    _, options, _ = made
    scores = options["scores"].float()
    relative = (scores / scores.abs().amax(1, keepdim=True)).tolist()
    page.run(f'document.querySelector("{row(2)} .proponents .pick").click()')
    name = ranked(made, 2, 1)[0]
    k = options["train"].ids.index(name)
    assert texts(page, "#zoom h2") == [name]
    served = sorted((m for m in range(M) if relative[m][k] > 0), key=lambda m: -relative[m][k])
    assert names(page, "#zoom ol:first-of-type .name") == [f"query/{m}" for m in served]
    ranks = [ranked(made, m, 1).index(name) + 1 for m in served]
    told = texts(page, "#zoom ol:first-of-type small")
    assert [t for t in told if t.startswith("number")] == [f"number {r} of {N}" for r in ranks]
    # from there to the picture, and by keys to the next
    page.run("document.querySelector('#zoom .pick').click()")
    assert texts(page, "#zoom h2") == [f"query/{served[0]}"]
    page.key("ArrowRight", 39)
    assert texts(page, "#zoom h2") == [f"query/{(served[0] + 1) % M}"]
    page.key("Escape", 27)
    assert not page.run("document.getElementById('zoom').open")


def test_training_images_by_their_share(page, made):
    _, options, _ = made
    mass = options["scores"].float().clamp(min=0)
    shares = (mass / mass.sum(1, keepdim=True)).mean(0)
    expected = [options["train"].ids[k] for k in shares.argsort(descending=True, stable=True)]
    assert names(page, "#tiles .name") == expected[:48]
    page.run("document.querySelector('#tiles-more button').click()")
    assert names(page, "#tiles .name") == expected


def test_details_of_a_query(page, made):
    _, options, found = made
    page.run(f'document.querySelector("{row(5)} details").open = true')
    page.run("new Promise((done) => setTimeout(done, 100))")
    mass = options["scores"][5].float().clamp(min=0)
    labels = torch.tensor(options["train"].labels)
    shares = {c: float(mass[labels == c].sum() / mass.sum()) for c in range(10)}
    best = sorted(shares, key=lambda c: -shares[c])
    assert texts(page, f"{row(5)} .totals:nth-of-type(1) th") == [f"label {c}" for c in best]
    groups = texts(page, f"{row(5)} .totals:nth-of-type(2) td")
    sums = [f"{float(found.groups.scores[5, g]):+#.3g} ±0.25".replace("-", "−") for g in (0, 1)]
    assert [text for text in groups if "±" in text] == sums
    heights = page.run(
        f'[...document.querySelectorAll("{row(5)} .histogram rect:not(.band)")]'
        ".map((e) => Number(e.getAttribute('height')))"
    )
    assert sum(height > 0 for height in heights) > 10
    assert page.run(f'document.querySelectorAll("{row(5)} .histogram .band").length') == 1
    alike = [options["train"].ids[k] for k in found.look_alikes[5].tolist()]
    assert names(page, f"{row(5)} .alike .name") == alike
    # the highest scores, so that as many proponents are the same ones
    assert "4 of 4 are among the first 4 proponents" in texts(page, f"{row(5)} .alike h3")[0]


def test_the_table_of_what_is_chosen(page, made):
    _, options, found = made
    choose(page, "label", 7)
    choose(page, "query", "query/3")
    page.run("document.getElementById('export').click()")
    file = page.downloads / "scores.csv"
    until = time.monotonic() + 60
    while not file.is_file() and time.monotonic() < until:
        page.run("new Promise((done) => setTimeout(done, 50))")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    scores = options["scores"][3].float()
    order = scores.argsort(descending=True).tolist()
    expected = [k for k in order if options["train"].labels[k] == 7]
    assert [r["training image"] for r in rows] == [options["train"].ids[k] for k in expected]
    assert {r["query"] for r in rows} == {"query/3"}
    for r, k in zip(rows, expected, strict=True):
        assert int(r["rank"]) == order.index(k) + 1
        assert float(r["score"]) == pytest.approx(float(scores[k]), rel=1e-7)
        assert float(r["standard error"]) == pytest.approx(float(found.errors[3, k]), rel=5e-3)
        assert float(r["p value"]) == pytest.approx(float(found.p_values[3, k]), abs=1e-3)
        assert r["stands out"] == str(int(found.stands_out[3, k]))
        assert r["label"] == "label 7"


def test_a_keyboard_is_enough(page):
    reached = []
    for _ in range(40):
        page.key("Tab", 9)
        reached.append(page.run("document.activeElement.className || document.activeElement.name"))
        if reached[-1] == "pick":
            break
    assert {"query", "sort", "text", "label", "size", "pick"} <= set(reached)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) == "solid"
    page.key("Enter", 13, "\r")
    assert page.run("document.getElementById('zoom').open")
    assert page.run("document.activeElement.textContent") == "Close"
    page.key("Enter", 13, "\r")
    assert not page.run("document.getElementById('zoom').open")
    assert page.run("document.activeElement.className") == "pick"


# the least contrast of a text and what is behind it, as WCAG 2 has it
CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let least = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.namespaceURI.endsWith("svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, e.outerHTML.slice(0, 80)];
  }
  return least;
})()"""


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(browser, made, width, dark):
    browser.open(made[0], width=width, dark=dark)
    browser.run("document.querySelector('details').open = true")
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, where
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('.pick').click()")
    inside = "(() => { const b = document.getElementById('zoom').getBoundingClientRect();"
    assert browser.run(f"{inside} return b.left >= 0 && b.right <= innerWidth; }})()")
    assert browser.said == []


def many(M, N, size=32):
    """A set as large as a page must hold, of smooth noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(N, 3, size, size, generator=generator) * 2 - 1
    # which takes as many bytes as a photograph of that size
    pixels = torch.nn.functional.avg_pool2d(pixels, 7, 1, 3)
    train = Samples(
        pixels, [f"train/{i:06d}.png" for i in range(N)], [i % 10 for i in range(N)], ""
    )
    queries = Samples(pixels[:M], [f"{i:05d}.png" for i in range(M)], None, "")
    scores = torch.randn(M, N, generator=generator)
    errors = torch.rand(M, N, generator=generator)
    found = Findings(errors, errors, scores > 2, None, scores.topk(5).indices, "pixels")
    options = case() | {"train": train, "queries": queries, "scores": scores}
    return explained_of(options, findings=found)


@pytest.mark.full
def test_a_hundred_queries_and_five_thousand_images(browser, tmp_path):
    explained = many(100, 5000)
    file = tmp_path / "r.html"
    write_report(file, tmp_path / "r.png", explained)
    assert file.stat().st_size < 20e6
    seconds = browser.open(file)
    assert texts(browser, "#found") == ["100 pictures, 5,000 training images"]
    assert not texts(browser, ".left-out")
    assert browser.said == []
    # a second on a machine that does nothing else
    assert seconds < 10


def test_what_does_not_fit_is_said_with_what_gets_it(browser, tmp_path):
    explained = many(6, 4000)
    file = tmp_path / "r.html"
    write_report(file, tmp_path / "r.png", explained, megabytes=1)
    assert file.stat().st_size < 1e6
    browser.open(file)
    (said,) = texts(browser, ".left-out")
    assert "of each generated picture, the first" in said
    assert "Of 4,000 training images" in said
    assert "have no picture here" in said
    assert "megabytes=2" in said
    assert "to_csv" in said
    # what is here is right: ranks, and totals over all
    order = explained.scores[2].argsort(descending=True).tolist()
    expected = [explained.train.ids[k] for k in order]
    choose(browser, "count", 50)
    assert names(browser, f"{row(2)} .proponents .name") == expected[:50]
    browser.run("document.querySelectorAll('.query details')[2].open = true")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    mass = explained.scores[2].clamp(min=0)
    first = [float(mass[c::10].sum() / mass.sum()) for c in range(10)]
    best = max(range(10), key=lambda c: first[c])
    assert texts(browser, f"{row(2)} .totals th")[0] == f"label {best}"
    assert browser.said == []
