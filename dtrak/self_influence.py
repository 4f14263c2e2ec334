"""``python -m dtrak.self_influence``: see `cli.self_influence`."""

from .cli.self_influence import app as app
from .cli.self_influence import main as main

if __name__ == "__main__":
    main()
