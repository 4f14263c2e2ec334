"""Which training images made this diffusion model draw that picture: data attribution."""

from dtrak_kernels import __version__ as __version__

from .runs.interrupts import is_command, keep_quiet

if is_command():
    keep_quiet()
