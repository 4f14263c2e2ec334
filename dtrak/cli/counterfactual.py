"""Does a picture change when the training images that a method ranks highest were never there?

``python -m dtrak.counterfactual runs/digits`` removes, for each query and method, the top training
images, trains again from where the run's model began, draws the picture again from its seed and
measures how far it is from the original. Every model is kept as the picture it drew, so a run that
was interrupted goes on.
"""

from __future__ import annotations

from rich.console import Console

from ..evaluation.counterfactual.options import Options, check_options
from .options import make_app


def run(options: Options, console: Console) -> None:
    """Retrain without the images a method ranks highest, and see how the pictures change."""
    check_options(options)
    # as in dtrak.train
    from ..pages.index import refresh_index
    from .counterfactual_experiment import print_results, run_counterfactual

    results = run_counterfactual(options, console)
    if results is not None:
        print_results(results, options.folder)
        refresh_index(options.folder.parent)


app, main = make_app("dtrak.counterfactual", Options, run, shares=True)

if __name__ == "__main__":
    main()
