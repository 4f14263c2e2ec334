"""The page that gathers what a run and its evaluations left, and the report of a run alone."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from ..runs.console import progress_bar
from ..runs.files import encode_text, expand_path
from ..runs.record import RUN_FILE, ResultsError, check_report, list_queries
from .html import render_page
from .influence import (
    PNG_QUERIES,
    TITLE,
    Row,
    gather,
    lead,
    render_explanation,
    render_rows,
    write_png,
)
from .tables import times_table, values_table

if TYPE_CHECKING:
    from ..data.samples import Samples
    from ..evaluation.counterfactual.results import Counterfactual
    from ..findings import Findings


def write_report(
    path_html: str | os.PathLike[str],
    path_png: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    stages: Sequence[tuple[str, float]] = (),
    facts: Mapping[str, str] | None = None,
    query_kind: str = "generated picture",
) -> None:
    """Write the attribution of M queries as one self-contained HTML page and one PNG picture.

    The page holds its images and needs no network and no script; the same input gives the same
    bytes. The picture shows the first 16 queries.

    Args:
        path_html: the page.
        path_png: the picture.
        rows: of `influence.gather`.
        settings: what decided the numbers, as name and value.
        stages: name and wall time in seconds of each step of the run, in order.
        facts: other figures of the run, as name and text.
        query_kind: what one query is, in words.
    """
    header = f'<p class="lead">{html.escape(lead(query_kind))}</p>\n{render_explanation(rows)}'
    tables = _render_tables(settings, facts or {}, stages)
    body = f'{render_rows(rows, query_kind)}\n<div class="tables">\n{tables}</div>'
    page = render_page(TITLE, header, body)
    expand_path(path_html).write_bytes(encode_text(page))
    write_png(Path(path_png), rows, query_kind)


def _render_tables(
    settings: Mapping[str, Any], facts: Mapping[str, str], stages: Sequence[tuple[str, float]]
) -> str:
    tables = [
        values_table("Settings", list(settings.items())),
        values_table("This run", list(facts.items())),
        times_table("Time per stage", stages),
    ]
    return "".join(table.html() for table in tables)


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


def gather_report(
    folder: str | Path,
    *,
    queries: str | None = None,
    lds: str | Path | None = None,
    counterfactual: str | Path | None = None,
    source: str | None = None,
    num_queries: int = 16,
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
        num_queries: queries whose pictures are shown, the first.
        console: where progress goes; None keeps quiet.
        explained: what the run has just found out; None reads what it left.

    Returns:
        HTML.

    Raises:
        FileNotFoundError: a folder, or what a run was about, is not there.
        ValueError: there is nothing to show, or something is damaged; one clear line.
    """
    folder = expand_path(folder)
    check_report(folder, num_queries)
    # read first: what follows takes minutes where the intervals of an LDS are still to be made
    changed = _find_counterfactual(folder, lds, counterfactual)
    parts: list[tuple[str, str, str]] = []
    tables, data = "", None
    if explained is None and (list_queries(folder) or (folder / RUN_FILE).is_file()):
        explained = _read_explained(folder, queries, source)
    if explained is not None:
        data = explained.train.fingerprint
        shown, tables = _influence_part(explained, num_queries)
        parts.append(("pictures", "Pictures and their training images", shown))
    table = _find_lds(folder, None if lds is None else Path(lds), data, console)
    if table is not None:
        from .lds_section import render_section

        parts.append(("lds", "Do scores predict retraining? (LDS)", render_section(table)))
    if changed is not None:
        from .counterfactual import render_section as render_counterfactual

        body = render_counterfactual(changed, num_queries)
        parts.append(("counterfactual", "Do pictures change without them?", body))
        tables += values_table("Counterfactual retraining", list(changed.settings.items())).html()
    if table is not None:
        about = [(name, value) for name, value in table["about"].items() if _is_plain(value)]
        tables += values_table("LDS", about).html()
    if not parts:
        raise ResultsError(
            f"{folder} must hold a finished run of dtrak.attribute, or results of dtrak.lds or "
            "dtrak.counterfactual, got none"
        )
    parts.append(("settings", "Settings", f'<div class="tables">\n{tables}</div>'))
    links = "".join(f'<a href="#{name}">{html.escape(heading)}</a>' for name, heading, _ in parts)
    body = "\n".join(
        f'<section class="part" id="{name}">\n<h2>{html.escape(heading)}</h2>\n{content}\n'
        "</section>"
        for name, heading, content in parts
    )
    header = f'<p class="lead">{html.escape(str(folder))}</p>\n<nav>{links}</nav>'
    return render_page(TITLE, header, body)


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


def _influence_part(explained: Explained, num_queries: int) -> tuple[str, str]:
    """The strips of a set of queries, and its tables of settings."""
    scores = explained.scores[:num_queries]
    rows = gather(explained.train, explained.queries, scores, explained.top_k)
    more = (
        f'<p class="soft">The first {len(rows)} of {len(explained.scores)}.</p>'
        if len(rows) < len(explained.scores)
        else ""
    )
    tables = _render_tables(explained.settings, explained.facts, explained.stages)
    tables += values_table("Environment", list(explained.environment.items())).html()
    kind = explained.query_kind
    return (
        f"<p>{html.escape(lead(kind))}</p>\n{render_explanation(rows)}\n"
        f"{render_rows(rows, kind)}\n{more}",
        tables,
    )


def _find_lds(
    folder: Path, given: Path | None, data: str | None, console: Console | None
) -> dict[str, Any] | None:
    """The table of a run of `dtrak.lds` on the same images; None where there is none."""
    from ..evaluation.lds.table import load_results, make_table, packaged_results
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
        return _packaged_table(packaged_results, data)
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
        packaged = find(preset)
        if packaged is not None and packaged[0].about["data"] == data:
            table: dict[str, Any] = packaged[1]
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
