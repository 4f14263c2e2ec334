"""Which training images made this diffusion model draw that picture: data attribution."""

from .interrupts import is_command, keep_quiet

__version__ = "0.1.0"

if is_command():
    keep_quiet()
