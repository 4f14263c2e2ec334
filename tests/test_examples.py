"""The examples, and the code in kernels/README.md, do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(*arguments: str) -> str:
    # as a user runs it: on a CPU no kernel is interpreted
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def example(name: str) -> list[str]:
    return run(str(ROOT / "examples" / f"{name}.py")).splitlines()


def test_the_trak_example_finds_each_query_s_own_image():
    pytest.importorskip("trak", reason="traker is not installed")
    lines = example("trak_library")
    assert len(lines) == 6
    for query, line in enumerate(lines):
        assert line.startswith(f"query {query}: training images [{query}, ")


def test_the_dtrak_example_gives_the_published_features():
    (line,) = example("dtrak_script")
    found = re.fullmatch(r"features \[12, 512\], difference (\S+)", line)
    assert float(found[1]) < 1e-5


def test_the_language_model_example_finds_sentences_of_the_query_s_kind():
    lines = example("language_model")
    for line, kind in zip(lines, ("weather", "sums", "names"), strict=True):
        query, first = re.fullmatch(r"'(.+)': \[.*\], first '(.+)'", line).groups()
        assert query == first
        assert re.findall(r"'(\w+)'", line.split("[")[1].split("]")[0]).count(kind) >= 4


def test_the_transformers_example_finds_texts_of_the_query_s_kind():
    pytest.importorskip("peft", reason="peft is not installed")
    lines = example("transformers_models")
    assert len(lines) == 6
    for line in lines:
        found = re.fullmatch(
            r"(GPT-2|Llama|BERT), (all weights|LoRA): P = \S+, (\d+) of 15 .*", line
        )
        assert int(found[3]) >= 12


def test_the_less_example_finds_examples_of_the_task():
    pytest.importorskip("peft", reason="peft is not installed")
    first, *tasks = example("less")
    assert float(first.rpartition(" ")[2]) < 1e-5
    for line, task in zip(tasks, ("copy", "swap", "count"), strict=True):
        found = re.fullmatch(rf"{task}: (\d+) of the best 10 are of the task, first (.+)", line)
        assert int(found[1]) >= 7
        assert task in found[2]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_of_the_readme_run(code):
    run("-c", code)


def test_every_example_is_in_the_readme_and_tested():
    text = Path(__file__).read_text()
    for file in (ROOT / "examples").glob("*.py"):
        assert f"../examples/{file.name}" in README
        assert f'example("{file.stem}")' in text


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


def test_the_notebook_runs_in_a_kernel(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    from dtrak.models.unet import digits_model

    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    digits_model().save(tmp_path / "runs" / "digits" / "model")
    for cell in notebook.cells:
        # every cell, on little
        cell.source = cell.source.replace('images("digits")', 'images("digits", limit=40)')
        cell.source = cell.source.replace("timesteps=5", "timesteps=1")
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=place).execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    assert shown[0]["text/plain"] == "(40, (1, 8, 8))"
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert len(pages) == 2
    assert pages[0].count("<tr>") == 4
    for name in ("notebook.html", "notebook.csv", "notebook-scores/scores.safetensors"):
        assert (tmp_path / "runs" / name).is_file(), name
