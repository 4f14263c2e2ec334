"""Rewrite the README's table from the newest rows: nobody types a number.

``python benchmarks/report.py`` rewrites it, ``--check`` only says whether it is up to date.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def newest(case: str) -> dict:
    """The last row of a case."""
    lines = (ROOT / "benchmarks" / "results" / f"{case}.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def table() -> str:
    """The README's table, markers included."""
    row = newest("attribute")
    published = row["published_gradient_seconds"] + row["published_projection_seconds"]
    ratio = row["published_peak_bytes"] / row["fused_peak_bytes"]
    return "\n".join(
        [
            BEGIN,
            f"| features of {row['samples']} digits, S = {row['timesteps']}, "
            f"P = {row['grad_dim']:,}, K = {row['proj_dim']:,} | fused | published way | ratio |",
            "|---|---|---|---|",
            f"| time | {row['fused_seconds']:.2f} s | {published:.2f} s "
            f"(gradients {row['published_gradient_seconds']:.2f}, "
            f"projection {row['published_projection_seconds']:.2f}) "
            f"| {row['speedup']:.1f}x |",
            f"| tensors alive at the peak | {row['fused_peak_bytes'] / 1e6:.0f} MB "
            f"| {row['published_peak_bytes'] / 1e6:.0f} MB | {ratio:.1f}x |",
            "",
            f"Measured on {row['device']}, torch {row['torch']}, commit {row['commit']}, "
            f"{row['utc'][:10]}; fused in batches of {row['fused_batch_size']}, published in one "
            f"of {row['published_batch_size']}; the same gradients to "
            f"{row['gradient_error']:.0e}. Not yet run on a GPU.",
            END,
        ]
    )


def rewritten(readme: str) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(BEGIN)
    return before + table() + rest.split(END)[1]


def main() -> None:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    file = ROOT / "README.md"
    old = file.read_text()
    new = rewritten(old)
    if check and new != old:
        sys.exit("README.md's table does not match benchmarks/results: run benchmarks/report.py")
    if new != old:
        file.write_text(new)


if __name__ == "__main__":
    main()
