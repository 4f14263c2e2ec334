"""``python -m dtrak.generate``: see `cli.generate`."""

from .cli.generate import app as app
from .cli.generate import main as main

if __name__ == "__main__":
    main()
