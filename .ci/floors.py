"""The floors of pyproject.toml as pins; torch and Triton stay as constraints.txt has them."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def floors(project: str, pins: str) -> list[str]:
    """``name==floor`` for every dependency of the project, but for torch's."""
    kept = [line for line in pins.splitlines() if line.startswith(("torch==", "triton=="))]
    names = {line.partition("==")[0] for line in kept}
    dependencies = tomllib.loads(project)["project"]["dependencies"]
    found = [re.match(r"([\w-]+)>=([\d.]+)", dependency) for dependency in dependencies]
    return [*kept, *(f"{m[1]}=={m[2]}" for m in found if m is not None and m[1] not in names)]


if __name__ == "__main__":
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    print("\n".join(floors(*(file.read_text(encoding="utf-8") for file in files))))
