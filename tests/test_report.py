"""One page for one attribution, and one for everything a run left."""

import base64
import hashlib
import json
import shutil

import matplotlib
import numpy as np
import pytest
import torch
from finished_run import OPTIONS, results
from page import HOSTILE, Page, case, embedded, named, quantised, ranking, shown, write
from rich.console import Console
from test_counterfactual_results import example
from tiny_stable_diffusion import build_pipeline, load_tiny, write_pictures
from typer.testing import CliRunner

from dtrak.cli.attribution import run_attribution
from dtrak.cli.report import app
from dtrak.data.samples import Samples
from dtrak.evaluation.counterfactual.results import load_counterfactual, save_counterfactual
from dtrak.evaluation.lds.statistics import predict_groups
from dtrak.evaluation.lds.table import (
    Entry,
    Results,
    dense_ranks,
    load_results,
    make_table,
    save_results,
)
from dtrak.features.fit import FIT
from dtrak.models.lora import save_lora
from dtrak.pages.index import write_index
from dtrak.pages.report import gather_report
from dtrak.runs.results import load_attribution
from dtrak.runs.run import Options


@pytest.mark.parametrize("C", [1, 3])
def test_page_holds_every_image_of_every_row_in_order(tmp_path, C):
    options = case(C=C)
    page, _ = write(tmp_path, options)
    pictures = embedded((tmp_path / "r.html").read_text(encoding="utf-8"))
    # every picture once, whether or not a row shows it
    assert len(pictures) == 3 + 12
    for m in range(3):
        images = page.all("span", section=m, role="img")
        rows = [row for places, _ in ranking(options) for row in places[m].tolist()]
        expected = [options["queries"][m], *(options["train"][row] for row in rows)]
        for name, source in zip(shown(page, section=m), expected, strict=True):
            assert np.array_equal(pictures[name], quantised(source))
        names = [options["train"].ids[row] for row in rows]
        assert [e["title"] for e in page.all("span", section=m) if "title" in e] == names
        assert [e["text"] for e in page.all("span", section=m, **{"class": "name"})] == names
        assert f"query/{m}" in images[0]["aria-label"]
        assert all(name in e["aria-label"] for e, name in zip(images[1:], names, strict=True))
        labels = [e["text"] for e in page.all("span", section=m, **{"class": "soft"})]
        assert labels == [f"label {row % 10}" for row in rows]


def test_scores_and_bars_are_those_of_the_input(tmp_path):
    options = case()
    page, _ = write(tmp_path, options)
    for m in range(3):
        scores = torch.cat([values[m] for _, values in ranking(options)]).tolist()
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
    assert ("in units of 10" in page.all("body")[0]["text"]) == has_unit
    unit = 10.0 ** int(powers[0]) if has_unit else 1.0
    for element in page.all("data"):
        assert len(element["text"]) <= 8
        shown = float(element["text"].replace("−", "-")) * unit
        assert shown == pytest.approx(float(element["value"]), rel=0.006)


def test_scores_that_are_all_zero(tmp_path):
    options = case()
    page, _ = write(tmp_path, options | {"scores": torch.zeros_like(options["scores"])})
    assert not page.all("i")
    assert [e["text"] for e in page.all("li", section=0)] == ["none", "none"]


def test_the_least_of_the_proponents_is_no_opponent(tmp_path):
    options = case()
    scores = options["scores"].abs()
    scores[0, 4] = -0.5
    page, _ = write(tmp_path, options | {"scores": scores})
    shown = [float(e["value"]) for e in page.all("data", section=0)]
    assert sum(value < 0 for value in shown) == 1
    assert len(shown) == options["num_proponents"] + 1


def test_page_is_self_contained_and_runs_its_own_script_alone(tmp_path):
    page, _ = write(tmp_path, case())
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not any(word in text.lower() for word in ("http:", "https:", "@import", "//www"))
    assert text.count("url(") == text.count("url(data:image/")
    for element in page.elements:
        assert element["tag"] not in {"link", "iframe", "object", "base"}
        assert not any(name.startswith("on") for name in element)
        for name in ("src", "href", "srcset"):
            assert element.get(name, "#").startswith(("data:", "#"))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy
    data, script = page.all("script")
    assert data["type"] == "application/json"
    digest = hashlib.sha256(script["text"].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert page.all("html", lang="en")
    assert page.all("meta", name="viewport")
    assert len(page.all("h1")) == 1
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert all(image["aria-label"] for image in page.all("span", role="img"))


def test_text_is_escaped_everywhere(tmp_path):
    options = case(M=1)
    options |= {
        "queries": named(options["queries"], [HOSTILE]),
        "train": named(options["train"], [f"{HOSTILE}{i}" for i in range(12)]),
        "settings": {HOSTILE: HOSTILE},
        "stages": [(HOSTILE, 1.0)],
        "facts": {HOSTILE: HOSTILE},
        "query_kind": HOSTILE,
    }
    page, _ = write(tmp_path, options)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<script") == len(page.all("script")) == 2
    known = json.loads(page.all("script")[0]["text"])
    assert known["queries"]["ids"] == [HOSTILE]
    assert sorted(known["train"]["ids"]) == sorted(f"{HOSTILE}{i}" for i in range(12))
    assert [e["title"] for e in page.all("h2", section=0) if "title" in e] == [HOSTILE]
    assert HOSTILE in page.all("span", role="img")[0]["aria-label"]
    cells = [e["text"] for e in page.all("th") + page.all("td")]
    assert cells.count(HOSTILE) == 5
    assert page.all("p")[0]["text"].startswith(f"For each {HOSTILE}: the tra")


def settings_of(tmp_path):
    """The part of a page with the settings."""
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    return Page(text[text.index('<section class="part" id="settings"') : text.index("</main>")])


def test_tables_give_settings_facts_and_times(tmp_path):
    write(tmp_path, case())
    page = settings_of(tmp_path)
    names, values = [[e["text"] for e in page.all(tag)] for tag in ("th", "td")]
    assert list(zip(names, values, strict=True)) == [
        ("proj_dim", "512"),
        ("damping", "0.25"),
        ("peak memory", "612 MB"),
        ("features", "61.3 s"),
        ("scores", "2 min 30 s"),
        ("Total", "3 min 31 s"),
    ]
    bare = case() | {"stages": [], "facts": None, "settings": {}}
    train = bare["train"]
    page, _ = write(tmp_path, bare | {"train": Samples(train.images, train.ids, None, "")})
    assert not page.all("table")
    assert "label" not in page.all("section")[0]["text"]
    stages = [("long", 3600 * 2 + 65.0), ("twice", 1.0), ("twice", 2.0)]
    write(tmp_path, case() | {"stages": stages})
    page = settings_of(tmp_path)
    times = [e["text"] for e in page.all("td", **{"class": "number"})]
    assert times == ["2 h 01 min", "1.0 s", "2.0 s", "2 h 01 min"]


def test_small_images_are_enlarged_sharply_and_large_ones_smoothly(tmp_path):
    for size, rendering in ((32, "pixelated"), (96, "auto")):
        write(tmp_path, case(M=1, size=size))
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert text.count(f"image-rendering:{rendering}}}") == 2


def test_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path, case())
    first = [(tmp_path / name).read_bytes() for name in ("r.html", "r.png")]
    user = {"font.size": 40, "savefig.bbox": "tight", "figure.dpi": 30, "savefig.facecolor": "red"}
    with matplotlib.rc_context(user):
        write(tmp_path, case())
        assert matplotlib.rcParams["font.size"] == 40
    assert [(tmp_path / name).read_bytes() for name in ("r.html", "r.png")] == first


def test_no_queries(tmp_path):
    nothing = case() | {
        "queries": Samples(torch.zeros(0, 3, 8, 8), [], None, ""),
        "scores": torch.zeros(0, 12),
    }
    page, _ = write(tmp_path, nothing)
    assert not page.all("span", role="img")


@pytest.fixture(scope="module")
def finished(finished, tmp_path_factory):
    """A run with counterfactual results in it and an LDS beside it."""
    folder = tmp_path_factory.mktemp("report") / "here" / "run"
    shutil.copytree(finished.parent, folder.parent)
    (folder / "counterfactual").mkdir()
    save_counterfactual(example(Q=3), folder / "counterfactual")
    (folder.parent / "lds-run").mkdir()
    save_lds(folder.parent / "lds-run", load_attribution(folder).manifest["data"])
    return folder


def save_lds(folder, data):
    generator = torch.Generator().manual_seed(0)
    subsets = torch.rand(8, 60, generator=generator) < 0.5
    losses = {"generated": torch.rand(8, 3, generator=generator)}
    scores = torch.rand(3, 60, generator=generator).double()
    ranks = dense_ranks(predict_groups(scores, subsets)[None])
    entry = Entry("Random", 0, "", ("generated",), ("",), (float("nan"),), ranks)
    about = {"models": 8, "subset_size": 30, "samples": 60, "data": data, "queries": {}}
    save_results(folder / "results.npz", Results(about, subsets, losses, [entry]))


def headings(text):
    page = Page(text)
    parts = [e for e in page.all("section") if "part" in e.get("class", "").split()]
    links = [e["href"] for e in page.all("a")]
    assert links == [f"#{part['id']}" for part in parts]
    return page, [part["id"] for part in parts]


def test_the_whole_report_has_all_there_is(finished):
    page, parts = headings(gather_report(finished))
    assert parts == ["pictures", "training", "lds", "counterfactual", "settings"]
    run = load_attribution(finished)
    data = run.load_inputs()
    # the strips are those the main job wrote
    own = Page((results(finished) / "report.html").read_text(encoding="utf-8"))
    assert shown(page) == shown(own)
    assert page.all("script")[0]["text"] == own.all("script")[0]["text"]
    pictures = embedded(gather_report(finished))
    assert [e["value"] for e in page.all("data")] == [e["value"] for e in own.all("data")]
    assert np.array_equal(pictures["q0"], quantised(data.queries[0]))
    cells = [e["text"] for e in page.all("th") + page.all("td")]
    for text in ("Random", "D-TRAK", "proj_dim", "256", "training images", "subset_size", "torch"):
        assert text in cells, text
    # loading it again neither trains nor draws
    assert len(list((finished / "generated").iterdir())) == 4


# slow: a run of a LoRA
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
def test_text_to_image_runs_show_captions_prompts_and_guidance(tmp_path):
    base = build_pipeline(tmp_path / "base")
    save_lora(load_tiny(base).module, tmp_path / "lora")
    write_pictures(tmp_path / "pictures")
    (tmp_path / "prompts.txt").write_text("a wave\na <b>fog</b>\n")
    places = {"model": base, "lora": tmp_path / "lora", "data": tmp_path / "pictures",
              "output": tmp_path / "run", "prompts": tmp_path / "prompts.txt"}  # fmt: skip
    places = {name: str(place) for name, place in places.items()}
    options = Options(**{**OPTIONS, **places, "num_queries": 3, "guidance_scale": 3.5})
    run_attribution(options, Console(quiet=True))
    own = Page((results(tmp_path / "run") / "report.html").read_text(encoding="utf-8"))
    page, _ = headings(gather_report(tmp_path / "run"))
    captions = [e["text"] for e in page.all("small")]
    assert captions == [e["text"] for e in own.all("small")]
    assert [captions.count(text) for text in ("“a wave”", "“a <b>fog</b>”")] == [2, 1]
    assert {"“a ukiyo e painting”", "“a romanticism painting”"} & set(captions)
    for found in (own, page):
        cells = [e["text"] for e in found.all("th") + found.all("td")]
        for text in ("guidance scale of the pictures", "3.5", "“a wave”, “a <b>fog</b>”"):
            assert text in cells, text
    # a run of a version that did not say so
    manifest = json.loads((results(tmp_path / "run") / "manifest.json").read_text())
    manifest["facts"] = {}
    (results(tmp_path / "run") / "manifest.json").write_text(json.dumps(manifest))
    cells = [e["text"] for e in Page(gather_report(tmp_path / "run")).all("td")]
    assert "3.5" in cells


def test_the_whole_report_is_self_contained(finished):
    text = gather_report(finished)
    assert text == gather_report(finished)
    assert not any(word in text.lower() for word in ("http:", "https:", "@import"))
    for element in Page(text).elements:
        assert element.get("src", "data:").startswith("data:")
        assert element.get("href", "#").startswith("#")


def test_parts_are_left_out_where_they_are_not(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "counterfactual")
    page, parts = headings(gather_report(tmp_path / "run", num_queries=2))
    assert parts == ["pictures", "training", "settings"]
    assert sum(e.get("class") == "query" for e in page.all("section")) == 2
    assert "The first 2 of 4 generated pictures are here." in page.all("section")[0]["text"]
    # an LDS on other images does not belong here
    (tmp_path / "lds-run").mkdir()
    save_lds(tmp_path / "lds-run", "other")
    assert headings(gather_report(tmp_path / "run"))[1] == ["pictures", "training", "settings"]
    with pytest.raises(ValueError, match="--lds must be a run on the images of"):
        gather_report(tmp_path / "run", lds=tmp_path / "lds-run")
    assert headings(gather_report(tmp_path / "lds-run"))[1] == ["lds", "settings"]
    found = gather_report(tmp_path / "lds-run", counterfactual=finished / "counterfactual")
    assert headings(found)[1] == ["lds", "counterfactual", "settings"]


def test_the_table_of_dtrak_lds_is_taken_where_it_is_of_these_results(finished, tmp_path):
    shutil.copytree(finished.parent / "lds-run", tmp_path / "lds")
    gather_report(tmp_path / "lds")
    results = load_results(tmp_path / "lds" / "results.npz")
    table = make_table(results, num_resamples=50)
    (tmp_path / "lds" / "report").mkdir()
    kept = tmp_path / "lds" / "report" / "table.json"
    kept.write_text(json.dumps(table))
    assert "bootstraps with 50 resamples" in gather_report(tmp_path / "lds")
    kept.write_text(json.dumps(table | {"results": "of others"}))
    assert "bootstraps with 2,000 resamples" in gather_report(tmp_path / "lds")
    # damaged, it is made anew
    kept.write_text(json.dumps(table)[:100])
    assert "bootstraps with 2,000 resamples" in gather_report(tmp_path / "lds")


def command(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_the_command(finished, tmp_path):
    code, output = command(finished, "--output", tmp_path / "page.html", "--num-queries", "1")
    assert code == 0, output
    assert output.endswith("page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == gather_report(finished, num_queries=1)


def test_figures_and_the_index_of_a_run(finished, tmp_path):
    code, output = command(finished, "--figures", tmp_path / "f", "--num-queries", "2")
    assert code == 0, output
    names = {file.name for file in (tmp_path / "f").iterdir()}
    assert {"strips.pdf", "strips.png", "counterfactual-pixel_l2.pdf"} < names
    assert output.count("figure: ") == len(names)
    # an evaluation's figures stand in the first page of the run
    index = Page(write_index(finished).read_text(encoding="utf-8"))
    cells = [e["text"] for e in index.all("th") + index.all("td")]
    median = load_counterfactual(finished / "counterfactual").summary("pixel_l2", "d-trak").median
    assert {"D-TRAK", "Random", f"{median:.3g}", "pictures", FIT} <= {*cells}
    assert any(e["src"].startswith("data:image/webp") for e in index.all("img"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent"], "a run must be an existing folder, got absent"),
        (["{}", "--megabytes", "0.5"], "--megabytes must be at least 1, got 0.5"),
        (["{}", "--figures", "f", "--output", "x.html"], "--figures writes no page: leave out"),
        (["{}", "--num-queries", "0"], "--num-queries must be at least 1, got 0"),
        (["{}", "--lds", "absent"], "--lds must be a run that dtrak.lds has evaluated, got no abs"),
        (["{}", "--output", "absent/x.html"], "--output must be a file in an existing folder, got"),
        (["{}", "--output", "{}"], "--output must be a file in an existing folder, got"),
        (["{}", "--counterfactual", "absent"], "absent must hold the results of dtrak.counterfac"),
        (["{}", "--data", "absent.parquet"], "no file or folder at 'absent.parquet'"),
        (["{}/generated"], "must hold a finished run of dtrak.attribute, or results of dtrak.lds"),
    ],
)
def test_misuse_is_one_clear_line(finished, arguments, message):
    code, output = command(*(argument.format(finished) for argument in arguments))
    assert code == 2, output
    assert output.startswith("error: ")
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "name, keep",
    [("scores.safetensors", 100), ("manifest.json", 50), ("run.json", 10),
     ("counterfactual/results.safetensors", 400), ("lds/results.npz", 300)],
)  # fmt: skip
def test_truncated_files_are_one_clear_line(finished, tmp_path, name, keep):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished.parent / "lds-run", tmp_path / "run" / "lds")
    place = (
        results(tmp_path / "run") if name.startswith(("scores", "manifest")) else tmp_path / "run"
    )
    file, before = place / name, (results(tmp_path / "run") / "report.html").read_bytes()
    file.write_bytes(file.read_bytes()[:keep])
    code, output = command(tmp_path / "run", "--lds", tmp_path / "run" / "lds")
    assert code == 2, output
    assert output.startswith("error: ")
    assert output.count("error: ") == 1
    assert file.name in output
    assert "damaged" in output
    assert (results(tmp_path / "run") / "report.html").read_bytes() == before
