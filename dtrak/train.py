"""Training the model of a preset: in full, on a subset, or without some of its images.

``python -m dtrak.train --preset digits --output runs/digits`` writes a Diffusers pipeline. With
several GPUs, ``accelerate launch -m dtrak.train …`` shares every batch among them. A run that was
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.console import Console

from . import __version__
from .console import progress_bar, reporting_errors, run_app
from .data import ImageData
from .diffusion import DiffusionModel, hash_model, load_model
from .files import write_atomically
from .folders import claim_folder
from .options import check_choice
from .presets import PRESETS, SUBSET_FAMILIES, Preset, get_preset
from .recipe import Recipe
from .training import one_thread, train

PRECISIONS = ("no", "fp16", "bf16")
SETTINGS_FILE = "training.json"
_STATE_FILE = "training.pt"


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `train_preset`."""

    preset: str
    output: str
    data: str | None = None
    subset: int | None = None
    family: str = "lds-val"
    without: str | None = None
    seed: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    mixed_precision: str = "no"
    ema: float | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 0
    device: str = "auto"
    skip_corrupt: bool = False


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Where the model after ``step`` steps is kept."""
    return Path(output) / f"checkpoint-{step}"


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """The last steps of ``count`` equal parts of a training: 25, 50, 75 and 100 % for four."""
    return sorted({max(1, round(steps * part / count)) for part in range(1, count + 1)})


def _check(options: Options) -> Preset:
    """Validate every option that needs no data."""
    preset = get_preset(check_choice("--preset", options.preset, PRESETS))
    check_choice("--family", options.family, SUBSET_FAMILIES)
    check_choice("--mixed-precision", options.mixed_precision, PRECISIONS)
    check_choice("--device", options.device, ("auto", "cpu"))
    for name in ("steps", "batch_size", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.keep_checkpoints < 0:
        raise ValueError(f"--keep-checkpoints must be at least 0, got {options.keep_checkpoints}")
    if options.ema is not None and not 0 <= options.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {options.ema}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {options.seed}")
    if options.subset is not None and options.subset < 0:
        raise ValueError(f"--subset must be at least 0, got {options.subset}")
    if options.subset is not None and options.without is not None:
        raise ValueError("--subset and --without exclude each other, got both")
    if preset.lora is not None:
        raise ValueError(
            f"--preset {preset.name} fine-tunes a text-to-image model, which dtrak.train does not: "
            "see python -m dtrak.train_lora"
        )
    return preset


def read_ids(file: str | Path) -> list[str]:
    """The ids in a text file, one a line; empty lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file of ids at {file}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must hold ids, one a line, got {error}") from error
    return [line.strip() for line in lines if line.strip()]


def select_without(data: ImageData, ids: Sequence[str]) -> ImageData:
    """The images whose ids are not among ``ids``, in their order.

    Raises:
        ValueError: an id is of no image, or no image is left.
    """
    removed = set(ids)
    unknown = removed - set(data.ids)
    if unknown:
        raise ValueError(
            f"ids must be of the training images, got {len(unknown)} others, such as "
            f"{min(unknown)!r}; theirs are like {data.ids[0]!r}"
        )
    kept = [position for position, name in enumerate(data.ids) if name not in removed]
    if not kept:
        raise ValueError(f"ids must leave at least one image, got all {len(data)}")
    return data.select(kept)


def _select(preset: Preset, options: Options, data: ImageData) -> tuple[ImageData, dict[str, Any]]:
    """The images to train on, and how they were chosen."""
    if options.subset is not None:
        chosen = sorted(preset.subset_indices(data, options.subset, options.family))
        return data.select(chosen), {"subset": options.subset, "family": options.family}
    if options.without is not None:
        kept = select_without(data, read_ids(options.without))
        return kept, {"without": f"{len(data) - len(kept)} images"}
    return data, {}


def _recipe(preset: Preset, options: Options) -> Recipe:
    recipe = replace(preset.recipe, ema_decay=options.ema)
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    elif options.subset is not None:
        # the published subset models have seeds 0, 1 and 2
        recipe = replace(recipe, seed=0)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps, epochs=None)
    if options.batch_size is not None:
        recipe = replace(recipe, batch_size=options.batch_size)
    return recipe


def _save_model(model: DiffusionModel, folder: Path) -> None:
    """Write a pipeline so that a killed run leaves no half one that passes for a whole one."""
    partial = folder / "model.partial" if folder.exists() else folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    if not folder.exists():
        partial.rename(folder)
        return
    # the index is what makes a folder a pipeline
    names = sorted((path.name for path in partial.iterdir()), key="model_index.json".__eq__)
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (partial / name).replace(folder / name)
    partial.rmdir()


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Let cuDNN choose among its reproducible algorithms only, as the published scripts do."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def run_training(options: Options, console: Console) -> Path:
    """Train, or find the finished model in the output folder.

    Args:
        options: what to do.
        console: where progress goes.

    Returns:
        The output folder, which `dtrak.diffusion.load_model` reads.

    Raises:
        ValueError: an option, the data or the output folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    with ExitStack() as held:
        return _train(options, console, held)


def check_precision(accelerator: Accelerator) -> None:
    """Refuse a precision that the device does not compute in.

    Raises:
        ValueError: it is one.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed-precision fp16 must run on a GPU, got the CPU: bf16 runs on both")


def _train(options: Options, console: Console, held: ExitStack) -> Path:
    preset = _check(options)
    output = Path(options.output)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, cpu=options.device == "cpu" or None
    )
    check_precision(accelerator)
    console.quiet = not accelerator.is_main_process
    data, selection = _select(
        preset, options, preset.load_data("train", options.data, skip_corrupt=options.skip_corrupt)
    )
    recipe = _recipe(preset, options)
    steps = recipe.num_steps(len(data))
    model = preset.make_model(recipe.seed)
    kept_steps = checkpoint_steps(steps, options.keep_checkpoints)
    settings = {
        "preset": preset.name,
        "data": {"fingerprint": data.fingerprint, "rows": len(data), **selection},
        "recipe": recipe.to_dict(),
        "model": hash_model(model.unet),
        "schedule": model.schedule,
        "mixed_precision": options.mixed_precision,
        "kept checkpoints": kept_steps,
    }
    if accelerator.is_main_process:
        # a finished model is only read
        is_done = (output / "model_index.json").is_file()
        claim_folder(output, SETTINGS_FILE, settings, None if is_done else held)
    accelerator.wait_for_everyone()
    if (output / "model_index.json").is_file():
        console.print(f"already trained: {output}")
        return output
    parameters = sum(p.numel() for p in model.unet.parameters())
    console.print(
        f"{preset.title}: {len(data):,} images, {parameters:,} parameters, {steps:,} steps of "
        f"{recipe.batch_size} on {accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision {options.mixed_precision}",
        highlight=False,
        soft_wrap=True,
    )
    threads = one_thread() if preset.name == "digits" else nullcontext()
    with (
        progress_bar(console, "train the model") as progress,
        threads,
        _deterministic_cudnn(),
    ):
        train(
            model,
            data.images,
            recipe,
            checkpoint=output / _STATE_FILE,
            checkpoint_every=options.checkpoint_every,
            progress=progress,
            accelerator=accelerator,
            keep_at=kept_steps,
            keep=lambda step: _save_model(model, checkpoint_folder(output, step)),
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(model, output, settings, accelerator, steps)
    accelerator.end_training()
    console.print(f"model: {output}", highlight=False, soft_wrap=True)
    return output


def _finish(
    model: DiffusionModel,
    output: Path,
    settings: dict[str, Any],
    accelerator: Accelerator,
    steps: int,
) -> None:
    model.unet.cpu()
    facts = {
        "trained weights": hash_model(model.unet),
        "steps": steps,
        "processes": accelerator.num_processes,
        "dtrak": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else platform.machine(),
    }
    content = json.dumps({"settings": settings, "facts": facts}, indent=1)
    write_atomically(output / SETTINGS_FILE, content.encode())
    _save_model(model, output)
    (output / _STATE_FILE).unlink(missing_ok=True)


def load_checkpoints(output: str | Path) -> dict[int, DiffusionModel]:
    """The models that ``--keep-checkpoints`` kept, by their number of steps (TracInCP).

    Raises:
        FileNotFoundError: there are none.
        ModelError: as in `dtrak.diffusion.load_model`.
    """
    found = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in Path(output).glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    }
    if not found:
        raise FileNotFoundError(f"no checkpoints in {output} (dtrak.train --keep-checkpoints 4)")
    return {step: load_model(found[step]) for step in sorted(found)}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train_preset(
    preset: Annotated[str, typer.Option(help=f"Experiment: {', '.join(PRESETS)}.")],
    output: Annotated[str, typer.Option(help="Folder of the trained pipeline.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Where the data set lies: its authors' files, <split>/<class>/<image> folders, "
            "parquet files, a datasets folder or a hub name. Default: the preset's hub name."
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
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the initial weights and the training. Default: the preset's; 0 for a subset."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps. Default: the preset's.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step, over all processes. Default: the preset's."),
    ] = None,
    mixed_precision: Annotated[
        str, typer.Option(help=f"Precision of the forward pass: {', '.join(PRECISIONS)}.")
    ] = "no",
    ema: Annotated[
        float | None,
        typer.Option(
            help="Largest decay of an exponential moving average of the weights, which is then the "
            "model. Default: none."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between the states an interrupted run resumes from.")
    ] = 500,
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            help="Keep this many models along the way, at equal distances, as checkpoint-<step> "
            "(TracInCP: 4)."
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help="auto (what accelerate finds) or cpu.")] = "auto",
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that do not decode.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Train the diffusion model of an experiment, in full or on part of its images."""
    options = Options(
        preset=preset,
        output=output,
        data=data,
        subset=subset,
        family=family,
        without=without,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        ema=ema,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        device=device,
        skip_corrupt=skip_corrupt,
    )
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        run_training(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.train``."""
    run_app(app, "dtrak.train", arguments)


if __name__ == "__main__":
    main()
