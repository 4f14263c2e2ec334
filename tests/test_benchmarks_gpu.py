"""The driver of `make gpu`: whatever a piece does, the others run and the page is printed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace as replace_fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu  # noqa: E402

FACTS = {"cuda": False, "device": "cpu", "torch": "2", "triton": "3"}


def piece(name, code, limit=20.0, **options):
    return gpu.Piece(name, ("-c", code), limit, **options)


def run(one, out, limit=None):
    (outcome,) = run_all([replace_fields(one, limit=limit or one.limit)], out)
    return outcome


def run_all(pieces, out, limit=None, **options):
    outcomes = []
    deadline = time.monotonic() + (limit or 600)
    variables = gpu.environment(out, cuda=False)
    assert not gpu.run_pieces(pieces, out, deadline, variables, tell=outcomes.append, **options)
    return outcomes


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        # a zombie has ended
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_piece_does_is_an_outcome(tmp_path):
    crash = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    codes = {"good": "pass", "bad": "raise SystemExit('not today')", "crash": crash}
    found = {name: run(piece(name, code), tmp_path) for name, code in codes.items()}
    assert {name: o.status for name, o in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "crash": "failed",
    }
    assert found["bad"].note == "exit 1: not today"
    assert found["crash"].note == f"signal {int(signal.SIGSEGV)}"
    absent = run(piece("absent", "pass", absent="no such thing"), tmp_path)
    assert (absent.status, absent.note) == ("skipped", "no such thing")
    nothing = run(piece("none", "pass", wrapper=("/nowhere/at/all",)), tmp_path)
    assert nothing.status == "failed"


# slow: waits for what hangs
@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_piece_that_hangs_is_ended_with_its_children(tmp_path):
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); "
        "print('half a result', flush=True); time.sleep(600)"
    )
    begin = time.monotonic()
    outcome = run(piece("hangs", code), tmp_path, limit=4)
    assert time.monotonic() - begin < 15
    assert (outcome.status, outcome.note) == ("timed out", "stopped after 4 s")
    assert (tmp_path / "hangs.log").read_text() == "half a result\n"
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(child)


def test_a_process_that_cannot_be_ended_is_left_behind(tmp_path, monkeypatch):
    """As one that waits for its driver: no signal reaches it, and nothing may wait for it."""
    monkeypatch.setattr(gpu, "PATIENCE", 1.0)
    sent = []
    monkeypatch.setattr(gpu, "send", lambda process, number: sent.append((process, number)))
    begin = time.monotonic()
    slow = piece("blocked", "import time; time.sleep(60)", 1.0)
    blocked, after = run_all([slow, piece("after", "pass")], tmp_path)
    assert time.monotonic() - begin < 20
    assert (blocked.status, blocked.note) == ("timed out", "stopped after 1 s, and does not end")
    assert after.status == "passed"
    assert [number for _, number in sent] == [signal.SIGINT]
    sent[0][0].kill()
    sent[0][0].wait()


def test_tests_that_take_too_long_are_counted_as_far_as_they_came(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pathlib, time\ndef test_a(): pass\n"
        f"def test_b(): pathlib.Path({str(tmp_path / 'reached')!r}).touch(); time.sleep(600)\n"
    )
    xml = f"--junitxml={tmp_path / 'out.xml'}"
    command = ("-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path), xml)
    one = gpu.Piece("tests", command, 300)
    running = gpu.start(one, tmp_path, one.limit, gpu.environment(tmp_path, cuda=False))
    while not (tmp_path / "reached").exists():
        assert running.poll() is None
        time.sleep(0.1)
    # late from now on, however long it took to begin
    running.limit = time.monotonic() - running.begin
    while (outcome := running.poll()) is None:
        time.sleep(0.1)
    note = f"stopped after {running.limit:.0f} s: 1 passed"
    assert (outcome.status, outcome.note) == ("cut short", note)
    assert "test_a PASSED" in (tmp_path / "tests.log").read_text()
    # half a file, as of a process that was killed, ends nothing
    (tmp_path / "out.xml").write_text("<testsuites><testsu")
    assert gpu.count_tests(gpu.Piece("tests", command, 12)) is None


def test_checks_run_side_by_side(tmp_path):
    """Each waits for the file of the other."""
    code = (
        "import pathlib, time; here, there = map(pathlib.Path, ({!r}, {!r})); here.touch()\n"
        "while not there.exists(): time.sleep(0.05)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    pieces = [piece("a", code.format(a, b)), piece("b", code.format(b, a)), piece("c", "pass")]
    outcomes = run_all(pieces, tmp_path, width=2)
    assert {o.name: o.status for o in outcomes} == dict.fromkeys("abc", "passed")
    for cuda in (False, True):
        for one in gpu.make_pieces(cuda, tmp_path):
            checks = one.name.split()[0] in ("agreement", "kernel", "gpu", "memcheck")
            assert one.is_timing == (not checks), one.name


def test_pieces_find_the_repository_and_no_network(tmp_path):
    code = (
        "import os, dtrak_kernels, protocol, numerics; "
        "assert os.environ['HF_HUB_OFFLINE'] == '1'; print(dtrak_kernels.__file__)"
    )
    outcome = run(piece("imports", code, limit=90.0), tmp_path)
    assert outcome.status == "passed", (tmp_path / "imports.log").read_text()


# slow: a session of pytest; those that take too long are counted in the fast lane
@pytest.mark.full
def test_tests_are_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_d(broken): pass\n"
    )
    xml = f"--junitxml={tmp_path / 'out.xml'}"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), xml)
    outcome = run(gpu.Piece("tests", command, 60), tmp_path)
    assert outcome.status == "failed"
    assert outcome.note == "1 passed, 1 failed, 1 errors, 1 skipped"
    # nothing selected is no failure
    chosen = gpu.Piece("tests", (*command, "-k", "nothing"), 60)
    assert run(chosen, tmp_path).status == "passed"


@pytest.mark.parametrize("cuda", [False, True])
def test_pieces_are_what_is_in_the_repository(cuda, tmp_path):
    pieces = gpu.make_pieces(cuda, tmp_path)
    names = [p.name for p in pieces]
    assert len(set(names)) == len(names)
    for one in pieces:
        files = [a for a in one.arguments if a.startswith(str(ROOT))]
        assert files
        for file in files:
            assert Path(file).exists(), file
    wanted = {"stages", "modelled", "gpu tests", "kernel tests", "memcheck", "tune"}
    assert wanted <= set(names)
    if cuda:
        suites = {p.stem.removeprefix("test_") for p in (ROOT / "benchmarks").glob("test_*.py")}
        assert {f"suite {name}" for name in suites} <= set(names)
        assert {f"agreement {name}" for name in gpu.KERNELS} <= set(names)


def test_twelve_minutes_are_enough(monkeypatch):
    """Whatever takes all of its limit, and if the last piece has to be given up."""
    assert gpu.BUDGET - gpu.RESERVE + gpu.PATIENCE + 5 < gpu.MOST == 12 * 60
    assert max(after for after, _ in gpu.SIGNALS) < gpu.PATIENCE
    # nothing is absent
    monkeypatch.setattr(gpu, "has", lambda module: True)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "compute-sanitizer")
    pieces = gpu.make_pieces(True, Path("out"))
    assert not any(piece.absent for piece in pieces)
    for cores in (8, 16, 64):
        assert gpu.longest(pieces, cores) <= gpu.BUDGET - gpu.RESERVE
    assert sum(p.limit for p in pieces if p.is_timing) < gpu.longest(pieces, 64)


def test_limits_are_added_up_as_pieces_run():
    limits = ((30, False), (10, False), (10, False), (20, False), (5, True), (7, True))
    pieces = [
        piece(str(number), "pass", limit, is_timing=is_timing)
        for number, (limit, is_timing) in enumerate(limits)
    ]
    # two at a time: 30 beside 10, 10 and 20
    assert gpu.longest(pieces, 4) == 40 + 5 + 7
    assert gpu.longest(pieces, 2) == 70 + 5 + 7
    assert gpu.longest([replace_fields(pieces[0], absent="not here"), *pieces[1:]], 2) == 40 + 12


def test_the_most_telling_pieces_come_first(monkeypatch):
    monkeypatch.setattr(gpu, "has", lambda module: True)
    names = [piece.name for piece in gpu.make_pieces(True, Path("out"))]
    order = ["agreement rademacher", "memcheck", "suite sketcher", "suite projection", "stages"]
    assert [name for name in names if name in order] == order
    assert names[: len(gpu.KERNELS)] == [f"agreement {kernel}" for kernel in gpu.KERNELS]
    assert names[-1] == "tune"


def test_what_only_gpus_run_is_collected_and_nothing_else():
    kernels, dtrak = gpu.files_with_gpu_tests().values()
    assert str(ROOT / "tests" / "test_projection.py") in kernels
    assert str(ROOT / "tests" / "test_training.py") in dtrak
    assert str(ROOT / "tests" / "test_readme.py") not in kernels + dtrak


# it collects a third of all tests
@pytest.mark.full
def test_tests_of_kernels_need_neither_diffusers_nor_scipy(tmp_path):
    """They are collected on a machine that has torch, triton and pytest alone."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('diffusers', 'scipy', 'trak', 'sklearn', 'typer'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Bare())\n"
    )
    files = {str(ROOT / "tests" / f"test_{name}.py") for name in gpu.KERNEL_TESTS}
    files |= set(gpu.files_with_gpu_tests()["gpu tests"])
    variables = gpu.environment(tmp_path, cuda=False)
    paths = os.pathsep.join([str(tmp_path), variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:xdist", *sorted(files)],
        capture_output=True,
        text=True,
        env=variables | {"PYTHONPATH": paths},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_page_shows_this_run_s_suites(tmp_path):
    row = {"provider": "features: sjlt, K = 8", "ratio": 1.5, "baseline": "step", "dtype": "bf16"}
    row |= {"group": "U-Net", "run": "2026-01-02T00:00:00Z"}
    files = {"sketcher": [row, row | {"run": "2025-01-02T00:00:00Z", "group": "old"}]}
    # another width is in the report
    files["sketcher"].append(row | {"provider": "features: sjlt, K = 16"})
    files["layers"] = [
        row | {"model": "SD", "group": str(n), "ratio": ratio} for n, ratio in enumerate((1, 2, 30))
    ]
    files["projection"] = [row | {"provider": "trak"}]
    for name, rows in files.items():
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    lines = [" ".join(x.split()) for x in gpu.suite_lines(tmp_path, "2026-01-01T00:00:00Z")]
    assert lines == [
        "sketcher: U-Net features: sjlt, K = 8 1.500x step",
        "layers: SD, bf16, median of 3 features: sjlt, K = 8 2.000x step",
    ]


def replace(monkeypatch, pieces, arguments):
    monkeypatch.setattr(gpu, "probe", lambda out: FACTS)
    monkeypatch.setattr(gpu, "make_pieces", lambda cuda, out: pieces)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])


def test_the_page_comes_last_and_says_what_happened(tmp_path, monkeypatch, capsys):
    row = {"kernel": "sketch", "dtype": "float16", "shape": "s", "error": 1e-7, "allowed": 1e-6}
    rows = [
        row | {"status": "passed"},
        row | {"status": "passed", "error": 3e-7},
        row | {"kernel": "normal", "status": "failed", "note": "error"},
    ]
    lines = "\n".join(json.dumps(r) for r in rows) + '\n{"kernel": "unfini'
    write = f"open({str(tmp_path / 'agreement.jsonl')!r}, 'a').write({lines!r})"
    pieces = [
        piece("broken", "raise SystemExit(3)"),
        piece("writes", write),
        piece("slow", "import time; time.sleep(60)"),
        piece("late", "pass"),
    ]
    # rows of another run are not this one's
    (tmp_path / "agreement.jsonl").write_text(json.dumps(row | {"kernel": "old"}) + "\n")
    replace(monkeypatch, pieces, ["--out", str(tmp_path), "--budget", "15"])
    assert gpu.main() == 1
    page = (tmp_path / "table.txt").read_text()
    assert capsys.readouterr().out.endswith(page)
    assert len(page.splitlines()) < 60
    assert "3.0e-07 / 1.0e-06 (2)" in page
    assert "1 of 1 FAILED" in page
    assert "old" not in page
    statuses = {
        p["name"]: p["status"]
        for p in json.loads((tmp_path / "summary.json").read_text())["pieces"]
    }
    assert statuses == {
        "broken": "failed",
        "writes": "passed",
        "slow": "timed out",
        "late": "skipped",
    }


def test_only_some_pieces(tmp_path, monkeypatch, capsys):
    pieces = [
        piece("suite a", "pass"),
        piece("suite b", "pass"),
        piece("other", "raise SystemExit"),
    ]
    replace(monkeypatch, pieces, ["--out", str(tmp_path), "--only", "suite"])
    assert gpu.main() == 0
    out = capsys.readouterr().out
    assert "suite a" in out
    assert "other" not in out
    replace(monkeypatch, pieces, ["--out", str(tmp_path), "--only", "sweet"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "--only must be one of other, suite, suite a, suite b, got 'sweet'" in (
        capsys.readouterr().err
    )


def test_stages_and_models_have_their_lines():
    stage = {"stage": "total with sjlt", "seconds": 7.0, "target": 6.5, "published": "> 320"}
    row = stage | {"model": "U-Net", "tiny": False, "device": "NVIDIA H200"}
    lines = list(gpu.stage_lines([row, row | {"seconds": 6.0}, row | {"tiny": True}]))
    assert "MISSED" in lines[1]
    assert "met" in lines[2]
    assert "target" not in lines[3]
    model = {"case": "pack", "card": "H200", "modelled_seconds": 1e-3, "limit": "memory"}
    lines = list(gpu.modelled_lines([model, model | {"measured_seconds": 2e-3}]))
    assert "modelled" in lines[0]
    assert "(model)" in lines[0]
    assert lines[1].split()[1:4] == ["1.000", "ms", "-"]
    assert lines[2].split()[1:5] == ["1.000", "ms", "2.000", "ms"]


def test_what_was_tuned_has_its_lines():
    row = {"operation": "sketch", "sizes": {"form": "one tap", "T": 2560}, "device": "a card"}
    rows = [
        row | {"config": {"a": 1}},
        row | {"config": {"a": 1}, "seconds": 4e-3},
        row | {"config": {"a": 2}, "reason": "it does not fit"},
        row | {"config": {"a": 3}},
        row | {"config": {"a": 3}, "seconds": 1e-3},
        row | {"sizes": {"T": 7}, "config": {"a": 1}},
    ]
    head, tuned, ended = gpu.tuned_lines(rows)
    assert "best" in head
    assert " ".join(tuned.split()) == "sketch one tap, T 2,560: 2 of 3 4.000 ms 1.000 ms"
    assert ended.split()[:3] == ["sketch", "T", "7:"]
    assert ended.endswith("it ended the process")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_still_gives_the_page(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu; "
        f"gpu.probe = lambda out: {FACTS!r}; "
        "hang = gpu.Piece('hangs', ('-c', 'import time; time.sleep(600)'), 600); "
        "gpu.make_pieces = lambda cuda, out: [hang]; "
        f"sys.argv = ['gpu.py', '--out', {str(tmp_path)!r}, '--budget', '600']; "
        "sys.exit(gpu.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in out
    assert (tmp_path / "table.txt").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target, command",
    [
        ("gpu", "benchmarks/gpu.py --out somewhere"),
        ("tune", "benchmarks/tune.py --journal somewhere/tune.jsonl"),
    ],
)
def test_make_runs_the_drivers(target, command):
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", target, "OUT=somewhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(command)


# the pieces by themselves are in the fast lane
@pytest.mark.full
def test_a_rehearsal(tmp_path):
    """A real piece, from the command line to the page."""
    if gpu.probe(tmp_path)["cuda"]:
        pytest.skip("there is a GPU: no rehearsal")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "modelled", "--only", "tune", "--budget", "200"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "limited by (model)" in done.stdout
    assert "tuned: candidates that ran" in done.stdout
    tuned = json.loads((tmp_path / "configs" / "sketch.json").read_text())
    assert len(tuned["cpu"]) == 3
