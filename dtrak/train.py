"""``python -m dtrak.train``: see `cli.train`."""

from .cli.train import main

if __name__ == "__main__":
    main()
