"""What the commands of `dtrak.lds` accept, and the record of a run they accept it for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrak_kernels.projection import KINDS

from ...features.settings import check_whitening
from ...runs.choices import check_choice
from ...runs.folders import Record
from ...training.presets import get_preset

FULL = "full"
# of models: those scores are judged on, and those that methods are fitted on
LDS, RETRAIN = "lds", "retrain"
FAMILIES = (LDS, RETRAIN)
# in the title of a method whose gradients are whitened
WHITENED = "whitened"
# kinds of queries
VALIDATION, GENERATED = "validation", "generated"
NUM_RESAMPLES = 2000
# with fewer, a correlation of halves is one of a single pair
FEWEST_SUBSETS = 4
DEFAULT_PRESET = "digits"
# what every record says, the oldest too
_RECORDED = {"subject", "num_validation", "subsets", "num_subsets", "num_model_seeds"}
_DECIDING = {"name", "data", "validation", "num_generated", "recipe", "start"}
# a picture is called after its seed in five digits: in the order of names, more would be jumbled
_MOST_GENERATED = 10**5


class ExperimentError(ValueError):
    """A run folder that cannot be used; the message says why."""


# the report of a packaged experiment may lie in its folder before there is a run
EXPERIMENT = Record(
    "experiment.json", error=ExperimentError, format=3, before=frozenset({"report"})
)


@dataclass(frozen=True)
class LossSettings:
    """How the loss of a query is measured.

    Attributes:
        num_timesteps: S, evenly spaced timesteps.
        num_noise_seeds: noises per query and timestep; seeds 0, 1, …. The noise of a query does not
            depend on the model, so that models are compared on the same noise.
    """

    num_timesteps: int = 1000
    num_noise_seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("num_timesteps", "num_noise_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def parse_sizes(text: str) -> list[int]:
    """Numbers of models, in order, from the command line.

    Raises:
        ValueError: they are not integers of at least 2.
    """
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 2:
        raise ValueError(
            f"--ensemble must be numbers of models, at least 2, separated by commas, got {text!r}"
        )
    return sizes


def parse_features(
    timesteps: str, projection: str, whiten: str
) -> tuple[list[int], list[str], list[str]]:
    """Numbers of timesteps, kinds of projections and of whitenings, from the command line.

    Raises:
        ValueError: the numbers are not positive integers, a kind is unknown, or two do not go
            together.
    """
    try:
        numbers = [int(part) for part in timesteps.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--timesteps must be positive integers, got {timesteps!r}")
    kinds = [part.strip() for part in projection.split(",")]
    for kind in kinds:
        check_choice("--projection", kind, KINDS)
    ways = [part.strip() for part in whiten.split(",")]
    for kind in kinds:
        for way in ways:
            check_whitening(way, kind)
    return numbers, kinds, ways


def check_numbers(counts: Mapping[str, int | None]) -> None:
    """Refuse numbers of subsets, trainings and queries that no run has; None is not given.

    Raises:
        ValueError: one is below 1 (0 for the retrain family), or there are too many pictures.
    """
    for name, count in counts.items():
        least = 0 if name == "num_retrain" else 1
        if count is not None and count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    if (counts["num_generated"] or 0) > _MOST_GENERATED:
        raise ValueError(
            f"num_generated must be at most {_MOST_GENERATED}, as names of pictures have five "
            f"digits, got {counts['num_generated']}"
        )


def recorded_name(folder: Path) -> str | None:
    """Name of the preset or the model of the run in ``folder``; None where there is no run.

    Raises:
        ExperimentError: its record is damaged.
    """
    found = _read(folder)
    return None if found is None else str(found["settings"]["name"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `experiment.prepare` wrote down.

    Raises:
        ExperimentError: there is no run in ``folder``, or its record is damaged.
    """
    found = _read(folder)
    if found is None:
        raise ExperimentError(
            f"{folder} must be a folder that prepare made, got no {EXPERIMENT.file_name}"
        )
    return found


def _read(folder: Path) -> dict[str, Any] | None:
    found = EXPERIMENT.read(folder)
    if found and not (found.keys() >= _RECORDED and found["settings"].keys() >= _DECIDING):
        raise EXPERIMENT.damaged(folder)
    return found


def locate(preset: str | None, output: str | None, run: str | None = None) -> tuple[Path, str]:
    """The run folder, and the name of the preset or model of the run in it or else that asked for.

    Args:
        preset: as typed.
        output: as typed.
        run: folder of a model of one's own, or of a run that explains it.

    Raises:
        ValueError: the folder holds a run of another preset or model, there is no such preset, or a
            preset and a model are asked for.
    """
    if run is not None:
        if preset is not None:
            raise ValueError("--run and --preset exclude each other, got both")
        wanted = Path(run).resolve().name
        # "." has no name to be beside of
        place = Path(run) if Path(run).name not in ("", "..") else Path(run).resolve()
        folder = Path(output) if output else place.with_name(f"lds-{wanted}")
    else:
        wanted = DEFAULT_PRESET if preset is None else get_preset(preset).name
        folder = Path(output) if output else Path("runs") / f"lds-{wanted}"
    found = recorded_name(folder)
    if run is not None:
        check_name(wanted, found, folder, "--run")
    else:
        check_name(preset, found, folder)
    return folder, found or wanted


def check_name(
    wanted: str | None, found: str | None, folder: Path, option: str = "--preset"
) -> None:
    """Refuse a preset or model that is not that of the run in ``folder``; None asks for none.

    Raises:
        ValueError: it is another.
    """
    if wanted is not None and found is not None and wanted != found:
        raise ValueError(
            f"{option} must be {found!r}, whose run {folder} holds, or left out, got {wanted!r}: "
            "choose another --output"
        )
