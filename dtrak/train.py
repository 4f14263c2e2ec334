"""``python -m dtrak.train``: see `cli.train`."""

from .cli.train import app as app
from .cli.train import main as main

if __name__ == "__main__":
    main()
