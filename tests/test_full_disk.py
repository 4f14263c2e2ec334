"""A disk that is full while the main job writes: one line, nothing lost, and the same bits."""

import os
import subprocess

import pytest
import torch
from finished_run import make_images, results
from safetensors.torch import load_file
from test_sketcher import small_unet
from typer.testing import CliRunner

from dtrak.attribute import app
from dtrak.features import extraction
from dtrak.features import store as stores
from dtrak.features.store import FeatureStore
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and how it is made of another size, in bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    made = subprocess.run([*mount, "size=64k", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no disk of its own size: {made.stderr.strip() or 'mount failed'}")

    def resize(size):
        subprocess.run([*mount, f"remount,size={size}", "tmpfs", place], check=True)

    yield place, resize
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def attribute(tmp_path, monkeypatch):
    """The main job on a small model; gives (exit code, what was said)."""
    monkeypatch.setattr(stores, "_ROWS_PER_SHARD", 16)
    monkeypatch.setattr(extraction, "ROWS_PER_PART", 8)
    UNet(small_unet().float(), linear_process()).save(tmp_path / "model")
    words = (
        "--model", tmp_path / "model", "--data", make_images(tmp_path / "images"),
        "--timesteps", 1, "--proj-dim", 1024, "--num-queries", 3, "--batch-size", 4,
        "--device", "cpu", "--output",
    )  # fmt: skip

    def run(output):
        done = CliRunner().invoke(app, [*map(str, words), str(output)])
        return done.exit_code, done.output

    return run


def used(folder):
    # as pages, which is what such a disk counts
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_full_disk_loses_nothing(attribute, disk, tmp_path):
    code, said = attribute(tmp_path / "whole")
    assert code == 0, said
    place, resize = disk
    whole, kept = used(tmp_path / "whole"), {}
    for part in (0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97):
        resize(int(whole * part))
        code, said = attribute(place / "run")
        # not a page is left to say otherwise
        assert (code, said.count("error: ")) == (2, 1), (part, said)
        assert "error: no space left on the device: free some and run the same" in said
        assert not list(place.rglob("*.partial")), part
        assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
        kept = {file: file.stat().st_mtime_ns for file in place.rglob("0?????.safetensors")}
    assert kept
    resize(4 * whole)
    assert attribute(place / "run")[0] == 0
    assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
    for manifest in (tmp_path / "whole").rglob("manifest.json"):
        if "features" not in str(manifest):
            continue
        there = place / "run" / manifest.parent.relative_to(tmp_path / "whole")
        assert torch.equal(
            FeatureStore.read(there).load(), FeatureStore.read(manifest.parent).load()
        )
    scores = [
        load_file(results(at) / "scores.safetensors") for at in (tmp_path / "whole", place / "run")
    ]
    assert torch.equal(*(found["scores"] for found in scores))
