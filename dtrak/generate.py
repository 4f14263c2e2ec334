"""``python -m dtrak.generate``: see `cli.generate`."""

from .cli.generate import main

if __name__ == "__main__":
    main()
