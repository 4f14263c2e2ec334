"""``python -m dtrak.attribute``: see `cli.attribute`."""

from .cli.attribute import main

if __name__ == "__main__":
    main()
