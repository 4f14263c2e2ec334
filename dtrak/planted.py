"""``python -m dtrak.planted``: see `cli.planted`."""

from .cli.planted import app as app
from .cli.planted import main as main

if __name__ == "__main__":
    main()
