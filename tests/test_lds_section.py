"""The LDS section: every figure is the table's."""

import pytest
import torch
from page import Page

from dtrak.evaluation.lds.statistics import predict_groups
from dtrak.evaluation.lds.table import Entry, Results, dense_ranks, fitted_entries, make_table
from dtrak.pages.lds_section import render_section


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    subsets = torch.rand(12, 40, generator=generator) < 0.5
    effects = torch.randn(5, 40, generator=generator).double()
    losses = 3 - subsets.double() @ effects.T
    kinds = {"validation": losses[:, :2].float(), "generated": losses[:, 2:].float()}
    rules = ("0.1", "1", "10", "auto")
    entries = []
    for S in (10, 100):
        for name in ("D-TRAK", "TRAK"):
            noisy = [
                effects + n * torch.randn(5, 40, generator=generator).double() for n in (2, 1, 3, 2)
            ]
            ranks = dense_ranks(torch.stack([predict_groups(m, subsets) for m in noisy]))
            entries.append(
                Entry(name, S, "sjlt", tuple(kinds), rules, (1.0, 10.0, 100.0, 7.0), ranks)
            )
    exact = [torch.randn(5, 40, generator=generator).double() for _ in rules]
    ranks = dense_ranks(torch.stack([predict_groups(m, subsets) for m in exact]))
    entries.append(Entry("D-TRAK", 10, "none", tuple(kinds), rules, (1.0, 10.0, 100.0, 7.0), ranks))
    chance = predict_groups(torch.rand(5, 40, generator=generator).double(), subsets)
    entries.append(
        Entry("Random", 0, "", tuple(kinds), ("",), (float("nan"),), dense_ranks(chance[None]))
    )
    about = {"models": 12, "subset_size": 20, "samples": 40}
    results = Results(about, subsets, kinds, entries + fitted_entries(subsets, kinds))
    return make_table(results, num_resamples=100)


def number(text):
    return float(text.replace("−", "-"))


def test_every_row_is_there_with_its_figures(table):
    page = Page(f"<main>{render_section(table)}</main>")
    names = [e["text"] for e in page.all("th", scope="row")]
    cells = [e["text"] for e in page.all("td")]
    rows = [cells[n : n + 8] for n in range(0, len(cells), 8)]
    expected = [
        row
        for kind in ("validation", "generated")
        for row in sorted(
            (row for row in table["rows"] if row["queries"] == kind),
            key=lambda row: -row["held_out"]["lds"],
        )
    ]
    assert names == [row["method"] for row in expected]
    for cells, row in zip(rows, expected, strict=True):
        S, projection, lds, interval, chosen, unit, auto, in_sample = cells
        assert number(lds) == pytest.approx(100 * row["held_out"]["lds"], abs=0.051)
        ends = [number(end) for end in interval.split(" to ")]
        assert ends == pytest.approx([100 * x for x in row["held_out"]["bca"]], abs=0.051)
        shown = {"none": "exact"}.get(row["projection"], row["projection"])
        assert (S, projection) == (str(row["timesteps"] or ""), shown)
        if "in_sample" in row:
            value, rule = in_sample.split(" (λ ")
            assert number(value) == pytest.approx(100 * row["in_sample"]["lds"], abs=0.051)
            assert rule == f"{row['in_sample']['rule']})"
            assert chosen.split(", ") == list(dict.fromkeys(row["chosen"]))
            assert number(unit) == pytest.approx(100 * row["1"]["lds"], abs=0.051)
            assert number(auto) == pytest.approx(100 * row["auto"]["lds"], abs=0.051)
        else:
            assert (in_sample, auto, chosen, unit) == ("", "", "", "")
    assert "12 models" in page.all("p")[0]["text"]
    assert "20 of 40 training images" in page.all("p")[0]["text"]
    assert "100 resamples" in page.all("p")[0]["text"]


def test_plots_against_method_damping_and_timesteps(table):
    page = Page(f"<main>{render_section(table)}</main>")
    labels = [svg["aria-label"] for svg in page.all("svg")]
    kinds = ("held-out images", "generated images")
    assert labels == [
        f"LDS {against} on {kind}"
        for kind in kinds
        for against in ("by method", "against damping", "against number of timesteps")
    ]
    single = {**table, "rows": [row for row in table["rows"] if row["timesteps"] in (0, 10)]}
    assert len(Page(f"<main>{render_section(single)}</main>").all("svg")) == 4
    plain = {**table, "rows": [row for row in table["rows"] if not row["timesteps"]]}
    assert len(Page(f"<main>{render_section(plain)}</main>").all("svg")) == 2


def test_the_papers_methods_are_always_among_the_curves(table):
    rows = [row for row in table["rows"] if row["queries"] == "validation"]
    best = {row["method"]: row for row in rows if row["timesteps"] == 100}
    high = {**best["TRAK"]["held_out"], "lds": 1}
    others = [
        {**best["TRAK"], "method": f"other {n}", "held_out": high, "timesteps": timesteps}
        for n in range(8)
        for timesteps in (10, 100)
    ]
    page = Page(f"<main>{render_section({**table, 'rows': rows + others})}</main>")
    for svg in page.all("svg")[1:]:
        assert "D-TRAK" in svg["text"]
        assert "other 3" in svg["text"]
        assert "other 4" not in svg["text"]
