"""Training the model of a preset into a folder: in full, on a subset, or without some images."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from .. import __version__
from ..data.samples import Samples
from ..models import load
from ..models.denoiser import Denoiser
from ..runs.choices import TRAINING_FILE
from ..runs.console import progress_bar
from ..runs.files import write_atomically
from ..runs.folders import claim_folder
from .presets import Preset
from .recipe import Recipe
from .train_options import Options, check_options
from .trainer import make_accelerator, one_thread, train

_STATE_FILE = "training.pt"


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Where the model after ``step`` steps is kept."""
    return Path(output) / f"checkpoint-{step}"


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """The last steps of ``count`` equal parts of a training: 25, 50, 75 and 100 % for four."""
    return sorted({max(1, round(steps * part / count)) for part in range(1, count + 1)})


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


def select_without(data: Samples, ids: Sequence[str]) -> Samples:
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


def _select(preset: Preset, options: Options, data: Samples) -> tuple[Samples, dict[str, Any]]:
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


def _save_model(model: Denoiser, folder: Path) -> None:
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
        The output folder, which `dtrak.models.load` reads.

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
    preset = check_options(options)
    output = Path(options.output)
    accelerator = make_accelerator(options.device, options.mixed_precision)
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
        "model": model.identity()["model"],
        "schedule": model.process.describe(),
        "mixed_precision": options.mixed_precision,
        "kept checkpoints": kept_steps,
    }
    if accelerator.is_main_process:
        # a finished model is only read
        is_done = (output / "model_index.json").is_file()
        claim_folder(output, TRAINING_FILE, settings, None if is_done else held)
    accelerator.wait_for_everyone()
    if (output / "model_index.json").is_file():
        console.print(f"already trained: {output}")
        return output
    parameters = sum(p.numel() for p in model.module.parameters())
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
            data,
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
    model: Denoiser,
    output: Path,
    settings: dict[str, Any],
    accelerator: Accelerator,
    steps: int,
) -> None:
    model.module.cpu()
    facts = {
        "trained weights": model.identity()["model"],
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
    write_atomically(output / TRAINING_FILE, content.encode())
    _save_model(model, output)
    (output / _STATE_FILE).unlink(missing_ok=True)


def load_checkpoints(output: str | Path) -> dict[int, Denoiser]:
    """The models that ``--keep-checkpoints`` kept, by their number of steps (TracInCP).

    Raises:
        FileNotFoundError: there are none.
        ModelError: as in `dtrak.models.load`.
    """
    found = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in Path(output).glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    }
    if not found:
        raise FileNotFoundError(f"no checkpoints in {output} (dtrak.train --keep-checkpoints 4)")
    return {step: load(found[step]) for step in sorted(found)}
