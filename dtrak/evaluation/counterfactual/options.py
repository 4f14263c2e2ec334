"""What `dtrak.counterfactual` accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runs.choices import check_choice, check_counts
from ...runs.console import check_device
from ...runs.folders import Record
from ...runs.record import list_queries, read_record
from ...runs.stated import Stated, argument, option
from ...runs.usual import DEVICE, WHERE_NOW
from ...training.presets import get_preset
from ..lds.options import EXPERIMENT

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
DEFAULT_QUERIES, DEFAULT_SEED = 16, 0
# of the published draw of queries, by preset; the other presets have no published experiment
PUBLISHED_SEEDS = {"cifar2": 42, "celeba": 0, "artbench2": 0}
PUBLISHED_QUERIES, PUBLISHED_POOL = 60, 1000


class CounterfactualError(ValueError):
    """A folder of counterfactual results that cannot be used; the message says why."""


# the scores come before the plan
PLAN = Record(
    "plan.json", "another experiment", CounterfactualError, format=4, before=frozenset({"scores"})
)


@dataclass(frozen=True)
class Options(Stated):
    """What the command line asked for."""

    run: str = argument(
        "runs/digits",
        help="Finished run of dtrak.attribute whose queries were generated, or a run folder of "
        "dtrak.lds with its full model.",
        is_path=True,
    )
    methods: str = option(
        "d-trak,trak,random",
        help=f"Who chooses what is removed, with commas: {', '.join(METHODS)}, or name=file with "
        "scores.safetensors of another run on the same images. 'none' removes nothing and trains "
        "with another seed.",
    )
    top_k: int | None = option(
        None, help="Training images removed per query. Default: a fifth of them."
    )
    queries: str | None = option(
        None,
        help="Which of the run's sets of queries, such as generated-1a2b3c4d; as much of the name "
        "as tells it from the others. Default: the one that was generated.",
    )
    num_queries: int | None = option(
        None,
        help=f"Queries of the run to draw again. Default: the published {PUBLISHED_QUERIES}, else "
        f"{DEFAULT_QUERIES}, or all.",
    )
    retrainings: int = option(1, help="Models trained for each removal, with other seeds.")
    draw: str | None = option(
        None,
        help="Of the queries and of random removals: published (there is one for "
        f"{', '.join(PUBLISHED_SEEDS)} with 1,000 generated queries), or seed, from --seed. "
        "Default: published where there is one.",
    )
    seed: int | None = option(
        None, help=f"Seed of a draw that is not the published. Default: {DEFAULT_SEED}."
    )
    recipe: str | None = option(
        None,
        help="File that says how the run's model was trained, for a model from elsewhere "
        "(docs/training.md). Default: what trained it wrote.",
        is_path=True,
    )
    preset: str | None = option(
        None, help="Preset that trained the run's model. Default: what trained it wrote."
    )
    data: str | None = option(**WHERE_NOW)
    timesteps: int | None = option(
        None, help="S of gradient features. Default: the run's; 10 for one of dtrak.lds."
    )
    clip: str | None = option(
        None, help="Folder of a CLIP model, for CLIP similarity and the clip methods.", is_path=True
    )
    vae: str | None = option(
        None,
        help="Folder of a VAE, for the distance of latents and the latent methods. Default: that "
        "of a text-to-image model, for the distance.",
        is_path=True,
    )
    processes: int = option(1, help="Models trained at once.")
    device: str = option(**DEVICE)
    output: str | None = option(
        None, help="Output folder. Default: counterfactual in the run's.", is_path=True
    )

    @property
    def method_names(self) -> list[str]:
        """The methods asked for."""
        return [method.strip() for method in self.methods.split(",") if method.strip()]

    @property
    def folder(self) -> Path:
        """Of the experiment."""
        return Path(self.run) / "counterfactual" if self.output is None else Path(self.output)


def check_options(options: Options) -> None:
    """Validate what needs neither the model nor the images of the run.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: an option or a folder is refused; one clear line.
    """
    check_device(options.device)
    check_methods(options.method_names, options.clip, options.vae)
    check_counts(retrainings=options.retrainings, processes=options.processes)
    if options.draw is not None:
        check_choice("--draw", options.draw, DRAWS)
    if options.preset is not None:
        get_preset(options.preset)
    if options.preset is not None and options.recipe is not None:
        raise ValueError("--preset and --recipe exclude each other, got both")
    PLAN.check(options.folder, {}, partly=True)
    # one of dtrak.lds is checked when it is loaded
    run = Path(options.run)
    if not EXPERIMENT.is_in(run):
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
