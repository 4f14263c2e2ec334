"""``python -m dtrak.ensemble``: see `cli.ensemble`."""

from .cli.ensemble import app as app
from .cli.ensemble import main as main

if __name__ == "__main__":
    main()
