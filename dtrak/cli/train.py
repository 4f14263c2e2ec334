"""Training a model: a preset's, one of your own from scratch or from where it is, or a LoRA.

``python -m dtrak.train --preset digits --output runs/digits`` writes a Diffusers pipeline and the
recipe from which it can be trained again. With several GPUs, ``accelerate launch -m dtrak.train …``
shares every batch among them. A run that was interrupted, called again, goes on where it stopped.
"""

from __future__ import annotations

from rich.console import Console

from ..training.options import Options, check_options
from .options import make_app


def run(options: Options, console: Console) -> None:
    """Train a diffusion model, or an adapter of one, in full or on part of the images."""
    check_options(options)
    # brings torch and Diffusers: seconds that a mistake in the options should not cost
    from ..training.command import run_training

    run_training(options, console)


app, main = make_app("dtrak.train", Options, run, shares=True)

if __name__ == "__main__":
    main()
