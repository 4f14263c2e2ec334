"""One command for a machine with a GPU: ``make gpu``.

Every piece of evidence is a process of its own with a time limit, its output in a file of its own
under OUT; whatever one of them does (fail, hang, lose the device), the others run, and what it had
written stays. All pieces together stay below the budget, and a page that says how they went is
printed last and kept as OUT/table.txt.

    python benchmarks/gpu.py --out out                 all of it, under 8 minutes
    python benchmarks/gpu.py --out out --only stages   one piece; see --list

Needs torch, triton and pytest. diffusers, numpy, scipy, scikit-learn and pytest-benchmark (the
tests and the suites), and compute-sanitizer, are used where they are installed; no network, and
nothing outside the repository. Without a GPU it is a rehearsal: the interpreter, tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pages import read_rows

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
# seconds for everything, of which some are kept to end processes and to write the page
BUDGET_GPU, BUDGET_CPU = 460.0, 180.0
RESERVE = 5.0
KERNELS = ("rademacher", "normal", "sketch", "gram_product")
# tests that run the kernels on whatever device there is; those marked gpu are run by themselves
KERNEL_TESTS = ("projection", "streams", "sketch_kernel", "gram", "sketcher")

PROBE = """
import json, torch, triton
cuda = torch.cuda.is_available()
facts = {"cuda": cuda, "torch": torch.__version__, "triton": triton.__version__, "device": "cpu"}
if cuda:
    p = torch.cuda.get_device_properties(0)
    facts |= {"device": p.name, "multiprocessors": p.multi_processor_count}
    facts |= {"bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
    facts |= {"runtime": torch.version.cuda or torch.version.hip}
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Piece:
    """One process.

    Attributes:
        name: of the piece, its log and its line on the page.
        arguments: after the interpreter.
        limit: seconds it may take.
        absent: why it cannot run here; empty if it can.
        wrapper: what the interpreter runs under.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    absent: str = ""
    wrapper: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How a piece went.

    Attributes:
        name: of the piece.
        status: ``"passed"``, ``"failed"``, ``"timed out"``, ``"skipped"`` or ``"interrupted"``.
        seconds: it took.
        note: a few words.
    """

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


def has(module: str) -> bool:
    """Whether the interpreter that runs the pieces can find a module."""
    from importlib.util import find_spec

    return find_spec(module) is not None


def find_sanitizer() -> str | None:
    """compute-sanitizer, where CUDA toolkits put it."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return str(places[-1]) if places else None


def make_pieces(cuda: bool, out: Path) -> list[Piece]:
    """All pieces, the most telling first: what comes last is cut if time runs out.

    A rehearsal puts pieces together: starting a process is most of what it does.
    """
    folder = ("--out", str(out))
    smoke = () if cuda else ("--smoke",)
    agreement, stages, modelled, tune = (
        str(HERE / f"{name}.py") for name in ("agreement", "stages", "modelled", "tune")
    )
    pieces = [
        Piece(f"agreement {kernel}", (agreement, "--kernel", kernel, *folder), 40)
        for kernel in KERNELS
    ]
    if not cuda:
        pieces = [Piece("agreement", (agreement, *folder, *smoke), 60)]
    pieces.append(Piece("stages", (stages, *folder, *smoke), 100 if cuda else 50))
    pieces.append(Piece("modelled", (modelled, *folder, *smoke), 50))
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    absent = "" if has("pytest") else "pytest is not installed"
    marked = (str(ROOT / "tests"), "-m", "gpu", f"--junitxml={out / 'gpu_tests.xml'}")
    pieces.append(Piece("gpu tests", (*pytest, *marked), 90, absent))
    files = (str(ROOT / "tests" / f"test_{name}.py") for name in KERNEL_TESTS)
    pieces.append(
        Piece(
            "kernel tests",
            (*pytest, *files, "-m", "not gpu", f"--junitxml={out / 'kernel_tests.xml'}"),
            90,
            absent or ("" if cuda else "without a GPU, make test runs them"),
        )
    )
    sanitizer = find_sanitizer()
    missing = "" if sanitizer else "compute-sanitizer is not installed"
    pieces.append(
        Piece(
            "memcheck",
            (agreement, "--smoke", "--out", str(out / "memcheck")),
            60,
            missing if cuda else "it watches a GPU",
            (sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9"),
        )
    )
    for module, name in (("pytest_benchmark", "pytest-benchmark"), ("diffusers", "diffusers")):
        absent = absent or ("" if has(module) else f"{name} is not installed")
    record = ("--record", f"--rows={out / 'rows'}", "--seconds=0.2") if cuda else ("--smoke",)
    for file in sorted(HERE.glob("test_*.py")) if cuda else [HERE]:
        name = file.stem.replace("test_", "suite ") if cuda else "suites"
        xml = f"--junitxml={out / name.replace(' ', '_')}.xml"
        command = (*pytest, str(file), "--benchmark-only", *record, xml)
        pieces.append(Piece(name, command, 90, absent))
    # a taste of it: all of it is one command of its own, make tune
    found = ("--out", str(out / "configs"), "--journal", str(out / "tune.jsonl"))
    length = ("--operation", "sketch", "--seconds", "4", "--minutes", "1")
    pieces.append(Piece("tune", (tune, *found, *length, *smoke), 90))
    return pieces


def environment(out: Path, cuda: bool) -> dict[str, str]:
    """Of every piece: the repository's packages without installing them, and no network."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(HERE), str(ROOT / "tests")]
    before = os.environ.get("PYTHONPATH")
    # a rehearsal is too small for more threads, which would wait for one another
    threads = {} if cuda else {"OMP_NUM_THREADS": "1"}
    return (
        os.environ
        | threads
        | {
            "PYTHONPATH": os.pathsep.join([*paths, before] if before else paths),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str((out / "cache").resolve())),
        }
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process and its children to end; a moment later, make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=2)
            # children that outlive it are made to end, too
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_piece(piece: Piece, out: Path, limit: float, variables: dict[str, str]) -> Outcome:
    """Run a piece; whatever happens to it is an outcome."""
    if piece.absent:
        return Outcome(piece.name, "skipped", note=piece.absent)
    if limit < 1:
        return Outcome(piece.name, "skipped", note="no time was left")
    begin = time.monotonic()
    log = out / f"{piece.name.replace(' ', '_')}.log"
    if piece.wrapper:
        # or the allocator's pool hides what is out of bounds
        variables = variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                [*piece.wrapper, sys.executable, *piece.arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=variables,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(piece.name, "failed", note=str(error))
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            end(process)
            seconds = time.monotonic() - begin
            return Outcome(piece.name, "timed out", seconds, f"stopped after {limit:.0f} s")
        except KeyboardInterrupt:
            end(process)
            raise
    seconds = time.monotonic() - begin
    status, note = describe(piece, code, log)
    return Outcome(piece.name, status, seconds, note)


def describe(piece: Piece, code: int, log: Path) -> tuple[str, str]:
    """Status and a few words about a piece that ended by itself."""
    xml = next((a.split("=", 1)[1] for a in piece.arguments if a.startswith("--junitxml=")), "")
    if xml and Path(xml).is_file():
        counts = count_tests(Path(xml))
        note = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        bad = counts["failed"] or counts["errors"]
        # 5: nothing was selected
        return ("failed" if bad or code not in (0, 5) else "passed"), note or "no tests"
    if code == 0:
        return "passed", ""
    lines = log.read_text(errors="replace").strip().splitlines()
    what = f"signal {-code}" if code < 0 else f"exit {code}"
    return "failed", f"{what}: {lines[-1].strip()[:90]}" if lines else what


def count_tests(file: Path) -> dict[str, int]:
    """Passed, failed, errors and skipped of a JUnit file."""
    suite = ElementTree.parse(file).getroot().find("testsuite")
    if suite is None:
        return dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    total, failed, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed,
        "errors": errors,
        "skipped": skipped,
    }


def agreement_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line per kernel: its largest error in every dtype, as a part of what is allowed."""
    dtypes = ("float32", "float16", "bfloat16")
    yield f"{'kernel: error / allowed':24}" + "".join(f"{dtype:>28}" for dtype in dtypes)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for dtype in dtypes:
            of = [r for r in rows if (r["kernel"], r["dtype"]) == (kernel, dtype)]
            bad = [r for r in of if r["status"] == "failed"]
            done = [r for r in of if r["status"] == "passed"]
            if bad:
                cells.append(f"{len(bad)} of {len(of)} FAILED")
            elif done:
                worst = max(done, key=lambda r: r["error"] / r["allowed"])
                cells.append(f"{worst['error']:.1e} / {worst['allowed']:.1e} ({len(done)})")
            else:
                cells.append("skipped")
        yield f"{kernel:24}" + "".join(f"{cell:>28}" for cell in cells)


def stage_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line per stage, with its budget."""
    what = "tiny sizes: no measurement" if rows[0]["tiny"] else rows[0]["device"]
    yield f"stages, {rows[0]['model']} ({what})"
    for row in rows:
        if "seconds" not in row:
            yield f"  {row['stage']}: {row['note'][:80]}"
            continue
        note = f"{row['steps']:.2f} ordinary steps" if "steps" in row else ""
        if "target" in row and not row["tiny"]:
            verdict = "met" if row["seconds"] <= row["target"] else "MISSED"
            note = (
                f"target {row['target']:g} s {verdict}; published {row['published']} s (modelled)"
            )
        yield f"  {row['stage']:30} {row['seconds']:9.3f} s  {note}"


def modelled_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line per kernel: the model's time, and the measured one where there is a GPU."""
    yield f"{'kernel':34} {'modelled':>12} {'measured':>12}   limited by (model)"
    for row in rows:
        measured = row.get("measured_seconds")
        text = "-" if measured is None else f"{1e3 * measured:.3f} ms"
        time_text = f"{1e3 * row['modelled_seconds']:.3f} ms"
        yield f"{row['case']:34.34} {time_text:>12} {text:>12}   {row['limit']}, {row['card']}"


def tuned_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line per size: its default's time and the best one's; candidates that did not count."""
    yield f"{'tuned: candidates that ran, of all':72} {'default':>12} {'best':>12}"
    sizes = {json.dumps(row["sizes"], sort_keys=True): row["sizes"] for row in rows}
    for key, size in sizes.items():
        of = [row for row in rows if json.dumps(row["sizes"], sort_keys=True) == key]
        # a line is written before a candidate is tried, too
        of = list({json.dumps(row["config"], sort_keys=True): row for row in of}.values())
        seconds = [row["seconds"] for row in of if "seconds" in row]
        words = [v if isinstance(v, str) else f"{k} {v:,}" for k, v in size.items()]
        name = f"{of[0]['operation']} {', '.join(words)}: {len(seconds)} of {len(of)}"
        # the default comes first
        if "seconds" in of[0]:
            times = f"{1e3 * of[0]['seconds']:9.3f} ms {1e3 * min(seconds):9.3f} ms"
        else:
            times = of[0].get("reason", "it ended the process")[:40]
        yield f"  {name:70.70} {times}"


def suite_lines(folder: Path) -> Iterator[str]:
    """Our providers beside their baselines."""
    for file in sorted(folder.glob("*.jsonl")):
        for row in read_rows(file):
            ours = any(word in row.get("provider", "") for word in ("sjlt", "philox", "fused"))
            if ours and row.get("ratio"):
                name = f"{file.stem}: {row['group']}"
                ratio = f"{row['ratio']:8.3f}x {row['baseline']}"
                yield f"  {name:56.56} {row['provider']:18.18} {ratio}"


def table(facts: dict[str, Any], outcomes: list[Outcome], out: Path, seconds: float) -> str:
    """The page."""
    lines = [
        f"{facts['device']}, torch {facts.get('torch', '?')}, triton {facts.get('triton', '?')}: "
        f"{len(outcomes)} pieces in {seconds:.0f} s, results in {out}",
        "",
        *(f"{o.name:24} {o.status:12} {o.seconds:6.1f} s  {o.note}" for o in outcomes),
    ]
    sections = [
        (read_rows(out / "agreement.jsonl"), agreement_lines),
        (read_rows(out / "stages.jsonl"), stage_lines),
        (read_rows(out / "modelled.jsonl"), modelled_lines),
        (read_rows(out / "tune.jsonl"), tuned_lines),
    ]
    for rows, write in sections:
        if rows:
            lines += ["", *write(rows)]
    suites = list(suite_lines(out / "rows"))
    if suites:
        lines += ["", "suites: time over the baseline's", *suites[:20]]
    return "\n".join(lines) + "\n"


def probe(out: Path) -> dict[str, Any]:
    """What this machine is; a machine on which torch does not start is one without a GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(out, True),
        )
        return json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError, OSError):
        return {"cuda": False, "device": "torch and triton do not start here"}


def main() -> int:
    """Run the pieces and print the page; 1 if one failed, 130 after Ctrl-C."""
    # a process started in the background ignores Ctrl-C otherwise
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--only", action="append", help="a piece, or the first word of several")
    parser.add_argument("--list", action="store_true", help="only name the pieces")
    parser.add_argument("--budget", type=float, help="seconds for everything")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    facts = probe(out)
    pieces = make_pieces(facts["cuda"], out)
    if options.only:
        known = {word for piece in pieces for word in (piece.name, piece.name.split()[0])}
        unknown = [name for name in options.only if name not in known]
        if unknown:
            parser.error(f"--only must be one of {', '.join(sorted(known))}, got {unknown[0]!r}")
        pieces = [p for p in pieces if {p.name, p.name.split()[0]} & set(options.only)]
    if options.list:
        sys.stdout.writelines(f"{piece.name}\n" for piece in pieces)
        return 0
    # rows of another run would be taken for this one's
    for stale in ("agreement", "stages", "modelled", "tune"):
        (out / f"{stale}.jsonl").unlink(missing_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    budget = options.budget or (BUDGET_GPU if facts["cuda"] else BUDGET_CPU)
    variables = environment(out, facts["cuda"])
    sys.stdout.write(f"{facts['device']}: {len(pieces)} pieces, at most {budget:.0f} s\n")
    outcomes: list[Outcome] = []
    interrupted = False
    for piece in pieces:
        left = budget - RESERVE - (time.monotonic() - begin)
        sys.stdout.write(f"{piece.name:24} ")
        sys.stdout.flush()
        try:
            outcome = run_piece(piece, out, min(piece.limit, left), variables)
        except KeyboardInterrupt:
            outcome, interrupted = Outcome(piece.name, "interrupted"), True
        outcomes.append(outcome)
        sys.stdout.write(f"{outcome.status:12} {outcome.seconds:6.1f} s  {outcome.note}\n")
        if interrupted:
            break
    seconds = time.monotonic() - begin
    summary = {"facts": facts, "seconds": seconds, "pieces": [asdict(o) for o in outcomes]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    page = table(facts, outcomes, out, seconds)
    (out / "table.txt").write_text(page)
    sys.stdout.write("\n" + page)
    if interrupted:
        return 130
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
