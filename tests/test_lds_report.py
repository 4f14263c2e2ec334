"""What a reader sees: the numbers of the table, and plots of them."""

import copy
import io
import json

import pytest
from PIL import Image
from rich.console import Console
from test_lds_table import small_results

from dtrak.evaluation.lds.table import make_table, packaged_table
from dtrak.pages.lds_report import print_table, read_table, render_markdown, row_notes, write_plots
from dtrak.pages.lds_section import render_section


@pytest.fixture(scope="module")
def table():
    results = small_results()
    about = {
        "subset_size": 10, "samples": 20, "steps": 7, "loss_timesteps": 4, "noise_seeds": 2
    }  # fmt: skip
    results.about.update(about)
    return make_table(results, num_resamples=100)


def cells(line):
    return [cell.strip() for cell in line[1:-1].replace("│", "|").split("|")]


def test_terminal_and_page_show_the_numbers_of_the_table(table, tmp_path):
    file = tmp_path / "out.txt"
    with file.open("w") as out:
        print_table(table, Console(file=out, width=200))
    printed = [cells(line) for line in file.read_text().splitlines() if line.startswith("│")]
    page = render_markdown(table)
    rows = [cells(line) for line in page.splitlines() if line.startswith("| ")]
    expected = []
    for kind in ("validation", "generated"):
        chosen = [row for row in table["rows"] if row["queries"] == kind]
        for row in sorted(chosen, key=lambda row: -row["held_out"]["lds"]):
            low, high = row["held_out"]["bca"]
            line = [
                row["method"],
                str(row["timesteps"]) if row["timesteps"] else "",
                row["projection"],
                f"{100 * row['held_out']['lds']:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
            ]
            if "sweep" in row:
                line += [
                    ", ".join(dict.fromkeys(row["chosen"])),
                    f"{100 * row['1']['lds']:.1f}",
                    f"{100 * row['auto']['lds']:.1f}",
                    f"{100 * row['in_sample']['lds']:.1f} (λ {row['in_sample']['rule']})",
                ]
            else:
                line += [""] * 4
            expected.append(line)
    assert printed == expected
    assert [row for row in rows if row in expected] == expected
    differences = [row for row in rows if " - " in row[0]]
    assert len(differences) == len(table["differences"])
    assert differences[0][4] == f"{100 * table['differences'][0]['difference']:+.1f}"
    # the reader is told what the intervals do not cover, and which figure is optimistic
    for text in (" ".join(file.read_text().split()), page):
        assert "They do not cover other queries" in text
        assert "optimistic" in text


def test_only_packaged_results_are_said_to_be_tested(table):
    """A user's own figures follow from no file of the package."""
    packaged = packaged_table("digits")
    claim = "every figure follows from the losses and ranks in the package, and a test"
    assert claim in render_markdown(packaged)
    other = packaged | {"results": "0" * 64}
    own = copy.deepcopy(packaged)
    own["rows"][0]["held_out"]["lds"] += 0.01
    for theirs in (table, other, own):
        page = render_markdown(theirs)
        assert "in the package" not in page
        name = theirs["about"]["preset"]
        # a model of one's own is no preset
        whose = "--preset digits" if name == "digits" else "--run FOLDER"
        assert f"Made by `python -m dtrak.lds report {whose} --markdown FILE`." in page


def test_a_table_that_cannot_be_used_is_none(tmp_path):
    results = small_results()
    table = make_table(results, num_resamples=100)
    file = tmp_path / "table.json"
    assert read_table(file, results) is None
    whole = json.dumps(table)
    file.write_text(whole)
    assert read_table(file, results) == json.loads(whole)
    damaged = [
        whole[: len(whole) // 2], "", "[]", "null", "{}", json.dumps(table | {"rows": None}),
        json.dumps(table | {"rows": []}), json.dumps(table | {"rows": [{"method": "TRAK"}]}),
        json.dumps(table | {"results": "of others"}), json.dumps(table | {"about": None}),
        json.dumps({key: value for key, value in table.items() if key != "differences"}),
    ]  # fmt: skip
    for text in damaged:
        file.write_text(text)
        assert read_table(file, results) is None, text[:80]
    file.write_bytes(b"\xff\xfe\x00")
    assert read_table(file, results) is None


def test_rows_that_need_it_are_explained(table):
    # the table at hand has empirical influence fitted to halves
    (note,) = row_notes(table)
    assert "cross-fitted: to one half of the models, and judged on the other" in note
    rows = [row for row in table["rows"] if "sweep" in row or "all" in row]
    assert row_notes({**table, "rows": rows}) == []
    fitted = {**table["about"], "retrain": {"models": 64}}
    (note,) = row_notes({**table, "rows": rows, "about": fitted})
    assert "the first n models of a family of their own, which nothing is judged on" in note
    several = [*rows, {**rows[0], "method": "D-TRAK, single half-data model"}]
    (note,) = row_notes({**table, "rows": several})
    assert "scores averaged over the first n models of the retrain family" in note
    for page in (render_markdown, render_section):
        assert "scores averaged over" in page({**table, "rows": several})
        assert "scores averaged over" not in page(table)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_gets_whole_figures(table, width):
    out = io.StringIO()
    print_table(table, Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert "LDS" in text
    assert ("in-sample" in text.split("LDS in %")[0]) == (width == 200)


def test_plots_are_drawn_for_every_kind_of_query(table, tmp_path):
    files = write_plots(table, tmp_path / "plots")
    # one S only: nothing to plot against it
    assert {file.name for file in files} == {
        f"lds-{plot}-{kind}.png"
        for plot in ("damping", "methods")
        for kind in ("validation", "generated")
    }
    for file in files:
        with Image.open(file) as image:
            assert image.size[0] == 900
            assert len(image.convert("L").getcolors()) > 10
    again = write_plots(table, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_two_numbers_of_timesteps_make_a_curve(table, tmp_path):
    both = copy.deepcopy(table)
    both["rows"] += [
        {**row, "timesteps": 100} for row in copy.deepcopy(table["rows"]) if row["timesteps"]
    ]
    names = {file.name for file in write_plots(both, tmp_path)}
    assert "lds-timesteps-validation.png" in names
