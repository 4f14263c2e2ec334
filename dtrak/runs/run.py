"""A run of the main job: its options, its output folder, its stages."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..features.settings import FeatureSettings
from ..methods.damping import Damping
from .code import describe_code
from .console import choose_device
from .files import plain_stem
from .folders import alone_at, refuse_inside
from .options import Options, check_options, lasting
from .ranks import LeftToOthers, ranks
from .record import RUN, RUN_FILE
from .stages import Stages

if TYPE_CHECKING:
    from ..models.denoiser import Denoiser


@dataclass(frozen=True)
class Plan:
    """The options of a run, and where it computes and writes.

    Attributes:
        options: as given.
        device: where to compute.
        output: the output folder.
        settings: of the features, where the method takes any; their timesteps wait for the model.
    """

    options: Options
    device: torch.device
    output: Path
    settings: FeatureSettings | None

    @property
    def damping(self) -> Damping:
        """Of the scores."""
        return self.options.damped


def make_plan(options: Options) -> Plan:
    """Where a run computes and writes.

    Raises:
        FileNotFoundError: there is no folder of the model.
        ValueError: the device is not there.
    """
    check_options(options)
    named = options.lora or options.model or options.preset or options.data
    # "." and ".." have no name of their own
    stem = plain_stem(named).strip(".") or plain_stem(Path(named).resolve()) or "run"
    output = Path(options.output) if options.output else Path("runs") / stem
    settings = None if options.function is None else options.feature_settings()
    return Plan(options, choose_device(options.device), output, settings)


class Run(Stages):
    """One run: its plan and its folder, with the stages timed so far and those that were reused.

    Attributes:
        plan: what to do; `choose_timesteps` completes it.

    Args:
        plan: as above.
        console: where progress goes.
        held: where the run keeps its output folder locked against other commands, until it is
            closed; None for a reader of a finished run, which keeps nobody away.
    """

    def __init__(self, plan: Plan, console: Console, held: ExitStack | None = None) -> None:
        super().__init__(plan.device, console)
        self.plan, self.folder = plan, plan.output
        self._held, self._is_locked, self._leads = held, False, False

    def choose_timesteps(self, model: Denoiser) -> None:
        """Fix the timesteps for a model, whose process bounds them.

        Raises:
            ValueError: as `Timesteps.resolve`.
        """
        if self.plan.settings is not None:
            settings = self.plan.options.feature_settings(model.process)
            self.plan = replace(self.plan, settings=settings)

    def lock(self) -> None:
        """Keep other commands away from the output folder, which is made if missing.

        Those that share this run, as `ranks` says, are not kept away.

        Raises:
            OutputError: another one is at work in it.
        """
        if self._held is not None and not self._is_locked:
            self._held.enter_context(ranks().hold(self.plan.output, self._shared))
            self._is_locked = True

    def _shared(self) -> dict[str, Any]:
        """What must be the same for all processes that share this run."""
        options = {**lasting(self.plan.options), "device": self.plan.device.type}
        return {"options": options, **describe_code()}

    def lead(self) -> None:
        """See `Stages.lead`."""
        here = ranks()
        if not here.is_main:
            raise LeftToOthers("the results")
        if here.is_shared and not here.is_launched and self._held is not None and not self._leads:
            self._leads = self._held.enter_context(alone_at(self.plan.output, "results"))
            if not self._leads:
                raise LeftToOthers("another command makes the scores and the report")

    def lock_existing(self) -> None:
        """As `lock`, where there is a run already: before anything is read for another one."""
        if (self.plan.output / RUN_FILE).is_file():
            self.lock()

    def claim_output(self, deciding: dict[str, Any]) -> None:
        """Make the output folder ours, and keep in it how it is to be run again.

        Args:
            deciding: what decides whose it is.

        Raises:
            OutputError: it belongs to another run (what differs), is no place for one, or another
                command is at work in it.
        """
        self.check_output(deciding)
        self.lock()
        again = {"options": lasting(self.plan.options)}
        with ranks().alone(self.plan.output, "run"):
            RUN.claim(self.plan.output, deciding, also=again)

    def check_output(self, deciding: dict[str, Any], *, partly: bool = False) -> bool:
        """Refuse an output folder that cannot be ours; nothing is written.

        Args:
            deciding: what decides whose it is.
            partly: there is more that does, which is not known yet.

        Returns:
            Whether a run is there, which is this one as far as is known.

        Raises:
            OutputError: as `claim_output`.
        """
        folder, options = self.plan.output, self.plan.options
        refuse_inside(folder, data=options.data, queries=options.queries)
        return RUN.check(folder, deciding, partly=partly) is not None
