"""Configurations of the fused sketch: found where they were measured, refused where impossible."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from numerics import assert_as_good_as
from test_sketch_kernel import torch_path, true_gradients

from dtrak_kernels import tuning
from dtrak_kernels.sjlt import triton as sketch_kernel
from dtrak_kernels.sjlt.config import (
    Form,
    SketchConfig,
    config_on,
    default_config,
    find_config,
    read_config,
    read_form,
    refusal,
    sizes_of,
)
from dtrak_kernels.sjlt.reference import sjlt_matrix

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sketch_layers = importlib.import_module("sketch_layers")

FORM = Form((128, 128), torch.bfloat16)
CARD = "Some card"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the card's entries, ``(form, T, config)``, where the kernels look."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: CARD)
    monkeypatch.setattr(tuning, "arch_of", lambda _: 90)

    def to_file(*entries):
        tuning._entries.cache_clear()
        config_on.cache_clear()
        rows = [{"sizes": sizes_of(form, T), "config": config} for form, T, config in entries]
        (tmp_path / "sketch.json").write_text(json.dumps({CARD: rows}))

    yield to_file
    tuning._entries.cache_clear()
    config_on.cache_clear()


def on_card(form=FORM, reduction=2560):
    return config_on(torch.device("cuda"), form, reduction)


def test_what_was_measured_nearby_is_launched(write):
    default = find_config(FORM, 90, 2560)
    short, long = {"block_t": 32, "num_warps": 4}, asdict(replace(default, num_stages=4))
    write((FORM, 160, short), (FORM, 10240, long))
    assert on_card(reduction=100) == SketchConfig(**short)
    assert on_card(reduction=8000) == SketchConfig(**long)
    # another dtype of the same width is the same problem to the compiler
    assert on_card(replace(FORM, dtype=torch.float16), 160) == SketchConfig(**short)
    assert config_on(torch.device("cpu"), FORM, 160) == find_config(FORM, 80, 160)


@pytest.mark.parametrize(
    "change",
    [
        {"tile": (128, 64)},
        {"dtype": torch.float32},
        {"is_one_tap": False},
        {"is_one_axis": True},
        {"is_channels_last": False},
        {"is_wide": True},
        {"is_grouped": True},
    ],
    ids=str,
)
def test_other_forms_keep_their_default(change, write):
    """What fits one form may not fit another."""
    write((FORM, 160, {"block_t": 128, "num_stages": 4}))
    form = replace(FORM, **change)
    expected = default_config(
        90,
        form.tile,
        form.dtype,
        160,
        is_one_tap=form.is_one_tap,
        is_wide=form.is_wide,
        is_channels_last=form.is_channels_last,
    )
    assert on_card(form, 160) == expected


@pytest.mark.parametrize(
    "config, message",
    [
        ({"blok_t": 64}, "fields must be among block_t, num_warps, .*, got 'blok_t'"),
        ({"block_t": 48}, "block_t must be a power of two from 16 to 256, got 48"),
        ({"block_t": 8}, "block_t must be a power of two from 16 to 256, got 8"),
        ({"block_t": "64"}, "block_t must be a power of two from 16 to 256, got '64'"),
        ({"num_warps": 6}, "num_warps must be a power of two up to 32, got 6"),
        ({"num_warps": True}, "num_warps must be a power of two up to 32, got True"),
        ({"num_stages": 0}, "num_stages must be from 1 to 8, got 0"),
        ({"is_rolled": 1}, "is_rolled must be true or false, got 1"),
        (
            {"input_precision": "tf16"},
            "input_precision must be one of ieee, tf32x3, tf32, got 'tf16'",
        ),
        ({"input_precision": "tf32"}, "input_precision must be 'ieee', .*, got 'tf32'"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(config, message, write):
    write((FORM, 160, config))
    with pytest.raises(ValueError, match=rf"configs/sketch\.json, Some card, one tap.*: {message}"):
        on_card()
    with pytest.raises(ValueError, match=f"here: {message}"):
        read_config(config, "here")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"Some card": [', r"sketch\.json must be JSON, got Expecting value"),
        ('["Some card"]', r"sketch\.json must map Some card to a list of"),
        ('{"Some card": [{"sizes": {"T": 0}, "config": {}}]}', "words or numbers above 0"),
        ('{"Some card": [{"sizes": {"T": 1}}]}', r"sketch\.json must map Some card to a list of"),
    ],
)
def test_broken_files_are_refused(text, message, write, tmp_path):
    write()
    (tmp_path / "sketch.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        on_card()


def test_entries_of_other_letters_do_not_count(write, tmp_path):
    write()
    entry = {"sizes": {"form": str(FORM), "N": 3}, "config": {"block_t": 128}}
    (tmp_path / "sketch.json").write_text(json.dumps({CARD: [entry]}))
    assert on_card() == find_config(FORM, 90, 2560)


def test_forms_are_read_as_they_are_written():
    for layer in sketch_layers.LAYERS:
        assert read_form(str(layer.form)) == layer.form
    with pytest.raises(ValueError, match=r"form must be like 'one tap, .*, got 'three taps'"):
        read_form("three taps")


class Recorder:
    """In place of the kernel: what it was launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append(arguments)


def test_the_kernel_is_launched_as_the_file_says(write, monkeypatch):
    """From the layer to the constants of the launch, for a device that has a file."""
    layer = sketch_layers.TINY[0]
    tuned = {"block_t": 32, "num_warps": 2, "num_stages": 4, "is_rolled": False}
    write((layer.form, layer.reduction, tuned))
    recorder, on_device = Recorder(), config_on
    monkeypatch.setattr(sketch_kernel, "_sketch_kernel", recorder)
    monkeypatch.setattr(
        sketch_kernel, "config_on", lambda _, *problem: on_device(torch.device("cuda"), *problem)
    )
    out = torch.zeros(layer.samples, layer.proj_dim)
    inputs = layer.make(torch.device("cpu"))
    sketch_kernel.launch_sketch(*inputs, layer.sketch, out, layer.timesteps)
    # an explicit configuration comes first
    sketch_kernel.launch_sketch(*inputs, layer.sketch, out, layer.timesteps, SketchConfig(16))
    names = ("BLOCK_T", "num_warps", "num_stages", "IS_ROLLED", "INPUT_PRECISION")
    found = [tuple(launch[name] for name in names) for launch in recorder.launches]
    assert found == [(32, 2, 4, False, "ieee"), (16, 8, 3, True, "ieee")]


@pytest.mark.parametrize("layer", sketch_layers.LAYERS + sketch_layers.TINY, ids=lambda x: x.name)
def test_layers_are_tuned_as_they_are_launched(layer, monkeypatch):
    """The form and the reduction that the tuner stores by are those the launch looks up by."""
    asked = []

    class AskedError(Exception):
        pass

    def ask(device, form, reduction):
        asked.append((form, reduction))
        raise AskedError

    monkeypatch.setattr(sketch_kernel, "config_on", ask)
    # one row; the batch must not matter
    one = replace(layer, samples=1, timesteps=1)
    out = torch.zeros(1, layer.proj_dim)
    with pytest.raises(AskedError):
        sketch_kernel.launch_sketch(*one.make(torch.device("cpu")), one.sketch, out)
    assert asked == [(layer.form, one.reduction)]
    assert layer.reduction == layer.timesteps * one.reduction


def tried(layer, device):
    """Candidates of the tuner; the interpreter knows neither warps nor stages, nor what fits."""
    default = find_config(layer.form, tuning.arch_of(device), layer.reduction)
    steps = sketch_layers.CHOICES["block_t"]
    if device.type != "cuda":
        return [replace(default, block_t=block_t) for block_t in steps]
    found = sketch_layers.candidates(layer.form, tuning.arch_of(device), max(steps))
    return [config for config, why in found if not why]


@pytest.mark.parametrize("layer", sketch_layers.TINY, ids=lambda layer: layer.name)
def test_no_candidate_changes_the_features(layer, device):
    """Every one of them against the definition, in float64."""
    module, x, grads = layer.make(device)
    sketch = layer.sketch
    matrix = sjlt_matrix([layer.shape], layer.proj_dim, sketch.seed)
    oracle = true_gradients(module.cpu(), x, grads, layer.timesteps) @ matrix
    eager = torch_path(module.to(device), x, grads, sketch, layer.timesteps)
    configs = tried(layer, device)
    for config in (*configs, replace(configs[0], is_rolled=False)):
        out = torch.zeros(layer.samples, layer.proj_dim, device=device)
        sketch_kernel.launch_sketch(module, x, grads, sketch, out, layer.timesteps, config)
        assert_as_good_as(out, eager=eager, oracle=oracle)


@pytest.mark.parametrize("arch", [80, 90, 100, "gfx942"])
def test_candidates_are_few_and_have_the_default_among_them(arch):
    for layer in sketch_layers.LAYERS:
        form, T = layer.form, layer.reduction
        default = find_config(form, arch, T)
        assert refusal(default, form, arch, T) == "", layer
        reasons = [why for _, why in sketch_layers.candidates(form, arch, T)]
        # in float32 on sm_100 most spill; the default is timed besides
        fewest = 2 if (arch, form.dtype) == (100, torch.float32) else 3
        assert fewest <= reasons.count("") <= 36, layer


def test_what_spilled_is_not_tried():
    for (arch, text), configs in sketch_layers.SPILLED.items():
        form = read_form(text)
        assert str(form) in {str(layer.form) for layer in sketch_layers.LAYERS}
        found = {
            (c.num_warps, c.block_t, c.num_stages): why
            for c, why in sketch_layers.candidates(form, arch, 2**14)
        }
        for config in configs:
            # whatever a rule refuses needs no entry
            assert found[config] == "it spills on this architecture"
            assert refusal(SketchConfig(config[1], config[0], config[2]), form, arch, 2**14) == ""


def test_no_two_layers_are_stored_as_one():
    keys = [json.dumps(sizes_of(x.form, x.reduction)) for x in sketch_layers.LAYERS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "config, arch, message",
    [
        (SketchConfig(128), 90, "128 positions a step, and there are 10"),
        (SketchConfig(16, num_warps=4), 90, "128 entries a thread do not fit into registers"),
        (SketchConfig(16, num_warps=2), "gfx942", "128 entries a thread do not fit into registers"),
    ],
)
def test_reasons_are_given(config, arch, message):
    assert refusal(config, FORM, arch, 10) == message


def test_memory_is_counted():
    needs = "262144 bytes of shared memory, and a program has 232448"
    assert refusal(SketchConfig(128, 8, 4), FORM, 90, 2560) == needs
    assert refusal(SketchConfig(128, 8, 3), FORM, 90, 2560) == ""
    spills = "operands of 128 positions a step do not fit into registers"
    assert refusal(SketchConfig(128, 8, 2), FORM, 80, 2560) == spills
    assert refusal(SketchConfig(64, 8, 2), FORM, "gfx942", 2560) == spills.replace("128", "64")
    # on this card 16 warps spill whatever the step
    assert refusal(SketchConfig(16, 16, 2), FORM, 80, 2560) == spills.replace("128", "16")
    single = replace(FORM, dtype=torch.float32)
    assert refusal(SketchConfig(32, 16, 2), single, 90, 2560) == spills.replace("128", "32")
    # an unknown card is taken for a small one
    assert "a program has 65536" in refusal(SketchConfig(64, 8, 3), FORM, 120, 2560)
    thin = replace(FORM, tile=(128, 16))
    assert (
        refusal(SketchConfig(16, 16), thin, 90, 2560)
        == "4 entries a thread leave most of it without work"
    )


def test_default_configurations_follow_the_layer():
    fast = {"is_one_tap": True, "is_wide": False, "is_channels_last": True}
    large = (128, 128)
    assert default_config(90, large, torch.bfloat16, 1000, **fast).block_t == 64
    assert default_config(90, large, torch.bfloat16, 10, **fast).block_t == 16
    assert default_config(90, large, torch.bfloat16, 1000, **fast | {"is_wide": True}).block_t == 16
    assert default_config(90, large, torch.float32, 1000, **fast).input_precision == "ieee"
