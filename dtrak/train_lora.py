"""``python -m dtrak.train_lora``: see `cli.train_lora`."""

from .cli.train_lora import main

if __name__ == "__main__":
    main()
