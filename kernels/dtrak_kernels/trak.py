"""The parts for the TRAK library, under the name their users import: see `adapters.trak`."""

from .adapters.trak import FusedGradientComputer, ProjectionType, TritonProjector, install

__all__ = ["FusedGradientComputer", "ProjectionType", "TritonProjector", "install"]
