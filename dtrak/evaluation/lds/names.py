"""The methods that are evaluated, by name; importing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runs.choices import check_choice


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes:
        name: as in tables.
        kind: which formula.
        output_function: whose gradients it takes; None where it takes none.
    """

    name: str
    kind: str
    output_function: str | None = None

    @property
    def option(self) -> str:
        """As it is typed: lower case, no blanks."""
        return self.name.lower().replace(",", "").replace(" ", "-").replace("_", "-")

    @property
    def needs_checkpoints(self) -> bool:
        """Whether it looks at the full model on the way."""
        return self.kind in CHECKPOINTED


CHECKPOINTED = ("tracin_cp", "gas")
METHODS = (
    Method("D-TRAK", "trak", "mean_squared_l2_norm"),
    Method("D-TRAK, mean", "trak", "mean"),
    Method("D-TRAK, l1_norm", "trak", "l1_norm"),
    Method("D-TRAK, l2_norm", "trak", "l2_norm"),
    Method("D-TRAK, linf_norm", "trak", "linf_norm"),
    Method("TRAK", "trak", "loss"),
    Method("TRAK, weighted_mse", "trak", "weighted_mse"),
    Method("Relative influence", "relative", "loss"),
    Method("Renormalised influence", "renormalised", "loss"),
    Method("Journey-TRAK", "journey", "loss"),
    Method("Gradient dot", "dot", "loss"),
    Method("Gradient cosine", "cosine", "loss"),
    Method("TracInCP", "tracin_cp", "loss"),
    Method("GAS", "gas", "loss"),
    Method("Raw pixels, dot", "raw_dot"),
    Method("Raw pixels, cosine", "raw_cosine"),
    Method("Random", "random"),
)
# where a CLIP model is at hand
CLIP_METHODS = (Method("CLIP, dot", "clip_dot"), Method("CLIP, cosine", "clip_cosine"))


def parse_methods(text: str | None, *, with_clip: bool) -> list[Method]:
    """The methods of ``--methods``, in the order of the table; None is all there are.

    Raises:
        ValueError: one is unknown, or needs a CLIP model that is not given.
    """
    known = {method.option: method for method in (*METHODS, *CLIP_METHODS)}
    if text is None:
        return [*METHODS, *(CLIP_METHODS if with_clip else ())]
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    chosen = [known[check_choice("--methods", name, known)] for name in wanted]
    if not chosen:
        raise ValueError(f"--methods must name methods, such as d-trak,trak, got {text!r}")
    if not with_clip and any(method in CLIP_METHODS for method in chosen):
        raise ValueError("--clip must name a folder with a CLIP model for CLIP's methods")
    return [method for method in known.values() if method in chosen]


def names_of(methods: Sequence[Method]) -> str:
    """Names for a sentence."""
    return ", ".join(method.name for method in methods)
