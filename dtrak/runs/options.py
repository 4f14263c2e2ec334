"""What `dtrak.explain` and `dtrak.attribute` can be asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrak_kernels.projection import KINDS, Projection

from ..features.output_names import OUTPUT_NAMES, check_output_function
from ..features.settings import (
    AUTO,
    FeatureSettings,
    WhiteningSettings,
    check_whitening,
    choose_whitening,
)
from ..features.timesteps import TIMESTEP_STRATEGIES, Timesteps
from ..methods import DEFAULT, METHODS, Method, check_held_out, check_needs, get_method
from ..methods.damping import Damping
from ..training.presets import PRESETS
from .choices import (
    DEFAULT_PROJ_DIM,
    DENSITIES,
    DTYPES,
    FLOAT32,
    GROUPS,
    SHIFTS,
    STORE_DTYPES,
    WHITENINGS,
    check_choice,
    check_counts,
    check_model_folder,
    check_seed,
    check_weights,
    parse_numbers,
)
from .console import check_device
from .ranks import parse_shard
from .stated import Stated, option
from .usual import (
    CLASSES,
    DEVICE,
    FLIPS,
    GUIDANCE,
    LORA,
    OF_CHECKPOINT,
    PROMPTS,
    RESIZE,
    RESOLUTION,
    SKIP_CORRUPT,
)

if TYPE_CHECKING:
    from ..models.process import Process

_FEATURES, _DRAWING, _READING = "Features and scores", "Pictures that are drawn", "Reading images"
_TRUST = "How far scores can be trusted"
_TRAINED = "How a flow-matching model was trained, which no file says"


@dataclass(frozen=True)
class ExplainOptions(Stated):
    """How a model is explained, whatever it is: the options of `dtrak.explain`.

    Raises:
        ValueError: one is out of range or unknown; one clear line.
    """

    method: str = option(
        DEFAULT, panel=_FEATURES, help=f"Attribution method: {', '.join(METHODS)}."
    )
    output_function: str | None = option(
        None,
        panel=_FEATURES,
        help=f"What is differentiated: {', '.join(OUTPUT_NAMES)}; or your own, "
        "package.module:function, called with (prediction [R, D], target [R, D], weight [R]), "
        "which returns [R]. Default: the method's.",
    )
    timesteps: str = option(
        "10",
        panel=_FEATURES,
        help="S, timesteps a feature averages over; or their indices, such as 0,100,500.",
    )
    timestep_strategy: str | None = option(
        None,
        panel=_FEATURES,
        help=f"{', '.join(TIMESTEP_STRATEGIES)}: spread over all, the S least noisy, or those that "
        "--timesteps lists. Default: explicit for a list, else uniform.",
    )
    noise_seed: int = option(
        0, panel=_FEATURES, help="Seed of the noise, with sample id and timestep."
    )
    projection: str = option("sjlt", panel=_FEATURES, help=f"Random matrix: {', '.join(KINDS)}.")
    proj_dim: int | None = option(
        None,
        panel=_FEATURES,
        help="K, features per image. Default: 8192 for sjlt, 2048 for the dense kinds.",
    )
    seed: int = option(0, panel=_FEATURES, help="Seed of the random matrix.")
    whiten: str = option(
        "auto",
        panel=_FEATURES,
        help=f"Whiten gradients before they are projected: {', '.join(WHITENINGS)}; or auto, which "
        "is lowrank (channels for kronecker) for methods with a damping, none for others. none is "
        "the papers'.",
    )
    damping: str | None = option(
        None,
        panel=_FEATURES,
        help="λ in units of the Gram matrix ΦᵀΦ; or in mean squared feature norms, such as 1x; or "
        "'auto' (leave-one-out likelihood of the training features). Default: 1x where gradients "
        "are whitened, else auto.",
    )
    batch_size: int | None = option(
        None, panel=_FEATURES, help="Images per batch. Default: chosen to fit memory."
    )
    device: str = option(**DEVICE, panel=_FEATURES)
    dtype: str = option(
        "float32", panel=_FEATURES, help=f"Precision of the model: {', '.join(DTYPES)}."
    )
    checkpointing: bool | None = option(
        None,
        panel=_FEATURES,
        flags=("--checkpointing/--no-checkpointing",),
        help="Make the network's activations again in the backward instead of keeping them: less "
        "memory, a forward more. Default: above two billion parameters.",
    )
    flips: bool = option(**FLIPS, panel=_FEATURES)
    store_dtype: str = option(
        FLOAT32,
        panel=_FEATURES,
        help=f"What features of training images are kept as: {', '.join(STORE_DTYPES)}, one byte "
        "an entry and a scale for 128 of them. docs/scale.md says what each costs.",
    )
    fused: bool = option(
        True,
        panel=_FEATURES,
        flags=("--fused/--no-fused",),
        help="Stream gradients, or the published way: vmap(grad), gradients in memory, TRAK's "
        "projector.",
    )

    noise_halves: bool = option(
        False,
        panel=_TRUST,
        help="Standard errors of scores: how far they move with other noise. Up to 64 training "
        "images are given other noise too, and all features take twice the room, for two halves of "
        "their timesteps.",
    )
    look_alikes: int | None = option(
        None,
        panel=_TRUST,
        help="So many training images that look most like each query, by pixels, by CLIP with "
        "--clip or by DINO with --dino, and how many of them have the highest scores.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # from Python: numbers, and lists of them, which are the timesteps themselves
        if not isinstance(self.timesteps, str | int) and self.timestep_strategy is None:
            object.__setattr__(self, "timestep_strategy", "explicit")
        object.__setattr__(self, "timesteps", _as_text(self.timesteps))
        if self.checkpointing and not self.fused:
            raise ValueError("--checkpointing must go with --fused, got --no-fused")
        if self.damping is not None:
            object.__setattr__(self, "damping", _as_text(self.damping))
        method = get_method(self.method)
        if self.output_function is not None:
            check_output_function(self.output_function)
            if method.output_function is None:
                raise ValueError(
                    f"--output-function is for methods that take gradients, got {method.name}"
                )
        check_choice("--projection", self.projection, KINDS)
        check_whitening(self.whiten, self.projection)
        if self.whiten not in (AUTO, "none") and self.function is None:
            raise ValueError(f"--whiten is for methods that take gradients, got {method.name}")
        _ = self.when, self.damped
        check_choice("--dtype", self.dtype, DTYPES)
        check_choice("--store-dtype", self.store_dtype, STORE_DTYPES)
        if self.store_dtype != FLOAT32 and (self.function is None or self.dtype == "float64"):
            what = f"--dtype {self.dtype}" if self.function else self.what.name
            raise ValueError(f"--store-dtype is for features in float32, got it with {what}")
        check_counts(batch_size=self.batch_size, look_alikes=self.look_alikes)
        if self.noise_halves:
            self._check_halves()
        check_seed("--noise-seed", self.noise_seed)
        Projection(self.projection, self.num_features, self.seed)
        check_device(self.device)

    def _check_halves(self) -> None:
        chosen = self.when.chosen
        count = chosen if isinstance(chosen, int) else len(chosen)
        if not self.what.is_ridge or not self.fused:
            way = "" if self.fused else " with --no-fused"
            raise ValueError(
                "--noise-halves is for methods that are TRAK's formula on fused features, such as "
                f"{DEFAULT} and trak, got {self.what.name}{way}"
            )
        if count % 2:
            raise ValueError(f"--noise-halves must have an even number of timesteps, got {count}")

    @property
    def parts(self) -> int:
        """Numbers that a store keeps for each feature: itself, and half a difference."""
        return 2 if self.noise_halves else 1

    @property
    def halves_suffix(self) -> str:
        """What tells a store of features with half differences from one without."""
        return "-halves" if self.noise_halves else ""

    @property
    def what(self) -> Method:
        """The method asked for."""
        return get_method(self.method)

    @property
    def function(self) -> str | None:
        """The output function whose gradients are taken; None for a method that takes none."""
        return self.output_function or self.what.output_function

    @property
    def variant(self) -> str:
        """How scores are made, as a name for files: the method, and what differs from its own."""
        other = "" if self.function == self.what.output_function else f"-of-{self.function}"
        way = "" if self.fused or self.function is None else "-published"
        way += "-flips" if self.flips and self.function is not None else ""
        if self.whiten not in (AUTO, self._chosen_whitening(AUTO)):
            way += "-unwhitened" if self.whiten == "none" else f"-{self.whiten}"
        way += "" if self.store_dtype == FLOAT32 else f"-{self.store_dtype}"
        if self.what.is_damped and self.damped != self._usual_damping:
            way += f"-damping-{self.damped}"
        return f"{self.what.name}{other}{way}".replace(":", "-")

    def feature_settings(self, process: Process | None = None) -> FeatureSettings:
        """The settings of features.

        Args:
            process: of the model, which places the timesteps; None leaves them open.

        Raises:
            ValueError: the method takes no gradients, or raises as `Timesteps.resolve`.
        """
        if self.function is None:
            raise ValueError(f"--method must be one that takes gradients, got {self.what.name}")
        return FeatureSettings(
            check_output_function(self.function),
            () if process is None else self.when.resolve(process.num_timesteps, process.spread),
            self.noise_seed,
            Projection(self.projection, self.num_features, self.seed),
            self.dtype,
            whitening=WhiteningSettings.of(self.whitening),
            halves=self.noise_halves,
        )

    @property
    def whitening(self) -> str:
        """The kind of whitening, ``"none"`` for none."""
        return self._chosen_whitening(self.whiten)

    def _chosen_whitening(self, asked: str) -> str:
        if self.function is None:
            return "none"
        if asked == AUTO and not self.what.is_damped:
            return "none"
        return choose_whitening(asked, self.projection)

    def feature_folder(self, run: Path, part: str = "") -> Path:
        """Where features lie in the folder of a run: those of each output function by themselves.

        Args:
            run: the folder.
            part: which model, where it is not the run's own.
        """
        room = "features" if self.fused else "features-published"
        room += "" if self.whitening == "none" else f"-{self.whitening}"
        room += "-flips" if self.flips else ""
        room += "" if self.store_dtype == FLOAT32 else f"-{self.store_dtype}"
        return run / room / str(self.function).replace(":", "-") / part

    @cached_property
    def when(self) -> Timesteps:
        """The timesteps asked for; raises as `Timesteps.parse`."""
        return Timesteps.parse(self.timesteps, self.timestep_strategy)

    @cached_property
    def damped(self) -> Damping:
        """The damping asked for; raises as `Damping.parse`."""
        return self._usual_damping if self.damping is None else Damping.parse(self.damping)

    @property
    def _usual_damping(self) -> Damping:
        return Damping.parse("auto" if self.whitening == "none" else "1x")

    @property
    def num_features(self) -> int:
        """K of the projection; 0 where that is the number of parameters."""
        default = DEFAULT_PROJ_DIM[self.projection]
        return default if self.proj_dim is None else self.proj_dim


@dataclass(frozen=True)
class Options(ExplainOptions):
    """What the command line of `dtrak.attribute` asked for; raises as `ExplainOptions`."""

    model: str | None = option(
        None,
        help="Folder of a Diffusers pipeline, or its hub name. Default: train the digits model, or "
        "reuse the one in the output folder.",
        is_path=True,
    )
    weights: str | None = option(**OF_CHECKPOINT)
    lora: str | None = option(**LORA)
    data: str = option(
        "digits",
        help="Training images: 'digits', a folder of images, a parquet file, a datasets folder or "
        "a hub name; for a text-to-image model with captions: metadata.jsonl of {file_name, "
        "text}, or a column 'text'.",
        is_path=True,
    )
    queries: str = option(
        "generated",
        help="Images to explain: 'generated', 'validation', a folder of images or one image.",
        is_path=True,
    )
    num_queries: int = option(16, help="How many to generate, or to take from validation.")
    preset: str | None = option(
        None,
        help="Take the training, validation images and prompts of a published experiment, whose "
        f"data set lies at --data: {', '.join(PRESETS)}.",
    )
    output: str | None = option(
        None, help="Output folder. Default: runs/<name of the data or model>.", is_path=True
    )
    run: str | None = option(
        None,
        help="Explain other queries with a finished run: model, data and options are its own, and "
        "its features are used again.",
        is_path=True,
    )
    top_k: int = option(5, help="Proponents shown per query.")
    checkpoints: str | None = option(
        None,
        help="Folder whose folders are the model's checkpoints (dtrak.train --keep-checkpoints), "
        "for the methods that need them.",
        is_path=True,
    )
    clip: str | None = option(
        None, help="Folder of a CLIP model, for the methods that need one.", is_path=True
    )
    dino: str | None = option(
        None,
        panel=_TRUST,
        help="Folder of a general image encoder, DINO's or another that transformers' AutoModel "
        "reads, for --look-alikes.",
        is_path=True,
    )
    held_out: str | None = option(
        None,
        panel=_TRUST,
        help="Images that the model was not trained on, as --queries takes them; 'validation' is "
        "that part of --data. Scores that are higher than theirs stand out (5 % false ones).",
        is_path=True,
    )
    groups: str | None = option(
        None,
        panel=_TRUST,
        help="Sums of scores by group of training images: label, folder, caption, or a CSV file of "
        "lines image,group below a line of heads.",
        is_path=True,
    )
    shard: str | None = option(
        None,
        help="Share the run with other commands: 3/16 makes every 16th shard of the training "
        "images' features, from the third on, 1/1 whatever nobody is at. torchrun needs no such "
        "option (docs/scale.md).",
    )
    compare: bool = option(
        False, help="Run both ways on one batch and print agreement, times and memory."
    )
    caption: str | None = option(
        None,
        panel=_READING,
        help="Captions of the training images instead of those that lie with them, such as 'a "
        "{label} painting'; and of queries without any.",
    )
    skip_corrupt: bool = option(**SKIP_CORRUPT, panel=_READING)
    resize: bool = option(**RESIZE, panel=_READING)
    resolution: int | None = option(**RESOLUTION, panel=_READING)
    prompts: str | None = option(**PROMPTS, panel=_DRAWING)
    classes: str | None = option(**CLASSES, panel=_DRAWING)
    guidance_scale: float | None = option(**GUIDANCE, panel=_DRAWING)
    trained_guidance: float | None = option(
        None,
        panel=_TRAINED,
        help="Guidance that a model which embeds it (FLUX.1 dev) was trained with. Default: what "
        "dtrak wrote beside the LoRA, or 3.5.",
    )
    density: str | None = option(
        None,
        panel=_TRAINED,
        help=f"Of its timesteps, over which features are averaged: {', '.join(DENSITIES)}. "
        "Default: likewise, or what is usual for the kind.",
    )
    shift: str | None = option(
        None, panel=_TRAINED, help=f"Of its noise levels: {', '.join(SHIFTS)}. Default: likewise."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.class_numbers
        if self.preset is not None:
            check_choice("--preset", self.preset, PRESETS)
        check_needs(
            self.what,
            checkpoints=self.checkpoints,
            drawing=self.queries == "generated",
            clip=self.clip,
        )
        if self.held_out is not None:
            check_held_out(self.what)
        if self.dino is not None and self.look_alikes is None:
            raise ValueError("--dino is for --look-alikes, got none of them")
        if self.compare and self.noise_halves:
            raise ValueError("--compare is for features without --noise-halves, got both")
        check_weights(self.weights, self.model)
        if self.density is not None:
            check_choice("--density", self.density, DENSITIES)
        if self.shift is not None:
            check_choice("--shift", self.shift, SHIFTS)
        guidance = self.trained_guidance
        if guidance is not None and not 0 <= guidance < float("inf"):
            raise ValueError(
                f"--trained-guidance must be a finite number of at least 0, got {guidance}"
            )
        if self.shard is not None:
            parse_shard(self.shard)
        check_counts(num_queries=self.num_queries, top_k=self.top_k, resolution=self.resolution)

    @property
    def trained(self) -> dict[str, Any]:
        """Which weights and how they were trained, as `dtrak.models.load` takes it."""
        return {
            "weights": self.weights,
            "guidance": self.trained_guidance,
            "density": self.density,
            "shift": self.shift,
        }

    @cached_property
    def class_numbers(self) -> list[int] | None:
        """The classes asked for, None for all; raises as `choices.parse_numbers`."""
        return None if self.classes is None else parse_numbers("--classes", self.classes)


# options that may be paths, which are kept so that they hold wherever they are read from
_PLACES = (
    "model",
    "lora",
    "data",
    "queries",
    "held_out",
    "groups",
    "prompts",
    "checkpoints",
    "clip",
    "dino",
)
_WORDS = ("digits", "generated", "validation", *GROUPS)


def lasting(options: Options) -> dict[str, Any]:
    """The options of a run as they are kept, without the folder they are kept in."""
    found = asdict(options)
    for name in _PLACES:
        if found[name] is not None and found[name] not in _WORDS:
            found[name] = _lasting_path(found[name])
    return {**found, "output": None, "run": None, "compare": False, "shard": None}


def _lasting_path(text: str) -> str:
    try:
        return str(Path(text).resolve()) if Path(text).exists() else text
    # a prompt may be longer than a path can be
    except (OSError, ValueError):
        return text


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple | range):
        return ",".join(map(str, value))
    return str(value)


def check_options(options: Options) -> None:
    """Refuse what is not there, before anything heavy is imported or anything trained.

    Raises:
        FileNotFoundError: there is no folder of the model, of its checkpoints, of CLIP or of DINO.
    """
    if options.model is not None:
        check_model_folder(options.model)
    for name in ("checkpoints", "clip", "dino"):
        folder = getattr(options, name)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"--{name} must be an existing folder, got {folder}")
