"""What is supported and refused, as the registry has it: ``python -m dtrak.pages.support``.

docs/models.md holds what this prints; a test compares them.
"""

from __future__ import annotations

import inspect
import sys

from ..models import _KINDS, _REFUSED, _class_of
from .tables import Table

_COLUMNS = ("pipeline", "kind", "reads", "process", "drawn with", "adapters")

_OTHER = (
    "any other",
    "Any other pipeline with a VAE (`models/recorded.py`)",
    "captions, or labels",
    "discrete, flow matching",
    "as its pipeline is",
    "PEFT",
)


def table() -> str:
    """Two tables in Markdown: every pipeline that is served, and those that are refused."""
    served = [*map(_row, _KINDS), _OTHER]
    parts = (_COLUMNS, served), (("pipelines", "refused: it has"), _refused())
    return "\n".join(
        "\n".join([*Table(columns, rows, words=columns).markdown(), ""]) for columns, rows in parts
    )


def _row(pipeline: str) -> tuple[str, ...]:
    kind = _class_of(pipeline)
    about = (inspect.getdoc(kind) or "").splitlines()[0]
    for end in (":", ",", " and the noise"):
        about = about.partition(end)[0]
    # a U-Net of pixels reads labels where its configuration has classes
    reads = kind.reads if isinstance(kind.reads, str) else "labels, or nothing"
    guided = "" if kind.guidance_scale is None else f"guidance {kind.guidance_scale:g}, "
    return (
        f"`{pipeline}`",
        f"{about} (`models/{_KINDS[pipeline].partition(':')[0]}.py`)",
        reads,
        kind.noised_by,
        f"{guided}{kind.num_inference_steps} steps",
        kind.adapters or "none",
    )


def _refused() -> list[tuple[str, str]]:
    return [
        (", ".join(f"`{name}…`" for name in names.split(", ")), reason)
        for names, reason in _REFUSED.items()
    ]


if __name__ == "__main__":
    sys.stdout.write(table())
