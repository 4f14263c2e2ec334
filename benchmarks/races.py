"""Shows a race between providers to pytest-benchmark, provider by provider, and records it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from protocol import Absent, Outcome, Provider, Roofs, figures, race


@dataclass(frozen=True)
class Contest:
    """One case: who competes, and in what.

    Attributes:
        suite: whose rows these are.
        group: what the case is called.
        sizes: of the case.
        baselines: the first of these that ran is whose time the others' are divided by.
        providers: all of them.
        facts: more figures for every row.
        seconds: per provider, where a suite has so many cases that it needs less than usual.
    """

    suite: str
    group: str
    sizes: dict[str, int]
    baselines: tuple[str, ...]
    providers: list[Provider]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


class Clock:
    """What pytest-benchmark reads as the time: it advances by durations measured elsewhere."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, seconds: list[float]) -> None:
        """Let a benchmark see these durations as its rounds."""
        rest = itertools.cycle(seconds)

        def advance() -> None:
            self.now += next(rest)

        benchmark._timer = self
        benchmark.pedantic(advance, rounds=len(seconds))


class Races:
    """Runs the race of a case when its first provider is due, and keeps it until the next case.

    Args:
        device: where.
        seconds: see `race`.
        smoke: a single round of everything.
        record: called with the suite and the figures of a row.
    """

    def __init__(
        self, device: torch.device, seconds: float, smoke: bool, record: Callable[..., None]
    ) -> None:
        self.device, self.seconds, self.smoke, self.record = device, seconds, smoke, record
        self._clock = Clock()
        self._case: Any = None
        self._contest: Contest | None = None
        self._outcomes: dict[str, Outcome] = {}
        self._error: Exception | None = None

    def present(
        self,
        benchmark: Any,
        case: Any,
        name: str,
        build: Callable[[], Contest],
        roofs: Callable[[str], Roofs],
    ) -> dict[str, Any]:
        """Show one provider of a case: skips the test if it is absent, fails it if it disagrees.

        Args:
            benchmark: the fixture.
            case: anything that tells cases apart.
            name: of the provider.
            build: makes the case.
            roofs: the fixture.

        Returns:
            The figures of its row.
        """
        try:
            contest, outcomes = self._run(case, build)
        except Absent as reason:
            pytest.skip(str(reason))
        provider = next(p for p in contest.providers if p.name == name)
        outcome = outcomes[name]
        if outcome.absent:
            pytest.skip(outcome.absent)
        if outcome.failure:
            pytest.fail(f"{name}: {outcome.failure}", pytrace=False)
        ran = (name for name in contest.baselines if outcomes[name].counts)
        baseline = next(((name, outcomes[name]) for name in ran), None)
        found = figures(provider, outcome, baseline, roofs(provider.work.dtype))
        row = {"group": contest.group, "sizes": contest.sizes, **found, **contest.facts}
        benchmark.group = f"{contest.suite}: {contest.group}"
        benchmark.extra_info.update(row)
        self._clock.replay(benchmark, outcome.seconds)
        self.record(contest.suite, **row)
        return row

    def _run(self, case: Any, build: Callable[[], Contest]) -> tuple[Contest, dict[str, Outcome]]:
        if self._case is None or case != self._case:
            # what the last case holds goes before this one is built
            self._contest, self._outcomes, self._error = None, {}, None
            gc.collect()
            self._case = case
            try:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                contest = build()
                seconds = self.seconds if contest.seconds is None else contest.seconds
                options: dict[str, Any] = {"rounds": (1, 1)} if self.smoke else {}
                self._outcomes = race(
                    contest.providers, self.device, seconds=min(seconds, self.seconds), **options
                )
                self._contest = contest
            # a case that cannot be built is not built again for every provider
            except Exception as error:
                # its frames hold what the case made
                self._error = error.with_traceback(None)
        if self._error is not None:
            raise self._error
        assert self._contest is not None
        return self._contest, self._outcomes
