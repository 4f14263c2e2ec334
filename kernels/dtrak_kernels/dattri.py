"""The projector for the dattri library, under the name its users import: see `adapters.dattri`."""

from .adapters.dattri import DattriProjector, install

__all__ = ["DattriProjector", "install"]
