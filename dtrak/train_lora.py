"""Fine-tuning a text-to-image model: ``python -m dtrak.train_lora --model … --data … --output …``.

Writes a LoRA folder that ``python -m dtrak.attribute --lora`` and Diffusers read. With several
GPUs, ``accelerate launch -m dtrak.train_lora …`` shares every batch among them. A run that was
interrupted, called again, goes on where it stopped.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # the imports below take seconds, in which Ctrl-C would end in a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import platform
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.console import Console

from . import __version__
from .captions import load_captions
from .console import progress_bar, reporting_errors, run_app
from .data import ImageData, load_data
from .files import write_atomically
from .folders import check_folder, claim_folder
from .latents import fill_latents, open_latents, read_posteriors
from .lora import LORA_FILES, hash_lora, save_lora
from .lora_training import describe_model, describe_training, train_lora
from .options import CAPTION_DROPOUT, PRECISIONS, check_choice
from .presets import PRESETS, SUBSET_FAMILIES, Preset, get_preset
from .recipe import Recipe
from .text_to_image import TRAINING_FILE, TextToImageModel, load_text_to_image
from .train import check_precision, checkpoint_folder, checkpoint_steps, read_ids

# the presets that fine-tune share one recipe, the published one
_PUBLISHED = "artbench2"
_RANK = 128
_STATE_FILE = "training.pt"


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `fine_tune`."""

    output: str
    model: str | None = None
    data: str | None = None
    preset: str | None = None
    caption: str | None = None
    subset: int | None = None
    family: str = "lds-val"
    without: str | None = None
    rank: int | None = None
    seed: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    caption_dropout: float = CAPTION_DROPOUT
    mixed_precision: str = "no"
    checkpoint_every: int = 100
    keep_checkpoints: int = 0
    latents: str | None = None
    resolution: int | None = None
    resize: bool = False
    skip_corrupt: bool = False
    device: str = "auto"


def _check(options: Options) -> Preset | None:
    """Validate every option that needs no data."""
    check_choice("--family", options.family, SUBSET_FAMILIES)
    check_choice("--mixed-precision", options.mixed_precision, PRECISIONS)
    check_choice("--device", options.device, ("auto", "cpu"))
    for name in ("rank", "epochs", "steps", "batch_size", "checkpoint_every", "resolution"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.keep_checkpoints < 0:
        raise ValueError(f"--keep-checkpoints must be at least 0, got {options.keep_checkpoints}")
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be positive, got {options.learning_rate}")
    if not 0 <= options.caption_dropout <= 1:
        raise ValueError(f"--caption-dropout must be in [0, 1], got {options.caption_dropout}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {options.seed}")
    if options.subset is not None and options.subset < 0:
        raise ValueError(f"--subset must be at least 0, got {options.subset}")
    for one, other in (("subset", "without"), ("epochs", "steps")):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            raise ValueError(f"--{one} and --{other} exclude each other, got both")
    tuned = [name for name, preset in PRESETS.items() if preset.lora is not None]
    preset = None if options.preset is None else get_preset(options.preset)
    if preset is not None and preset.lora is None:
        raise ValueError(
            f"--preset must be one that fine-tunes ({', '.join(tuned)}), got {preset.name!r}: "
            "use dtrak.train"
        )
    if preset is None and (options.model is None or options.data is None):
        raise ValueError("--model and --data must be given where there is no --preset")
    if preset is None and options.subset is not None:
        raise ValueError("--subset needs --preset, whose published subset it is")
    return preset


def _load_data(
    options: Options, preset: Preset | None, model: TextToImageModel
) -> tuple[ImageData, list[str]]:
    """The images and their captions."""
    if preset is not None:
        if options.resolution is not None or options.caption is not None:
            raise ValueError("--resolution and --caption are the preset's own, got another")
        data = preset.load_data("train", options.data, skip_corrupt=options.skip_corrupt)
        return data, preset.captions(data.labels or [])
    assert options.data is not None
    data = load_data(
        options.data,
        channels=model.channels,
        size=options.resolution or model.size,
        skip_corrupt=options.skip_corrupt,
        resize=options.resize,
    )
    return data, load_captions(options.data, data, options.caption)


def _select(
    options: Options, preset: Preset | None, data: ImageData
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
        The output folder, which `dtrak.text_to_image.load_text_to_image` reads as a LoRA.

    Raises:
        ValueError: an option, the model, the data or the output folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    with ExitStack() as held:
        return _train(options, console, held)


def _train(options: Options, console: Console, held: ExitStack) -> Path:
    preset = _check(options)
    output = Path(options.output)
    recipe = _recipe(options, preset)
    lora = preset.lora if preset is not None else None
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, cpu=options.device == "cpu" or None
    )
    check_precision(accelerator)
    console.quiet = not accelerator.is_main_process
    rank = options.rank or (_RANK if lora is None else lora.rank)
    base = options.model or (lora.base_model if lora is not None else "")
    model = load_text_to_image(base, rank=rank, seed=recipe.seed)
    about: dict[str, Any] = {
        "preset": options.preset,
        "base": base,
        "rank": rank,
        "caption_dropout": options.caption_dropout,
        "mixed_precision": options.mixed_precision,
    }
    # images take minutes to read: another model is refused before
    check_folder(output, TRAINING_FILE, describe_model(model, recipe, **about), partly=True)
    data, captions = _load_data(options, preset, model)
    chosen, selection = _select(options, preset, data)
    texts = [captions[position] for position in chosen]
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
    parameters = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
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
    model: TextToImageModel,
    data: ImageData,
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


def _save(model: TextToImageModel, folder: Path) -> None:
    """Write the adapter so that a killed run leaves no half one that passes for a whole one."""
    partial = folder / "lora.partial" if folder.exists() else folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_lora(model.unet, partial)
    if not folder.exists():
        partial.rename(folder)
        return
    (partial / LORA_FILES[0]).replace(folder / LORA_FILES[0])
    partial.rmdir()


def _finish(
    model: TextToImageModel, output: Path, settings: dict[str, Any], accelerator: Accelerator
) -> None:
    facts = {
        "trained weights": hash_lora(model.unet),
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


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fine_tune(
    output: Annotated[str, typer.Option(help="Folder of the trained LoRA.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base: a Stable Diffusion folder that Diffusers wrote, or a hub name. Default: "
            "the preset's."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Training images with captions: a folder with metadata.jsonl of {file_name, "
            "text}, a parquet file, a datasets folder or hub name with a column 'text'. For a "
            "preset: where its data set lies."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Published experiment: artbench2 or artbench5."),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            help="Caption of every image instead of those that lie with them, such as 'a {label} "
            "painting'."
        ),
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="Train on this published subset (from 0) of the images.")
    ] = None,
    family: Annotated[
        str, typer.Option(help=f"Of the subset: {', '.join(SUBSET_FAMILIES)}.")
    ] = "lds-val",
    without: Annotated[
        str | None,
        typer.Option(help="Text file of ids, one a line: train without these images."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help=f"Of the LoRA. Default: {_RANK}.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the LoRA's start and the training. Default: 42; 0 for a subset."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images. Default: 100.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step, over all processes. Default: 64.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of AdamW's learning rate. Default: 3e-4.")
    ] = None,
    caption_dropout: Annotated[
        float, typer.Option(help="Probability that a caption is replaced by the empty one.")
    ] = CAPTION_DROPOUT,
    mixed_precision: Annotated[
        str, typer.Option(help=f"Precision of the forward pass: {', '.join(PRECISIONS)}.")
    ] = "no",
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between the states an interrupted run resumes from.")
    ] = 100,
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            help="Keep this many LoRAs along the way, at equal distances, as checkpoint-<step> "
            "(TracInCP: 4)."
        ),
    ] = 0,
    latents: Annotated[
        str | None,
        typer.Option(
            help="Folder where the VAE's latents of all images are kept, to share between runs. "
            "Default: in the output folder."
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Image side, in pixels. Default: the model's.")
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize and centre-crop images to that size.")
    ] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that do not decode.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto (what accelerate finds) or cpu.")] = "auto",
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Fine-tune Stable Diffusion with a LoRA, by the published recipe."""
    options = Options(
        output=output,
        model=model,
        data=data,
        preset=preset,
        caption=caption,
        subset=subset,
        family=family,
        without=without,
        rank=rank,
        seed=seed,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        caption_dropout=caption_dropout,
        mixed_precision=mixed_precision,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        latents=latents,
        resolution=resolution,
        resize=resize,
        skip_corrupt=skip_corrupt,
        device=device,
    )
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        run_lora_training(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.train_lora``."""
    run_app(app, "dtrak.train_lora", arguments)


if __name__ == "__main__":
    main()
