"""One command for a machine with a GPU: ``make gpu``.

Every piece of evidence is a process of its own with a time limit, its output in a file of its own
under OUT; whatever one of them does (fail, hang, lose the device), the others run, and what it had
written stays. What only checks runs side by side, where there are cores for it; what is timed runs
alone. All limits together stay below the budget, so nothing is cut because something else was slow
(with eight cores or more; with fewer the last pieces may be), and a page that says how they went is
printed last and kept as OUT/table.txt. The most telling come first: what was only emulated agrees,
in bfloat16 before all else; the price of a backward; dense projections beside TRAK's; the stages of
the CIFAR-2 experiment.

    python benchmarks/gpu.py --out out                 all of it, at most 12 minutes
    python benchmarks/gpu.py --out out --only stages   one piece; see --list

Needs torch, triton and pytest. What else is installed is used: diffusers with what dtrak needs,
peft, traker, pytest-benchmark, compute-sanitizer; without diffusers the layers of the CIFAR U-Net
stand in for it. No network, and nothing outside the repository. Without a GPU it is a rehearsal:
the interpreter, tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from pages import read_rows

ROOT = Path(__file__).parents[1]
XML = "--junitxml="
HERE = Path(__file__).parent
# seconds for everything, of which some are kept to end processes and to write the page
MOST = 12 * 60.0
BUDGET = 700.0
RESERVE = 10.0
# a piece that is late gets these, so many seconds after its limit; then it is left to itself: a
# process that waits for its driver cannot be ended
SIGNALS = ((0.0, signal.SIGINT), (4.0, signal.SIGTERM), (5.0, signal.SIGKILL))
PATIENCE = 8.0
KERNELS = ("rademacher", "normal", "sketch", "gram_product")
# what the page shows of the suites; the report shows all
OURS = ("features: sjlt", "features: kronecker", "philox", "fused", "dual")
# seconds a suite may take here: what is not reached is make bench's
SUITE_LIMITS = {"suite sketcher": 90.0, "suite projection": 70.0}
# which are timed before the stages
FIRST = tuple(SUITE_LIMITS)
# tests that run the kernels on whatever device there is; those marked gpu are run by themselves
KERNEL_TESTS = ("projection", "streams", "sketch_kernel", "gram", "sketcher")

PROBE = """
import json, sys, torch, triton
cuda = torch.cuda.is_available()
facts = {"cuda": cuda, "torch": torch.__version__, "triton": triton.__version__, "device": "cpu"}
if cuda:
    p = torch.cuda.get_device_properties(0)
    facts |= {"device": p.name, "multiprocessors": p.multi_processor_count}
    facts |= {"bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
    facts |= {"runtime": torch.version.cuda or torch.version.hip}
open(sys.argv[1], "w").write(json.dumps(facts))
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
        is_timing: whether its times count: nothing runs beside it.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    absent: str = ""
    wrapper: tuple[str, ...] = ()
    is_timing: bool = False


@dataclass
class Outcome:
    """How a piece went.

    Attributes:
        name: of the piece.
        status: ``"passed"``, ``"failed"``, ``"timed out"``, ``"skipped"`` or ``"interrupted"``;
            ``"cut short"`` if all passed of what there was time for.
        note: a few words.
        seconds: it took.
    """

    name: str
    status: str
    note: str = ""
    seconds: float = 0.0


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


def files_with_gpu_tests() -> dict[str, list[str]]:
    """Those of the kernels, and those of dtrak, which need all it needs.

    Only these are collected: it takes half a minute to import all others.
    """
    found: dict[str, list[str]] = {"gpu tests": [], "gpu tests of dtrak": []}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        text = file.read_text()
        if "mark.gpu" in text:
            needs_all = re.search(r"^(from|import) dtrak[. ]", text, re.MULTILINE)
            found["gpu tests of dtrak" if needs_all else "gpu tests"].append(str(file))
    return found


def suites() -> list[Path]:
    """The suites, the most telling first."""
    order = ("sketcher", "projection", "ridge", "attribute", "layers", "growth")
    names = [f"test_{name}.py" for name in order]
    return sorted(
        HERE.glob("test_*.py"), key=lambda f: names.index(f.name) if f.name in names else 99
    )


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
        Piece(f"agreement {kernel}", (agreement, "--kernel", kernel, *folder), 60)
        for kernel in KERNELS
    ]
    if not cuda:
        pieces = [Piece("agreement", (agreement, *folder, *smoke), 180)]
    pytest = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    absent = "" if has("pytest") else "pytest is not installed"
    files = (str(ROOT / "tests" / f"test_{name}.py") for name in KERNEL_TESTS)
    pieces.append(
        Piece(
            "kernel tests",
            (*pytest, *files, "--full", "-m", "not gpu", f"--junitxml={out / 'kernel_tests.xml'}"),
            100,
            absent or ("" if cuda else "without a GPU, make test runs them"),
        )
    )
    for name, chosen in files_with_gpu_tests().items():
        xml = f"--junitxml={out / name.replace(' ', '_')}.xml"
        missing = "diffusers is not installed" if "dtrak" in name and not has("diffusers") else ""
        command = (*pytest, *chosen, "--full", "-m", "gpu", xml)
        pieces.append(Piece(name, command, 60, absent or missing))
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
    limit = 90 if cuda else 180
    timings = [Piece("stages", (stages, *folder, *smoke), limit, is_timing=True)]
    # a model needs no time that other pieces want, its measured times little
    timings.append(Piece("modelled", (modelled, *folder, *smoke), 40, is_timing=True))
    record = ("--record", f"--rows={out / 'rows'}", "--seconds=0.2") if cuda else ("--smoke",)
    # without pytest-benchmark conftest.py stands in for it
    only = ("--benchmark-only",) if has("pytest_benchmark") else ()
    for file in suites() if cuda else [HERE]:
        name = file.stem.replace("test_", "suite ") if cuda else "suites"
        xml = f"--junitxml={out / name.replace(' ', '_')}.xml"
        command = (*pytest, str(file), *only, *record, xml)
        limit = SUITE_LIMITS.get(name, 35) if cuda else 240
        timings.append(Piece(name, command, limit, absent, is_timing=True))
    pieces += sorted(timings, key=lambda piece: piece.name not in FIRST)
    # a taste of it: all of it is one command of its own, make tune
    found = ("--out", str(out / "configs"), "--journal", str(out / "tune.jsonl"))
    length = ("--operation", "sketch", "--seconds", "4", "--minutes", "0.7")
    pieces.append(
        Piece("tune", (tune, *found, *length, *smoke), 50 if cuda else 120, is_timing=True)
    )
    return pieces


def width_of(is_timing: bool, cores: int) -> int:
    """How many pieces run at a time on that many cores."""
    return 1 if is_timing else max(1, min(6, cores // 2))


def longest(pieces: list[Piece], cores: int) -> float:
    """Seconds until the last piece has begun and ended if each takes all of its limit."""
    clock = 0.0
    for is_timing, group in groupby(pieces, key=lambda piece: piece.is_timing):
        free = [clock] * width_of(is_timing, cores)
        for piece in group:
            free.sort()
            free[0] += 0.0 if piece.absent else piece.limit
        clock = max(free)
    return clock


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


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@dataclass
class Running:
    """A piece whose process was started.

    Attributes:
        piece: of which it is.
        process: its own, and the first of its group.
        log: where its output goes.
        limit: seconds it may take.
        begin: when it was started.
        sent: signals it got for being late.
    """

    piece: Piece
    process: subprocess.Popen[bytes]
    log: Path
    limit: float
    begin: float = field(default_factory=time.monotonic)
    sent: int = 0

    def poll(self) -> Outcome | None:
        """How it went, once that is known; never waits."""
        code, seconds = self.process.poll(), time.monotonic() - self.begin
        late = seconds - self.limit
        note = f"stopped after {self.limit:.0f} s"
        if code is not None:
            if not self.sent:
                return Outcome(self.piece.name, *describe(self.piece, code, self.log), seconds)
            # children that outlive it are made to end, too
            send(self.process, signal.SIGKILL)
            counts = count_tests(self.piece)
            if counts is None:
                return Outcome(self.piece.name, "timed out", note, seconds)
            is_good = counts["passed"] and not (counts["failed"] or counts["errors"])
            status = "cut short" if is_good else "timed out"
            return Outcome(self.piece.name, status, f"{note}: {in_words(counts)}", seconds)
        for after, number in SIGNALS[self.sent :]:
            if late >= after:
                send(self.process, number)
                self.sent += 1
        if late < PATIENCE:
            return None
        return Outcome(self.piece.name, "timed out", f"{note}, and does not end", seconds)


def start(piece: Piece, out: Path, limit: float, variables: dict[str, str]) -> Running | Outcome:
    """Start a piece; an outcome at once if that cannot be done."""
    if piece.absent:
        return Outcome(piece.name, "skipped", piece.absent)
    if limit < 1:
        return Outcome(piece.name, "skipped", "no time was left")
    log = out / f"{piece.name.replace(' ', '_')}.log"
    # what another run counted is not this one's
    for argument in piece.arguments:
        if argument.startswith(XML):
            Path(argument.removeprefix(XML)).unlink(missing_ok=True)
    if piece.wrapper:
        # or the allocator's pool hides what is out of bounds
        variables = variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        with log.open("wb") as file:
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
        return Outcome(piece.name, "failed", str(error))
    return Running(piece, process, log, limit)


def run_pieces(
    pieces: list[Piece],
    out: Path,
    deadline: float,
    variables: dict[str, str],
    *,
    width: int = 1,
    tell: Callable[[Outcome], Any] = lambda outcome: None,
) -> bool:
    """Run pieces in their order, some of them side by side; whatever happens is an outcome.

    Args:
        pieces: to run.
        out: folder of the logs.
        deadline: no piece is given time beyond it, on the monotonic clock.
        variables: of the environment.
        width: how many run at a time.
        tell: is given every outcome, once it is known.

    Returns:
        Whether Ctrl-C ended it.
    """
    waiting, running = list(pieces), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < width:
                piece = waiting.pop(0)
                limit = min(piece.limit, deadline - time.monotonic())
                begun = start(piece, out, limit, variables)
                if isinstance(begun, Outcome):
                    tell(begun)
                else:
                    running.append(begun)
            for one in list(running):
                outcome = one.poll()
                if outcome is not None:
                    running.remove(one)
                    tell(outcome)
            time.sleep(0.05)
    except KeyboardInterrupt:
        for number, seconds in ((signal.SIGINT, 3.0), (signal.SIGKILL, 2.0)):
            for one in running:
                send(one.process, number)
            until = time.monotonic() + seconds
            while time.monotonic() < until and any(one.process.poll() is None for one in running):
                time.sleep(0.1)
        for one in running:
            tell(Outcome(one.piece.name, "interrupted", "", time.monotonic() - one.begin))
        return True
    return False


def describe(piece: Piece, code: int, log: Path) -> tuple[str, str]:
    """Status and a few words about a piece that ended by itself."""
    counts = count_tests(piece)
    if counts is not None:
        bad = counts["failed"] or counts["errors"]
        # 5: nothing was selected
        return ("failed" if bad or code not in (0, 5) else "passed"), in_words(counts)
    if code == 0:
        return "passed", ""
    lines = log.read_text(errors="replace").strip().splitlines()
    what = f"signal {-code}" if code < 0 else f"exit {code}"
    return "failed", f"{what}: {lines[-1].strip()[:90]}" if lines else what


def count_tests(piece: Piece) -> dict[str, int] | None:
    """Passed, failed, errors and skipped in the JUnit file of a piece; None if it wrote none."""
    xml = next((a.removeprefix(XML) for a in piece.arguments if a.startswith(XML)), "")
    try:
        suite = ElementTree.parse(xml).getroot().find("testsuite")
    # none was asked for, or a process that was ended left half of one
    except (OSError, ElementTree.ParseError):
        return None
    names = ("tests", "failures", "errors", "skipped")
    total, failed, errors, skipped = (
        0 if suite is None else int(suite.get(name, 0)) for name in names
    )
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed,
        "errors": errors,
        "skipped": skipped,
    }


def in_words(counts: dict[str, int]) -> str:
    """``3 passed, 1 skipped``."""
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "no tests"


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
    yield f"{'kernel':46} {'modelled':>12} {'measured':>12}   limited by (model)"
    for row in rows:
        measured = row.get("measured_seconds")
        text = "-" if measured is None else f"{1e3 * measured:.3f} ms"
        time_text = f"{1e3 * row['modelled_seconds']:.3f} ms"
        yield f"{row['case']:46.46} {time_text:>12} {text:>12}   {row['limit']}, {row['card']}"


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


def suite_lines(folder: Path, since: str) -> Iterator[str]:
    """Ours beside baselines, of this run only: a line per group and kind, layers as a median."""
    layers: dict[str, list[float]] = {}
    shown: set[tuple[str, str]] = set()
    for suite in (file.stem.removeprefix("test_") for file in suites()):
        for row in read_rows(folder / f"{suite}.jsonl"):
            kind = next((word for word in OURS if word in row.get("provider", "")), "")
            if not kind or not row.get("ratio") or row.get("run", since) < since:
                continue
            if suite == "layers":
                key = f"{row['model']}, {row['dtype']}\t{row['provider']}\t{row['baseline']}"
                layers.setdefault(key, []).append(row["ratio"])
            elif (row["group"], kind) not in shown:
                shown.add((row["group"], kind))
                name = f"{suite}: {row['group']}"
                ratio = f"{row['ratio']:8.3f}x {row['baseline']}"
                yield f"  {name:56.56} {row['provider']:28.28} {ratio}"
    for key, ratios in layers.items():
        model, provider, baseline = key.split("\t")
        name = f"layers: {model}, median of {len(ratios)}"
        yield f"  {name:56.56} {provider:28.28} {median(ratios):8.3f}x {baseline}"


def table(
    facts: dict[str, Any], outcomes: list[Outcome], out: Path, seconds: float, since: str = ""
) -> str:
    """The page; ``since`` is when the run began, as rows say it."""
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
    found = list(suite_lines(out / "rows", since))
    if found:
        lines += ["", "suites: time over the baseline's", *found[:28]]
    return "\n".join(lines) + "\n"


def probe(out: Path) -> dict[str, Any]:
    """What this machine is; a machine on which torch does not start is one without a GPU."""
    nothing = {"cuda": False, "device": "torch and triton do not start here"}
    answer = out / "probe.json"
    answer.unlink(missing_ok=True)
    piece = Piece("probe", ("-c", PROBE, str(answer)), 60)
    run_pieces([piece], out, time.monotonic() + 60, environment(out, True))
    try:
        return json.loads(answer.read_text())
    except (json.JSONDecodeError, OSError):
        return nothing


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
    begin, since = time.monotonic(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = probe(out)
    pieces = make_pieces(facts["cuda"], out)
    if options.only:
        known = {word for piece in pieces for word in (piece.name, piece.name.split()[0])}
        unknown = [name for name in options.only if name not in known]
        if unknown:
            parser.error(f"--only must be one of {', '.join(sorted(known))}, got {unknown[0]!r}")
        pieces = [p for p in pieces if {p.name, p.name.split()[0]} & set(options.only)]
    if options.list:
        sys.stdout.writelines(f"{p.name:24} {p.limit:4.0f} s  {p.absent}\n" for p in pieces)
        return 0
    # rows of another run would be taken for this one's
    for stale in ("agreement", "stages", "modelled", "tune"):
        (out / f"{stale}.jsonl").unlink(missing_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    budget = options.budget or BUDGET
    variables = environment(out, facts["cuda"])
    sys.stdout.write(f"{facts['device']}: {len(pieces)} pieces, at most {budget:.0f} s\n")
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        line = f"{outcome.name:24} {outcome.status:12} {outcome.seconds:6.1f} s  {outcome.note}\n"
        sys.stdout.write(line)
        sys.stdout.flush()

    interrupted = False
    cores = os.cpu_count() or 1
    for is_timing, group in groupby(pieces, key=lambda piece: piece.is_timing):
        width = width_of(is_timing, cores)
        # those that run side by side share the cores
        shared = {"OMP_NUM_THREADS": str(max(1, cores // width))} if width > 1 else {}
        interrupted = run_pieces(
            list(group), out, begin + budget - RESERVE, variables | shared, width=width, tell=tell
        )
        if interrupted:
            break
    seconds = time.monotonic() - begin
    summary = {"facts": facts, "seconds": seconds, "pieces": [asdict(o) for o in outcomes]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    page = table(facts, outcomes, out, seconds, since)
    (out / "table.txt").write_text(page)
    sys.stdout.write("\n" + page)
    if interrupted:
        return 130
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
