"""Fine-tuning a text-to-image model: ``python -m dtrak.train_lora --model … --data … --output …``.

Writes a LoRA folder that ``python -m dtrak.attribute --lora`` and Diffusers read. With several
GPUs, ``accelerate launch -m dtrak.train_lora …`` shares every batch among them. A run that was
interrupted, called again, goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from ..runs.choices import CAPTION_DROPOUT, PRECISIONS
from ..runs.console import reporting_errors, run_app
from ..training.presets import SUBSET_FAMILIES
from ..training.train_lora_options import RANK, Options, check_options

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
    rank: Annotated[int | None, typer.Option(help=f"Of the LoRA. Default: {RANK}.")] = None,
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
        check_options(options)
        # as in dtrak.train
        from ..training.fine_tuning import run_lora_training

        run_lora_training(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.train_lora``."""
    run_app(app, "dtrak.train_lora", arguments)


if __name__ == "__main__":
    main()
