"""What `dtrak.train` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..runs.choices import (
    LORA_TARGETS,
    PRECISIONS,
    check_choice,
    check_counts,
    check_weights,
)
from ..runs.stated import Stated, option
from ..runs.usual import OF_CHECKPOINT, RESIZE, RESOLUTION, SKIP_CORRUPT
from .data import DataSource, read_ids
from .presets import PRESETS, SUBSET_FAMILIES, get_preset
from .recipe import SCHEDULES, Recipe
from .record import Training
from .start import Start

# the presets that fine-tune share one recipe, the published one
_ADAPTERS = "artbench2"
_RECIPE = "Recipe"
# of a model of one's own: the published one for pixels, without flips, which may be wrong
OWN_RECIPE = Recipe(
    epochs=200,
    batch_size=128,
    learning_rate=1e-4,
    partial_batches=True,
    dropout=0.1,
    warm_up_from_zero=True,
)


@dataclass(frozen=True)
class Options(Stated):
    """What the command line asked for."""

    output: str = option(help="Folder of what is trained.", is_path=True)
    preset: str | None = option(
        None, help=f"Published experiment, its data, model and recipe: {', '.join(PRESETS)}."
    )
    data: str | None = option(
        None,
        help="Training images: a folder, a parquet file, a datasets folder or a hub name, with "
        "captions or a column 'label' for a model that reads them. For a preset: where its data "
        "set lies. Default: the preset's hub name.",
        is_path=True,
    )
    config: str | None = option(
        None,
        help="Configuration of a UNet2DModel of Diffusers, a JSON file: train it from scratch. A "
        "scheduler_config.json beside it is its noise schedule; else that of DDPM.",
        is_path=True,
    )
    model: str | None = option(
        None,
        help="Folder that Diffusers wrote, or a hub name: go on from that model, or with "
        "--lora-rank train an adapter of it. For a preset that fine-tunes: its base.",
        is_path=True,
    )
    weights: str | None = option(**OF_CHECKPOINT)
    lora_rank: int | None = option(
        None, help="Train a LoRA of this rank instead of the model. Default: the preset's, if any."
    )
    caption: str | None = option(
        None,
        help="Caption of every image instead of those that lie with them, such as 'a {label} "
        "painting'.",
    )
    resolution: int | None = option(**RESOLUTION)
    resize: bool = option(**RESIZE)
    skip_corrupt: bool = option(**SKIP_CORRUPT)
    subset: int | None = option(
        None, help="Train on this published subset (from 0) of the preset's images."
    )
    family: str = option("lds-val", help=f"Of the subset: {', '.join(SUBSET_FAMILIES)}.")
    without: str | None = option(
        None, help="Text file of ids, one a line: train without these images.", is_path=True
    )
    seed: int | None = option(
        None,
        help="Of the initial weights and the training. Default: the recipe's; 0 for a subset.",
        panel=_RECIPE,
    )
    epochs: int | None = option(
        None, help="Passes over the images. Default: the recipe's.", panel=_RECIPE
    )
    steps: int | None = option(None, help="Optimiser steps, instead of epochs.", panel=_RECIPE)
    batch_size: int | None = option(
        None, help="Images per step, over all processes. Default: the recipe's.", panel=_RECIPE
    )
    learning_rate: float | None = option(
        None, help="Peak of AdamW's learning rate. Default: the recipe's.", panel=_RECIPE
    )
    schedule: str | None = option(
        None,
        help=f"Course of the learning rate after its warm-up: {', '.join(SCHEDULES)}. Default: the "
        "recipe's.",
        panel=_RECIPE,
    )
    flip: bool | None = option(
        None,
        help="Mirror each image left to right with probability a half. Default: the recipe's; of "
        "your own model not, of a LoRA as published.",
        flags=("--flip/--no-flip",),
        panel=_RECIPE,
    )
    dropout: float | None = option(
        None, help="Of dropout layers while training. Default: the recipe's.", panel=_RECIPE
    )
    caption_dropout: float | None = option(
        None,
        help="Probability that a caption is replaced by the empty one. Default: the recipe's.",
        panel=_RECIPE,
    )
    ema: float | None = option(
        None,
        help="Largest decay of an exponential moving average of the weights, which is then the "
        "model. Default: none.",
        panel=_RECIPE,
    )
    mixed_precision: str = option(
        "no", help=f"Precision of the forward pass: {', '.join(PRECISIONS)}.", panel=_RECIPE
    )
    checkpoint_every: int = option(
        500, help="Steps between the states an interrupted run resumes from."
    )
    keep_checkpoints: int = option(
        0,
        help="Keep this many models along the way, at equal distances, as checkpoint-<step> "
        "(TracInCP: 4).",
    )
    latents: str | None = option(
        None,
        help="Folder where latents of all images are kept, to share between runs of a model of "
        "latents. Default: in the output folder.",
        is_path=True,
    )
    device: str = option("auto", help="auto (what accelerate finds) or cpu.")


def check_options(options: Options) -> None:
    """Validate every option that needs no data.

    Raises:
        ValueError: one is out of range or unknown, or some do not go together; one clear line.
    """
    check_choice("--family", options.family, SUBSET_FAMILIES)
    check_choice("--mixed-precision", options.mixed_precision, PRECISIONS)
    check_choice("--device", options.device, ("auto", "cpu"))
    if options.schedule is not None:
        check_choice("--schedule", options.schedule, SCHEDULES)
    check_counts(
        lora_rank=options.lora_rank,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        checkpoint_every=options.checkpoint_every,
        resolution=options.resolution,
    )
    if options.keep_checkpoints < 0:
        raise ValueError(f"--keep-checkpoints must be at least 0, got {options.keep_checkpoints}")
    for name, largest in (("ema", ")"), ("dropout", ")"), ("caption_dropout", "]")):
        value = getattr(options, name)
        if value is not None and not (0 <= value < 1 or (value == 1 and largest == "]")):
            raise ValueError(f"--{_dashed(name)} must be in [0, 1{largest}, got {value}")
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be positive, got {options.learning_rate}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {options.seed}")
    if options.subset is not None and options.subset < 0:
        raise ValueError(f"--subset must be at least 0, got {options.subset}")
    for one, other in (("subset", "without"), ("epochs", "steps"), ("config", "model")):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            raise ValueError(f"--{one} and --{other} exclude each other, got both")
    check_weights(options.weights, options.model)
    if options.preset is not None:
        _check_preset(options)
    elif options.data is None or (options.config is None and options.model is None):
        raise ValueError(
            "--data and --config or --model must be given where there is no --preset "
            f"({', '.join(PRESETS)})"
        )
    elif options.subset is not None:
        raise ValueError("--subset needs --preset, whose published subset it is")
    elif options.config is not None and options.lora_rank is not None:
        raise ValueError("--lora-rank needs --model, the base of the adapter, got --config")


def _check_preset(options: Options) -> None:
    preset = get_preset(check_choice("--preset", str(options.preset), PRESETS))
    for name in ("config", "resolution", "caption", "resize"):
        if getattr(options, name):
            raise ValueError(f"--{name} is the preset's own with --preset, got another")
    if preset.lora is None:
        for name in ("model", "lora_rank"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{_dashed(name)} is not for --preset {preset.name}, which trains a model of "
                    "its own from scratch"
                )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def plan_training(options: Options) -> Training:
    """What the options ask for.

    Args:
        options: as `check_options` leaves them.

    Raises:
        FileNotFoundError: a file that they name is not there.
        ValueError: it is not what it should be.
    """
    preset = None if options.preset is None else get_preset(options.preset)
    if preset is not None:
        start, recipe = preset.start(options.model), preset.recipe
        if options.lora_rank is not None:
            start = replace(start, rank=options.lora_rank)
    elif options.config is not None:
        from ..models import read_config

        start, recipe = Start(config=read_config(options.config)), OWN_RECIPE
    elif options.lora_rank is not None:
        start = Start(model=options.model, rank=options.lora_rank, targets=LORA_TARGETS)
        recipe = get_preset(_ADAPTERS).recipe
    else:
        start, recipe = Start(model=options.model), OWN_RECIPE
    start = replace(start, weights=options.weights)
    if options.seed is None and options.subset is not None:
        # the published subset models have seeds 0, 1 and 2
        recipe = replace(recipe, seed=0)
    given = {
        "ema_decay": options.ema,
        **{
            name: getattr(options, name)
            for name in (
                "seed", "batch_size", "learning_rate", "schedule", "flip", "dropout",
                "caption_dropout",
            )
        },
    }  # fmt: skip
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps, epochs=None)
    without = () if options.without is None else tuple(read_ids(options.without))
    data = DataSource.asked_for(
        options, subset=options.subset, family=options.family, without=without
    )
    return Training(data, start, recipe, options.mixed_precision)
