"""Data attribution for diffusion models: which training images made this model draw that picture."""

__version__ = "0.1.0"
