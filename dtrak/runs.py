"""A run of the main job: its options, its output folder, its stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dtrak_kernels import Projection
from dtrak_kernels.projection import KINDS

from .console import choose_device, parse_damping, progress_bar
from .diffusion import DiffusionModel
from .features import DTYPES, FeatureSettings, describe_differences
from .files import LOCK_FILE, claim, write_atomically
from .measure import StageClock
from .noise import MAX_TIMESTEPS
from .outputs import check_choice, check_output_function, parse_timesteps, select_timesteps
from .presets import PRESETS

DEFAULT_PROJ_DIM = {"sjlt": 8192, "kronecker": 8192, "rademacher": 2048, "normal": 2048, "none": 0}


class OutputError(ValueError):
    """An output folder that belongs to something else; the message says what differs."""


@contextmanager
def alone_in(folder: Path, part: range | None = None) -> Iterator[None]:
    """Keep other commands from writing into an output folder; readers are not kept away.

    Args:
        folder: made if missing.
        part: as in `files.claim`.

    Raises:
        OutputError: another command writes there.
    """
    with claim(folder / LOCK_FILE, part=part) as is_ours:
        if not is_ours:
            raise OutputError(
                f"another command is at work in {folder}: wait until it has ended, or choose "
                "another --output"
            )
        yield


def is_unclaimed(folder: Path) -> bool:
    """Whether ``folder`` is missing, or empty but for locks and what a killed writer left."""
    return not folder.exists() or all(
        path.suffix == ".partial" or path.name == LOCK_FILE for path in folder.iterdir()
    )


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `dtrak.attribute.attribute`."""

    model: str | None
    data: str
    queries: str
    num_queries: int
    output_function: str
    timesteps: int | str
    timestep_strategy: str | None
    noise_seed: int
    projection: str
    proj_dim: int | None
    seed: int
    damping: str
    top_k: int
    batch_size: int | None
    device: str
    dtype: str
    output: str | None
    fused: bool
    skip_corrupt: bool
    resize: bool
    preset: str | None = None
    lora: str | None = None
    caption: str | None = None
    prompts: str | None = None
    guidance_scale: float | None = None
    resolution: int | None = None


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
        ValueError: one is out of range or unknown; one clear line.
    """
    output_function = check_output_function(options.output_function)
    parse_timesteps(options.timesteps, options.timestep_strategy)
    check_choice("--projection", options.projection, KINDS)
    check_choice("--dtype", options.dtype, DTYPES)
    if options.preset is not None:
        check_choice("--preset", options.preset, PRESETS)
    for name in ("num_queries", "top_k", "batch_size", "resolution"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= options.noise_seed < 2**63:
        raise ValueError(f"--noise-seed must be in [0, 2**63), got {options.noise_seed}")
    proj_dim = (
        DEFAULT_PROJ_DIM[options.projection] if options.proj_dim is None else options.proj_dim
    )
    settings = FeatureSettings(
        output_function,
        (),
        options.noise_seed,
        Projection(options.projection, proj_dim, options.seed),
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

    def choose_timesteps(self, model: DiffusionModel) -> None:
        """Fix the timesteps for a model, whose number of training timesteps bounds them.

        Raises:
            ValueError: they are out of its range, or it has more than the noise can tell apart.
        """
        if model.num_train_timesteps > MAX_TIMESTEPS:
            raise ValueError(
                f"the model must have at most {MAX_TIMESTEPS} training timesteps, got "
                f"{model.num_train_timesteps}"
            )
        options = self.plan.options
        chosen, strategy = parse_timesteps(options.timesteps, options.timestep_strategy)
        timesteps = select_timesteps(chosen, strategy, model.num_train_timesteps)
        settings = replace(self.plan.settings, timesteps=tuple(timesteps))
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
