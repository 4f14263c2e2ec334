"""What a run of the main job attributes: a model, its training samples and the queries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..data.captions import (
    caption_all,
    choose_prompts,
    load_captions,
    read_captions,
    read_prompts,
    write_captions,
)
from ..data.images import DataError, load_data
from ..data.samples import Samples
from ..features.latents import encode
from ..methods.evidence import HELD_OUT, Drawing
from ..methods.verdicts import check_count
from ..models import load
from ..models.denoiser import Denoiser
from ..models.unet import digits_model
from ..training.drawing import (
    choose_items,
    draw_missing,
    fitting_steps,
    missing_seeds,
)
from ..training.presets import get_preset
from ..training.recipe import Recipe
from ..training.trainer import train
from .console import check_source, tell
from .files import picture_name
from .folders import OutputError
from .ranks import ranks
from .run import Run
from .workers import one_thread

_TRAINING, _GENERATION = "train the model", "generate the queries"
_SHOWN = 5


def load_model_and_data(run: Run) -> tuple[Denoiser, Samples]:
    """The model and its training samples; trains the digits model when none is there yet.

    Raises:
        ValueError: the options do not go together, or the model, the data or the output folder is
            refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    options = run.plan.options
    check_source("--data", options.data, ["digits"])
    run.lock_existing()
    if options.model is None and options.lora is not None:
        raise ValueError(
            f"--model must name the base pipeline, got none with --lora {options.lora}"
        )
    model = (
        digits_model()
        if options.model is None
        else load(options.model, options.lora, **options.trained)
    )
    _check_options(run, model)
    if options.model is None and (options.data != "digits" or options.preset):
        raise ValueError(
            "--model must name a Diffusers folder for --data other than 'digits', which has a "
            "small model that is trained on the spot"
        )
    recipe = Recipe()
    deciding = {
        "model": {"recipe": recipe.to_dict()} if options.model is None else model.identity(),
        "schedule": model.process.describe(),
    }
    # images take minutes to read: another model is refused before
    run.check_output(deciding, partly=True)
    data = _load_images(run, model, "train")
    tell(run.console, "training images", data)
    model.input_shape(data.shape)
    data = data.conditioned(_train_items(run, model, data))
    run.claim_output(
        {
            "data": {"fingerprint": data.fingerprint, "rows": len(data)},
            **({} if model.reads is None else {model.reads: _hash(data.conditions)}),
            **deciding,
        }
    )
    run.choose_timesteps(model)
    if options.model is None:
        model = _train_digits(run, model, data, recipe)
    return model, _encode(run, model, data, "train")


def _check_options(run: Run, model: Denoiser) -> None:
    """Refuse options that are for models of another kind."""
    options = run.plan.options
    for name in ("caption", "prompts", "resolution"):
        if getattr(options, name) is not None and model.reads != "captions":
            raise ValueError(
                f"--{name} is for text-to-image models, which a {type(model).__name__} is not"
            )
    if options.guidance_scale is not None and model.guidance_scale is None:
        raise ValueError("--guidance-scale is for models with guidance, which this one has not")
    if options.classes is not None and model.reads != "labels":
        raise ValueError("--classes is for models that read classes, which this one does not")


def _load_images(run: Run, model: Denoiser, split: str, limit: int | None = None) -> Samples:
    """The images of a part of ``--data``, as the preset draws them if there is one."""
    options = run.plan.options
    if options.preset is None:
        return load_data(options.data, split=split, limit=limit, **_image_options(run, model))
    preset = get_preset(options.preset)
    is_encoded = model.encoding is not None
    if model.reads != preset.reads or not (is_encoded or model.size == preset.size):
        size = "latent" if is_encoded else f"{model.size}-pixel"
        raise ValueError(f"--preset {preset.name} must fit the model, got a {size} model")
    # the default of --data is the digits' name
    source = None if options.data == "digits" else options.data
    return preset.load_data(split, source, limit=limit, skip_corrupt=options.skip_corrupt)


def _image_options(run: Run, model: Denoiser) -> dict[str, Any]:
    """How images are loaded for a model."""
    options = run.plan.options
    return {
        "channels": model.channels,
        "size": options.resolution or model.size,
        "skip_corrupt": options.skip_corrupt,
        "resize": options.resize,
    }


def _train_digits(run: Run, model: Denoiser, data: Samples, recipe: Recipe) -> Denoiser:
    with ranks().alone(run.plan.output, "model"):
        return _trained_digits(run, model, data, recipe)


def _trained_digits(run: Run, model: Denoiser, data: Samples, recipe: Recipe) -> Denoiser:
    output = run.plan.output
    folder = output / "model"
    if (folder / "model_index.json").is_file():
        run.reuse(_TRAINING)
        return load(folder)
    if folder.exists():
        raise OutputError(
            f"{folder} must hold model_index.json, got a folder without it: delete it to train anew"
        )
    checkpoint = output / "training.pt"
    with run.stage(_TRAINING) as progress, one_thread():
        model.to(run.plan.device)
        train(model, data, recipe, checkpoint=checkpoint, progress=progress)
    # written beside, then renamed: a killed run leaves no half model that passes for a whole one
    partial = output / "model.partial"
    model.save(partial)
    partial.rename(folder)
    checkpoint.unlink(missing_ok=True)
    return load(folder)


def _train_items(run: Run, model: Denoiser, data: Samples) -> list[Any] | None:
    """What goes with the training images, for a model that reads anything."""
    options = run.plan.options
    if model.reads == "captions":
        return _captions(run, options.data, data)
    return _labels(model, data, options.data) if model.reads == "labels" else None


def _labels(model: Denoiser, data: Samples, source: str) -> list[int]:
    """The classes of images, for a model that reads them.

    Raises:
        ValueError: they have none, or others than the model knows.
    """
    if data.labels is None:
        raise ValueError(
            f"'{source}' must have labels for a model that reads classes, got none: folders "
            "<class>/<image>, or a parquet file or data set with a column 'label'"
        )
    count = model.num_classes
    wrong = [label for label in data.labels if count is not None and not 0 <= label < count]
    if wrong:
        raise ValueError(
            f"labels of '{source}' must be in [0, {count}), the classes of the model, got "
            f"{max(wrong)}"
        )
    return data.labels


def _captions(run: Run, source: str, data: Samples) -> list[str]:
    options = run.plan.options
    if options.preset is not None and options.caption is None:
        return get_preset(options.preset).captions(data.labels or [])
    return load_captions(source, data, options.caption)


def _encode(run: Run, model: Denoiser, data: Samples, role: str) -> Samples:
    """``data`` with what the model is given for it, kept in the output folder."""
    return encode(model, data, run, role, run.plan.output)


def load_queries(run: Run, model: Denoiser) -> tuple[Samples, Drawing | None]:
    """The images to explain: drawn by the model, held out, or in a folder.

    Returns:
        The queries, and how they were drawn where the model drew them.

    Raises:
        ValueError: there are none of that kind, or they do not fit the model; one clear line.
        FileNotFoundError: a path does not exist.
    """
    options = run.plan.options
    if options.queries == "generated":
        pictures, drawing = _draw_queries(run, model)
        return _encode(run, model, pictures, "query"), drawing
    pictures, source = _load_given(run, model, "--queries", options.queries, options.num_queries)
    tell(run.console, "queries", pictures)
    model.input_shape(pictures.shape)
    items = _query_items(run, model, source, pictures)
    return _encode(run, model, pictures.conditioned(items), "query"), None


def load_held_out(run: Run, model: Denoiser, train: Samples, queries: Samples) -> Samples | None:
    """The images of ``--held-out`` that are neither training images nor queries, None without.

    Raises:
        ValueError: they are too few, or do not fit the model; one clear line.
        FileNotFoundError: a path does not exist.
    """
    place = run.plan.options.held_out
    if place is None:
        return None
    pictures, source = _load_given(run, model, "--held-out", place)
    model.input_shape(pictures.shape)
    left = pictures.without(train, queries)
    tell(run.console, "held-out images", left)
    if len(left) < len(pictures):
        run.say(f"{len(pictures) - len(left):,} of them are training images or queries: left out")
    check_count(len(left))
    return _encode(run, model, left.conditioned(_query_items(run, model, source, left)), HELD_OUT)


def _load_given(
    run: Run, model: Denoiser, option: str, asked: str, limit: int | None = None
) -> tuple[Samples, str]:
    """Images that were not drawn, and where they lie: a part of the data, or elsewhere."""
    if asked == "validation":
        return _load_validation(run, model, option, limit), run.plan.options.data
    words = ["generated", "validation", "digits"] if option == "--queries" else ["validation"]
    check_source(option, asked, words)
    return load_data(asked, **_image_options(run, model)), asked


def _load_validation(run: Run, model: Denoiser, option: str, limit: int | None) -> Samples:
    try:
        return _load_images(run, model, "validation", limit)
    except DataError:
        raise
    except ValueError as error:
        others = "'generated' or a folder" if option == "--queries" else "a folder"
        raise ValueError(
            f"{option} must be {others} of images where --data has no validation part, got "
            f"'validation' with {run.plan.options.data}"
        ) from error


def _query_items(run: Run, model: Denoiser, source: str, pictures: Samples) -> list[Any] | None:
    """What goes with queries that were not drawn: their own, or what an option says."""
    options = run.plan.options
    if model.reads is None:
        return None
    if model.reads == "labels":
        if options.class_numbers is not None:
            return choose_items(model, range(len(pictures)), classes=options.class_numbers)
        return _labels(model, pictures, source)
    if options.queries == "validation" and options.preset is not None:
        return _captions(run, source, pictures)
    own = read_captions(source, pictures)
    if own is not None:
        return own
    if options.prompts is not None:
        return choose_prompts(read_prompts(options.prompts), range(len(pictures)))
    if options.caption is not None:
        return caption_all(options.caption, source, pictures)
    return load_captions(source, pictures)


def _draw_queries(run: Run, model: Denoiser) -> tuple[Samples, Drawing]:
    """Pictures by seed, with what they were drawn from."""
    options, output = run.plan.options, run.plan.output
    seeds = range(options.num_queries)
    prompts = _prompts(run, model)
    items = choose_items(model, seeds, prompts=prompts, classes=options.class_numbers)
    folder = output / "generated"
    if items is not None:
        # pictures of other prompts or classes live side by side
        classes = options.class_numbers or range(model.num_classes or 0)
        # the whole round of them, repeats too: it says which seed takes which
        every = prompts or [f"class {label}" for label in classes]
        guidance = guidance_of(run, model)
        how = [*([] if guidance is None else [str(guidance)]), *_size(run)]
        folder = output / f"generated-{_hash([*every, *how])[:8]}"
    how_drawn = {
        "num_inference_steps": fitting_steps(model),
        "guidance_scale": guidance_of(run, model),
        "size": options.resolution,
    }
    # picture i depends on its seed i alone, so pictures are added to those drawn before
    with ranks().alone(output, folder.name):
        missing = missing_seeds(folder, seeds)
        if not missing:
            run.reuse(_GENERATION, folder.name)
        else:
            folder.mkdir(exist_ok=True)
            if prompts is not None and items is not None:
                write_captions(folder, {picture_name(seed): items[seed] for seed in seeds})
            with run.stage(_GENERATION, folder.name) as progress:
                model.to(run.plan.device)
                chosen = None if items is None else [items[seed] for seed in missing]
                draw_missing(model, missing, folder, chosen, progress=progress, **how_drawn)
    # the query is the picture as saved, 8 bits a channel
    pictures = load_data(folder, channels=model.channels, limit=options.num_queries)
    return pictures.conditioned(items), Drawing(seeds, items, how_drawn)


def _prompts(run: Run, model: Denoiser) -> list[str] | None:
    """What pictures are drawn from, for a model that reads captions."""
    options = run.plan.options
    if model.reads != "captions":
        return None
    if options.prompts is not None:
        return read_prompts(options.prompts)
    return None if options.preset is None else get_preset(options.preset).prompts()


def guidance_of(run: Run, model: Denoiser) -> float | None:
    """The guidance scale pictures are drawn with; None for a model without."""
    chosen = run.plan.options.guidance_scale
    return model.guidance_scale if chosen is None else chosen


def drawing_facts(run: Run, model: Denoiser, queries: Samples) -> dict[str, str]:
    """How queries were drawn, as name and text; nothing for those that read nothing."""
    items = list(dict.fromkeys(queries.conditions or []))
    if run.plan.options.queries != "generated" or not items:
        return {}
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    guidance = guidance_of(run, model)
    told = {} if guidance is None else {"guidance scale of the pictures": f"{guidance:g}"}
    if not isinstance(items[0], str):
        return {"classes of the pictures": ", ".join(map(str, items[:_SHOWN])) + more, **told}
    shown = ", ".join(f"“{prompt}”" for prompt in items[:_SHOWN])
    return {"prompts of the pictures": shown + more, **told}


def _size(run: Run) -> list[str]:
    resolution = run.plan.options.resolution
    return [] if resolution is None else [str(resolution)]


def _hash(values: Sequence[Any] | None) -> str:
    return hashlib.sha256(json.dumps(list(values or [])).encode()).hexdigest()
