"""Agreement tied to an oracle instead of to a tolerance picked by eye."""

import torch
from torch import Tensor


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64 (0 where both are empty or zero)."""
    actual, oracle = actual.detach().double().cpu(), oracle.detach().double().cpu()
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)} != {tuple(oracle.shape)}"
    difference, scale = (actual - oracle).norm().item(), oracle.norm().item()
    return difference / scale if scale else difference


def assert_as_good_as(
    actual: Tensor, eager: Tensor, oracle: Tensor, *, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """``actual`` may err at most ``slack`` times as much as eager torch does in the same dtype."""
    assert torch.isfinite(actual).all(), "non-finite output"
    got, allowed = relative_error(actual, oracle), max(floor, slack * relative_error(eager, oracle))
    assert got <= allowed, f"relative error {got:.2e} > {allowed:.2e}"


def moat(x: Tensor, pad: int = 16) -> Tensor:
    """The same values inside a NaN-filled parent: an unmasked load drags NaN into the result."""
    parent = x.new_full((x.shape[0] + 2 * pad, x.shape[1] + 2 * pad), float("nan"))
    view = parent[pad : pad + x.shape[0], pad : pad + x.shape[1]]
    view.copy_(x)
    return view
