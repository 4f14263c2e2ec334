"""Does a method find the images again that taught a model something foreign?

``python -m dtrak.planted`` plants inverted digits among the digits, trains one model, and asks
every method for the training images behind inverted digits: those the model draws, and held-out
ones. A run that was interrupted goes on where it stopped; methods may be added later.
"""

from __future__ import annotations

from rich.console import Console

from ..evaluation.planted.options import Options
from .options import make_app


def run(options: Options, console: Console) -> None:
    """Plant foreign images in the training set, train once, and see which methods find them."""
    options.check()
    # as in dtrak.train
    from .planted_experiment import run_planted

    run_planted(options, console)


app, main = make_app("dtrak.planted", Options, run)

if __name__ == "__main__":
    main()
