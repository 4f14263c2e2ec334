"""REPORT.md, its pictures and the README's table, made from the rows: nobody types a number.

``python benchmarks/report.py`` rewrites them, ``--check`` only says whether they are up to date.
``--rows FOLDER --output FOLDER`` makes the report of rows that lie elsewhere and leaves the README
alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import plots
from pages import markers, replace_table
from rows import RESULTS, ROOT, format_seconds, read

from dtrak.pages import tables
from dtrak.runs.measure import format_bytes

MARKER = "benchmark"
BEGIN, END = markers(MARKER)
NO_GPU = "not yet run on a GPU"
NO_ROWS = "no row yet"

Row = dict[str, Any]

SUITES = {
    "sketcher": (
        "The price of a backward",
        "Time over an ordinary training step: forward and backward of the same batch in the same "
        "precision. Providers that stop at gradients [B, P] have no projection in their time.",
    ),
    "layers": (
        "Layer by layer",
        "The same, one layer at a time: every distinct layer of the CIFAR and SD-1.x U-Nets on a "
        "GPU, a few of a thin U-Net on a CPU.",
    ),
    "projection": (
        "Projection of gradients that exist",
        "[B, P] to [B, K]. The stored matrix is made beforehand and needs the memory its row "
        "shows; all others make theirs in every call.",
    ),
    "attribute": (
        "Features of the main job",
        "Digits, end to end: the fused sketcher against vmap(grad) one timestep after the other "
        "and TRAK's own projector.",
    ),
    "ridge": (
        "The regularised inverse",
        "Scores from features. D-TRAK inverts a float32 K x K matrix once per damping, and makes "
        "its Gram once.",
    ),
    "growth": (
        "Growth",
        "Exponents are slopes of log time (or log peak memory) against log size, by least squares; "
        "in parentheses between the two largest sizes, where fixed costs count least.",
    ),
}


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def devices(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of the newest run on every device; rows of different devices never share a table."""
    newest: dict[str, list[Row]] = {}
    for row in rows:
        # rows from before there were providers
        if "provider" not in row:
            continue
        kept = newest.get(row["device"])
        if kept is None or kept[0]["run"] != row["run"]:
            kept = newest[row["device"]] = []
        kept.append(row)
    return newest


def of_type(rows: list[Row], device_type: str) -> dict[str, list[Row]]:
    """`devices`, of one type."""
    return {
        d: found for d, found in devices(rows).items() if found[0]["device_type"] == device_type
    }


def newest(rows: list[Row], device_type: str) -> list[Row]:
    """The newest run on any device of a type; nothing if there is none."""
    runs = of_type(rows, device_type).values()
    return max(runs, key=lambda found: found[0]["run"], default=[])


def pick(rows: list[Row], provider: str, group: str = "") -> Row | None:
    """The first row of a provider whose group contains a text."""
    for row in rows:
        if row["provider"].startswith(provider) and group in row["group"]:
            return row
    return None


def _ratio(top: Row | None, bottom: Row | None) -> float | None:
    return top["p50_seconds"] / bottom["p50_seconds"] if top and bottom else None


def price(rows: list[Row], model: str) -> str | None:
    """What features cost in training steps, by the cheapest kinds; of several sizes, of each."""
    found = {}
    for group in dict.fromkeys(row["group"] for row in rows if model in row["group"]):
        alike = [row for row in rows if row["group"] == group]
        ours = ((kind, pick(alike, f"features: {kind}")) for kind in ("sjlt", "kronecker"))
        parts = [f"{row['ratio']:.2f}x {kind}" for kind, row in ours if row and row["ratio"]]
        if parts:
            found[group] = ", ".join(parts)
    if len(found) > 1:
        return "; ".join(f"{text} ({group})" for group, text in found.items())
    return next(iter(found.values()), None)


def main_job(rows: list[Row]) -> Row | None:
    """Fused against published, as one set of figures."""
    fused, gradients = pick(rows, "fused"), pick(rows, "published: vmap")
    projection = pick(rows, "published: TRAK")
    if not (fused and gradients and projection):
        return None
    return {
        **{key: fused[key] for key in ("device", "torch", "commit")},
        "date": fused["run"][:10],
        "samples": fused["sizes"]["N"],
        "timesteps": fused["sizes"]["S"],
        "grad_dim": fused["sizes"]["P"],
        "proj_dim": fused["sizes"]["K"],
        "fused_seconds": fused["p50_seconds"],
        "gradient_seconds": gradients["p50_seconds"],
        "projection_seconds": projection["p50_seconds"],
        "fused_peak_bytes": fused["peak_bytes"],
        "published_peak_bytes": gradients["peak_bytes"],
        "fused_batch_size": fused["fused_batch_size"],
        "published_batch_size": fused["published_batch_size"],
        "error": fused["agreement"][0]["error"],
    }


def readme_table(folder: Path) -> str:
    """The README's table: the main job on a CPU, then on a GPU if one ran it."""
    rows = read(folder, "attribute")
    cpu, gpu = main_job(newest(rows, "cpu")), main_job(newest(rows, "cuda"))
    lines: list[str] = []
    for job in filter(None, (cpu, gpu)):
        published = job["gradient_seconds"] + job["projection_seconds"]
        head = (
            f"features of {job['samples']} digits, S = {job['timesteps']}, "
            f"P = {job['grad_dim']:,}, K = {job['proj_dim']:,}"
        )
        time = (
            f"{published:.2f} s (gradients {job['gradient_seconds']:.2f}, "
            f"projection {job['projection_seconds']:.2f})"
        )
        ratio = f"{published / job['fused_seconds']:.1f}x"
        peaks = [job[f"{way}_peak_bytes"] for way in ("fused", "published")]
        megabytes = [f"{peak / 1e6:.0f} MB" for peak in peaks]
        rows = [
            ("time", f"{job['fused_seconds']:.2f} s", time, ratio),
            ("tensors alive at the peak", *megabytes, f"{peaks[1] / peaks[0]:.1f}x"),
        ]
        lines += [*_table((head, "fused", "published way", "ratio"), rows), ""]
        note = (
            f"Measured on {job['device']}, torch {job['torch']}, commit {job['commit']}, "
            f"{job['date']}; fused in batches of {job['fused_batch_size']}, published in one "
            f"of {job['published_batch_size']}; the same gradients to {job['error']:.0e}."
        )
        if gpu is None:
            note += f" {_sentence(NO_GPU)}"
        lines.append(note)
    return "\n".join(lines)


def rewritten(readme: str, folder: Path = RESULTS) -> str:
    """The README with its table replaced."""
    return replace_table(readme, MARKER, readme_table(folder).splitlines())


def headlines(folder: Path) -> Iterator[tuple[str, str, str]]:
    """What a reader wants first: a claim, its figure on a CPU and on a GPU."""

    def cells(suite: str, figure: Any) -> tuple[str, str]:
        rows = read(folder, suite)
        found = []
        for device_type, missing in (("cpu", NO_ROWS), ("cuda", NO_GPU)):
            run = newest(rows, device_type)
            found.append((figure(run) if run else None) or (NO_ROWS if run else missing))
        return found[0], found[1]

    for label, model in (("digits U-Net", "digits"), ("CIFAR U-Net", "CIFAR"), ("LoRA", "LoRA")):
        row = cells("sketcher", lambda run, model=model: price(run, model))
        yield f"features over a training step, {label}", *row

    def speedup(run: list[Row]) -> str | None:
        job = main_job(run)
        if job is None:
            return None
        time = (job["gradient_seconds"] + job["projection_seconds"]) / job["fused_seconds"]
        memory = job["published_peak_bytes"] / job["fused_peak_bytes"]
        return f"{time:.1f}x faster, {memory:.1f}x less memory"

    yield "main job, fused against published", *cells("attribute", speedup)

    def projection(kind: str, run: list[Row]) -> str | None:
        # the largest case that a peer can do
        for ours in sorted(run, key=lambda row: -row["flops"]):
            if ours["provider"] == "philox" and ours["group"].startswith(f"{kind}, "):
                for provider in ("fast_jl CUDA", "trak"):
                    ratio = _ratio(pick(run, provider, ours["group"]), ours)
                    if ratio:
                        return f"{ratio:.2f}x the speed of {provider}"
        return None

    for kind in ("rademacher", "normal"):
        row = cells("projection", lambda run, kind=kind: projection(kind, run))
        yield f"dense projection, {kind}", *row

    def sweep(run: list[Row]) -> str | None:
        ours = pick(run, "dual, 27")
        inverse, gram = pick(run, "published: one float32"), pick(run, "published: float32 Gram")
        if not (ours and inverse and gram):
            return None
        published = gram["p50_seconds"] + ours["dampings"] * inverse["p50_seconds"]
        return f"{published / ours['p50_seconds']:.0f}x faster (inverses extrapolated from one)"

    yield "27 dampings, dual against float32 inverses", *cells("ridge", sweep)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """In Markdown, as text."""
    return tables.Table(columns, rows, words=columns).markdown()


def _agreement(row: Row) -> str:
    return "; ".join(f"{check['error']:.1e} ({check['with']})" for check in row["agreement"])


def suite_table(rows: list[Row]) -> Iterator[str]:
    """One table per group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for name, members in groups.items():
        sizes = ", ".join(f"{key} = {size:,}" for key, size in members[0]["sizes"].items())
        yield f"\n{name} ({sizes})\n"
        lines = []
        for row in members:
            low, middle, high = (format_seconds(row[f"{p}_seconds"]) for p in ("p20", "p50", "p80"))
            lines.append(
                (
                    row["provider"],
                    f"{middle} ({low} to {high})",
                    "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
                    format_bytes(row["peak_bytes"]),
                    f"{100 * row['roof_fraction']:.1f} %",
                    _agreement(row),
                )
            )
        heads = ("", "p50 (p20 to p80)", "ratio", "peak memory", "of the roof", "error")
        yield from _table(heads, lines)


def growth_table(rows: list[Row]) -> Iterator[str]:
    """Exponents, a line per curve."""
    lines = [
        (
            row["axis"],
            row["provider"],
            *(f"{row['x'][end]:,}" for end in (0, -1)),
            *(
                f"{row[f'{what}_exponent']:+.2f} ({row[f'{what}_exponent_end']:+.2f})"
                for what in ("time", "memory")
            ),
            ", ".join(f"{key} = {size:,}" for key, size in row["sizes"].items()),
        )
        for row in rows
    ]
    yield ""
    heads = ("against", "curve", "from", "to", "time", "peak memory", "held fixed")
    yield from _table(heads, lines)


def _environment(row: Row) -> str:
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    roofs = ""
    if "roof_bytes_per_second" in row:
        # as `protocol.measure_roofs` makes it
        is_tf32 = row["device_type"] == "cuda" and row["dtype"] == "float32"
        dtype = f"{row['dtype']} (TF32)" if is_tf32 else row["dtype"]
        roofs = (
            f"; roofs of this run: copy {row['roof_bytes_per_second'] / 1e9:,.0f} GB/s, "
            f"{dtype} product {row['roof_flops_per_second'] / 1e12:,.2f} TFLOP/s"
        )
    return (
        f"{row['device']}{driver}, torch {row['torch']}, triton {row['triton']}, commit "
        f"{row['commit']}, {row['run'][:10]}{roofs}."
    )


def pictures(folder: Path) -> Iterator[tuple[str, str, list[Row]]]:
    """Suite, file name and rows of every picture."""
    for suite in SUITES:
        for device, rows in devices(read(folder, suite)).items():
            yield suite, plots.file_name(suite, device), rows


def report(folder: Path) -> str:
    """REPORT.md."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `benchmarks/report.py` from the rows in `benchmarks/results`; do not edit. "
        "`make bench` times this machine and appends rows.",
        "",
        "Before anything is timed its result is compared, on the very inputs timed, with what the "
        "error column names; a provider that disagrees has no row. Providers take turns, round by "
        "round. Ratios are of medians within one run. Peak memory counts what lives beyond the "
        "inputs: tensors on a CPU, allocations on a GPU. “Of the roof” is the least time the work "
        "can take, at the rates of a large copy and a large matrix product measured in the same "
        "run, over the time it took.",
        "",
        "## At a glance",
        "",
        *_table(("", "CPU", "GPU"), list(headlines(folder))),
    ]
    for suite, (title, text) in SUITES.items():
        lines += ["", f"## {title}", "", text]
        rows = read(folder, suite)
        for device_type, name, missing in (("cpu", "CPU", NO_ROWS), ("cuda", "GPU", NO_GPU)):
            lines += ["", f"### {title}: {name}", ""]
            found = of_type(rows, device_type)
            if not found:
                lines.append(_sentence(missing))
            for device, members in found.items():
                table = growth_table if suite == "growth" else suite_table
                lines += [
                    _environment(members[0]),
                    *table(members),
                    "",
                    f"![{title} on {device}](plots/{plots.file_name(suite, device)})",
                ]
    return "\n".join(lines) + "\n"


def stale(folder: Path, output: Path, readme: Path | None) -> list[str]:
    """Files that are not what the rows give."""
    found = []
    file = output / "REPORT.md"
    if not file.is_file() or file.read_text(encoding="utf-8") != report(folder):
        found.append(str(file.name))
    for _, name, rows in pictures(folder):
        if not plots.is_current(output / "plots" / name, rows):
            found.append(f"plots/{name}")
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        if rewritten(text, folder) != text:
            found.append(readme.name)
    return found


def write(folder: Path, output: Path, readme: Path | None) -> None:
    """Rewrite what is stale; pictures no row asks for are removed."""
    outdated = stale(folder, output, readme)
    output.mkdir(parents=True, exist_ok=True)
    if "REPORT.md" in outdated:
        (output / "REPORT.md").write_text(report(folder), encoding="utf-8")
    wanted = set()
    for suite, name, rows in pictures(folder):
        wanted.add(name)
        if f"plots/{name}" in outdated:
            plots.save(suite, rows, output / "plots" / name)
    for file in (output / "plots").glob("*.svg"):
        if file.name not in wanted:
            file.unlink()
    if readme is not None and readme.name in outdated:
        text = readme.read_text(encoding="utf-8")
        readme.write_text(rewritten(text, folder), encoding="utf-8")


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--output", type=Path, help="folder of the report; by default benchmarks")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / "benchmarks"
    readme = ROOT / "README.md" if arguments.output is None else None
    if not arguments.rows.is_dir():
        sys.exit(f"--rows must be an existing folder, got {arguments.rows}")
    if not arguments.check:
        write(arguments.rows, output, readme)
        return
    outdated = stale(arguments.rows, output, readme)
    if outdated:
        sys.exit(f"{', '.join(outdated)}: not what the rows give; run benchmarks/report.py")


if __name__ == "__main__":
    main()
