"""What the commands of `dtrak.lds` take: one dataclass each, which is its command line."""

from __future__ import annotations

from dataclasses import dataclass

from dtrak_kernels.projection import KINDS

from ...methods import Method
from ...runs.choices import PRECISIONS, WHITENINGS, check_choice, check_counts, parse_numbers
from ...runs.console import check_device
from ...runs.stated import Stated, option
from ...runs.usual import DEVICE, FLIPS
from ...training.presets import PRESETS
from .names import CLIP_METHODS, METHODS, parse_methods
from .options import (
    DEFAULT_PRESET,
    FAMILIES,
    LDS,
    NUM_RESAMPLES,
    LossSettings,
    check_numbers,
    parse_features,
    parse_sizes,
)

_OWN = "A model of your own"


@dataclass(frozen=True)
class _Experiment(Stated):
    """Which experiment."""

    preset: str | None = option(
        None,
        help=f"Experiment: {', '.join(PRESETS)}. Default: that of the run in --output, or "
        f"{DEFAULT_PRESET}.",
    )
    output: str | None = option(
        None,
        help="Run folder. Default: runs/lds-<preset>, or lds-<name> beside --run.",
        is_path=True,
    )


@dataclass(frozen=True)
class _Prepared(_Experiment):
    """One that is there."""

    run: str | None = option(
        None, help="Model of your own: the folder that --run of prepare named.", is_path=True
    )


@dataclass(frozen=True)
class _Shared(_Prepared):
    """Models of one, which several commands may divide."""

    first: int = option(0, help="First subset to work on.")
    last: int | None = option(None, help="Last subset to work on, excluded.")
    processes: int = option(1, help="Models worked on at once.")
    device: str = option(**DEVICE)


@dataclass(frozen=True)
class PrepareOptions(_Experiment):
    """What ``prepare`` was asked for."""

    data: str | None = option(
        None, help="Where the data set lies. Default: the run's, or the preset's.", is_path=True
    )
    num_subsets: int | None = option(
        None, help="M, subsets to draw. Default: the run's, or the preset's; 64 with --run."
    )
    num_model_seeds: int | None = option(
        None, help="Trainings of each subset. Default: the run's, or the preset's; 1 with --run."
    )
    num_validation: int | None = option(
        None,
        help="Validation images to take as queries. Default: the run's, or all; the first 100 with "
        "--run.",
    )
    num_generated: int | None = option(
        None,
        help="Images the full model draws as queries. Default: the run's, or the preset's; 64 with "
        "--run.",
    )
    num_retrain: int | None = option(
        None,
        help="Subsets of the retrain family, to whose models datamodels and empirical influence "
        "are fitted. Default: the run's, or the preset's; none with --run.",
    )
    model: str | None = option(
        None,
        help="Base of artbench2 and artbench5: a Stable Diffusion folder that Diffusers wrote, or "
        "a hub name. Default: the run's, or the preset's.",
        is_path=True,
    )
    mixed_precision: str | None = option(
        None,
        help="Of artbench2 and artbench5: no, fp16 or bf16. Default: fp16, as published, or no "
        "where there is no GPU.",
    )
    device: str = option(**DEVICE)
    run: str | None = option(
        None,
        help="Folder that dtrak.train wrote, or a finished run of dtrak.attribute: the experiment "
        "is on that model, which is the full one.",
        panel=_OWN,
        is_path=True,
    )
    recipe: str | None = option(
        None,
        help="File that says how that model was trained, if it was trained elsewhere "
        "(docs/training.md). Default: what trained it wrote beside it.",
        panel=_OWN,
        is_path=True,
    )
    validation: str | None = option(
        None,
        help="Held-out images, queries beside those the model draws. Default: the validation part "
        "of its data, if there is one.",
        panel=_OWN,
        is_path=True,
    )
    prompts: str | None = option(
        None,
        help="What it draws: a text, or a file with one prompt per line. Default: those of the "
        "run, or the captions of its data.",
        panel=_OWN,
        is_path=True,
    )
    classes: str | None = option(
        None,
        help="Classes it draws, such as 0,3. Default: those of the run, or all.",
        panel=_OWN,
    )
    guidance_scale: float | None = option(
        None, help="Of the pictures. Default: that of the run, or the model's own.", panel=_OWN
    )
    num_inference_steps: int | None = option(
        None, help="DDIM steps of a picture. Default: 50, or those of the preset.", panel=_OWN
    )

    @property
    def numbers(self) -> dict[str, int | None]:
        """Sizes of the experiment, as far as they were said."""
        names = ("subsets", "model_seeds", "validation", "generated", "retrain")
        return {f"num_{name}": getattr(self, f"num_{name}") for name in names}

    @property
    def class_numbers(self) -> list[int] | None:
        """The classes asked for; raises as `choices.parse_numbers`."""
        return None if self.classes is None else parse_numbers("--classes", self.classes)

    def check(self) -> None:
        """Refuse what can be refused before anything is read.

        Raises:
            ValueError: an option is out of range or unknown, or some do not go together.
        """
        check_device(self.device)
        check_numbers(self.numbers)
        check_counts(num_inference_steps=self.num_inference_steps)
        if self.mixed_precision is not None:
            check_choice("--mixed-precision", self.mixed_precision, PRECISIONS)
        _ = self.class_numbers
        own = ("recipe", "validation", "prompts", "classes", "guidance_scale")
        for name in (*own, "num_inference_steps"):
            if self.run is None and getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --run, whose model it is about")
        for name in ("model", "mixed_precision"):
            if self.run is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for presets, a --run says its own, got another"
                )


@dataclass(frozen=True)
class TrainOptions(_Shared):
    """What ``train`` was asked for."""

    family: str = option(LDS, help=f"Whose models: {', '.join(FAMILIES)}; both have the full one.")

    def check(self) -> None:
        """As `PrepareOptions.check`."""
        check_counts(processes=self.processes)
        check_device(self.device)
        check_choice("--family", self.family, FAMILIES)


@dataclass(frozen=True)
class EvaluateOptions(_Shared):
    """What ``evaluate`` was asked for."""

    family: str | None = option(
        None,
        help=f"Whose losses are measured: {', '.join(FAMILIES)}. Default: of both, or with "
        f"--first or --last those of {LDS}.",
    )
    loss_timesteps: int = option(
        100, help="Timesteps the loss of a query is averaged over (published: 1000)."
    )
    noise_seeds: int = option(3, help="Noises the loss of a query is averaged over.")
    batch_size: int = option(256, help="Noisy images per forward pass when losses are measured.")
    timesteps: str = option("10,100", help="S of the features; several separated by commas.")
    projection: str = option(
        "sjlt",
        help=f"Random matrix: {', '.join(KINDS)}; of several separated by commas the first is for "
        "all methods, the others for D-TRAK and TRAK.",
    )
    whiten: str = option(
        "none,auto",
        help=f"Whitening of gradients, of methods with a damping: {', '.join(WHITENINGS)} or auto; "
        "of several separated by commas the first is for all methods, the others for D-TRAK (f = "
        "mean too) and TRAK.",
    )
    methods: str | None = option(
        None,
        help="Only these, separated by commas: "
        f"{', '.join(method.name for method in METHODS)}; with --clip "
        f"{', '.join(method.name for method in CLIP_METHODS)}. Default: all.",
    )
    feature_batch_size: int | None = option(
        None, help="Images per batch when features are made. Default: chosen to fit memory."
    )
    flips: bool = option(**FLIPS)
    ensemble: str | None = option(
        None,
        help="Add D-TRAK and TRAK averaged over the first N models of the retrain family, and "
        "with the first alone; several N separated by commas (published: 2,4,8).",
    )
    clip: str | None = option(
        None, help="Folder of a CLIP model: adds CLIP similarity, dot and cosine.", is_path=True
    )
    losses_only: bool = option(False, help="Measure losses, leave the methods for later.")

    @property
    def losses(self) -> LossSettings:
        """How losses are measured; raises ValueError for numbers below 1."""
        return LossSettings(self.loss_timesteps, self.noise_seeds)

    @property
    def features(self) -> tuple[list[int], list[str], list[str]]:
        """S, projections and whitenings; raises as `options.parse_features`."""
        return parse_features(self.timesteps, self.projection, self.whiten)

    @property
    def sizes(self) -> list[int]:
        """Of the ensembles; raises as `options.parse_sizes`."""
        return [] if self.ensemble is None else parse_sizes(self.ensemble)

    @property
    def chosen(self) -> list[Method]:
        """The methods; raises as `names.parse_methods`."""
        return parse_methods(self.methods, with_clip=self.clip is not None)

    def check(self) -> None:
        """As `PrepareOptions.check`."""
        check_counts(
            processes=self.processes,
            batch_size=self.batch_size,
            feature_batch_size=self.feature_batch_size,
        )
        _ = self.chosen
        check_device(self.device)
        _ = self.losses, self.features, self.sizes
        if self.family is not None:
            check_choice("--family", self.family, FAMILIES)


@dataclass(frozen=True)
class ReportOptions(_Prepared):
    """What ``report`` was asked for."""

    resamples: int = option(
        NUM_RESAMPLES, help="Resamples of the models for intervals, at least 1,000."
    )
    markdown: str | None = option(
        None, help="Write the table as Markdown to this file too.", is_path=True
    )

    def check(self) -> None:
        """As `PrepareOptions.check`."""
        if self.resamples < 1000:
            raise ValueError(f"--resamples must be at least 1000, got {self.resamples}")
