"""What an experiment is about: a preset's model, or one of your own and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.captions import read_prompts
from ..data.samples import Samples
from ..models import load
from ..models.denoiser import Denoiser
from ..runs.files import expand_path
from ..runs.record import list_queries
from ..runs.results import Attribution, load_attribution
from ..training.command import checkpoint_step, is_saved
from ..training.data import DataSource
from ..training.drawing import choose_items, fitting_steps
from ..training.presets import SUBSET_FAMILIES, Preset, draw_positions, draw_subsets, get_preset
from ..training.record import Training, find_record, of_preset, parse_training, read_training
from ..training.start import Start
from .retraining import DTYPES, Drawing, RetrainingError

# of an experiment of one's own, where nothing else is said
NUMBERS = {"num_subsets": 64, "num_model_seeds": 1, "num_generated": 64, "num_retrain": 0}
NUM_VALIDATION = 100
_FRACTION = 0.5


@dataclass(frozen=True)
class Subject:
    """What is trained again, and what is asked of the models.

    Attributes:
        name: of the preset or the run, for tables.
        training: of the full model.
        drawing: how it draws.
        preset: whose published draws of subsets are taken; None for draws of the same kind.
        items: captions or labels that pictures are drawn from: seed i takes item i, from the first
            again after the last; None for those of the preset, or all classes of the model.
        validation: where held-out images lie; None for none.
        split: their part of that source.
        checkpoints: steps at which models on the way were kept; None for every quarter.
    """

    name: str
    training: Training
    drawing: Drawing
    preset: str | None = None
    items: tuple[Any, ...] | None = None
    validation: DataSource | None = None
    split: str = "validation"
    checkpoints: tuple[int, ...] | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The checkpoints, none where they are the quarters."""
        return self.checkpoints or ()

    @property
    def numbers(self) -> dict[str, int]:
        """Sizes of an experiment where nothing else is said."""
        if self.preset is None:
            return NUMBERS
        preset = get_preset(self.preset)
        return {name: getattr(preset, name) for name in NUMBERS}

    @property
    def subset_fraction(self) -> float:
        """Part of the training images that a subset holds."""
        return _FRACTION if self.preset is None else get_preset(self.preset).subset_fraction

    def items_of(self, model: Denoiser, seeds: Sequence[int]) -> list[Any] | None:
        """What the pictures of ``seeds`` are drawn from; None for a model that reads nothing.

        Raises:
            ValueError: there is nothing to draw from.
        """
        if model.reads is None:
            return None
        items: Sequence[Any] | None = self.items
        if items is None and self.preset is not None and model.reads == "captions":
            items = get_preset(self.preset).prompts()
        return choose_items(model, seeds, **{_OPTIONS[model.reads]: items})

    def subsets(self, data: Samples, count: int, family: str) -> Tensor:
        """Bool ``[count, N]``: the images of each subset of a family, as published draws are made.

        Those of one's own keep the proportions of the classes where every class is large enough.
        """
        if self.preset is not None:
            return get_preset(self.preset).subsets(data, count, family)
        first, labels = SUBSET_FAMILIES[family], _classes(data)
        return draw_subsets(
            count,
            lambda index: draw_positions(len(data), _FRACTION, first + 2 * index, labels),
            len(data),
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-serialisable."""
        return {
            "name": self.name,
            "preset": self.preset,
            "training": self.training.to_dict(),
            "drawing": self.drawing.to_dict(),
            "items": None if self.items is None else list(self.items),
            "validation": None if self.validation is None else asdict(self.validation),
            "split": self.split,
            "checkpoints": None if self.checkpoints is None else list(self.checkpoints),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Subject:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        items, steps, held_out = (values[k] for k in ("items", "checkpoints", "validation"))
        return cls(
            values["name"],
            parse_training(values["training"]),
            Drawing(**values["drawing"]),
            values["preset"],
            None if items is None else tuple(items),
            None
            if held_out is None
            else DataSource(**{**held_out, "without": tuple(held_out["without"])}),
            values["split"],
            None if steps is None else tuple(steps),
        )


_OPTIONS = {"captions": "prompts", "labels": "classes"}


def _classes(data: Samples) -> list[int] | None:
    """Labels whose proportions a half can keep; None where a class is too small, or for none."""
    labels = data.labels
    if labels is None:
        return None
    counts = {label: labels.count(label) for label in set(labels)}
    fits = min(counts.values()) >= 2 and len(counts) <= len(labels) // 2
    return labels if fits else None


def subject_of_preset(
    preset: Preset, source: str | None = None, base: str | None = None, precision: str = "no"
) -> Subject:
    """The published experiment of a preset; arguments as `record.of_preset`."""
    lora = preset.lora
    return Subject(
        preset.name,
        of_preset(preset.name, source, base, precision),
        Drawing(
            preset.num_inference_steps,
            None if lora is None else lora.guidance_scale,
            preset.size,
            DTYPES[precision],
        ),
        preset.name,
        validation=DataSource(source, preset.name),
    )


def default_precision(preset: Preset) -> str:
    """The published precision of a preset where there is a GPU, single precision elsewhere."""
    if preset.lora is None or not torch.cuda.is_available():
        return "no"
    return preset.lora.mixed_precision


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that was trained, and how.

    Attributes:
        folder: that was named.
        training: how; its start and its data say where the model and the images are now.
        weights: folder or file of the model or the adapter.
        attribution: the run of `dtrak.attribute` that explains it, if one was named.
    """

    folder: Path
    training: Training
    weights: Path
    attribution: Attribution | None = None

    @property
    def preset(self) -> str | None:
        """Name of the preset it was trained by, as far as is known."""
        return self.training.data.preset or self.training.start.preset

    def load(self) -> Denoiser:
        """The model, on the CPU.

        Raises:
            FileNotFoundError, ValueError: as `dtrak.models.load`.
        """
        if self.attribution is not None:
            # of a checkpoint it may be the moving average that is explained
            return self.attribution.load_model()
        return self.training.start.load(self.weights)

    def checkpoints(self) -> dict[int, Path]:
        """Folders of the models that were kept on the way, by their step."""
        steps = {folder: checkpoint_step(folder) for folder in self.weights.glob("checkpoint-*")}
        found = {step: folder for folder, step in steps.items() if step and is_saved(folder)}
        return {step: found[step] for step in sorted(found)}

    def check(self) -> None:
        """Refuse a recipe that is not of this model.

        Raises:
            RetrainingError: what it begins with has weights of other shapes, or another noise.
        """
        own = self.load()
        shapes, process = _shapes(own), own.process.describe()
        base = own if self.training.start.rank is not None else None
        fresh = self.training.start.make(0, base)
        if _shapes(fresh) != shapes or fresh.process.describe() != process:
            raise RetrainingError(
                f"the recipe must be that of the model of {self.folder}, got one for a model of "
                "other weights or noise"
            )


def find_trained(
    folder: str | Path,
    *,
    recipe: str | Path | None = None,
    preset: str | None = None,
    source: str | None = None,
    queries: str | None = None,
) -> Trained:
    """Find a model in a folder, and how it was trained.

    Args:
        folder: that `dtrak.train` wrote, that holds a model from elsewhere, or of a finished run of
            `dtrak.attribute`.
        recipe: file that says how it was trained, where no record lies beside it.
        preset: name of the preset that trained it, instead.
        source: where the training images lie now.
        queries: which of the run's sets of queries, where it has several.

    Raises:
        FileNotFoundError: there is no such folder or file.
        RetrainingError: it is not said how the model was trained.
        ValueError: the folder holds neither a model nor a finished run, or the recipe is none.
    """
    folder = expand_path(folder)
    attribution = None if is_saved(folder) else _open_run(folder, queries)
    weights, base, data = folder, None, DataSource()
    if attribution is not None:
        options = attribution.options
        data = DataSource.asked_for(options)
        weights, base = attribution.model_folder, options.lora and options.model
        weights = Path(options.lora) if options.lora else weights
    training = _find_training(folder, weights, attribution, recipe, preset)
    start = training.start
    if attribution is not None and base is not None:
        # where the run found it last
        start = replace(start, model=base, weights=attribution.options.weights or start.weights)
    if replace(start, weights=None) in (Start(), Start(model=base)):
        start = _like(weights, start)
    here = training.data
    if here.source is None and here.preset is None:
        here = replace(data, subset=here.subset, family=here.family, without=here.without)
    if source is not None:
        here = replace(here, source=source)
    return Trained(folder, replace(training, start=start, data=here), weights, attribution)


def _open_run(folder: Path, queries: str | None) -> Attribution:
    """A run, by its first set of queries where none is asked for: the model is that of them all."""
    return load_attribution(folder, queries or next(iter(list_queries(folder)), None))


def _find_training(
    folder: Path,
    weights: Path,
    attribution: Attribution | None,
    recipe: str | Path | None,
    preset: str | None,
) -> Training:
    if recipe is not None:
        return read_training(recipe)
    if preset is not None:
        lora = get_preset(preset).lora
        return of_preset(preset, None, None, "no" if lora is None else lora.mixed_precision)
    record = find_record(weights)
    if record is not None:
        return read_training(record)
    own = None if attribution is None else attribution.deciding["model"].get("recipe")
    if own is not None:
        # the digits' model that dtrak.attribute trains on the spot
        return replace(of_preset("digits", "digits", None, "no"), recipe=_recipe(own, folder))
    raise RetrainingError(
        f"--recipe (or --preset) must say how the model of {folder} was trained, got none: no "
        "training.json lies beside it"
    )


def _recipe(values: Mapping[str, Any], folder: Path) -> Any:
    try:
        return parse_training({"recipe": values}).recipe
    except ValueError as error:
        raise RetrainingError(
            f"the recipe in {folder} must be one of this version: say with --recipe how its model "
            f"was trained ({error})"
        ) from error


def _like(weights: Path, start: Start) -> Start:
    """Fresh weights in the shape of a model of which nothing more is known."""
    if start.model is None:
        return Start(model=str(weights), is_fresh=True)
    adapter = load(start.model, weights, weights=start.weights).adapter()
    return replace(start, rank=adapter["rank"], targets=tuple(adapter["targets"]))


def subject_of_run(
    trained: Trained,
    *,
    prompts: str | None = None,
    classes: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    validation: str | None = None,
) -> Subject:
    """An experiment on a model of one's own.

    Args:
        trained: the model.
        prompts: as ``--prompts``; None takes those of the run.
        classes: that pictures are drawn of; None takes those of the run, or all.
        num_inference_steps: of pictures; None takes those of the run.
        guidance_scale: likewise.
        validation: where held-out images lie; None takes the data's own, if it has any.

    Raises:
        FileNotFoundError, ValueError: the model cannot be used, or does not read what is given.
    """
    trained.check()
    training, model, run = trained.training, trained.load(), trained.attribution
    if prompts is not None or classes is not None:
        # what it does not read is refused, with its reason
        given = None if prompts is None else read_prompts(prompts)
        choose_items(model, [0], prompts=given, classes=classes)
    preset = training.data.preset if _is_published(training) else None
    items: Sequence[Any] | None = classes
    size = training.data.resolution
    if run is not None:
        options = run.options
        items = options.class_numbers if items is None else items
        prompts = options.prompts if prompts is None else prompts
        guidance_scale = options.guidance_scale if guidance_scale is None else guidance_scale
        size = options.resolution if size is None else size
    if prompts is not None:
        items = read_prompts(prompts)
    if items is None and preset is None and model.reads == "captions":
        # what it was trained to draw
        items = list(dict.fromkeys(training.data.load(model).conditions or []))
    published = None if preset is None else get_preset(preset)
    if num_inference_steps is None:
        num_inference_steps = (
            fitting_steps(model) if published is None else published.num_inference_steps
        )
    held_out = replace(training.data, subset=None, without=())
    if validation is not None:
        held_out = replace(held_out, source=validation, preset=None)
    return Subject(
        trained.folder.resolve().name,
        training,
        Drawing(
            num_inference_steps,
            guidance_scale,
            size,
        ),
        preset,
        None if items is None else tuple(items),
        held_out,
        "validation" if validation is None else "train",
        tuple(trained.checkpoints())[:-1],
    )


def _is_published(training: Training) -> bool:
    """Whether it is on all images of a preset, so that its published draws are of them."""
    data = training.data
    return data.preset is not None and data.subset is None and not data.without


def _shapes(model: Denoiser) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
