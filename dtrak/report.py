"""``python -m dtrak.report``: see `cli.report`."""

from .cli.report import main

if __name__ == "__main__":
    main()
