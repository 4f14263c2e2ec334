"""Drawing images: ``python -m dtrak.generate --model runs/digits --output runs/generated``.

One picture per seed, ``00000.png`` from seed 0 and so on; what is there already is not drawn again.
"""

from __future__ import annotations

from rich.console import Console

from ..training.generate_options import Options, check_options
from .options import make_app


def generate(options: Options, console: Console) -> None:
    """Draw pictures from a trained model, one per seed."""
    check_options(options)
    # as in dtrak.train
    from ..training.drawing import run_generation

    run_generation(options, console)


app, main = make_app("dtrak.generate", Options, generate, shares=True)

if __name__ == "__main__":
    main()
