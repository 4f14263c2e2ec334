"""Training a model, or an adapter of one, into a folder that everything else here reads."""

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
from ..data.rows import InMemory
from ..data.samples import Samples
from ..features.latents import fill_latents, open_latents, read_posteriors
from ..models.denoiser import Denoiser
from ..models.lora import LORA_FILES, PEFT_FILES
from ..runs.choices import TRAINING_FILE, counted
from ..runs.console import progress_bar, tell
from ..runs.files import write_atomically
from ..runs.folders import Record, refuse_inside
from .options import Options, check_options, plan_training
from .trainer import check_trainable, make_accelerator, train

# what a folder of a trained model has, and its writer puts there last
_RECORD = Record(TRAINING_FILE)
WEIGHT_FILES = ("model_index.json", LORA_FILES[0], PEFT_FILES[0])
_STATE_FILE = "training.pt"


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Where the model after ``step`` steps is kept."""
    return Path(output) / f"checkpoint-{step}"


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """The last steps of ``count`` equal parts of a training: 25, 50, 75 and 100 % for four."""
    return sorted({max(1, round(steps * part / count)) for part in range(1, count + 1)})


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` holds a finished model or adapter."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def save_model(model: Denoiser, folder: Path, record: dict[str, Any] | None = None) -> None:
    """Write a model so that a killed run leaves no half one that passes for a whole one.

    Args:
        model: to save.
        folder: made if missing.
        record: of its training, written beside it.
    """
    is_new = not folder.exists()
    partial = folder.with_name(folder.name + ".partial") if is_new else folder / "model.partial"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    if record is not None:
        write_atomically(partial / TRAINING_FILE, json.dumps(record, indent=1).encode())
    if is_new:
        partial.rename(folder)
        return
    # what makes a folder a model comes last
    for name in sorted((path.name for path in partial.iterdir()), key=WEIGHT_FILES.__contains__):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (partial / name).replace(folder / name)
    partial.rmdir()


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
    check_options(options)
    output = Path(options.output)
    refuse_inside(output, data=options.data)
    accelerator = make_accelerator(options.device, options.mixed_precision)
    check_precision(accelerator)
    console.quiet = not accelerator.is_main_process
    training = plan_training(options)
    recipe = training.recipe
    model = training.start.make(recipe.seed)
    if options.caption_dropout is None and model.reads != "captions":
        # the recipe of adapters is of models that read them
        recipe = replace(recipe, caption_dropout=0.0)
        training = replace(training, recipe=recipe)
    check_trainable(model, recipe)
    settings = training.describe(model)
    # images take minutes to read: another model is refused before
    _RECORD.check(output, settings, partly=True)
    data = training.data.load(model)
    tell(console, "training images", data)
    model.input_shape(data.shape)
    chosen = training.data.select(data)
    part = data if len(chosen) == len(data) else data.select(chosen)
    steps = recipe.num_steps(len(part))
    kept_steps = checkpoint_steps(steps, options.keep_checkpoints)
    settings |= {
        "data": {"fingerprint": part.fingerprint, "rows": len(part), **training.data.to_dict()},
        "kept checkpoints": kept_steps,
    }
    if part.conditions is not None:
        settings[str(model.reads)] = model.identify_items(part.conditions) or "in the data"
    if accelerator.is_main_process:
        # a finished model is only read
        _RECORD.claim(output, settings, None if is_saved(output) else held)
    accelerator.wait_for_everyone()
    if is_saved(output):
        console.print(f"already trained: {output}", highlight=False, soft_wrap=True)
        return output
    if model.encoding is not None:
        folder = Path(options.latents) if options.latents else output / "latents"
        part = _encode(folder, model, data, accelerator, console).select(chosen)
    count = sum(p.numel() for n, p in model.module.named_parameters() if n in model.parameters())
    console.print(
        f"{data.source}: {counted(len(part), 'image')}, {count:,} parameters, "
        f"{counted(steps, 'step')} of {recipe.batch_size} on "
        f"{accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision {options.mixed_precision}",
        highlight=False,
        soft_wrap=True,
    )
    with (
        progress_bar(console, "train") as progress,
        # reproducible algorithms only, as the published scripts do
        torch.backends.cudnn.flags(deterministic=True, benchmark=False),
    ):
        initial = model.identity()
        train(
            model,
            part,
            recipe,
            checkpoint=output / _STATE_FILE,
            checkpoint_every=options.checkpoint_every,
            progress=progress,
            accelerator=accelerator,
            keep_at=kept_steps,
            keep=lambda step: save_model(model, checkpoint_folder(output, step)),
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.module.cpu()
        changed = [h for name, h in model.identity().items() if initial.get(name) != h]
        facts = {"trained weights": " ".join(changed), "steps": steps, **_facts(accelerator)}
        also = {"places": training.places, "facts": facts}
        _RECORD.claim(output, settings, also=also, renew=True)
        save_model(model, output)
        (output / _STATE_FILE).unlink(missing_ok=True)
    accelerator.end_training()
    console.print(
        f"{'model' if training.start.rank is None else 'LoRA'}: {output}",
        highlight=False,
        soft_wrap=True,
    )
    return output


def _encode(
    folder: Path, model: Denoiser, data: Samples, accelerator: Accelerator, console: Console
) -> Samples:
    """``data`` with its posteriors, which all processes make between them."""
    store = open_latents(folder, model, data, flips=True)
    if store.missing():
        with progress_bar(console, "latents of training images") as progress:
            fill_latents(store, model, data, accelerator.device, progress=progress)
    return data.encoded(InMemory(read_posteriors(store, model, data)))


def _facts(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "processes": accelerator.num_processes,
        "dtrak": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else platform.machine(),
    }


def checkpoint_step(folder: Path) -> int:
    """The step in the name of `checkpoint_folder`; 0 for another name."""
    text = folder.name.removeprefix("checkpoint-")
    return int(text) if text.isdigit() else 0
