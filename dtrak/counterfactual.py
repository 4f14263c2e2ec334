"""``python -m dtrak.counterfactual``: see `cli.counterfactual`."""

from .cli.counterfactual import main

if __name__ == "__main__":
    main()
