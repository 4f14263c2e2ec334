"""What a run of the main job attributes: a model, its training images and the queries."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.captions import caption_all, load_captions, read_captions, write_captions
from ..data.images import DataError, ImageData, encode_png, load_data, to_uint8
from ..data.latents import LatentData, fill_latents, open_latents, read_latents
from ..features.extraction import model_identity
from ..models.generation import generate
from ..models.stable_diffusion import (
    TextToImageModel,
    drawing_groups,
    generate_from_prompts,
    is_text_to_image,
    load_text_to_image,
)
from ..models.unet import DiffusionModel, digits_model, load_model
from ..training.presets import get_preset
from ..training.recipe import Recipe
from ..training.trainer import one_thread, train
from .choices import GUIDANCE_SCALE
from .console import check_source
from .files import write_atomically
from .folders import OutputError
from .run import Run

NUM_INFERENCE_STEPS = 50
_TRAINING, _GENERATION = "train the model", "generate the queries"
_PROMPTS_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Subject:
    """A set of images: the pictures themselves, and what the model is given.

    Attributes:
        pictures: pixels.
        samples: the same, or their latents with their captions.
    """

    pictures: ImageData
    samples: ImageData | LatentData

    @property
    def captions(self) -> list[str] | None:
        """One per picture, or None for a model that reads none."""
        return getattr(self.samples, "captions", None)


def load_model_and_data(run: Run) -> tuple[DiffusionModel, Subject]:
    """The model and its training images; trains the digits model when none is there yet.

    Raises:
        ValueError: the options do not go together, or the model, the data or the output folder is
            refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    options = run.plan.options
    check_source("--data", options.data, ["digits"])
    run.lock_existing()
    if options.lora is not None or (options.model and is_text_to_image(options.model)):
        return _load_text_to_image(run)
    for name in ("caption", "prompts", "guidance_scale", "resolution"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is for text-to-image models, which need --lora"
            )
    if options.model is None and (options.data != "digits" or options.preset):
        raise ValueError(
            "--model must name a Diffusers folder for --data other than 'digits', which has a "
            "small model that is trained on the spot"
        )
    model = digits_model() if options.model is None else load_model(options.model)
    recipe = Recipe()
    deciding = {
        "model": {"recipe": recipe.to_dict()}
        if options.model is None
        else {"hash": model_identity(model)["model"]},
        "schedule": model.schedule,
    }
    # images take minutes to read: another model is refused before
    run.check_output(deciding, partly=True)
    data = _load_images(run, model, "train")
    run.claim_output({"data": {"fingerprint": data.fingerprint, "rows": len(data)}, **deciding})
    run.choose_timesteps(model)
    if options.model is None:
        model = _train_digits(run, model, data, recipe)
    return model, Subject(data, data)


def _load_images(run: Run, model: DiffusionModel, split: str) -> ImageData:
    """The images of a part of ``--data``, as the preset draws them if there is one."""
    options = run.plan.options
    limit = None if split == "train" else options.num_queries
    if options.preset is None:
        return load_data(options.data, split=split, limit=limit, **_image_options(run, model))
    preset = get_preset(options.preset)
    latent = isinstance(model, TextToImageModel)
    if latent != (preset.lora is not None) or (not latent and model.size != preset.size):
        size = "latent" if latent else f"{model.size}-pixel"
        raise ValueError(f"--preset {preset.name} must fit the model, got a {size} model")
    # the default of --data is the digits' name
    source = None if options.data == "digits" else options.data
    return preset.load_data(split, source, limit=limit, skip_corrupt=options.skip_corrupt)


def _image_options(run: Run, model: DiffusionModel) -> dict[str, Any]:
    """How images are loaded for a model."""
    options = run.plan.options
    return {
        "channels": model.channels,
        "size": options.resolution or model.size,
        "skip_corrupt": options.skip_corrupt,
        "resize": options.resize,
    }


def _train_digits(
    run: Run, model: DiffusionModel, data: ImageData, recipe: Recipe
) -> DiffusionModel:
    output = run.plan.output
    folder = output / "model"
    if (folder / "model_index.json").is_file():
        run.reused.append(_TRAINING)
        return load_model(folder)
    if folder.exists():
        raise OutputError(
            f"{folder} must hold model_index.json, got a folder without it: delete it to train anew"
        )
    checkpoint = output / "training.pt"
    with run.stage(_TRAINING) as progress, one_thread():
        model.unet.to(run.plan.device)
        train(model, data.images, recipe, checkpoint=checkpoint, progress=progress)
    # written beside, then renamed: a killed run leaves no half model that passes for a whole one
    partial = output / "model.partial"
    model.save(partial)
    partial.rename(folder)
    checkpoint.unlink(missing_ok=True)
    return load_model(folder)


def _load_text_to_image(run: Run) -> tuple[DiffusionModel, Subject]:
    options = run.plan.options
    if options.model is None or options.lora is None:
        missing, other = ("--model", "--lora") if options.model is None else ("--lora", "--model")
        what = "base pipeline" if options.model is None else "LoRA whose parameters are attributed"
        given = getattr(options, other[2:])
        raise ValueError(f"{missing} must name the {what}, got none with {other} {given}")
    model = load_text_to_image(options.model, options.lora)
    deciding = {"model": model.identity, "schedule": model.schedule}
    run.check_output(deciding, partly=True)
    data = _load_images(run, model, "train")
    captions = _captions(run, options.data, data)
    run.claim_output(
        {
            "data": {"fingerprint": data.fingerprint, "rows": len(data)},
            "captions": _hash_texts(captions),
            **deciding,
        }
    )
    run.choose_timesteps(model)
    return model, Subject(data, _encode(run, model, data, captions, "train"))


def _captions(run: Run, source: str, data: ImageData) -> list[str]:
    options = run.plan.options
    if options.preset is not None and options.caption is None:
        return get_preset(options.preset).captions(data.labels or [])
    return load_captions(source, data, options.caption)


def _encode(
    run: Run, model: TextToImageModel, data: ImageData, captions: Sequence[str], role: str
) -> LatentData:
    """Latents of ``data``, kept in the output folder."""
    label = {"train": "latents of training images", "query": "latents of queries"}[role]
    name = role if role == "train" else f"{role}-{data.fingerprint[:12]}"
    store = open_latents(run.plan.output / "latents" / name, model, data)
    if not store.missing():
        run.reused.append(label)
    else:
        with run.stage(label) as progress:
            fill_latents(store, model, data, run.plan.device, progress=progress)
    return read_latents(store, model, data, captions)


def load_queries(run: Run, model: DiffusionModel) -> Subject:
    """The images to explain: drawn by the model, held out, or in a folder.

    Raises:
        ValueError: there are none of that kind, or they do not fit the model; one clear line.
        FileNotFoundError: a path does not exist.
    """
    options = run.plan.options
    if options.queries == "generated":
        pictures, prompts = _draw_queries(run, model)
        if not isinstance(model, TextToImageModel):
            return Subject(pictures, pictures)
        return Subject(pictures, _encode(run, model, pictures, prompts, "query"))
    if options.queries == "validation":
        source = options.data
        pictures = _load_validation(run, model)
    else:
        check_source("--queries", options.queries, ["generated", "validation", "digits"])
        source = options.queries
        pictures = load_data(source, **_image_options(run, model))
    if not isinstance(model, TextToImageModel):
        return Subject(pictures, pictures)
    captions = _query_captions(run, source, pictures)
    return Subject(pictures, _encode(run, model, pictures, captions, "query"))


def _load_validation(run: Run, model: DiffusionModel) -> ImageData:
    try:
        return _load_images(run, model, "validation")
    except DataError:
        raise
    except ValueError as error:
        raise ValueError(
            "--queries must be 'generated' or a folder of images where --data has no validation "
            f"part, got 'validation' with {run.plan.options.data}"
        ) from error


def _query_captions(run: Run, source: str, pictures: ImageData) -> list[str]:
    """Their own, or those that ``--prompts`` or ``--caption`` gives."""
    options = run.plan.options
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


def read_prompts(text: str) -> list[str]:
    """What ``--prompts`` says: the lines of a file, or a text itself.

    Raises:
        FileNotFoundError: the name of a ``.txt`` file that is not there.
        ValueError: the file holds no line of text.
    """
    file = Path(text)
    # not Path.is_file, which raises where a long prompt is no valid name
    if not os.path.isfile(text):
        if text.endswith(".txt"):
            raise FileNotFoundError(f"--prompts must be a text or a file of them, got {text}")
        return [text]
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts must be a text file in UTF-8, got {file}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"--prompts must be a file with one prompt per line, got none in {file}")
    return prompts


def choose_prompts(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The prompt of each seed: seed i takes prompt i, from the start again after the last."""
    return [prompts[seed % len(prompts)] for seed in seeds]


def _draw_queries(run: Run, model: DiffusionModel) -> tuple[ImageData, list[str]]:
    """Pictures by seed, with their prompts where the model reads any."""
    options, output = run.plan.options, run.plan.output
    seeds = range(options.num_queries)
    prompts: list[str] = []
    folder = output / "generated"
    if isinstance(model, TextToImageModel):
        every = _prompts(run)
        prompts = choose_prompts(every, seeds)
        # pictures of other prompts live side by side
        deciding = [*every, str(guidance_of(run)), *_size(run)]
        folder = output / f"generated-{_hash_texts(deciding)[:8]}"
    # picture i depends on its seed i alone, so pictures are added to those drawn before
    missing = [seed for seed in seeds if not (folder / f"{seed:05d}.png").is_file()]
    if not missing:
        run.reused.append(_GENERATION)
    else:
        folder.mkdir(exist_ok=True)
        with run.stage(_GENERATION) as progress:
            model.unet.to(run.plan.device)
            if isinstance(model, TextToImageModel):
                _draw_from_prompts(run, model, prompts, missing, folder, progress)
            else:
                steps = min(NUM_INFERENCE_STEPS, model.num_train_timesteps)
                images = generate(model, missing, num_inference_steps=steps, progress=progress)
                _keep(folder, missing, images)
    # the query is the picture as saved, 8 bits a channel
    pictures = load_data(folder, channels=model.channels, limit=options.num_queries)
    return pictures, prompts


def _prompts(run: Run) -> list[str]:
    options = run.plan.options
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if options.preset is not None:
        return get_preset(options.preset).prompts()
    raise ValueError("--prompts must say what to draw: a text, or a file with one prompt per line")


def guidance_of(run: Run) -> float:
    """The guidance scale pictures are drawn with from their prompts."""
    chosen = run.plan.options.guidance_scale
    return GUIDANCE_SCALE if chosen is None else chosen


def drawing_facts(run: Run, queries: Subject) -> dict[str, str]:
    """How queries were drawn from prompts, as name and text; nothing for those that were not."""
    prompts = list(dict.fromkeys(queries.captions or []))
    if run.plan.options.queries != "generated" or not prompts:
        return {}
    shown = ", ".join(f"“{prompt}”" for prompt in prompts[:_PROMPTS_SHOWN])
    more = len(prompts) - _PROMPTS_SHOWN
    return {
        "prompts of the pictures": shown + (f" and {more} more" if more > 0 else ""),
        "guidance scale of the pictures": f"{guidance_of(run):g}",
    }


def _size(run: Run) -> list[str]:
    resolution = run.plan.options.resolution
    return [] if resolution is None else [str(resolution)]


def _keep(folder: Path, seeds: Sequence[int], images: Tensor) -> None:
    for seed, image in zip(seeds, images, strict=True):
        write_atomically(folder / f"{seed:05d}.png", encode_png(to_uint8(image)))


def _draw_from_prompts(
    run: Run,
    model: TextToImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    progress: Any,
) -> None:
    """Draw in small groups, so that a run that was killed keeps what it drew."""
    steps = min(NUM_INFERENCE_STEPS, model.num_train_timesteps)
    write_captions(folder, {f"{seed:05d}.png": text for seed, text in enumerate(prompts)})
    for group, report in drawing_groups(seeds, progress):
        images = generate_from_prompts(
            model,
            [prompts[seed] for seed in group],
            group,
            guidance_scale=guidance_of(run),
            num_inference_steps=steps,
            size=run.plan.options.resolution,
            batch_size=len(group),
            progress=report,
        )
        _keep(folder, group, images)


def _hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
