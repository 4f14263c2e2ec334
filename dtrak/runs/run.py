"""A run of the main job: its options, its output folder, its stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from dtrak_kernels import Projection

from ..features.noise import MAX_TIMESTEPS
from ..features.output_names import check_output_function
from ..features.settings import FeatureSettings
from .console import choose_device, parse_damping, progress_bar
from .files import write_atomically
from .folders import OutputError, alone_in, describe_differences, is_unclaimed
from .measure import Stage, StageClock, format_bytes
from .options import Options, check_options

if TYPE_CHECKING:
    from ..models.denoiser import Denoiser


@dataclass(frozen=True)
class Plan:
    """The options after validation.

    Attributes:
        options: as given.
        device: where to compute.
        settings: of the features; their timesteps wait for the model.
        damping: λ in units of the Gram matrix, or None to choose it.
        output: the output folder.
    """

    options: Options
    device: torch.device
    settings: FeatureSettings
    damping: float | None
    output: Path


def make_plan(options: Options) -> Plan:
    """Validate every option that needs neither model nor data.

    Raises:
        FileNotFoundError: there is no folder of the model.
        ValueError: an option is out of range or unknown; one clear line.
    """
    check_options(options)
    settings = FeatureSettings(
        check_output_function(options.output_function),
        (),
        options.noise_seed,
        Projection(options.projection, options.num_features, options.seed),
        options.dtype,
    )
    stem = Path(options.lora or options.model or options.preset or options.data).stem or "run"
    output = Path(options.output) if options.output else Path("runs") / stem
    device = choose_device(options.device)
    return Plan(options, device, settings, parse_damping(options.damping), output)


class Run:
    """One run: its folder, its console, the stages timed so far and those that were reused.

    Attributes:
        plan: what to do; `choose_timesteps` completes it.
        console: where progress goes.
        clock: seconds and memory of the stages.
        reused: names of the stages that needed no work.

    Args:
        plan: as above.
        console: as above.
        held: where the run keeps its output folder locked against other commands, until it is
            closed; None for a reader of a finished run, which keeps nobody away.
    """

    def __init__(self, plan: Plan, console: Console, held: ExitStack | None = None) -> None:
        self.plan, self.console = plan, console
        self._held, self._is_locked = held, False
        self.clock = StageClock(plan.device)
        self.reused: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A timed stage with a progress bar; yields ``progress(done, total)``."""
        with self.clock.stage(name), progress_bar(self.console, name) as progress:
            yield progress

    def choose_timesteps(self, model: Denoiser) -> None:
        """Fix the timesteps for a model, whose process bounds them.

        Raises:
            ValueError: they are out of its range, or it has more than the noise can tell apart.
        """
        T = model.process.num_timesteps
        if T > MAX_TIMESTEPS:
            raise ValueError(
                f"the model must have at most {MAX_TIMESTEPS} training timesteps, got {T}"
            )
        settings = replace(self.plan.settings, timesteps=self.plan.options.when.resolve(T))
        self.plan = replace(self.plan, settings=settings)

    def lock(self) -> None:
        """Keep other commands away from the output folder, which is made if missing.

        Raises:
            OutputError: another one is at work in it.
        """
        if self._held is not None and not self._is_locked:
            self._held.enter_context(alone_in(self.plan.output))
            self._is_locked = True

    def lock_existing(self) -> None:
        """As `lock`, where there is a run already: before anything is read for another one."""
        if (self.plan.output / "run.json").is_file():
            self.lock()

    def claim_output(self, deciding: dict[str, Any]) -> None:
        """Make the output folder ours.

        Args:
            deciding: what decides whose it is.

        Raises:
            OutputError: it belongs to another run (what differs), is no place for one, or another
                command is at work in it.
        """
        self.check_output(deciding)
        self.lock()
        # another command may have made it its own in between
        if not self.check_output(deciding):
            self.plan.output.mkdir(parents=True, exist_ok=True)
            content = json.dumps(deciding, indent=1).encode()
            write_atomically(self.plan.output / "run.json", content)

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
        folder, file = self.plan.output, self.plan.output / "run.json"
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"--output must be a folder, got the file {folder}")
        for name in ("data", "queries"):
            given = Path(getattr(self.plan.options, name))
            if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
                raise OutputError(
                    f"--output must not lie in the folder of --{name}, whose images it would join: "
                    f"got {folder} in {given}"
                )
        if file.is_file():
            try:
                found = dict(json.loads(file.read_text()))
            except (ValueError, TypeError) as error:
                raise OutputError(
                    f"{file} is damaged: delete {folder} or choose another --output"
                ) from error
            if partly:
                found = {key: value for key, value in found.items() if key in deciding}
            differing = describe_differences(found, deciding)
            if differing:
                raise OutputError(
                    f"{folder} holds another run: {differing}. Choose another --output, or "
                    "delete it"
                )
            return True
        if not is_unclaimed(folder):
            raise OutputError(
                f"{folder} is not empty and holds no run of dtrak: choose another --output"
            )
        return False


def print_summary(
    output: Path, reused: Sequence[str], stages: Sequence[Stage], facts: Mapping[str, str]
) -> None:
    """Show what a run cost, its figures and where its results are.

    Args:
        output: its folder.
        reused: names of the stages that needed no work.
        stages: the others.
        facts: figures, as name and text.
    """
    table = Table(title=None, show_header=True, header_style="bold")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory", justify="right")
    for name in reused:
        table.add_row(name, "reused", "", style="dim")
    for stage in stages:
        peak = format_bytes(stage.peak_bytes) if stage.peak_bytes else "not known"
        table.add_row(stage.name, f"{stage.seconds:.1f}", peak)
    total = sum(stage.seconds for stage in stages)
    table.add_row("total", f"{total:.1f}", "", style="bold")
    console = Console()
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name, value)
    console.print(grid)
    console.print(f"scores: {output / 'scores.safetensors'}\nreport: {output / 'report.html'}")
