"""Which training images made this diffusion model draw that picture: data attribution."""

__version__ = "0.1.0"
