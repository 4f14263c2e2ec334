"""Plots: what is drawn is what was given, and an SVG fits into a page."""

import matplotlib
import pytest
from page import HOSTILE, Page
from PIL import Image

from dtrak.methods import METHODS
from dtrak.pages.canvas import INK, LINE, SOFT, default_style
from dtrak.pages.counterfactual import name_method
from dtrak.pages.html import STYLE
from dtrak.pages.plots import (
    REFERENCE,
    SERIES,
    SERIES_DARK,
    Curve,
    colour_of,
    is_reference,
    plot_bars,
    plot_boxes,
    plot_curves,
    render_svg,
    split_label,
    write_figure,
    write_png,
)

CURVES = [
    Curve("TRAK", [1, 10, 100], [1.0, 2.0, 4.0]),
    Curve("D-TRAK", [1, 10, 100], [2.0, 5.0, 3.0], [(1, 3), (4, 6), (2, 4)]),
    Curve("Random", [1, 100], [0.0, 0.5]),
]


def lines(figure, **wanted):
    return [
        line
        for line in figure.axes[0].lines
        if all(getattr(line, f"get_{key}")() == value for key, value in wanted.items())
    ]


def test_colours_of_the_papers_methods_are_their_own():
    assert (colour_of("D-TRAK"), colour_of("TRAK")) == SERIES[:2]
    others = {method.title for method in METHODS.values()} - {"D-TRAK", "TRAK"}
    assert not {colour_of(title) for title in others | set(map(str, range(30)))} & set(SERIES[:2])


def test_what_is_there_for_comparison_is_grey():
    for title in ("Random", "No removal", "Raw pixels, dot", "CLIP, cosine", "Raw latents, dot"):
        assert colour_of(title) == REFERENCE
    assert colour_of("Randomised") != REFERENCE


@pytest.mark.parametrize(
    "label, title",
    [
        ("D-TRAK, whitened", "D-TRAK"),
        ("D-TRAK, mean of 4 models", "D-TRAK"),
        ("D-TRAK, mean", "D-TRAK, mean"),
        ("D-TRAK, mean, whitened (kfac)", "D-TRAK, mean"),
        ("TRAK, single half-data model", "TRAK"),
        ("Datamodel, 64 models", "Datamodel"),
        ("mine", "mine"),
    ],
)
def test_ways_of_one_method_share_its_colour(label, title):
    assert split_label(label) == (title, label[len(title) :])
    assert colour_of(label) == colour_of(title)


def test_ways_of_one_method_differ_in_dashes():
    ways = ("", ", whitened", ", mean of 4 models", ", single half-data model")
    ways += (", whitened, mean of 4 models", ", whitened, single half-data model")
    with default_style():
        figure = plot_curves([Curve(f"TRAK{way}", [1, 2], [0, 1]) for way in ways], "x", "y")
    assert len({str(line._unscaled_dash_pattern) for line in lines(figure)}) == len(ways)


def test_few_values_of_an_axis_are_all_named():
    with default_style():
        figure = plot_curves([Curve("TRAK", [10, 100], [0, 1])], "S", "y", log_x=True)
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["10", "100"]


def test_a_method_looks_the_same_whatever_is_beside_it():
    # a name of the command line, and a title
    assert name_method("relative-influence") == "Relative influence"
    titles = [method.title for method in METHODS.values()]
    # lines of one colour differ in their dashes
    others = [title for title in titles if not is_reference(title)]
    with default_style():
        figure = plot_curves([Curve(title, [1, 2], [0, 1]) for title in others], "x", "y")
    # what a dash looks like, whether or not it has a name
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines(figure)}
    assert len(looks) == len(others)
    with default_style():
        bars = plot_bars(dict.fromkeys(("TRAK", "D-TRAK"), (1.0, None)), "LDS")
    assert [line.get_color() for line in lines(bars, marker="o")] == [SERIES[1], SERIES[0]]


def edges(figure, artist):
    """How far an artist stays within a figure on its four sides, in pixels."""
    found, page = artist.get_window_extent(), figure.bbox
    return (found.x0 - page.x0, found.y0 - page.y0, page.x1 - found.x1, page.y1 - found.y1)


def test_nothing_is_cut_off_at_the_edges():
    long = "Gradient of the squared distance of raw latents, cosine, averaged over timesteps"
    with default_style():
        curves = [Curve(f"{long[:50]} {n}", [1, 10], [0.0, n]) for n in range(3)]
        figures = [
            plot_boxes({long[:40]: [1.0]}, f"{long}: {long}"),
            plot_bars({long[:40]: (1.0, (0.5, 2.0))}, long),
            plot_curves(curves, f"{long}, {long}", long, log_x=True),
        ]
        for figure in figures:
            figure.draw_without_rendering()
            axes = figure.axes[0]
            for artist in (axes.xaxis.label, axes.yaxis.label, *figure.legends):
                if not hasattr(artist, "get_text") or artist.get_text():
                    assert min(edges(figure, artist)) >= -1


def test_a_group_of_few_values_has_no_box():
    with default_style():
        figure = plot_boxes({"one": [3.0], "two": [1.0, 2.0], "many": [1.0] * 5}, "distance")
    assert len(lines(figure, linewidth=3)) == 1
    points = lines(figure, marker="o")
    assert [list(line.get_xdata()) for line in points] == [[3.0], [1.0, 2.0], [1.0] * 5]


def test_every_colour_has_a_name_in_the_style_sheet_for_light_and_dark():
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    for number, pair in enumerate(zip(SERIES, SERIES_DARK, strict=True)):
        for sheet, colour in zip((light, dark), pair, strict=True):
            assert f"--series-{number}: {colour}" in sheet
    for name, colour in (("ink", INK), ("soft", SOFT), ("line", LINE)):
        assert f"--{name}: {colour}" in light


def test_curves_show_their_points_intervals_and_choices():
    with default_style():
        figure = plot_curves(CURVES, "x", "y", log_x=True, marked={"TRAK": 10})
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")
    for curve, colour in zip(CURVES, (SERIES[1], SERIES[0], REFERENCE), strict=True):
        (line,) = lines(figure, label=curve.label)
        assert line.get_color() == colour
        assert list(line.get_ydata()) == list(curve.y)
        assert list(line.get_xdata()) == list(curve.x)
    (bars,) = axes.collections
    assert [segment[0][0] for segment in bars.get_segments()] == list(CURVES[1].x)
    ends = [(segment[0][1], segment[1][1]) for segment in bars.get_segments()]
    assert ends == CURVES[1].interval
    (mark,) = lines(figure, markersize=9)
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([10], [2.0])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["TRAK", "D-TRAK", "Random"]


def test_boxes_show_medians_and_every_value():
    groups = {"D-TRAK": [0.0, 1.0, 2.0, 9.0, 9.5], "Random": [4.0, 4.0, 5.0, 6.0, 6.0]}
    with default_style():
        figure = plot_boxes(groups, "distance")
    medians = lines(figure, linewidth=3)
    assert [set(line.get_xdata()) for line in medians] == [{2.0}, {5.0}]
    assert [line.get_color() for line in medians] == [SERIES[0], REFERENCE]
    points = lines(figure, marker="o")
    assert [list(line.get_xdata()) for line in points] == list(groups.values())
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ticks == ["D-TRAK", "Random"]
    low, high = figure.axes[0].get_ylim()
    assert low > high, "the first group is on top"


def test_bars_show_values_and_intervals():
    with default_style():
        figure = plot_bars({"a": (3.0, (1.0, 4.0)), "Random": (-1.0, None)}, "LDS")
    points = lines(figure, marker="o")
    assert [list(line.get_xdata()) for line in points] == [[3.0], [-1.0]]
    assert [line.get_color() for line in points] == [colour_of("a"), REFERENCE]
    assert [list(line.get_xdata()) for line in lines(figure, linewidth=1.6)] == [[1.0, 4.0]]


def test_svg_fits_into_a_page():
    with default_style():
        one = render_svg(plot_curves(CURVES, "x axis", "y"), "first")
        two = render_svg(plot_curves(CURVES, "x axis", "y"), HOSTILE)
        assert one == render_svg(plot_curves(CURVES, "x axis", "y"), "first")
    page = Page(f"<div>{one}{two}</div>")
    pictures = page.all("svg")
    assert [svg["aria-label"] for svg in pictures] == ["first", HOSTILE]
    assert all(svg["role"] == "img" and "viewbox" in svg and "width" not in svg for svg in pictures)
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids)) > 10
    targets = {e["href"] for e in page.elements if "href" in e}
    targets |= {e["clip-path"][4:-1] for e in page.elements if "clip-path" in e}
    assert targets
    assert targets <= {f"#{name}" for name in ids}
    assert "x axis" in page.all("div")[0]["text"]
    assert not any(word in one for word in ("http:", "xmlns", "<?xml", "<metadata", INK, SERIES[0]))
    assert "var(--ink)" in one
    assert "var(--series-0)" in one


def test_png_does_not_depend_on_the_user(tmp_path):
    def draw(name):
        with default_style():
            write_png(plot_curves(CURVES, "x", "y"), tmp_path / name)
        return (tmp_path / name).read_bytes()

    first = draw("a.png")
    with matplotlib.rc_context({"font.size": 40, "savefig.bbox": "tight", "axes.grid": False}):
        assert draw("b.png") == first
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_figures_for_a_paper_keep_their_letters_and_their_bytes(tmp_path):
    def draw(name):
        with default_style():
            files = write_figure(plot_curves(CURVES, "x", "y"), tmp_path / name)
        assert [file.name for file in files] == [f"{name}.pdf", f"{name}.png"]
        return [file.read_bytes() for file in files]

    pdf, png = draw("lds-a.b")
    assert pdf.startswith(b"%PDF")
    # fonts of type 3 are refused by journals
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf
    with matplotlib.rc_context({"pdf.fonttype": 3, "savefig.dpi": 30}):
        assert draw("again") == [pdf, png]
    with Image.open(tmp_path / "lds-a.b.png") as picture:
        assert round(picture.info["dpi"][0]) == 300
