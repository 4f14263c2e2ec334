"""The plots show the numbers of the table, whoever draws them."""

import copy

import pytest
from test_lds_table import small_results

from dtrak.evaluation.lds.table import make_table, select_rows
from dtrak.pages.canvas import default_style
from dtrak.pages.lds_plots import plot_lds


@pytest.fixture(scope="module")
def rows():
    return select_rows(make_table(small_results(), num_resamples=100), "validation")


def draw(rows):
    with default_style():
        return plot_lds(rows)


def lines(figure):
    """The points of every curve that has a name, by name."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[0].get_lines()
        if not line.get_label().startswith("_")
    }


def twice(rows):
    """The same rows at S = 100 as well, a little better."""
    more = copy.deepcopy([row for row in rows if row["timesteps"]])
    for row in more:
        row["timesteps"] = 100
        row["held_out"]["lds"] += 0.01
    return [*more, *rows]


def test_bars_are_held_out_figures_with_their_intervals(rows):
    axes = draw(rows)["methods"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [row["method"] for row in rows]
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    values = [100 * row["held_out"]["lds"] for row in rows]
    assert [line.get_xdata()[0] for line in points] == pytest.approx(values)
    drawn = [tuple(line.get_xdata()) for line in axes.get_lines() if len(line.get_xdata()) == 2]
    for row in rows:
        ends = tuple(100 * end for end in row["held_out"]["bca"])
        assert any(pytest.approx(ends) == pair for pair in drawn)


def test_damping_in_units_of_the_mean_squared_norm_with_auto_marked(rows):
    figure = draw(rows)["damping"]
    found = lines(figure)
    swept = [row for row in rows if "sweep" in row]
    assert set(found) == {row["method"] for row in swept}
    marks = [line for line in figure.axes[0].get_lines() if line.get_markersize() == 9]
    assert len(marks) == len(swept)
    for row in swept:
        x, y = found[row["method"]]
        unit = row["sweep"]["1"]["damping"]
        expected = sorted((p["damping"] / unit, 100 * p["lds"]) for p in row["sweep"].values())
        assert x == pytest.approx([at for at, _ in expected])
        assert y == pytest.approx([value for _, value in expected])
        auto = row["sweep"]["auto"]
        assert any(
            line.get_xdata()[0] == pytest.approx(auto["damping"] / unit)
            and line.get_ydata()[0] == pytest.approx(100 * auto["lds"])
            for line in marks
        )


def test_timesteps_are_drawn_where_there_are_several(rows):
    assert set(draw(rows)) == {"methods", "damping"}
    both = draw(twice(rows))
    assert set(both) == {"methods", "damping", "timesteps"}
    found = lines(both["timesteps"])
    for row in rows:
        if row["timesteps"] and row["method"] in found:
            value = 100 * row["held_out"]["lds"]
            assert found[row["method"]][1] == pytest.approx([value, value + 1])
    # a method at one S alone has no curve
    single = [row for row in twice(rows) if (row["method"], row["timesteps"]) != ("TRAK", 10)]
    assert "TRAK" not in lines(draw(single)["timesteps"])
    # bars and sweeps are those of the most timesteps
    assert "S = 100" in both["methods"].axes[0].get_xlabel()
    assert "S = 100" in both["damping"].axes[0].get_xlabel()


def test_other_projections_stay_out(rows):
    exact = copy.deepcopy([row for row in rows if row["method"] == "TRAK"])
    exact[0]["projection"], exact[0]["held_out"]["lds"] = "none", 0.99
    for order in ([*exact, *rows], [*rows, *exact]):
        found = draw(order)["methods"].axes[0]
        assert max(x for line in found.get_lines() for x in line.get_xdata()) < 98


def test_methods_without_features_have_no_curves(rows):
    plain = [row for row in rows if not row["timesteps"]]
    assert set(draw(plain)) == {"methods"}
    assert "S =" not in draw(plain)["methods"].axes[0].get_xlabel()
