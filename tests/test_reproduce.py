"""The guide to the paper: its commands parse and its costs follow from the presets."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from dtrak.training import presets

DOCS = Path(__file__).parents[1] / "docs"
# as they are shipped: other tests make a tiny one known
PRESETS = dict(presets.PRESETS)
TEXT = (DOCS / "reproduce.md").read_text(encoding="utf-8")


def commands(text: str = TEXT) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(python -m dtrak[^`…]*)`", text)
    return [line.strip() for line in lines if line.strip()] + inline


def parse(line):
    """Every option exists and takes such a value, and none that is required is missing."""
    python, flag, module, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-m")
    command = typer.main.get_command(importlib.import_module(module).app)
    context = command.make_context(module, list(arguments))
    if hasattr(command, "resolve_command"):
        # click 8.2 made it private
        held = getattr(context, "_protected_args", None) or getattr(context, "protected_args", [])
        rest = [*held, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert not context.args
    named = context.params.get("preset")
    assert named is None or named in PRESETS


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    parse(line)


def test_options_named_in_the_text_exist():
    known = set()
    for name in ("attribute", "counterfactual", "lds", "report", "train"):
        command = typer.main.get_command(importlib.import_module(f"dtrak.{name}").app)
        for part in (command, *getattr(command, "commands", {}).values()):
            known |= {option for p in part.params for option in p.opts + p.secondary_opts}
    assert set(re.findall(r"`?(--[a-z][a-z-]*)", TEXT)) <= known


def test_every_preset_is_there():
    for name in PRESETS:
        assert f"`{name}`" in TEXT or f"--preset {name}" in TEXT


def forward_flops(preset) -> int:
    """Of one image, counted without computing anything."""
    with torch.device("meta"):
        if preset.lora is None:
            unet = preset.make_model(0).module.to("meta")
            inputs = [torch.zeros(1, 3, preset.size, preset.size), torch.zeros(1)]
        else:
            # Stable Diffusion 1.x
            unet = UNet2DConditionModel(
                sample_size=32, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8,
                cross_attention_dim=768,
            )  # fmt: skip
            inputs = [torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, 77, 768)]
        with FlopCounterMode(display=False) as counter:
            unet(*inputs)
    return counter.get_total_flops()


# slow: counts operations of the published networks
@pytest.mark.full
def test_costs_follow_from_the_presets():
    table = re.search(r"<!-- costs: begin -->\n(.*?)<!-- costs: end -->", TEXT, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == [
        n for n in PRESETS if n not in ("digits", "cifar2-16")
    ]
    for name, F, *cells in rows:
        preset = PRESETS[name.strip("`")]
        flops = forward_flops(preset)
        assert float(F) * 1e9 == pytest.approx(flops, rel=0.005)
        N, epochs = preset.train.size or preset.train.pool, preset.recipe.epochs
        models, queries = preset.num_subsets * preset.num_model_seeds, 2 * preset.num_generated
        assert (models, queries, preset.subset_fraction) == (192, 2000, 0.5)
        expected = [
            epochs * N * 3,
            models * epochs * (N // 2) * 3,
            models * queries * 3 * 1000,
            models * queries * 3 * 100,
            (N + queries) * 100 * 3,
            180 * epochs * (N - 1000) * 3,
        ]
        for cell, images in zip(cells, expected, strict=True):
            assert cell == "" or float(cell) * 1e18 == pytest.approx(images * flops, rel=0.006)


def test_hours_follow_from_the_table():
    pixel, latent = (10**18 / rate / 3600 for rate in (60e12, 150e12))
    assert f"1 EFLOP is {pixel:.1f} hours and {latent:.1f} hours" in " ".join(TEXT.split())
    text = " ".join(TEXT.split())
    assert "83 hours with T = 1,000 and 23 with T = 100, its counterfactual 25" in text
    for hours, parts in ((83, (0.0373, 3.59, 14.3)), (23, (0.0373, 3.59, 1.43)), (25, (5.38,))):
        assert hours == round(sum(parts) * pixel)
    assert "CelebA's LDS 208 or 58 hours" in text
    for hours, losses in ((208, 35.8), (58, 3.58)):
        assert hours == round((0.0931 + 8.94 + losses) * pixel)


@pytest.mark.parametrize("line", [line for line in commands(
    (DOCS / "training.md").read_text(encoding="utf-8")) if line.startswith("python -m dtrak.")
    and len(line.split()) > 3])  # fmt: skip
def test_commands_of_ones_own_models_parse(line):
    parse(line)
