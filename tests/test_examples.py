"""The examples, and the code in kernels/README.md, do what they say."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_sketcher import small_unet

from dtrak.models.process import linear_process
from dtrak.models.unet import UNet

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py"))


# each as a user runs it, on a CPU, where no kernel is interpreted; one process, as the imports take
# longer than the work: what they print, or how they fail, by name
RUN = """
import contextlib, io, json, runpy, sys, traceback
out, *files = sys.argv[1:]
found = {}
for file in files:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(file, run_name="__main__")
        found[file] = ["", text.getvalue()]
    except Exception:
        found[file] = [traceback.format_exc(), text.getvalue()]
open(out, "w").write(json.dumps(found))
"""


@pytest.fixture(scope="session")
def said(shared):
    """What an example or a block of the README prints, by its name or number."""

    def make(folder):
        files = [ROOT / "examples" / f"{name}.py" for name in EXAMPLES]
        for number, code in enumerate(BLOCKS):
            files.append(folder / f"{number}.py")
            files[-1].write_text(code)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder / "said.json"), *map(str, files)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    found = json.loads((shared("examples", make) / "said.json").read_text())
    found = {Path(file).stem: outcome for file, outcome in found.items()}

    def said(name):
        error, text = found[str(name)]
        assert not error, error
        return text.splitlines()

    return said


def test_the_trak_example_finds_each_query_s_own_image(said):
    pytest.importorskip("trak", reason="traker is not installed")
    lines = said("trak_library")
    assert len(lines) == 6
    for query, line in enumerate(lines):
        assert line.startswith(f"query {query}: training images [{query}, ")


def test_the_dtrak_example_gives_the_published_features(said):
    (line,) = said("dtrak_script")
    found = re.fullmatch(r"features \[12, 512\], difference (\S+)", line)
    assert float(found[1]) < 1e-5


def test_the_language_model_example_finds_sentences_of_the_query_s_kind(said):
    lines = said("language_model")
    for line, kind in zip(lines, ("weather", "sums", "names"), strict=True):
        query, first = re.fullmatch(r"'(.+)': \[.*\], first '(.+)'", line).groups()
        assert query == first
        assert re.findall(r"'(\w+)'", line.split("[")[1].split("]")[0]).count(kind) >= 4


def test_the_transformers_example_finds_texts_of_the_query_s_kind(said):
    pytest.importorskip("peft", reason="peft is not installed")
    lines = said("transformers_models")
    assert len(lines) == 6
    for line in lines:
        found = re.fullmatch(
            r"(GPT-2|Llama|BERT), (all weights|LoRA): P = \S+, (\d+) of 15 .*", line
        )
        assert int(found[3]) >= 12


def test_the_less_example_finds_examples_of_the_task(said):
    pytest.importorskip("peft", reason="peft is not installed")
    first, *tasks = said("less")
    assert float(first.rpartition(" ")[2]) < 1e-5
    for line, task in zip(tasks, ("copy", "swap", "count"), strict=True):
        found = re.fullmatch(rf"{task}: (\d+) of the best 10 are of the task, first (.+)", line)
        assert int(found[1]) >= 7
        assert task in found[2]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_of_the_readme_run(number, said):
    said(number)


def test_every_example_is_in_the_readme_and_tested():
    text = Path(__file__).read_text()
    for name in EXAMPLES:
        assert f"../examples/{name}.py" in README
        assert f'said("{name}")' in text


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((\.\./[^)#]+)", README)
    assert len(links) >= 4
    for link in links:
        assert (ROOT / "kernels" / link).resolve().is_file(), link


def test_names_in_the_readme_s_table_exist():
    import dtrak_kernels
    from dtrak_kernels import dattri, ridge, trak

    rows = [line for line in README.splitlines() if line.startswith("|")][2:]
    names = {name for row in rows for name in re.findall(r"`([\w.]+)(?:\(\))?`", row.split("|")[3])}
    places = {"dtrak_kernels.trak.install": trak, "dtrak_kernels.dattri.install": dattri}
    places |= {"ridge.gram_product": ridge, "TritonProjector": trak, "FusedGradientComputer": trak}
    for name in names:
        assert hasattr(places.get(name, dtrak_kernels), name.split(".")[-1]), name


@pytest.fixture
def notebook(tmp_path):
    """The sources of the notebook's cells, on little, and what each must show."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    UNet(small_unet().float(), linear_process()).save(tmp_path / "runs" / "digits" / "model")
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        source = source.replace('images("digits")', 'images("digits", limit=40)')
        cell["source"] = source.replace("timesteps=5", "timesteps=1")
    return notebook


def check_notebook(shown, folder):
    assert shown[0]["text/plain"] == "(40, (1, 8, 8))"
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert len(pages) == 2
    assert pages[0].count("<tr>") == 4
    for name in ("notebook.html", "notebook.csv", "notebook-scores/scores.safetensors"):
        assert (folder / "runs" / name).is_file(), name


def test_the_notebook_s_cells_run(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, shown = {"__name__": "__main__"}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse(cell["source"]).body
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            assert isinstance(last, ast.Expr)
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            shown.append({"text/plain": repr(value)})
            if hasattr(value, "_repr_html_"):
                shown[-1]["text/html"] = value._repr_html_()
    check_notebook(shown, tmp_path)


# slow: imports everything again; the fast lane runs the cells here
def test_the_notebook_runs_in_a_kernel(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    notebook = nbformat.from_dict(notebook)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=place).execute()
    results = (output for cell in notebook.cells for output in cell.get("outputs", []))
    shown = [output.data for output in results if output.output_type == "execute_result"]
    check_notebook(shown, tmp_path)
