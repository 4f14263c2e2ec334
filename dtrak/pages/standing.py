"""How a method stands in the benchmark that comes with the package, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.lds.options import WHITENED
from ..evaluation.lds.table import packaged_table
from ..methods import METHODS, NOTHING

_PRESET = "digits"
_LIKENESS = "Raw pixels, "
_KINDS = {"generated": "generated pictures", "validation": "held-out images"}


def describe_standing(settings: Mapping[str, Any]) -> str | None:
    """What the packaged benchmark says of a run's method, against the likeness of pixels.

    Args:
        settings: what decided a run's scores, as its manifest has them.

    Returns:
        Sentences; None for a method of which it has nothing.
    """
    method = METHODS.get(str(settings.get("method")))
    if method is None or method.needs == NOTHING:
        return None
    table = packaged_table(_PRESET)
    if table is None:
        return None
    output = settings.get("output function")
    if output not in (None, method.output_function):
        return (
            f"The packaged benchmark on {_PRESET} has nothing on {method.title} with the output "
            f"function {output}: how far these scores can be trusted was not measured."
        )
    is_whitened = settings.get("whitening", "none") != "none"
    wanted = f"{method.title}, {WHITENED}" if is_whitened else method.title
    titles = {row["method"] for row in table["rows"]}
    title = wanted if wanted in titles else method.title
    if title not in titles:
        return None
    S = _count(str(settings.get("timesteps", "0 uniform")))
    found = [
        said
        for kind, name in _KINDS.items()
        if (said := _compare([r for r in table["rows"] if r["queries"] == kind], title, S, name))
    ]
    if not found:
        return None
    used = {said[1] for said in found}
    way = ["unwhitened"] if title == method.title and method.is_damped else []
    way += [f"S = {', '.join(map(str, sorted(used)))}"] if used != {0} else []
    how = f" ({', '.join(way)})" if way else ""
    about = (
        f"In the packaged benchmark on {_PRESET} ({table['about']['models']} retrained models), "
        f"{title}{how}: {'; '.join(said for said, _ in found)}."
    )
    if title != wanted:
        about += " This run is whitened, which was not measured there."
    if used not in ({0}, {S}):
        about += f" This run has S = {S}: that is the nearest that was measured."
    return f"{about} Other data may differ."


def _count(timesteps: str) -> int:
    """S, of timesteps as a run records them: ``10 uniform``, ``0,500 explicit``."""
    numbers, _, strategy = timesteps.partition(" ")
    return len(numbers.split(",")) if strategy == "explicit" else int(numbers)


def _compare(
    rows: Sequence[Mapping[str, Any]], title: str, S: int, name: str
) -> tuple[str, int] | None:
    """A method against the likeness of pixels on one kind of query, and its S."""
    own = [row for row in rows if row["method"] == title and row["projection"] != "none"]
    likeness = [row for row in rows if row["method"].startswith(_LIKENESS)]
    if not own or not likeness:
        return None
    row = min(own, key=lambda r: abs(math.log(max(r["timesteps"], 1) / max(S, 1))))
    best = max(likeness, key=lambda r: r["held_out"]["lds"])
    one, other = row["held_out"], best["held_out"]
    # intervals of 95 %, where there are models enough
    (low, high), (worst, most) = (e.get("bca", [e["lds"]] * 2) for e in (one, other))
    verdict = "above" if low > most else "below" if high < worst else "not told apart from"
    return (
        f"LDS {100 * one['lds']:.1f} % on {name}, {verdict} pixel similarity "
        f"({100 * other['lds']:.1f} %)"
    ), int(row["timesteps"])
