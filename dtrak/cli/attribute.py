"""The main job: which training images made this diffusion model draw that picture.

``python -m dtrak.attribute --fused`` trains (or loads) a model, draws pictures (or takes queries),
streams D-TRAK features of training images and queries, applies the kernel-matrix inverse and writes
scores and a report. Every stage is kept in the output folder and reused, so a run that was
interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from dtrak_kernels.projection import KINDS

from ..features.output_names import OUTPUT_NAMES
from ..runs.choices import DTYPES, GUIDANCE_SCALE
from ..runs.console import reporting_errors, run_app
from ..runs.options import Options, check_options
from ..training.presets import PRESETS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def attribute(
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder with a UNet2DModel, or a DDPM pipeline; with --lora, a Stable "
            "Diffusion pipeline or its hub name. Default: train the digits model, or reuse the one "
            "in the output folder."
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="LoRA folder or file of a text-to-image model: its parameters are attributed."
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Training images: 'digits', a folder of images, a parquet file, a datasets "
            "folder or a hub name; for a text-to-image model with captions: metadata.jsonl of "
            "{file_name, text}, or a column 'text'."
        ),
    ] = "digits",
    queries: Annotated[
        str,
        typer.Option(help="Images to explain: 'generated', 'validation' or a folder of images."),
    ] = "generated",
    num_queries: Annotated[
        int, typer.Option(help="How many to generate, or to take from validation.")
    ] = 16,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Take the training, validation images and prompts of a published experiment, "
            f"whose data set lies at --data: {', '.join(PRESETS)}."
        ),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            help="Captions of the training images instead of those that lie with them, such as 'a "
            "{label} painting'; and of queries without any."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="What a text-to-image model draws: a text, or a file with one per line, of which "
            "picture i takes line i, from the first again after the last."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes of the queries of a model that reads classes, such as 0,3: query i takes "
            "class i of them, from the first again after the last. Default: all of its classes."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance of the pictures drawn (gradients have none). Default: "
            f"{GUIDANCE_SCALE}."
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Image side of a text-to-image model, in pixels. Default: the model's."),
    ] = None,
    output_function: Annotated[
        str,
        typer.Option(
            help=f"What is differentiated: {', '.join(OUTPUT_NAMES)}; or your own, "
            "package.module:function, called with (prediction [R, D], target [R, D], weight [R]), "
            "which returns [R]."
        ),
    ] = "mean_squared_l2_norm",
    timesteps: Annotated[
        str,
        typer.Option(
            help="S, timesteps a feature averages over; or their indices, such as 0,100,500."
        ),
    ] = "10",
    timestep_strategy: Annotated[
        str | None,
        typer.Option(
            help="uniform, cumulative (the S least noisy) or explicit (--timesteps lists them). "
            "Default: explicit for a list, else uniform."
        ),
    ] = None,
    noise_seed: Annotated[
        int, typer.Option(help="Seed of the noise, with sample id and timestep.")
    ] = 0,
    projection: Annotated[str, typer.Option(help=f"Random matrix: {', '.join(KINDS)}.")] = "sjlt",
    proj_dim: Annotated[
        int | None,
        typer.Option(
            help="K, features per image. Default: 8192 for sjlt, 2048 for the dense kinds."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random matrix.")] = 0,
    damping: Annotated[
        str,
        typer.Option(
            help="λ in units of the Gram matrix ΦᵀΦ, or 'auto' (leave-one-out likelihood of the "
            "training features)."
        ),
    ] = "auto",
    top_k: Annotated[int, typer.Option(help="Proponents shown per query.")] = 5,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per batch. Default: chosen to fit memory.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Precision of the model: {', '.join(DTYPES)}.")
    ] = "float32",
    output: Annotated[
        str | None, typer.Option(help="Output folder. Default: runs/<name of the data or model>.")
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused/--no-fused",
            help="Stream gradients, or the published way: vmap(grad), gradients in memory, "
            "TRAK's projector.",
        ),
    ] = True,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Run both ways on one batch and print agreement, times and memory."
        ),
    ] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that do not decode.")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize and centre-crop images to the model's size.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Find the training images that made a diffusion model draw a picture.

    With no options: trains a small model on embedded digits, draws 16 pictures and explains them.
    """
    options = Options(
        model=model,
        data=data,
        queries=queries,
        num_queries=num_queries,
        output_function=output_function,
        timesteps=timesteps,
        timestep_strategy=timestep_strategy,
        noise_seed=noise_seed,
        projection=projection,
        proj_dim=proj_dim,
        seed=seed,
        damping=damping,
        top_k=top_k,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        output=output,
        fused=fused,
        skip_corrupt=skip_corrupt,
        resize=resize,
        preset=preset,
        lora=lora,
        caption=caption,
        prompts=prompts,
        guidance_scale=guidance_scale,
        resolution=resolution,
        classes=classes,
    )
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        check_options(options)
        # as in dtrak.train; torch comes first, Diffusers only where something is to be done
        from ..runs.finished import reuse_finished

        if not compare and reuse_finished(options, console):
            return
        from .attribution import run_attribution, run_comparison

        job = run_comparison if compare else run_attribution
        job(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.attribute``."""
    run_app(app, "dtrak.attribute", arguments)


if __name__ == "__main__":
    main()
