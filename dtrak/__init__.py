"""Which training images made this diffusion model draw that picture: data attribution."""

from dtrak_kernels import __version__ as __version__
