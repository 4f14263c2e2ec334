"""What the README tells a stranger to do, done."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_reproduce import parse
from test_sketcher import small_unet

from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.evaluation.lds.table import packaged_table
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_it_is_short_enough():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    # the first commands leave it there; here smaller, untrained, and explained at one timestep
    UNet(small_unet().float(), linear_process()).save(tmp_path / "runs" / "digits" / "model")
    monkeypatch.chdir(tmp_path)
    code = code.replace("train, 4,", "train, 4, timesteps=1,")
    code = code.replace('images("digits")', 'images("digits", limit=100)')
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    if "dtrak.explain" in code:
        said = capsys.readouterr().out
        assert said.startswith("torch.Size([4, 100]) [[Proponent(id='digits/")
        assert (tmp_path / "runs" / "notebook.html").is_file()


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("python -m")])
def test_commands_parse(line):
    parse(line)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_targets_exist():
    targets = re.findall(r"`make (\w+)|&& make (\w+)", README)
    targets = [name for pair in targets for name in pair if name]
    assert {"run", "test"} <= set(targets)
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


# with a tenth of the training
COMMANDS = """
import importlib, json, sys
from functools import partial
from dtrak.runs import inputs

inputs.Recipe = partial(inputs.Recipe, steps=120)
for line in json.loads(sys.argv[1]):
    module, *words = line.split()[2:]
    sys.argv = [module, *words]
    try:
        importlib.import_module(module).main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: {end.code}")
"""


# slow: the main job itself, six times; the fast lane parses their options
@pytest.mark.full
def test_commands_run(tmp_path):
    """Every dtrak command of the README, in order, as a user would type them, in one process."""
    lines = [line for line in commands() if line.startswith("python -m dtrak")]
    assert len(lines) >= 4
    digits = load_data("digits", channels=1, size=8)
    for folder, rows in (("my_images", range(40)), ("my_pictures", range(40, 43))):
        (tmp_path / folder).mkdir()
        for row in rows:
            png = encode_png(to_uint8(digits.images[row]))
            (tmp_path / folder / f"{row}.png").write_bytes(png)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "warning" not in done.stderr.lower(), done.stderr
    sets = {"digits": ["generated", "my_pictures", "validation"], "mine": ["my_pictures"]}
    for name, expected in sets.items():
        folders = sorted((tmp_path / "runs" / name / "queries").iterdir())
        assert [folder.name.rpartition("-")[0] for folder in folders] == expected
        for folder in folders:
            for file in ("scores.safetensors", "manifest.json", "report.html", "report.png"):
                assert (folder / file).is_file()
        index = (tmp_path / "runs" / name / "index.html").read_text()
        assert all(f'href="queries/{folder.name}/report.html"' in index for folder in folders)


def lds_cells(preset):
    """The README's row of a benchmark, from the package."""
    table = packaged_table(preset)
    rows = {
        (r["method"], r["timesteps"], r["queries"]): r
        for r in table["rows"]
        if r["projection"] in ("", "sjlt")
    }

    def both(method, S, rule):
        values = (rows[method, S, kind][rule]["lds"] for kind in ("validation", "generated"))
        return " / ".join(f"{100 * value:.1f}" for value in values)

    cells = []
    columns = ("D-TRAK, whitened", "D-TRAK, mean, whitened", "D-TRAK", "TRAK, whitened", "TRAK")
    for method in columns:
        rule = "1" if "whitened" in method else "held_out"
        shown = [both(method, S, rule) for S in (10, 100)]
        is_bold = method == "D-TRAK, mean, whitened"
        cells.append("; ".join(f"**{text}**" if is_bold else text for text in shown))
    return [*cells, both("Raw pixels, cosine", 0, "held_out")]


@pytest.mark.parametrize(
    "preset, name", [("digits", "digits"), ("cifar2-16", "CIFAR-2 at 16 x 16")]
)
def test_the_table_of_accuracy_is_what_comes_with_the_package(preset, name):
    line = f"| {name}, S = 10; 100 | {' | '.join(lds_cells(preset))} |"
    assert line in README.splitlines(), line


def test_the_table_is_the_newest_row(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    # it exits with the reason where the table is another
    importlib.import_module("report").main()


def test_nothing_names_this_machine():
    """No absolute paths of a developer's machine in what is committed."""
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    needles = [str(ROOT) + "/", "/home/", "/" + "work/", "/root/"]
    for name in listed.stdout.split():
        file = ROOT / name
        if file.is_file() and file.suffix not in (".npz", ".png"):
            text = file.read_text(errors="ignore")
            assert not [n for n in needles if n in text and file != Path(__file__)], name
