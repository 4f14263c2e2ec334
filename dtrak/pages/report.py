"""The page that gathers what a run and its evaluations left, and the report of a run alone."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from torch import Tensor

from ..features.fit import WARNING
from ..findings import Findings
from ..runs.console import progress_bar
from ..runs.files import encode_text, expand_path
from ..runs.record import NUM_QUERIES, RUN_FILE, ResultsError, check_report, list_queries
from .explorer import (
    MEGABYTES,
    TILES,
    Explorer,
    class_table,
    group_table,
    make_explorer,
    render_tools,
)
from .html import render_page
from .influence import (
    PNG_QUERIES,
    TITLE,
    gather,
    lead,
    render_explanation,
    render_findings,
    render_rows,
    write_png,
)
from .standing import describe_standing
from .tables import times_table, values_table

if TYPE_CHECKING:
    from ..data.samples import Samples
    from ..evaluation.counterfactual.results import Counterfactual
    from ..findings import Findings


@dataclass(frozen=True, eq=False)
class Explained:
    """A set of queries with scores, and everything a page says about it.

    Attributes:
        train: N training images.
        queries: M queries, or more.
        scores: ``[M, N]``, positive for proponents.
        top_k: proponents shown per query.
        query_kind: what one query is, in words.
        settings: what decided the numbers, as name and value.
        facts: other figures, as name and text.
        stages: name and wall time in seconds of each step.
        environment: versions, as name and text.
        findings: how noisy the scores are and what stands out, as far as it was asked for.
    """

    train: Samples
    queries: Samples
    scores: Tensor
    top_k: int
    query_kind: str
    settings: Mapping[str, Any]
    facts: Mapping[str, str]
    stages: Sequence[tuple[str, float]]
    environment: Mapping[str, str]
    findings: Findings | None = None


# rows that are there for readers without scripts, and bytes of a page besides its parts: style
# sheet, script, those rows, tables
_STATIC, _REST = 16, 140_000


class Part(NamedTuple):
    """A part of a page: its id, its heading and what it says; scripted ones need a script."""

    id: str
    heading: str
    content: str
    is_scripted: bool = False


def write_report(
    path_html: str | os.PathLike[str],
    path_png: str | os.PathLike[str],
    explained: Explained,
    *,
    megabytes: float = MEGABYTES,
) -> None:
    """Write the attribution of M queries as one self-contained HTML page and one PNG picture.

    The page holds its images and needs no network; the same input gives the same bytes. The
    picture shows the first 16 queries.

    Args:
        path_html: the page.
        path_png: the picture.
        explained: what it is about.
        megabytes: of the page, at most, in millions of bytes.
    """
    again = f"report(…, megabytes={2 * megabytes:g}) makes a larger page, to_csv(…) has all scores."
    budget = int(megabytes * 1e6)
    parts, tables, explorer = _render_explained(explained, len(explained.scores), budget, again)
    expand_path(path_html).write_bytes(encode_text(_assemble("", parts, tables, explorer)))
    write_picture(Path(path_png), explained)


def _assemble(lead: str, parts: Sequence[Part], tables: str, explorer: Explorer | None) -> str:
    """A whole page."""
    settings = f'<div class="tables">\n{tables}</div>'
    parts = [*parts, Part("settings", "Settings and costs", settings)]
    links = "".join(
        f'<a href="#{part.id}"{_hidden(part)}>{html.escape(part.heading)}</a>' for part in parts
    )
    body = "\n".join(
        f'<section class="part" id="{part.id}"{_hidden(part)}>\n<h2>{html.escape(part.heading)}'
        f"</h2>\n{part.content}\n</section>"
        for part in parts
    )
    said = f'<p class="lead">{html.escape(lead)}</p>\n' if lead else ""
    header = f"{said}<nav>{links}</nav>"
    if explorer is None:
        return render_page(TITLE, header, body)
    return render_page(TITLE, header, body, style=explorer.style, data=explorer.data)


def _hidden(part: Part) -> str:
    return " data-scripted hidden" if part.is_scripted else ""


def _render_tables(explained: Explained) -> str:
    tables = [
        values_table("Settings", list(explained.settings.items())),
        values_table("This run", list(explained.facts.items())),
        times_table("Time per stage", explained.stages),
        values_table("Environment", list(explained.environment.items())),
    ]
    return "".join(table.html() for table in tables)


def gather_report(
    folder: str | Path,
    *,
    queries: str | None = None,
    lds: str | Path | None = None,
    counterfactual: str | Path | None = None,
    source: str | None = None,
    num_queries: int = NUM_QUERIES,
    megabytes: float = MEGABYTES,
    console: Console | None = None,
    explained: Explained | None = None,
) -> str:
    """Everything a run and its evaluations left, as one self-contained HTML page.

    Args:
        folder: a finished run of `dtrak.attribute` or a run of `dtrak.lds`, whose pictures, LDS and
            counterfactual retraining are shown as far as they are there.
        queries: which of the run's sets of queries, as `record.find_queries`.
        lds: run folder of `dtrak.lds` to show; None looks in ``folder``, beside it for
            ``lds-<name>``, and in the package for results on the same images.
        counterfactual: folder of `dtrak.counterfactual` to show; None looks in ``folder`` and in
            the run of `dtrak.lds`.
        source: where the training images lie now; None takes where the run found them.
        num_queries: queries that are shown, the first.
        megabytes: of the page, at most, in millions of bytes; what that leaves out is said in it.
        console: where progress goes; None keeps quiet.
        explained: what the run has just found out; None reads what it left.

    Returns:
        HTML.

    Raises:
        FileNotFoundError: a folder, or what a run was about, is not there.
        ValueError: there is nothing to show, or something is damaged; one clear line.
    """
    folder = expand_path(folder)
    check_report(folder, num_queries, megabytes)
    # read first: what follows takes minutes where the intervals of an LDS are still to be made
    changed = _find_counterfactual(folder, lds, counterfactual)
    if explained is None and (list_queries(folder) or (folder / RUN_FILE).is_file()):
        explained = _read_explained(folder, queries, source)
    data = None if explained is None else explained.train.fingerprint
    table = _find_lds(folder, None if lds is None else Path(lds), data, console)
    evaluated: list[Part] = []
    tables, explorer = "", None
    if table is not None:
        from .lds_section import render_section

        evaluated.append(Part("lds", "Do scores predict retraining? (LDS)", render_section(table)))
    if changed is not None:
        from .counterfactual import render_section as render_counterfactual

        body = render_counterfactual(changed, min(num_queries, _STATIC))
        evaluated.append(Part("counterfactual", "Do pictures change without them?", body))
        tables += values_table("Counterfactual retraining", list(changed.settings.items())).html()
    if table is not None:
        about = [(name, value) for name, value in table["about"].items() if _is_plain(value)]
        tables += values_table("LDS", about).html()
    parts: list[Part] = []
    if explained is not None:
        again = (
            f"python -m dtrak.report {folder} --num-queries {len(explained.scores)} --megabytes "
            f"{2 * megabytes:g} makes a larger page; dtrak.Attribution.open({str(folder)!r})"
            ".to_csv('scores.csv') writes all scores."
        )
        taken = sum(len(encode_text(part.content)) for part in evaluated)
        budget = int(megabytes * 1e6) - taken
        parts, own, explorer = _render_explained(explained, num_queries, budget, again)
        tables = own + tables
    parts += evaluated
    if not parts:
        raise ResultsError(
            f"{folder} must hold a finished run of dtrak.attribute, or results of dtrak.lds or "
            "dtrak.counterfactual, got none"
        )
    return _assemble(str(folder), parts, tables, explorer)


def write_run_figures(
    target: Path,
    folder: Path,
    *,
    queries: str | None = None,
    lds: str | Path | None = None,
    counterfactual: str | Path | None = None,
    source: str | None = None,
    num_queries: int,
    console: Console | None = None,
) -> list[Path]:
    """What `gather_report` shows as figures for a paper, in ``target``; returns the files.

    Arguments and errors are those of `gather_report`; ``num_queries`` are the rows of strips.
    """
    from .figures import write_figures

    changed = _find_counterfactual(folder, lds, counterfactual)
    explained = None
    if list_queries(folder) or (folder / RUN_FILE).is_file():
        explained = _read_explained(folder, queries, source)
    data = None if explained is None else explained.train.fingerprint
    table = _find_lds(folder, None if lds is None else Path(lds), data, console)
    rows = []
    if explained is not None:
        scores = explained.scores[:num_queries]
        rows = gather(explained.train, explained.queries, scores, explained.top_k)
    kind = "" if explained is None else explained.query_kind
    files = write_figures(target, rows, kind, table, changed)
    if not files:
        raise ResultsError(f"{folder} must hold something to draw, got none")
    return files


def write_picture(file: Path, explained: Explained) -> None:
    """The first queries beside their training images, as one PNG."""
    shown = explained.scores[:PNG_QUERIES]
    rows = gather(explained.train, explained.queries, shown, explained.top_k)
    write_png(file, rows, explained.query_kind, len(explained.scores))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _read_explained(folder: Path, queries: str | None, source: str | None) -> Explained:
    """What a run of `dtrak.attribute` left of a set of queries."""
    from ..runs.inputs import drawing_facts
    from ..runs.results import load_attribution

    run = load_attribution(folder, queries)
    inputs, manifest = run.load_inputs(source), run.manifest
    return Explained(
        inputs.train,
        inputs.queries,
        run.scores,
        run.options.top_k,
        run.query_kind,
        manifest["settings"],
        manifest["facts"] | drawing_facts(inputs.run, inputs.model, inputs.queries),
        [(stage["name"], stage["seconds"]) for stage in manifest["stages"]],
        manifest["environment"],
        run.findings,
    )


def _render_explained(
    explained: Explained, num_queries: int, budget: int, again: str
) -> tuple[list[Part], str, Explorer]:
    """What there is to say of a set of queries, in so many bytes; ``again`` gets what is left out.

    Returns:
        Parts of a page, tables of settings, and what is explored.
    """
    kind, scores = explained.query_kind, explained.scores[:num_queries]
    rows = gather(
        explained.train,
        explained.queries,
        scores[:_STATIC],
        explained.top_k,
        findings=explained.findings,
    )
    needed = {match.index for row in rows for kind in row.matches.values() for match in kind}
    explorer = make_explorer(explained, scores.float(), needed, budget - _REST)
    said = [f"<p>{html.escape(lead(kind))}</p>"]
    if WARNING in explained.facts:
        said.append(f'<p class="warning">{html.escape(explained.facts[WARNING])}</p>')
    said.append(render_explanation(explorer.exponent))
    if explained.findings is not None:
        said.append(render_findings(explained.findings))
    standing = describe_standing(explained.settings)
    if standing is not None:
        said.append(f'<p class="standing">{html.escape(standing)}</p>')
    if explorer.left_out:
        left_out = " ".join([*explorer.left_out, again])
        said.append(f'<p class="soft left-out">{html.escape(left_out)}</p>')
    said.append(render_tools())
    if len(rows) < len(scores):
        said.append(
            f"<noscript><p>The first {len(rows)} of {len(scores)} are here; scripts show the "
            "others.</p></noscript>"
        )
    shown = render_rows(rows, kind, explorer.exponent, explorer.places)
    said.append(f'<div id="rows">\n{shown}\n</div>')
    parts = [
        Part("pictures", "Pictures and their training images", "\n".join(said)),
        Part("training", "Training images and the pictures they serve", TILES, is_scripted=True),
    ]
    groups = None if explained.findings is None else explained.findings.groups
    for name, heading, table in (
        ("groups", "Groups of training images", None if groups is None else group_table(groups)),
        ("classes", "Classes of training images", class_table(explained.train, scores)),
    ):
        if table is not None:
            parts.append(Part(name, heading, table.html()))
    return parts, _render_tables(explained), explorer


def _find_lds(
    folder: Path, given: Path | None, data: str | None, console: Console | None
) -> dict[str, Any] | None:
    """The table of a run of `dtrak.lds` on the same images; None where there is none."""
    from ..evaluation.lds.table import load_results, make_table, packaged_table
    from .lds_report import read_table

    place = given or next(
        (
            path
            for path in (folder, folder.with_name(f"lds-{folder.resolve().name}"))
            if (path / "results.npz").is_file()
        ),
        None,
    )
    if place is None:
        return _packaged_table(packaged_table, data)
    if not (place / "results.npz").is_file():
        raise FileNotFoundError(
            f"--lds must be a run that dtrak.lds has evaluated, got no {place / 'results.npz'}"
        )
    results = load_results(place / "results.npz")
    if data is not None and results.about["data"] != data:
        if given is None:
            return None
        raise ValueError(f"--lds must be a run on the images of {folder}, got one on others")
    kept = read_table(place / "report" / "table.json", results)
    if kept is not None:
        return kept
    with progress_bar(console or Console(quiet=True), "intervals of the LDS") as progress:
        return make_table(results, progress=progress)


def _packaged_table(find: Any, data: str | None) -> dict[str, Any] | None:
    """The table that comes with the package for these images."""
    from ..training.presets import PRESETS

    for preset in PRESETS:
        table: dict[str, Any] | None = find(preset)
        if table is not None and table["about"]["data"] == data:
            return table
    return None


def _find_counterfactual(
    folder: Path, lds: str | Path | None, given: str | Path | None
) -> Counterfactual | None:
    from ..evaluation.counterfactual.results import load_counterfactual

    if given is not None:
        return load_counterfactual(given)
    places = [folder, folder / "counterfactual"]
    if lds is not None:
        places.append(Path(lds) / "counterfactual")
    found = next((place for place in places if (place / "results.safetensors").is_file()), None)
    return None if found is None else load_counterfactual(found)
