"""Which modules draw random numbers in training mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RandomnessWatch:
    """Notes modules in training mode whose forward changes a generator's state.

    Of modules inside one another, the innermost; within its ``with``, once, on the first batch.

    Args:
        model: whose modules; those in eval mode are left alone.
        device: whose generator counts beside the CPU's.

    Attributes:
        found: names and kinds of the modules, in the order of their forwards.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.found: dict[str, str] = {}
        self._model, self._device = model, device
        # of every forward that runs: the generators' states before it, whether one inside drew
        self._running: list[tuple[list[Tensor], bool]] = []
        self._handles: list[Any] = []

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def __enter__(self) -> RandomnessWatch:
        for name, module in self._model.named_modules():
            # scripted ones take no hook before others
            if module.training and not isinstance(module, torch.jit.ScriptModule):
                self._watch(name, module)
        return self

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(*_: Any) -> None:
            self._running.append((self._states(), False))

        def after(*_: Any) -> None:
            # a forward that failed leaves those inside it behind
            if not self._running:
                return
            states, inside = self._running.pop()
            drew = not all(map(torch.equal, states, self._states()))
            if drew and not inside:
                self.found[name or type(module).__name__] = type(module).__name__
            if drew and self._running:
                self._running[-1] = self._running[-1][0], True

        self._handles += [
            module.register_forward_pre_hook(before, prepend=True),
            module.register_forward_hook(after),
        ]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def warning(self) -> str | None:
        """One line that names them; None if there are none."""
        if not self.found:
            return None
        (name, kind), *others = self.found.items()
        more = f" and {len(others)} more" if others else ""
        return (
            f"module {name!r} ({kind}){more} drew random numbers in training mode: features of the "
            "same batch differ from call to call; put the model in eval mode"
        )
