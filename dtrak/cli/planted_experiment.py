"""Planting, training, asking: from the images to the tables."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import NUMERICS
from ..data.captions import write_captions
from ..data.images import load_data
from ..data.samples import Samples, join
from ..evaluation.planted.images import Planted, is_of_concept, load_concept, plant
from ..evaluation.planted.options import DEFAULT_PRESET, PLANTED, Options, PlantedError
from ..evaluation.planted.retrieval import (
    FIRST,
    Found,
    average_precisions,
    precisions,
    recalls,
)
from ..evaluation.retraining import Retraining
from ..evaluation.subject import (
    Subject,
    default_precision,
    find_trained,
    subject_of_preset,
    subject_of_run,
)
from ..methods import TRAJECTORY
from ..methods.evidence import QUERY, TRAIN, Drawing, Evidence
from ..models.denoiser import Denoiser
from ..pages.planted import retrieval_table
from ..runs.choices import counted
from ..runs.console import choose_device, progress_bar
from ..runs.files import picture_name, picture_seed, write_atomically
from ..runs.folders import refuse_inside
from ..runs.options import ExplainOptions
from ..runs.stages import Stages
from ..training.command import checkpoint_folder, checkpoint_steps, is_saved, save_model
from ..training.drawing import keep, missing_seeds
from ..training.presets import get_preset

HELD_OUT, DRAWN = "held-out images of the concept", "pictures of the concept that the model drew"
RESULTS = "results.json"
_MODEL, _GENERATED = "model", "generated"
# parts of the training after which methods on checkpoints look at the model
_QUARTERS = 4


def run_planted(options: Options, console: Console) -> list[Found]:
    """The whole experiment, as far as it is not done; prints a table for each kind of queries.

    Args:
        options: as `Options.check` leaves them.
        console: where progress goes.

    Raises:
        ValueError: an option, the images or the folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    subject, folder = _subject(options), options.folder
    refuse_inside(folder, data=subject.training.data.source, concept=options.concept)
    base = Retraining(subject.training, folder, subject.drawing)
    model, data = base.like(), base.data
    concept = load_concept(options.concept, options.class_numbers, subject, model, data)
    planted = plant(data, concept, options.planted, options.num_queries, options.seed)
    console.print(
        f"{planted.train.source}: {counted(len(planted.train), 'image')}, "
        f"{counted(len(planted.held_out), 'held-out query', 'held-out queries')}",
        highlight=False,
        soft_wrap=True,
    )
    retraining = Retraining(subject.training, folder, subject.drawing, data=planted.train)
    settings = {
        "data": planted.train.fingerprint,
        "queries": planted.held_out.fingerprint,
        "training": retraining.identity({}),
        "pictures": options.generated,
        "timesteps": options.timesteps,
        "numerics": NUMERICS,
    }
    with ExitStack() as held:
        PLANTED.claim(folder, settings, held)
        device = choose_device(options.device)
        experiment = Experiment(folder, planted, retraining, device, console)
        retraining.prepare(device, partial(progress_bar, console))
        experiment.train()
        return experiment.ask(options)


def _subject(options: Options) -> Subject:
    if options.run is not None:
        trained = find_trained(options.run, recipe=options.recipe, source=options.data)
        subject = subject_of_run(trained)
    else:
        preset = get_preset(options.preset or DEFAULT_PRESET)
        subject = subject_of_preset(preset, options.data, None, default_precision(preset))
    if options.steps is None:
        return subject
    recipe = replace(subject.training.recipe, steps=options.steps, epochs=None)
    return replace(subject, training=replace(subject.training, recipe=recipe))


@dataclass(frozen=True, eq=False)
class Experiment:
    """One model trained on data with planted images, and what is asked of it.

    Attributes:
        folder: where everything lies.
        planted: the images.
        retraining: trains the model.
        device: where.
        console: where progress goes.
    """

    folder: Path
    planted: Planted
    retraining: Retraining
    device: torch.device
    console: Console

    @property
    def checkpoints(self) -> list[Path]:
        """Where the models of the quarters of the training lie, the last of them the whole one."""
        steps = self.retraining.recipe.num_steps(len(self.planted.train))
        kept = [checkpoint_folder(self.folder, s) for s in checkpoint_steps(steps, _QUARTERS)]
        return [*kept[:-1], self.folder / _MODEL]

    def train(self) -> None:
        """Train the model, unless that is done."""
        recipe, *kept = self.retraining.recipe, *self.checkpoints[:-1]
        steps = {int(place.name.rpartition("-")[2]): place for place in kept}
        with progress_bar(self.console, "train") as progress:
            self.retraining.train_once(
                _MODEL,
                None,
                (recipe.seed, recipe.seed),
                self.device,
                is_done=lambda: is_saved(self.folder / _MODEL),
                finish=lambda model: save_model(model, self.folder / _MODEL),
                keep_at=list(steps),
                keep=lambda model, step: save_model(model, steps[step]),
                progress=progress,
            )

    @cached_property
    def model(self) -> Denoiser:
        """The trained one."""
        return self.retraining.load(self.folder / _MODEL)

    def items(self, seeds: Any) -> list[Any] | None:
        """What pictures are drawn from: what goes with the planted images."""
        conditions = self.planted.train.select(self.planted.is_planted).conditions
        return conditions and [conditions[seed % len(conditions)] for seed in seeds]

    def draw(self, count: int) -> Samples:
        """The first ``count`` pictures, as saved; drawn where they are missing."""
        folder, seeds = self.folder / _GENERATED, range(count)
        missing = missing_seeds(folder, seeds)
        items = self.items(seeds)
        if missing:
            folder.mkdir(exist_ok=True)
            if items is not None and self.model.reads == "captions":
                write_captions(folder, {picture_name(seed): items[seed] for seed in seeds})
            with progress_bar(self.console, "draw pictures") as progress:
                for batch in self.retraining.draw(
                    self.model, missing, self.items(missing), self.device, progress=progress
                ):
                    keep(folder, batch)
        pictures = load_data(folder, channels=self.planted.train.shape[0], limit=count)
        return pictures.conditioned(items)

    def ask(self, options: Options) -> list[Found]:
        """Scores of every method for all queries, judged; what is known already is kept."""
        pictures = self.draw(options.generated)
        drawn = pictures.select(is_of_concept(pictures, self.planted))
        chosen = drawn.select(range(min(len(drawn), options.num_queries)))
        self.console.print(
            f"{len(drawn)} of {counted(len(pictures), 'picture')} are of the concept: nearer to "
            "held-out images of it than to the data",
            highlight=False,
            soft_wrap=True,
        )
        kinds = {HELD_OUT: self.planted.held_out, DRAWN: chosen}
        kinds = {kind: images for kind, images in kinds.items() if len(images)}
        encoded = {
            # sets of latents are kept by what they are of
            kind: self.retraining.samples(f"{QUERY}-{images.fingerprint[:8]}", images, self.device)
            for kind, images in kinds.items()
        }
        train = self.retraining.samples(TRAIN, self.planted.train, self.device)
        file, known = self.folder / RESULTS, self._read()
        for how in options.settings:
            asked = [kind for kind in kinds if how.what.needs != TRAJECTORY or kind == DRAWN]
            if all((how.variant, kind) in known for kind in asked):
                continue
            self.console.print(f"scores: {how.variant}", highlight=False)
            queries = join([encoded[kind] for kind in asked], "queries")
            scores = self._evidence(how, train, queries, kinds.get(DRAWN)).scores()[0]
            parts = scores.split([len(kinds[kind]) for kind in asked])
            for kind, part in zip(asked, parts, strict=True):
                known[how.variant, kind] = self._judge(how, kind, part)
            text = json.dumps({"rows": [row.to_dict() for row in known.values()]}, indent=1)
            write_atomically(file, text.encode())
        wanted = {how.variant for how in options.settings}
        rows = [row for row in known.values() if row.variant in wanted]
        N, P = len(train), int(self.planted.is_planted.sum())
        for kind in kinds:
            of_kind = [row for row in rows if row.queries == kind]
            if of_kind:
                retrieval_table(of_kind, N, P).show(Console())
        Console().print(f"every query: {file}", soft_wrap=True, highlight=False)
        return rows

    def _evidence(
        self, how: ExplainOptions, train: Samples, queries: Samples, drawn: Samples | None
    ) -> Evidence:
        stages = Stages(self.device, self.console)
        drawing = None
        if how.what.needs == TRAJECTORY and drawn is not None:
            seeds = [picture_seed(name) for name in drawn.ids]
            way = self.retraining.drawing
            drawing = Drawing(
                seeds,
                drawn.conditions,
                {
                    "num_inference_steps": way.num_inference_steps,
                    "guidance_scale": way.guidance_scale,
                    "size": way.size,
                },
            )
        self.model.to(self.device)
        return Evidence(
            self.model,
            train,
            queries,
            how,
            self.device,
            stages,
            folder=self.folder,
            drawing=drawing,
            checkpoints=[partial(self.retraining.load, place) for place in self.checkpoints],
        )

    def _judge(self, how: ExplainOptions, kind: str, scores: torch.Tensor) -> Found:
        relevant = self.planted.is_planted
        found = (
            average_precisions(scores, relevant),
            precisions(scores, relevant, FIRST),
            recalls(scores, relevant, int(relevant.sum())),
        )
        values = [tuple(value.tolist()) for value in found]
        return Found(how.what.name, how.variant, how.whitening, kind, *values)

    def _read(self) -> dict[tuple[str, str], Found]:
        file = self.folder / RESULTS
        if not file.is_file():
            return {}
        try:
            rows = [Found.from_dict(row) for row in json.loads(file.read_text())["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise PlantedError(f"{file} is damaged: delete it and run again") from error
        return {(row.variant, row.queries): row for row in rows}
