"""What is known about scores beside the scores: how noisy they are, and what stands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# before the names of tensors beside the scores
_PREFIX = "findings/"
_TENSORS = ("errors", "reliabilities", "p_values", "stands_out", "look_alikes", "agreement")
_SHOWN = 3
_OF_GROUPS = ("scores", "shares", "errors", "members")


@dataclass(frozen=True, eq=False)
class Groups:
    """Scores of groups of training images, such as artists, classes or sources.

    Letters: M queries, N training images, G groups.

    Attributes:
        names: G names, in the order of the columns.
        sizes: G numbers of images.
        scores: ``[M, G]`` float32, the sums of the scores of their images.
        shares: ``[M, G]`` float32, their share of the query's positive mass.
        errors: ``[M, G]`` float32, standard errors of ``scores``; None where they are not known.
        members: ``[N]`` int64, the group of each training image, -1 for none; None where it is not
            known or an image may be in several.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    scores: Tensor
    shares: Tensor
    errors: Tensor | None = None
    members: Tensor | None = None

    def describe(self, row: int) -> str:
        """The groups with the largest sums for a query, as text."""
        parts = []
        for column in self.scores[row].argsort(descending=True)[:_SHOWN].tolist():
            error = "" if self.errors is None else f" ± {float(self.errors[row, column]):.2g}"
            score, share = float(self.scores[row, column]), float(self.shares[row, column])
            parts.append(f"{self.names[column]} {score:+.3g}{error} ({share:.0%})")
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Findings:
    """What is known about scores ``[M, N]`` beside them; None is what was not asked for.

    Attributes:
        errors: ``[M, N]`` float32, the standard error of each score: how far it moves with other
            noise at the same timesteps. Errors of one query are correlated.
        p_values: ``[M, N]`` float32, of each score against those of held-out images.
        stands_out: ``[M, N]`` bool, the scores that are more than held-out images get.
        verdicts: M texts, of at most two sentences.
        look_alikes: ``[M, L]`` int64, the columns of the nearest images, the nearest first.
        likeness: how they were found, in words, such as ``"pixels"``.
        groups: scores of groups of training images.
        reliabilities: ``[M]`` float32, how a query's scores correlate with those of other noise.
        agreement: ``[M]`` float32, the share of look-alikes among the L highest scores.
        num_held_out: images that p-values rest on.
    """

    errors: Tensor | None = None
    p_values: Tensor | None = None
    stands_out: Tensor | None = None
    verdicts: tuple[str, ...] | None = None
    look_alikes: Tensor | None = None
    likeness: str = ""
    groups: Groups | None = None
    reliabilities: Tensor | None = None
    agreement: Tensor | None = None
    num_held_out: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """What goes beside the scores in their file, by name."""
        found = {f"{_PREFIX}{name}": getattr(self, name) for name in _TENSORS}
        if self.groups is not None:
            found |= {f"{_PREFIX}groups/{name}": getattr(self.groups, name) for name in _OF_GROUPS}
        return {name: value.contiguous() for name, value in found.items() if value is not None}

    def about(self) -> dict[str, Any]:
        """The rest of it, as JSON-serialisable values."""
        groups = self.groups
        return {
            "verdicts": self.verdicts,
            "likeness": self.likeness,
            "num_held_out": self.num_held_out,
            **(
                {} if groups is None else {"groups": {"names": groups.names, "sizes": groups.sizes}}
            ),
        }

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Findings:
        """From what `tensors` and `about` gave.

        Raises:
            KeyError: something is missing.
        """
        groups = None
        if "groups" in about:
            names, sizes = (tuple(about["groups"][name]) for name in ("names", "sizes"))
            scores, shares = (tensors[f"{_PREFIX}groups/{name}"] for name in ("scores", "shares"))
            errors, members = (
                tensors.get(f"{_PREFIX}groups/{name}") for name in ("errors", "members")
            )
            groups = Groups(names, sizes, scores, shares, errors, members)
        verdicts = about["verdicts"]
        return cls(
            verdicts=None if verdicts is None else tuple(verdicts),
            likeness=about["likeness"],
            num_held_out=about["num_held_out"],
            groups=groups,
            **{name: tensors.get(f"{_PREFIX}{name}") for name in _TENSORS},
        )
