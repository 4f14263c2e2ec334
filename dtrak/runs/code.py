"""The code that makes numbers, and the libraries under it: two that differ make different ones."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_OURS = ("dtrak", "dtrak_kernels")
LIBRARIES = (
    "diffusers",
    "matplotlib",
    "numpy",
    "pillow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
)


def describe_code() -> dict[str, Any]:
    """Versions of the libraries, and a hash of this code; JSON-serialisable."""
    return {
        "versions": {name: version(name) for name in LIBRARIES},
        "code": {name: hash_code(name) for name in _OURS},
    }


def hash_code(package: str) -> str:
    """SHA-256 of the source of a package."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    digest = hashlib.sha256()
    for place in spec.submodule_search_locations:
        # what a report is made of, too
        code = (f for f in Path(place).rglob("*") if f.suffix in (".py", ".css", ".js"))
        for file in sorted(code):
            digest.update(f"{file.relative_to(place).as_posix()} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
