"""The counterfactual command and every way it can be misused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from finished_run import results as results_of
from safetensors.torch import load_file, save_file
from sklearn.model_selection import train_test_split
from typer.testing import CliRunner

from dtrak.cli.counterfactual import app
from dtrak.data.images import load_data, to_uint8
from dtrak.evaluation.counterfactual import draw as counterfactual_draw
from dtrak.evaluation.counterfactual.results import load_counterfactual
from dtrak.training.presets import PRESETS, Draw


@pytest.fixture
def run(finished, tmp_path):
    """Run the command; gives (exit code, everything printed)."""

    def run(*arguments, of=finished, output=tmp_path / "cf"):
        fixed = [str(of), "--output", str(output), "--top-k", "10"]
        result = CliRunner().invoke(app, [*fixed, *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


def test_end_to_end(run, finished, tmp_path):
    code, output = run("--num-queries", "2", "--methods", "d-trak,random,none,raw-cosine")
    assert code == 0, output
    results = load_counterfactual(tmp_path / "cf")
    assert results.methods == ["d-trak", "random", "none", "raw-cosine"]
    drawn = load_data(finished / "generated", channels=1)
    rows = [drawn.ids.index(name) for name in results.query_ids]
    assert torch.equal(results.originals, to_uint8(drawn.images[rows]))

    # what was removed is what the scores rank highest, for these queries
    removed = load_file(tmp_path / "cf" / "removed.safetensors")
    scores = load_file(results_of(finished) / "scores.safetensors")["scores"]
    for place, row in enumerate(rows):
        highest = sorted(range(60), key=lambda i, r=row: -scores[r, i])[:10]
        assert removed["d-trak"][place].tolist() == highest
    assert removed["none"].shape == (2, 0)
    assert not torch.equal(removed["random"][0].sort().values, removed["random"][1].sort().values)

    table = json.loads((tmp_path / "cf" / "results.json").read_text())
    for method in results.methods:
        median = table["metrics"]["pixel_l2"][method]["median"]
        assert f"{median:.3g}" in output
    assert re.match(r"[01] of 255", table["settings"]["largest change by drawing again"])
    for name in ("distances.png", "strips.png"):
        assert (tmp_path / "cf" / name).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "cf").rglob("*.partial"))

    # more of everything: what is there is kept
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "cf" / "pictures").rglob("*.safetensors")}
    assert len(kept) == 7
    code, output = run("--num-queries", "3", "--methods", "random,d-trak", "--retrainings", "2")
    assert code == 0, output
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    results = load_counterfactual(tmp_path / "cf")
    assert results.pictures["d-trak"].shape == (3, 2, 1, 8, 8)
    assert "Beyond random" in output


# slow: three more retrainings; test_counterfactual_results.py has the metrics
@pytest.mark.full
def test_clip_latents_and_scores_of_another_run(run, finished, tmp_path, clip_folder, vae_folder):
    mine = tmp_path / "mine.safetensors"
    columns, rows = ([f"{n:0{w}d}.png" for n in range(c)] for c, w in ((60, 3), (4, 5)))
    names = {"rows": json.dumps(rows), "columns": json.dumps(columns)}
    save_file({"scores": torch.arange(240.0).reshape(4, 60)}, mine, metadata=names)
    code, output = run(
        "--num-queries", "1", "--methods", f"mine={mine},clip-cosine,latent-dot",
        "--clip", clip_folder, "--vae", vae_folder,
    )  # fmt: skip
    assert code == 0, output
    results = load_counterfactual(tmp_path / "cf")
    assert results.methods == ["mine", "clip-cosine", "latent-dot"]
    assert set(results.values) == {"loss", "pixel_l2", "latent_l2", "clip_cosine"}
    removed = load_file(tmp_path / "cf" / "removed.safetensors")["mine"]
    assert removed[0].tolist() == list(range(59, 49, -1))
    assert (tmp_path / "cf" / "distances-clip_cosine.png").is_file()


def test_scores_of_other_images_are_refused(run, tmp_path):
    mine = tmp_path / "mine.safetensors"
    rows, columns = ([f"{n:0{w}d}.png" for n in range(c)] for c, w in ((4, 5), (60, 3)))
    names = {"rows": json.dumps(rows), "columns": json.dumps(columns[::-1])}
    save_file({"scores": torch.zeros(4, 60)}, mine, metadata=names)
    code, output = run("--methods", f"mine={mine}", "--num-queries", "1")
    assert code == 2
    assert "scores of the run's images, got columns of other names" in output


def test_the_published_draw_decides_queries_and_random_removals(run, tmp_path, monkeypatch):
    """In miniature: the published experiment would be 2 of 4 queries on 60 images."""
    monkeypatch.setattr(counterfactual_draw, "PUBLISHED_SEEDS", {"digits": 3})
    monkeypatch.setattr(counterfactual_draw, "PUBLISHED_POOL", 4)
    monkeypatch.setattr(counterfactual_draw, "PUBLISHED_QUERIES", 2)
    small = replace(PRESETS["digits"], train=Draw(60, 60))
    monkeypatch.setattr(counterfactual_draw, "get_preset", lambda name: small)
    code, output = run("--methods", "random")
    assert code == 0, output
    _, chosen = train_test_split(range(4), test_size=2, random_state=3)
    results = load_counterfactual(tmp_path / "cf")
    assert results.query_ids == [f"{row:05d}.png" for row in chosen]
    assert "published" in results.settings["draw of queries and random removals"]
    scores = np.random.RandomState(42).uniform(size=(4, 60))[chosen]
    removed = load_file(tmp_path / "cf" / "removed.safetensors")["random"]
    assert removed.tolist() == (-scores).argsort(1)[:, :10].tolist()


# of SIGKILL the fast lane has the main command, of this the interrupted retraining
@pytest.mark.full
def test_killed_runs_resume(run, finished, tmp_path):
    """kill -9 while a model is trained, then the same command again."""
    folder = tmp_path / "cf"
    command = [
        sys.executable, "-m", "dtrak.counterfactual", str(finished), "--methods",
        "d-trak", "--num-queries", "3", "--top-k", "10", "--output", str(folder),
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if list(folder.glob("pictures/*/*/*.safetensors")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {f: f.stat().st_mtime_ns for f in folder.glob("pictures/*/*/*.safetensors")}
    assert kept
    assert not (folder / "results.safetensors").exists()
    assert run("--methods", "d-trak", "--num-queries", "3")[0] == 0
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert load_counterfactual(folder).pictures["d-trak"].shape == (3, 1, 1, 8, 8)


# of SIGINT the fast lane has dtrak.lds
@pytest.mark.full
def test_ctrl_c_ends_without_a_traceback(finished, tmp_path):
    folder = tmp_path / "cf"
    command = [
        sys.executable, "-m", "dtrak.counterfactual", str(finished), "--methods",
        "raw-dot", "--num-queries", "4", "--retrainings", "50", "--top-k", "10",
        "--output", str(folder),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(folder.glob("pictures/*/*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "it resumes where it stopped" in errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "dtrak"], "--methods must be one of d-trak, .* did you mean 'd-trak'"),
        (["--methods", ""], "--methods must be different and at least one"),
        (["--methods", "trak,trak"], "--methods must be different and at least one, got 'trak,"),
        (["--methods", "a/b=file"], "--methods must name scores as name=file, .* got 'a/b=file'"),
        (["--methods", "..=file"], "--methods must name scores as name=file, .* got '..=file'"),
        (["--methods", "none=file"], "as name=file, not 'none', got 'none=file'"),
        (["--methods", "x=absent"], "scores must be an existing file, got absent"),
        (["--methods", "clip-dot", "--num-queries", "1"], "--clip must name a folder with a CLIP"),
        (["--methods", "latent-dot", "--num-queries", "1"], "--vae must name a folder with a VAE"),
        (["--num-queries", "5"], r"--num-queries must be in \[1, 4\], the run's queries, got 5"),
        (["--draw", "published"], "--draw published must be for one of cifar2, .*preset 'digits'"),
        (["--draw", "other"], "--draw must be one of published, seed"),
        (["--draw", "published", "--seed", "0"], "--seed is for --draw seed, got 0"),
        (["--num-queries", "1", "--top-k", "60"], r"--top-k must be in \[1, 60\), got 60"),
        (["--num-queries", "1", "--retrainings", "0"], "--retrainings must be at least 1, got 0"),
        (["--retrainings", str(10**12)], r"--retrainings must leave .* memory, got 10{12} and"),
        (["--num-queries", "1", "--processes", "0"], "processes must be at least 1, got 0"),
        (["--device", "gpu"], "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--clip", "absent"], "CLIP must be an existing folder"),
        (["--vae", "absent"], "VAE must be an existing folder"),
    ],
)
def test_misuse_is_one_clear_line(run, arguments, message):
    code, output = run(*arguments)
    assert code == 2, output
    assert re.search(message, output), output
    assert "Traceback" not in output


def test_what_costs_nothing_is_refused_before_features_are_made(run, tmp_path):
    """No gradient is taken where another option is wrong."""
    wrong = [
        ["--top-k", "60"], ["--num-queries", "5"], ["--retrainings", "0"], ["--processes", "0"],
        ["--retrainings", str(10**12)],
        ["--methods", "trak,clip-dot"], ["--methods", "trak,latent-dot"],
        ["--methods", "trak,mine=absent"], ["--draw", "published"],
    ]  # fmt: skip
    for arguments in wrong:
        code, _ = run("--methods", "trak", *arguments)
        assert code == 2, arguments
        assert not (tmp_path / "cf").exists(), arguments


def test_a_place_that_is_no_folder_of_this_is_refused(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"mine")
    code, output = run("--methods", "trak", output=tmp_path / "photos")
    assert code == 2
    assert "is not empty and holds no plan.json: choose another" in output
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.png"]
    code, output = run("--methods", "trak", output=tmp_path / "photos" / "me.png")
    assert code == 2
    assert "--output must be a folder, got the file" in output
    assert (tmp_path / "photos" / "me.png").read_bytes() == b"mine"


# slow: retrainings; test_counterfactual_retraining.py and test_folders.py refuse
@pytest.mark.full
def test_an_output_folder_of_another_experiment_is_refused(run, tmp_path):
    assert run("--num-queries", "1", "--methods", "random")[0] == 0
    before = (tmp_path / "cf" / "results.json").read_bytes()
    code, output = run("--num-queries", "1", "--methods", "random", "--top-k", "11")
    assert code == 2
    assert "top_k is 10 there and 11 here" in output
    assert (tmp_path / "cf" / "results.json").read_bytes() == before
    code, output = run("--num-queries", "1", "--methods", "random", "--seed", "1")
    assert code in (0, 2)
    if code == 2:
        assert "trained without other images" in output


def test_the_run_must_be_one(run, tmp_path):
    code, output = run(of=tmp_path / "absent")
    assert code == 2
    assert "a run must be an existing folder" in output
    os.mkdir(tmp_path / "empty")
    code, output = run(of=tmp_path / "empty")
    assert code == 2
    assert "must be a finished run of dtrak.attribute" in output
