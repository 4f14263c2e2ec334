"""``python -m dtrak.lds``: see `cli.lds`."""

from .cli.lds import main

if __name__ == "__main__":
    main()
