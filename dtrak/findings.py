"""What is known about scores beside the scores: how noisy they are, and what stands out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class Findings:
    """What is known about scores ``[M, N]`` beside them; None is what was not asked for.

    Attributes:
        errors: ``[M, N]`` float32, the standard error of each score.
        p_values: ``[M, N]`` float32, of each score against those of held-out images.
        stands_out: ``[M, N]`` bool, the scores that are more than held-out images get.
        verdicts: M texts, of at most two sentences.
        look_alikes: ``[M, L]`` int64, the columns of the nearest images, the nearest first.
        likeness: how they were found, in words, such as ``"pixels"``.
        groups: scores of groups of training images.
    """

    errors: Tensor | None = None
    p_values: Tensor | None = None
    stands_out: Tensor | None = None
    verdicts: tuple[str, ...] | None = None
    look_alikes: Tensor | None = None
    likeness: str = ""
    groups: Groups | None = None
