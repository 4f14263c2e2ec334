"""Which training images made this diffusion model draw that picture: data attribution."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dtrak_kernels import __version__ as __version__

from .runs.interrupts import is_command, keep_quiet

if TYPE_CHECKING:
    from .attribution import Attribution as Attribution
    from .data.given import images as images
    from .explanation import explain as explain
    from .models import Denoiser as Denoiser
    from .models import load as load

# Raised by hand when the same settings give other bits than before, however few: features that were
# kept under another number are refused. CHANGELOG.md says what changed, under "Numerics".
NUMERICS = 2

# where a public name lies; it is imported when it is asked for
_PLACES = {
    "Attribution": "attribution",
    "Denoiser": "models",
    "explain": "explanation",
    "images": "data.given",
    "load": "models",
}
__all__ = ["Attribution", "Denoiser", "explain", "images", "load"]

if is_command():
    keep_quiet()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
