"""Which timesteps a feature averages over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runs.choices import check_choice

# that the noise can tell apart
MAX_TIMESTEPS = 4096
TIMESTEP_STRATEGIES = ("uniform", "cumulative", "explicit")
Spread = Callable[[int], list[int]]


@dataclass(frozen=True)
class Timesteps:
    """Which timesteps a feature averages over, before it is known how many a model has.

    Attributes:
        chosen: S, a number of timesteps; or their indices.
        strategy: one of `TIMESTEP_STRATEGIES`.
    """

    chosen: int | tuple[int, ...]
    strategy: str

    @classmethod
    def parse(cls, text: int | str, strategy: str | None = None) -> Timesteps:
        """What ``--timesteps`` and ``--timestep-strategy`` ask for.

        Args:
            text: a number of timesteps, or timestep indices separated by commas.
            strategy: one of `TIMESTEP_STRATEGIES`; None is ``"explicit"`` for indices separated by
                commas and ``"uniform"`` for a number.

        Raises:
            ValueError: the text is neither, a number is below 1, the strategy is unknown, or it
                chooses timesteps although they are listed.
        """
        parts = [part.strip() for part in str(text).split(",")]
        try:
            numbers = tuple(int(part) for part in parts)
        except ValueError as error:
            raise ValueError(
                f"--timesteps must be a number, or indices such as 0,100,500, got {text!r}"
            ) from error
        if strategy is None:
            strategy = "explicit" if len(numbers) > 1 else "uniform"
        check_choice("--timestep-strategy", strategy, TIMESTEP_STRATEGIES)
        if strategy == "explicit":
            return cls(numbers, strategy)
        if len(numbers) > 1:
            raise ValueError(
                f"--timesteps must be a number with --timestep-strategy {strategy}, got {text!r}"
            )
        if numbers[0] < 1:
            raise ValueError(f"--timesteps must be at least 1, got {numbers[0]}")
        return cls(numbers[0], strategy)

    def resolve(self, num_timesteps: int, spread: Spread | None = None) -> tuple[int, ...]:
        """The indices, for a model with so many timesteps; arguments as `select_timesteps`.

        Raises:
            ValueError: as `select_timesteps`, or they are more than the noise can tell apart.
        """
        if num_timesteps > MAX_TIMESTEPS:
            raise ValueError(
                f"the model must have at most {MAX_TIMESTEPS} training timesteps, got "
                f"{num_timesteps}"
            )
        return tuple(select_timesteps(self.chosen, self.strategy, num_timesteps, spread))

    def __str__(self) -> str:
        numbers = (self.chosen,) if isinstance(self.chosen, int) else self.chosen
        return f"{','.join(map(str, numbers))} {self.strategy}"


def select_timesteps(
    num_timesteps: int | Sequence[int],
    strategy: str,
    num_train_timesteps: int = 1000,
    spread: Spread | None = None,
) -> list[int]:
    """The S timestep indices a feature averages over.

    Args:
        num_timesteps: ``S``, in ``[1, num_train_timesteps]``; for ``"explicit"`` the indices
            themselves.
        strategy: ``"uniform"``: 0, ⌊T/S⌋, 2⌊T/S⌋, …; ``"cumulative"``: 0 to S - 1, the least noisy;
            ``"explicit"``: those given.
        num_train_timesteps: ``T``.
        spread: `models.process.Process.spread` of a model, which says where S timesteps lie for
            ``"uniform"``: evenly in its training density.

    Raises:
        ValueError: the strategy is unknown, S is out of range, or an index is out of range or given
            twice.

    Source:
        D-TRAK's grad_unconditional.py at e2a0c2e.
    """
    check_choice("timestep strategy", strategy, TIMESTEP_STRATEGIES)
    if not isinstance(num_timesteps, int):
        return _check_indices([int(index) for index in num_timesteps], num_train_timesteps)
    if strategy == "explicit":
        return _check_indices([num_timesteps], num_train_timesteps)
    if not 1 <= num_timesteps <= num_train_timesteps:
        raise ValueError(
            f"timesteps must be in [1, {num_train_timesteps}], the model's number of training "
            f"timesteps, got {num_timesteps}"
        )
    if strategy == "uniform" and spread is not None:
        return spread(num_timesteps)
    stride = num_train_timesteps // num_timesteps if strategy == "uniform" else 1
    return [step * stride for step in range(num_timesteps)]


def _check_indices(indices: list[int], num_train_timesteps: int) -> list[int]:
    if not indices:
        raise ValueError("timesteps must hold at least one index, got none")
    for position, index in enumerate(indices):
        if not 0 <= index < num_train_timesteps:
            raise ValueError(f"timesteps must be in [0, {num_train_timesteps}), got {index}")
        if index in indices[:position]:
            raise ValueError(f"timesteps must be given once each, got {index} twice")
    return indices
