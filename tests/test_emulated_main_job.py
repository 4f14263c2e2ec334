"""The main job on a tiny model with every kernel it launches emulated; its own process."""

import pytest
import torch
from finished_run import OPTIONS, make_images
from numerics import relative_error
from rich.console import Console
from safetensors.torch import load_file
from test_sketcher import small_unet

from dtrak.cli.attribution import run_attribution
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.run import Options
from dtrak_kernels import ops
from dtrak_kernels.gradients import accumulator

pytestmark = [pytest.mark.emulated, pytest.mark.full]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    UNet(small_unet().float(), linear_process()).save(folder / "model")
    return {
        "model": str(folder / "model"),
        "data": str(make_images(folder / "images", 6)),
        "queries": str(make_images(folder / "queries", 2)),
    }


def run(folder, inputs, **options):
    """Features by folder and file, and the scores."""
    changes = {"damping": "0.5", "output": str(folder)}
    with torch.random.fork_rng(devices=[]):
        run_attribution(Options(**{**OPTIONS, **inputs, **changes, **options}), Console(quiet=True))
    return {
        str(path.relative_to(folder)): tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for tensor in load_file(path).values()
    }


JOB = {"projection": "sjlt", "proj_dim": 4096}


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """What the job gives without a kernel."""
    return run(tmp_path_factory.mktemp("torch"), inputs, **JOB)


def test_features_are_those_of_the_torch_path(
    expected, inputs, tmp_path, monkeypatch, emulated_card
):
    before = emulated_card.launches
    for module in (ops, accumulator):
        chosen = module.choose_implementation
        monkeypatch.setattr(
            module,
            "choose_implementation",
            lambda grads, implementation, chosen=chosen: chosen(
                grads, "triton" if implementation is None else implementation
            ),
        )
    actual = run(tmp_path / "emulated", inputs, **JOB)
    assert emulated_card.launches > before + 20
    assert list(actual) == list(expected)
    assert sum(name.startswith("features") for name in actual) >= 2
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < (1e-3 if "scores" in name else 1e-5), name
