"""What a command costs before it works: help, refusals and a finished run import nothing heavy."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from finished_run import OPTIONS, results
from rich.console import Console

from dtrak.features.output_names import OUTPUT_NAMES
from dtrak.features.outputs import OUTPUT_FUNCTIONS
from dtrak.runs import code as code_of
from dtrak.runs.choices import DEFAULT_PROJ_DIM, DTYPES
from dtrak.runs.files import LOCK_FILE, claim
from dtrak.runs.finished import find_finished
from dtrak.runs.folders import OutputError
from dtrak.runs.options import Options
from dtrak_kernels.projection import KINDS

HEAVY = {
    "PIL", "accelerate", "datasets", "diffusers", "matplotlib", "peft", "pyarrow", "scipy",
    "sklearn", "torch", "transformers", "triton",
}  # fmt: skip
# (command line, what it says): one refusal of every kind that needs neither model nor data
REFUSALS = {
    "attribute": [
        ("--projection rademacer", "did you mean 'rademacher'?"),
        ("--proj-dim 100", "proj_dim must be at least 256 for kind 'sjlt', got 100"),
        ("--seed -1", "seed must be in [0, 2**63), got -1"),
        ("--method clip-dot --clip nowhere", "--clip must be an existing folder, got nowhere"),
        ("--method gas --checkpoints nowhere", "--checkpoints must be an existing folder, got now"),
        ("--timesteps 0", "--timesteps must be at least 1, got 0"),
        ("--output-function los", "did you mean 'loss'?"),
        ("--dtype float", "--dtype must be one of float32"),
        ("--damping much", "--damping must be 'auto', a finite number"),
        ("--device mps", "--device must be auto, cpu, cuda or cuda:N, got 'mps': "),
        ("--model nowhere", "or a file of its weights, got nowhere"),
        ("--preset cifar3", "did you mean 'cifar2'?"),
        ("--top-k 0", "--top-k must be at least 1, got 0"),
        ("--noise-halves --timesteps 5", "must have an even number of timesteps, got 5"),
        ("--held-out validation --method gas --checkpoints .", "--held-out is for TRAK's formula"),
        ("--shard 4/3", "--shard must be i/n with i from 1 to n, such as 3/16, got '4/3'"),
        ("--store-dtype int4", "did you mean 'int8'?"),
    ],
    "train": [
        ("--preset cifar3 --output x", "did you mean 'cifar2'?"),
        ("--preset digits --output x --steps -3", "--steps must be at least 1, got -3"),
        ("--output x", "--data and --config or --model must be given where there is no --preset"),
        ("--output x --preset digits --lora-rank 2", "--lora-rank is not for --preset digits"),
        ("--output x --preset artbench2 --lora-rank 0", "--lora-rank must be at least 1, got 0"),
        ("--output x --preset artbench2 --caption a", "--caption is the preset's own"),
        ("--output x --data y --config z --schedule a", "--schedule must be one of cosine, linear"),
    ],
    "generate": [
        ("--model nowhere --output x", "model must be an existing folder that Diffusers wrote"),
        ("--model nowhere --output x --num-images 0", "--num-images must be at least 1, got 0"),
        ("--model nowhere --output x --device gpu", "--device must be auto, cpu, cuda or cuda:N"),
    ],
    "lds": [
        ("prepare --preset cifar3", "did you mean 'cifar2'?"),
        ("prepare --output x --num-subsets 0", "num_subsets must be at least 1, got 0"),
        ("prepare --prompts x", "--prompts needs --run, whose model it is about"),
        ("prepare --run x --preset digits", "--run and --preset exclude each other, got both"),
        ("prepare --run x --model y", "--model is for presets, a --run says its own"),
        ("train --output nowhere", "nowhere must be a folder that prepare made"),
        ("evaluate --output nowhere --projection x", "--projection must be one of rademacher"),
        ("evaluate --output nowhere --ensemble 1", "--ensemble must be numbers of models"),
        ("report --resamples 3", "--resamples must be at least 1000, got 3"),
    ],
    "store": [
        ("import x --format dtrak --output y", "did you mean 'd-trak'?"),
        ("import x z --format trak --output y", "--format trak takes one folder, got 2"),
        ("score x z --output y --damping a", "--damping must be 'auto', a finite number"),
    ],
    "counterfactual": [
        ("nowhere", "a run must be an existing folder, got nowhere"),
        ("--methods d-track", "did you mean 'd-trak'?"),
        ("--methods clip-dot", "--clip must name a folder with a CLIP model"),
        ("--retrainings 0", "--retrainings must be at least 1, got 0"),
    ],
    "ensemble": [
        ("a b --output x", "--output must be a file *.safetensors, got x"),
        ("a a --output x.safetensors", "runs must be two or more, each given once"),
        ("a b --output x.safetensors", "a run must be an existing folder, got a"),
    ],
    "planted": [
        ("--preset cifar3", "did you mean 'cifar2'?"),
        ("--preset digits --run x", "--run and --preset exclude each other, got both"),
        ("--recipe x", "--recipe needs --run, whose model it is about"),
        ("--planted 0", "--planted must be at least 1, got 0"),
        ("--methods d-track", "did you mean 'd-trak'?"),
        ("--whiten all", "--whiten must be one of"),
        ("--labels 8", "--labels choose among foreign images, got it with --concept inverted"),
        ("--concept x --labels a", "--labels must be numbers such as 0,3,5, got 'a'"),
        ("--run nowhere", "--run must be an existing folder, got nowhere"),
    ],
    "self_influence": [
        ("nowhere", "a run must be an existing folder, got nowhere"),
        ("nowhere --top-k 0", "--top-k must be at least 1, got 0"),
    ],
    "report": [
        ("nowhere", "a run must be an existing folder, got nowhere"),
        (". --num-queries 0", "--num-queries must be at least 1, got 0"),
    ],
}  # fmt: skip
SCRIPT = """
import contextlib, importlib, io, json, sys
heavy, command, lines = json.loads(sys.argv[1])
said = []
for line in lines:
    module = importlib.import_module(f"dtrak.{command}")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            module.main(line.split())
        except SystemExit as end:
            code = end.code
    said.append((code, text.getvalue(), sorted(set(heavy) & set(sys.modules))))
print(json.dumps(said))
"""


def python(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", REFUSALS)
def test_help_and_refusals_import_nothing_heavy(command, tmp_path):
    lines = ["--help", *(line for line, _ in REFUSALS[command])]
    environment = {**os.environ, "COLUMNS": "200"}
    given = json.dumps([sorted(HEAVY), command, lines])
    said = json.loads(python("-c", SCRIPT, given, cwd=tmp_path, env=environment))
    assert said[0][0] == 0
    assert f"python -m dtrak.{command}" in said[0][1]
    for (line, message), (code, text, imported) in zip(REFUSALS[command], said[1:], strict=True):
        words = " ".join(text.split())
        assert (line, code, imported) == (line, 2, []), words
        assert words.startswith("error: "), words
        assert message in words
    assert said[0][2] == []
    assert not list(tmp_path.iterdir())


def test_importing_the_packages_imports_nothing_heavy():
    code = (
        "import sys, signal; before = signal.getsignal(signal.SIGINT); import dtrak, dtrak_kernels;"
        "print({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names);"
        "print(signal.getsignal(signal.SIGINT) is before)"
    )
    found, is_untouched = python("-c", code).splitlines()
    assert not set(re.findall(r"'(\w+)'", found)) & (HEAVY | {"numpy", "typer", "rich"})
    assert is_untouched == "True"


def test_names_that_options_take_are_those_that_are_there():
    assert tuple(OUTPUT_FUNCTIONS) == OUTPUT_NAMES
    assert DEFAULT_PROJ_DIM.keys() == set(KINDS)
    for name in DTYPES:
        assert getattr(torch, name).is_floating_point
    for name in code_of.LIBRARIES:
        assert version(name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("command", ["attribute", "lds"])
def test_control_c_while_a_command_starts(command, tmp_path):
    """At its first own import, and once it imports torch: 130, and no traceback."""
    for module in ("typer", "torch"):
        # stands in for the import that takes time, and says when it does
        place = tmp_path / f"{command}-{module}"
        place.mkdir()
        stub = f"import pathlib, time; pathlib.Path({str(place / 'begun')!r}).touch()\n"
        (place / f"{module}.py").write_text(stub + "time.sleep(100)\n")
        path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
        line = ["prepare"] if command == "lds" else []
        process = subprocess.Popen(
            [sys.executable, "-m", f"dtrak.{command}", *line, "--output", str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not (place / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
        assert process.returncode == 130, text
        assert "Traceback" not in text


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run to spoil, with its images and its model; gives its options."""
    here = shutil.copytree(finished.parent, tmp_path / "copy")
    file = results(here / "run") / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["options"] |= {"model": str(here / "model"), "data": str(here / "images")}
    file.write_text(json.dumps(manifest))
    return Options(**manifest["options"]), here


def reuses(options, folder):
    options = Options(**{**asdict(options), "output": str(folder / "run")})
    return find_finished(options, Console(quiet=True))


def test_a_finished_run_is_reused_without_diffusers(finished):
    run = finished
    options = json.loads((results(run) / "manifest.json").read_text())["options"]
    line = ["--model", options["model"], "--data", options["data"], "--output", run, "--timesteps"]
    line += ["2", "--num-queries", "4", "--proj-dim", "256", "--top-k", "3", "--device", "cpu"]
    code = (
        "import sys; from dtrak.attribute import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('imported:', sorted({'diffusers', 'transformers', 'sklearn', 'matplotlib', 'scipy',"
        "'accelerate', 'peft', 'datasets', 'triton'} & set(sys.modules)))"
    )
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    text = python("-c", code, *line)
    assert "imported: []" in text
    for stage in ("features of training images", "kernel inverse and scores", "report"):
        assert re.search(rf"{stage}\W+reused", text)
    assert {file: file.read_bytes() for file in before} == before


def test_whatever_differs_is_done_again(copy, monkeypatch):
    options, folder = copy
    assert reuses(options, folder)
    # as in a folder that was moved
    for name, value in (("top_k", 4), ("damping", "1"), ("seed", 1), ("num_queries", 3)):
        assert not reuses(Options(**{**asdict(options), name: value}), folder), name
    for place in (
        f"{results(folder / 'run').relative_to(folder)}/scores.safetensors",
        f"{results(folder / 'run').relative_to(folder)}/report.html",
        f"{results(folder / 'run').relative_to(folder)}/manifest.json",
        "run/run.json",
        "run/generated/00002.png",
        "run/features-lowrank/mean_squared_l2_norm/train/000000.safetensors",
        "run/features-lowrank/mean_squared_l2_norm/whitening.safetensors",
    ):
        file = folder / place
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert not reuses(options, folder), place
        file.unlink()
        assert not reuses(options, folder), place
        file.write_bytes(kept)
    assert reuses(options, folder)
    for name in ("version", "hash_code"):
        with monkeypatch.context() as patch:
            patch.setattr(code_of, name, lambda package: "another")
            assert not reuses(options, folder), name
    assert reuses(options, folder)


def test_other_images_and_another_model_are_not_those_of_the_run(copy):
    options, folder = copy
    for place in ("images/003.png", "model/unet/diffusion_pytorch_model.safetensors"):
        file = folder / place
        kept = file.read_bytes()
        other = folder / "images/004.png"
        file.write_bytes(other.read_bytes() if file.suffix == ".png" else kept[:-1] + b"\7")
        assert not reuses(options, folder), place
        file.unlink()
        assert not reuses(options, folder), place
        file.write_bytes(kept)
    assert reuses(options, folder)


def test_a_folder_another_command_works_in_is_refused(copy):
    options, folder = copy
    with claim(folder / "run" / LOCK_FILE):
        with pytest.raises(OutputError, match="another command is at work in"):
            reuses(options, folder)
        # of another run nothing is known yet
        assert not reuses(Options(**{**asdict(options), "top_k": 4}), folder)


def test_a_run_that_was_never_finished_is_none(tmp_path):
    options = Options(**{**OPTIONS, "output": str(tmp_path / "run")})
    assert not find_finished(options, Console(quiet=True))
    queries = tmp_path / "run" / "queries" / "generated-0"
    queries.mkdir(parents=True)
    for text in ("", "[]", "{}", '{"options": {}}', '{"finished": 3, "options": {}, "facts": {}}'):
        (queries / "manifest.json").write_text(text)
        assert not find_finished(options, Console(quiet=True))
    assert not Path(tmp_path / "run" / LOCK_FILE).exists()
