"""``python -m dtrak.lds``: see `cli.lds`."""

from .cli.lds import app as app
from .cli.lds import main as main

if __name__ == "__main__":
    main()
