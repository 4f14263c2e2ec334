"""``python -m dtrak.report``: see `cli.report`."""

from .cli.report import app as app
from .cli.report import main as main

if __name__ == "__main__":
    main()
