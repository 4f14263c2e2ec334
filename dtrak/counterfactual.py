"""``python -m dtrak.counterfactual``: see `cli.counterfactual`."""

from .cli.counterfactual import app as app
from .cli.counterfactual import main as main

if __name__ == "__main__":
    main()
