"""Fine-tuning a text-to-image model into a folder: a LoRA that Diffusers and `dtrak` read."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from .. import __version__
from ..data.captions import load_captions
from ..data.images import load_data
from ..data.samples import Samples
from ..features.latents import fill_latents, open_latents, read_posteriors
from ..models import load
from ..models.denoiser import Denoiser
from ..models.lora import LORA_FILES
from ..runs.choices import LORA_TARGETS, TRAINING_FILE
from ..runs.console import progress_bar
from ..runs.files import write_atomically
from ..runs.folders import check_folder, claim_folder
from .from_preset import check_precision, checkpoint_folder, checkpoint_steps, read_ids
from .lora_trainer import describe_model, describe_training, train_lora
from .presets import Preset, get_preset
from .recipe import Recipe
from .train_lora_options import RANK, Options, check_options
from .trainer import make_accelerator

# the presets that fine-tune share one recipe, the published one
_PUBLISHED = "artbench2"
_STATE_FILE = "training.pt"


def _load_data(options: Options, preset: Preset | None, model: Denoiser) -> Samples:
    """The images with their captions."""
    if preset is not None:
        data = preset.load_data("train", options.data, skip_corrupt=options.skip_corrupt)
        return data.conditioned(preset.captions(data.labels or []))
    assert options.data is not None
    data = load_data(
        options.data,
        channels=model.channels,
        size=options.resolution or model.size,
        skip_corrupt=options.skip_corrupt,
        resize=options.resize,
    )
    return data.conditioned(load_captions(options.data, data, options.caption))


def _select(
    options: Options, preset: Preset | None, data: Samples
) -> tuple[list[int], dict[str, Any]]:
    """Positions of the images to train on, and how they were chosen."""
    if preset is not None and options.subset is not None:
        chosen = sorted(preset.subset_indices(data, options.subset, options.family))
        return chosen, {"subset": options.subset, "family": options.family}
    if options.without is not None:
        removed = set(read_ids(options.without))
        unknown = removed - set(data.ids)
        if unknown:
            raise ValueError(
                f"--without must name training images, got {len(unknown)} others, such as "
                f"{min(unknown)!r}; theirs are like {data.ids[0]!r}"
            )
        kept = [position for position, name in enumerate(data.ids) if name not in removed]
        if not kept:
            raise ValueError(f"--without must leave at least one image, got all {len(data)}")
        return kept, {"without": f"{len(data) - len(kept)} images"}
    return list(range(len(data))), {}


def _recipe(options: Options, preset: Preset | None) -> Recipe:
    recipe = (preset or get_preset(_PUBLISHED)).recipe
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    elif options.subset is not None:
        # the published subset models have seeds 0, 1 and 2
        recipe = replace(recipe, seed=0)
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps, epochs=None)
    if options.batch_size is not None:
        recipe = replace(recipe, batch_size=options.batch_size)
    if options.learning_rate is not None:
        recipe = replace(recipe, learning_rate=options.learning_rate)
    return recipe


def run_lora_training(options: Options, console: Console) -> Path:
    """Train, or find the finished LoRA in the output folder.

    Args:
        options: what to do.
        console: where progress goes.

    Returns:
        The output folder, which `dtrak.models.load` reads as a LoRA.

    Raises:
        ValueError: an option, the model, the data or the output folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    with ExitStack() as held:
        return _train(options, console, held)


def _train(options: Options, console: Console, held: ExitStack) -> Path:
    preset = check_options(options)
    output = Path(options.output)
    recipe = _recipe(options, preset)
    lora = preset.lora if preset is not None else None
    accelerator = make_accelerator(options.device, options.mixed_precision)
    check_precision(accelerator)
    console.quiet = not accelerator.is_main_process
    rank = options.rank or (RANK if lora is None else lora.rank)
    base = options.model or (lora.base_model if lora is not None else "")
    targets = LORA_TARGETS if lora is None else lora.target_modules
    model = load(base).put_adapter(rank, seed=recipe.seed, targets=targets)
    about: dict[str, Any] = {
        "preset": options.preset,
        "base": base,
        "rank": rank,
        "targets": targets,
        "caption_dropout": options.caption_dropout,
        "mixed_precision": options.mixed_precision,
    }
    # images take minutes to read: another model is refused before
    check_folder(output, TRAINING_FILE, describe_model(model, recipe, **about), partly=True)
    data = _load_data(options, preset, model)
    chosen, selection = _select(options, preset, data)
    texts = data.conditions_of(chosen) or []
    steps = recipe.num_steps(len(chosen))
    kept_steps = checkpoint_steps(steps, options.keep_checkpoints)
    settings = describe_training(model, texts, recipe, fingerprint=data.fingerprint, **about)
    settings["data"] |= selection
    settings["kept checkpoints"] = kept_steps
    if accelerator.is_main_process:
        # a finished LoRA is only read
        is_done = (output / LORA_FILES[0]).is_file()
        claim_folder(output, TRAINING_FILE, settings, None if is_done else held)
    accelerator.wait_for_everyone()
    if (output / LORA_FILES[0]).is_file():
        console.print(f"already trained: {output}", highlight=False, soft_wrap=True)
        return output
    posteriors = _encode(options, model, data, accelerator, console)[chosen]
    parameters = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    console.print(
        f"{data.source}: {len(chosen):,} images, {parameters:,} parameters, {steps:,} steps of "
        f"{recipe.batch_size} on {accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision {options.mixed_precision}",
        highlight=False,
        soft_wrap=True,
    )
    with (
        progress_bar(console, "train the LoRA") as progress,
        torch.backends.cudnn.flags(deterministic=True, benchmark=False),
    ):
        train_lora(
            model,
            posteriors,
            texts,
            recipe,
            caption_dropout=options.caption_dropout,
            checkpoint=output / _STATE_FILE,
            checkpoint_every=options.checkpoint_every,
            progress=progress,
            accelerator=accelerator,
            keep_at=kept_steps,
            keep=lambda step: _save(model, checkpoint_folder(output, step)),
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(model, output, settings, accelerator)
    accelerator.end_training()
    console.print(f"LoRA: {output}", highlight=False, soft_wrap=True)
    return output


def _encode(
    options: Options,
    model: Denoiser,
    data: Samples,
    accelerator: Accelerator,
    console: Console,
) -> torch.Tensor:
    """Posteriors of all images, by the main process, the others wait."""
    folder = Path(options.latents) if options.latents else Path(options.output) / "latents"
    if accelerator.is_main_process:
        store = open_latents(folder, model, data, flips=True)
        if store.missing():
            with progress_bar(console, "latents of training images") as progress:
                fill_latents(store, model, data, accelerator.device, progress=progress)
    accelerator.wait_for_everyone()
    return read_posteriors(open_latents(folder, model, data, flips=True), model, data)


def _save(model: Denoiser, folder: Path) -> None:
    """Write the adapter so that a killed run leaves no half one that passes for a whole one."""
    partial = folder / "lora.partial" if folder.exists() else folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    if not folder.exists():
        partial.rename(folder)
        return
    (partial / LORA_FILES[0]).replace(folder / LORA_FILES[0])
    partial.rmdir()


def _finish(
    model: Denoiser, output: Path, settings: dict[str, Any], accelerator: Accelerator
) -> None:
    facts = {
        "trained weights": model.identity()["lora"],
        "processes": accelerator.num_processes,
        "dtrak": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else platform.machine(),
    }
    content = json.dumps({"settings": settings, "facts": facts}, indent=1)
    write_atomically(output / TRAINING_FILE, content.encode())
    _save(model, output)
    (output / _STATE_FILE).unlink(missing_ok=True)
