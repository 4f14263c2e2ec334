"""``python -m dtrak.attribute``: see `cli.attribute`."""

from .cli.attribute import app as app
from .cli.attribute import main as main

if __name__ == "__main__":
    main()
