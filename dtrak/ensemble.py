"""``python -m dtrak.ensemble``: see `cli.ensemble`."""

from .cli.ensemble import main

if __name__ == "__main__":
    main()
