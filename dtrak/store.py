"""``python -m dtrak.store``: see `cli.store`."""

from .cli.store import app as app
from .cli.store import main as main

if __name__ == "__main__":
    main()
