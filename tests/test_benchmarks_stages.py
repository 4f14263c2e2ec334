"""The stages of CIFAR-2: what is timed is what the budget speaks of, also without diffusers."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
stages = importlib.import_module("stages")

CPU = torch.device("cpu")


def test_the_layers_are_those_of_the_u_net():
    from dtrak.training.presets import get_preset

    entries = stages.read_layers()
    assert entries == stages.trace_layers()
    size = 0
    for entry in entries:
        o = entry["options"]
        if entry["kind"] == "linear":
            weight, outputs = o["in_features"] * o["out_features"], o["out_features"]
        else:
            outputs = o["out_channels"]
            weight = o["in_channels"] * outputs * math.prod(o["kernel_size"])
        size += entry["count"] * (weight + outputs * o["bias"])
    # all but norms
    assert 0.998 < size / get_preset("cifar2").num_parameters < 1


def test_a_stack_of_layers_is_a_chain():
    small = [
        e
        for e in stages.read_layers()
        if math.prod(e["x"]) * math.prod(e["options"].get("kernel_size", [1])) < 30_000
    ]
    stack = stages.LayerStack([e | {"count": 1} for e in small[:5]])
    assert {type(layer).__name__ for layer in stack.layers} == {"Linear", "Conv2d"}
    x = torch.randn(3, 8, requires_grad=True)
    stack(x).square().mean().backward()
    for tensor in (x, *stack.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0
    # rows do not meet
    with torch.no_grad():
        whole, first = stack(x), stack(x[:1])
    assert torch.allclose(whole[:1], first, atol=1e-6)


def test_every_budget_is_the_name_of_a_stage():
    job = stages.make_job(CPU, tiny=True)
    grad_dim = sum(parameter.numel() for parameter in job.model.parameters())
    # fewer columns are enough for names
    sizes = stages.Sizes(N=4, M=2, S=2, K=256, batch=2, dense_batch=1, dampings=3)
    rows = [
        *stages.backward_stages(job, sizes, CPU, 1),
        *stages.projection_stages(grad_dim, sizes, CPU, 1),
        stages.solver_stage(sizes, CPU),
    ]
    seconds = {row["stage"]: row["seconds"] for row in rows}
    rows += list(stages.totals(seconds))
    assert set(stages.BUDGETS) <= {row["stage"] for row in rows}
    by_name = {row["stage"]: row for row in rows}
    # a batch is multiplied up to N
    step = by_name["an ordinary training step"]
    assert step["seconds"] == pytest.approx(2 * step["batch_seconds"])
    parts = ("features with sjlt", "Gram and 27 dampings")
    assert by_name["total with sjlt"]["seconds"] == pytest.approx(
        sum(by_name[part]["seconds"] for part in parts)
    )
    assert all(parameter.requires_grad for parameter in job.model.parameters())


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["stages.py", "--smoke", *arguments])
    monkeypatch.setattr(
        stages, "TINY", stages.Sizes(N=4, M=2, S=2, K=256, batch=2, dense_batch=1, dampings=3)
    )
    with pytest.raises(SystemExit) as ended:
        stages.main()
    return ended.value.code


# slow: the next one runs without diffusers as well, but for one stage
@pytest.mark.full
def test_without_diffusers_the_layers_stand_in(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "dtrak.training.presets", None)
    assert run(monkeypatch, "--out", str(tmp_path)) == 0
    assert "the layers of the U-Net alone, without diffusers" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert {"features with sjlt", "total with rademacher"} <= {row["stage"] for row in rows}


def test_a_stage_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "dtrak.training.presets", None)

    def broken(*_, **__):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(stages, "GradientSketcher", broken)
    assert run(monkeypatch, "--out", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "failed: RuntimeError: out of memory" in out
    assert "dense projection" in out
    assert "total with rademacher" in out
    assert "total with sjlt" not in out


def test_budgets_are_only_held_against_real_sizes(capsys):
    row = {"stage": "total with sjlt", "seconds": 1.0}
    stages.write(None, row | {"tiny": True})
    stages.write(None, row | {"tiny": False})
    tiny, real = capsys.readouterr().out.splitlines()
    assert "target" not in tiny
    assert "target 6.5 s" in real
