"""What features will take, measured before they are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from ..data.samples import Samples
from .extraction import Extractor, extract_rows

# images whose features are made, and thrown away, to measure what one takes
_MEASURED = 2


def seconds_per_row(
    extractor: Extractor, data: Samples, batch_size: int | None = None, *, is_warm: bool = False
) -> float:
    """Seconds that the features of one image and timestep take, measured on a few images.

    A whole batch is often faster by a bit: it is an estimate from above.

    Args:
        extractor: makes the features.
        data: N images.
        batch_size: of the batches to come, where it is known.
        is_warm: features were made with it already.
    """
    rows = slice(0, min(_MEASURED, batch_size or _MEASURED, len(data)))
    # where mirror images are averaged in, a row is both of them
    make = partial(extract_rows, extractor, data, rows)
    return seconds_of(make, extractor.device, is_warm=is_warm) / rows.stop


def seconds_of(call: Callable[[], object], device: torch.device, *, is_warm: bool = False) -> float:
    """Seconds that a call takes once tables are made and memory is found, which the first does."""
    if not is_warm:
        call()
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
