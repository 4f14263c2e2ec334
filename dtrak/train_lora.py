"""``python -m dtrak.train_lora``: see `cli.train_lora`."""

from .cli.train_lora import app as app
from .cli.train_lora import main as main

if __name__ == "__main__":
    main()
