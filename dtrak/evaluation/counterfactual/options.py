"""What `dtrak.counterfactual` accepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runs.choices import check_choice, check_counts
from ...runs.console import check_device
from ...runs.record import list_queries, read_record
from ...training.presets import get_preset

# methods that need no scores: any images, and none
RANDOM, NOTHING = "random", "none"
# output functions whose gradients make the scores
GRADIENT_METHODS = {"d-trak": "mean_squared_l2_norm", "trak": "loss"}
SIMILARITY_METHODS = (
    "raw-dot",
    "raw-cosine",
    "latent-dot",
    "latent-cosine",
    "clip-dot",
    "clip-cosine",
)
METHODS = (*GRADIENT_METHODS, RANDOM, NOTHING, *SIMILARITY_METHODS)
DRAWS = ("published", "seed")
DEFAULT_QUERIES, DEFAULT_SEED = 10, 0
# of the published draw of queries, by preset; the other presets have no published experiment
PUBLISHED_SEEDS = {"cifar2": 42, "celeba": 0, "artbench2": 0}
PUBLISHED_QUERIES, PUBLISHED_POOL = 60, 1000


class CounterfactualError(ValueError):
    """A folder of counterfactual results that cannot be used; the message says why."""


def check_options(
    run: Path,
    methods: Sequence[str],
    *,
    retrainings: int,
    processes: int,
    draw: str | None,
    preset: str | None,
    clip: str | None,
    vae: str | None,
    device: str,
    output: Path,
) -> None:
    """Validate what needs neither the model nor the images of the run.

    Args:
        run: of the finished run.
        methods: as `check_methods`.
        retrainings: of each removal.
        processes: at once.
        draw: of `DRAWS`; None chooses.
        preset: that trained the model; None where the run knows.
        clip: folder of a CLIP model, if any.
        vae: folder of a VAE, if any.
        device: as typed.
        output: folder of the experiment.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: an option or a folder is refused; one clear line.
    """
    check_device(device)
    check_methods(methods, clip, vae)
    check_counts(retrainings=retrainings, processes=processes)
    if draw is not None:
        check_choice("--draw", draw, DRAWS)
    if preset is not None:
        get_preset(preset)
    check_output(output)
    # one of dtrak.lds is checked when it is loaded
    if not (run / "experiment.json").is_file():
        read_record(run, next(iter(list_queries(run)), None))


def check_methods(methods: Sequence[str], clip: Any, vae: Any) -> None:
    """Refuse methods that are unknown, given twice, or need a model that is not given.

    Args:
        methods: of `METHODS`, or ``name=file``.
        clip: the CLIP model, or where it lies; None where there is none.
        vae: likewise.

    Raises:
        ValueError: one is; one clear line.
    """
    names = [method.partition("=")[0] for method in methods]
    for name, method in zip(names, methods, strict=True):
        if "=" not in method:
            check_choice("--methods", name, METHODS)
            if name.startswith("clip-") and clip is None:
                raise ValueError(f"--clip must name a folder with a CLIP model for method {name!r}")
            if name.startswith("latent-") and vae is None:
                raise ValueError(f"--vae must name a folder with a VAE for method {name!r}")
        elif "/" in name or name in ("", ".", "..", NOTHING):
            # a name is a folder, and nothing is removed for this one
            raise ValueError(
                f"--methods must name scores as name=file, not {NOTHING!r}, got {method!r}"
            )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--methods must be different and at least one, got {','.join(names)!r}")


def check_output(folder: Path) -> None:
    """Refuse a place that is no folder, or whose content is not of an experiment.

    Raises:
        CounterfactualError: it is one of these.
    """
    if folder.exists() and not folder.is_dir():
        raise CounterfactualError(f"--output must be a folder, got the file {folder}")
    if not folder.exists() or (folder / "plan.json").is_file():
        return
    # the scores come before the plan
    if any(path.name != "scores" and path.suffix != ".partial" for path in folder.iterdir()):
        raise CounterfactualError(
            f"{folder} is not empty and holds no plan.json of dtrak.counterfactual: choose another "
            "--output"
        )
