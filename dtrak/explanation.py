"""`explain`: a model, its training data and some queries give an attribution."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dtrak_kernels.ridge.group import Group

from .attribution import Attribution
from .data.given import images
from .data.images import from_uint8, to_uint8
from .data.samples import Samples
from .features.latents import encode
from .methods import check_held_out, check_needs
from .methods.evidence import HELD_OUT, QUERY, TRAIN, Drawing, Evidence, Retrained
from .methods.groups import By, group_names
from .methods.judgement import judge
from .methods.verdicts import check_count
from .models import load, wrap
from .models.denoiser import Denoiser
from .runs.code import describe_code
from .runs.console import choose_device
from .runs.files import expand_path, picture_name
from .runs.options import ExplainOptions
from .runs.ranks import ranks
from .runs.record import RUN
from .runs.stages import Stages
from .training.drawing import choose_items, draw_all, fitting_steps


def explain(
    model: Any,
    data: Any,
    queries: Any,
    *,
    store: str | Path | None = None,
    checkpoints: Sequence[Any] = (),
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    retrained: Retrained | None = None,
    held_out: Any = None,
    groups: By | None = None,
    prompts: Sequence[str] | str | None = None,
    classes: Sequence[int] | int | None = None,
    progress: bool = True,
    **options: Any,
) -> Attribution:
    """Which training images made this model draw these pictures.

    Args:
        model: what `dtrak.load` or `Denoiser.of` gives, a folder that `dtrak.load` takes, or a
            Diffusers pipeline.
        data: the N training images: what `dtrak.images` gives or takes.
        queries: the M images to explain, likewise; or a number, of pictures that the model draws
            from the seeds 0, 1, ….
        store: folder in which features are kept, so that a call that was killed goes on and other
            queries cost only themselves; None touches no disk. Processes that a launcher started
            all make the call, divide the work by this folder and get the same answer.
        checkpoints: the model at several points of its training, for the methods that need them.
        clip: folder of a CLIP model, likewise.
        dino: folder of a general image encoder such as DINO's, by which ``look_alikes`` are found;
            without it that is CLIP where there is one, else pixels.
        retrained: models trained on parts of the data, likewise.
        held_out: images that the model was not trained on, as ``data``: scores that are higher than
            theirs stand out. Those that are training images or queries too are left out.
        groups: of the training images, whose scores are summed: ``"label"``, ``"folder"``,
            ``"caption"``, a CSV file of lines image,group, a mapping from ids, or N names.
        prompts: of the pictures drawn, for a model that reads captions.
        classes: of the pictures drawn, for a model that reads classes; all by default.
        progress: show progress bars, on stderr.
        options: as the command line of `dtrak.attribute` has them: ``method``,
            ``output_function``, ``timesteps``, ``damping`` and so on; `ExplainOptions` lists them.

    Returns:
        The scores ``[M, N]``, with the images, and `findings` where any were asked for.

    Raises:
        FileNotFoundError: a path does not exist.
        TypeError: there is no such option.
        ValueError: an option, the model, the images or the store is refused; one clear line.
    """
    how, here = ExplainOptions(**options), ranks()
    if here.is_launched and store is None:
        raise ValueError(
            f"store must be a folder that all {here.world} processes of the launch see, got None: "
            "one of them explains alone within dtrak.runs.ranks.by_itself()"
        )
    drawn = _count(queries)
    check_needs(
        how.what, checkpoints=checkpoints, drawing=drawn is not None, clip=clip, retrained=retrained
    )
    if held_out is not None:
        check_held_out(how.what)
    device = choose_device(how.device)
    console = Console(stderr=True, quiet=not here.is_main) if progress else None
    stages = Stages(device, console)
    denoiser = as_denoiser(model)
    if how.dtype == "float64":
        # the caller's stays what it is
        denoiser = denoiser.with_module(copy.deepcopy(denoiser.module))
    train = _fit(denoiser, data, "data")
    with ExitStack() as held:
        folder = None if store is None else expand_path(store)
        if folder is not None:
            settings = {
                "data": {"fingerprint": train.fingerprint, "rows": len(train)},
                "model": denoiser.identity(),
                "schedule": denoiser.process.describe(),
            }
            RUN.check(folder, settings)
            asked = {**asdict(how), "device": device.type, "queries drawn": drawn}
            about = {"options": asked, **settings, **describe_code()}
            # none of them holds the folder for the call before any more
            here.meet("explain")
            held.enter_context(here.hold(folder, lambda: about))
            with here.alone(folder, "run"):
                RUN.claim(folder, settings)
            stages.folder = folder
        drawing = None
        if drawn is not None:
            drawing = _drawing(denoiser, drawn, prompts, classes)
            explained = _draw(denoiser, drawing, stages)
        else:
            explained = _fit(denoiser, queries, "queries")
            here.agree("queries", {"queries": explained.fingerprint})
        others = None
        if held_out is not None:
            others = _fit(denoiser, held_out, "held_out").without(train, explained)
            check_count(len(others))
            others = encode(denoiser, others, stages, HELD_OUT, folder)
        train = encode(denoiser, train, stages, TRAIN, folder)
        explained = encode(denoiser, explained, stages, QUERY, folder)
        return explain_samples(
            denoiser,
            train,
            explained,
            how,
            stages,
            folder=folder,
            drawing=drawing,
            checkpoints=[as_denoiser(checkpoint) for checkpoint in checkpoints],
            clip=clip,
            dino=dino,
            retrained=retrained,
            held_out=others,
            groups=groups,
        )


def explain_samples(
    model: Denoiser,
    train: Samples,
    queries: Samples,
    how: ExplainOptions,
    stages: Stages,
    *,
    held_out: Samples | None = None,
    groups: By | None = None,
    **evidence: Any,
) -> Attribution:
    """What `explain` and ``python -m dtrak.attribute`` do once everything is loaded.

    Args:
        model: that is explained.
        train: N samples, encoded, with what the model reads beside each.
        queries: M samples, likewise.
        how: the options.
        stages: where the work is timed and shown, and on which device it is done.
        held_out: images that the model was not trained on, likewise.
        groups: as `explain`.
        evidence: what more there is, as `Evidence` takes it.

    Raises:
        ValueError: as `Evidence.scores` and `judge`.
    """
    # refused before anything is computed
    names = None if groups is None else group_names(train, groups)
    known = Evidence(model, train, queries, how, stages.clock.device, stages, **evidence)
    scores, settings = known.scores()
    findings = judge(known, scores, held_out, names)
    return Attribution(scores.cpu(), train, queries, settings, known.facts, findings=findings)


def as_denoiser(model: Any) -> Denoiser:
    """A model as `explain` takes it: itself, what lies in a folder, or a pipeline in memory."""
    if isinstance(model, Denoiser):
        return model
    return load(model) if isinstance(model, str | Path) else wrap(model)


def _fit(model: Denoiser, given: Any, name: str) -> Samples:
    """Samples with what the model reads beside each."""
    found = (
        given
        if isinstance(given, Samples)
        else images(given, channels=model.channels, size=model.size)
    )
    if model.channels is not None and (len(found.shape) != 3 or found.shape[0] != model.channels):
        raise ValueError(
            f"{name} must be images [N, {model.channels}, H, W], as the model takes them, got "
            f"{[len(found), *found.shape]}"
        )
    model.input_shape(found.shape)
    if model.reads is None:
        return found.conditioned(None)
    # a caption beside a label is for other models
    own = found.conditions is None and model.reads != "captions"
    if found.labels is not None and (own or model.reads == "labels"):
        found = found.conditioned(found.labels)
    if found.conditions is None:
        raise ValueError(
            f"{name} must have {model.reads}, which the model reads beside each image, got none: "
            f"dtrak.images(…, {'labels' if model.reads != 'captions' else 'captions'}=[…])"
        )
    return found


def _count(queries: Any) -> int | None:
    """How many queries are to be drawn; None where they are given.

    Raises:
        ValueError: it is a number that counts nothing.
    """
    if not isinstance(queries, int):
        return None
    if isinstance(queries, bool) or queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    return queries


def _drawing(
    model: Denoiser,
    count: int,
    prompts: Sequence[str] | str | None,
    classes: Sequence[int] | int | None,
) -> Drawing:
    seeds = range(count)
    if isinstance(prompts, str):
        prompts = [prompts]
    if classes is not None:
        classes = [classes] if isinstance(classes, int) else list(classes)
        if not classes:
            raise ValueError("classes must be at least one, got none")
    items = choose_items(model, seeds, prompts=prompts, classes=classes)
    return Drawing(seeds, items, {"num_inference_steps": fitting_steps(model)})


def _draw(model: Denoiser, drawing: Drawing, stages: Stages) -> Samples:
    """The pictures as they would be saved, 8 bits a channel."""
    here, drawn = ranks(), None
    # one process draws, and tells the others
    if here.is_main:
        model.to(stages.clock.device)
        with stages.stage("generate the queries") as progress:
            drawn = to_uint8(
                draw_all(
                    model, drawing.seeds, items=drawing.items, progress=progress, **drawing.how
                )
            ).cpu()
    shape = here.told("drawn", None if drawn is None else list(drawn.shape))
    pictures = from_uint8(Group(here.group()).first(drawn, tuple(shape), torch.uint8))
    names = [picture_name(seed) for seed in drawing.seeds]
    return Samples(pictures, names, None, "drawn by the model", drawing.items)


def _signature() -> inspect.Signature:
    """With every option by its name, for whoever asks in a notebook."""
    plain = inspect.signature(explain)
    named = [
        inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type
        )
        for one in fields(ExplainOptions)
    ]
    kept = [p for p in plain.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return plain.replace(parameters=[*kept, *named])


explain.__signature__ = _signature()  # type: ignore[attr-defined]
