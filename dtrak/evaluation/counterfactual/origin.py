"""The run whose pictures are drawn again: its images, its queries, its scores, its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver

from ...data.images import to_uint8
from ...data.samples import Samples
from ...features.extraction import complete_pair
from ...features.settings import FeatureSettings
from ...features.store import Store
from ...features.timesteps import select_timesteps
from ...features.whitening import open_extractor
from ...methods import DEFAULT
from ...methods.damping import Damping
from ...models.denoiser import Denoiser
from ...runs.console import progress_bar
from ...runs.files import expand_path, picture_seed
from ...runs.folders import alone_at, refuse_inside
from ...runs.options import ExplainOptions
from ...runs.ranks import ranks
from ...runs.record import GENERATED, list_queries
from ...runs.results import load_attribution
from ...training.drawing import fitting_steps
from ..lds.experiment import load_experiment as load_lds
from ..lds.losses import query_losses
from ..lds.options import EXPERIMENT, LossSettings
from ..lds.options import GENERATED as LDS_GENERATED
from ..lds.queries import drawn_from, generated_queries
from ..retraining import TRAIN, Drawing, Retraining
from ..subject import find_trained
from .options import CounterfactualError

_TIMESTEPS, _LOSS_TIMESTEPS = 10, 100


@dataclass(frozen=True, eq=False)
class Origin:
    """A model, what it was trained on and what it drew.

    Attributes:
        folder: of the run.
        train: N training images.
        drawn: M pictures the model drew; the picture of seed 3 is called ``00003.png``.
        load_model: loads the model, on the CPU.
        retraining: trains it again, in the folder of the experiment.
        items: what each query was drawn from, by its id, for a model that reads anything.
        preset: whose experiment it is, as far as is known.
        settings: of gradient features, whatever their output function.
        damping: λ of its scores.
        scores: ``[M, N]`` by output function, where the run has any that fit the settings.
    """

    folder: Path
    train: Samples
    drawn: Samples
    load_model: Callable[[], Denoiser]
    retraining: Retraining
    items: dict[str, Any]
    settings: FeatureSettings
    preset: str | None
    damping: Damping
    scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def data(self) -> Samples:
        """The training images as pictures."""
        return self.train

    @property
    def queries(self) -> Samples:
        """The queries as pictures."""
        return self.drawn

    def draw(self, model: Denoiser, query_ids: Sequence[str], device: torch.device) -> Tensor:
        """Queries drawn again, each from its seed: ``[Q, C, H, W]`` uint8."""
        items = [self.items[query] for query in query_ids] if self.items else None
        seeds = [picture_seed(query) for query in query_ids]
        batches = self.retraining.draw(model, seeds, items, device)
        return to_uint8(torch.cat([batch.images for batch in batches]))

    def losses(self, model: Denoiser, query_ids: Sequence[str], device: torch.device) -> Tensor:
        """The model's loss on queries as the run drew them, ``[Q]`` float32.

        The noise of a query is the same for every model.
        """
        chosen = self.drawn.select([self.drawn.ids.index(query) for query in query_ids])
        how = LossSettings(min(_LOSS_TIMESTEPS, model.process.num_timesteps), 1)
        dtype = self.retraining.dtype(device)
        return query_losses(model, chosen, how, device, dtype=dtype).mean((0, 1))

    def gradient_scores(
        self, output_function: str, folder: Path, device: torch.device, console: Console
    ) -> Tensor:
        """TRAK's formula on the gradients of an output function: D-TRAK, TRAK and their kin.

        Args:
            output_function: as in `output_names.check_output_function`.
            folder: where features are kept.
            device: where they are computed.
            console: where progress goes.

        Returns:
            ``[M, N]`` float32: the run's own where it has them.

        Raises:
            ValueError: as `extraction.fill_store`.
        """
        if output_function in self.scores:
            return self.scores[output_function]
        # those that were launched together divide the shards between them
        with nullcontext() if ranks().is_launched else alone_at(folder, "features", wait=True):
            stores = self._fill_stores(output_function, folder, device, console)
        solver = RidgeSolver(stores[0])
        return solver.scores(stores[1].load(), self.damping.resolve(solver)).float()

    def _fill_stores(
        self, output_function: str, folder: Path, device: torch.device, console: Console
    ) -> tuple[Store, Store]:
        """Complete stores of the training images and of the queries."""
        model = self.load_model()
        settings = replace(self.settings, output_function=output_function)
        show = lambda what: progress_bar(console, f"{folder.name} {what}")
        extractor = open_extractor(
            model, settings, self.train, device, folder, stage=partial(show, "whitening")
        )
        bar = lambda role: show(f"features, {role}")
        return complete_pair(folder, extractor, self.train, self.drawn, bar)

    def identity(self) -> dict[str, Any]:
        """What decides the retrained models, besides what is removed; JSON-serialisable."""
        return {
            "data": self.data.fingerprint,
            "model": self.load_model().identity(),
            "training": self.retraining.identity(self.items),
        }


def open_origin(
    folder: str | Path,
    output: str | Path,
    *,
    recipe: str | None = None,
    preset: str | None = None,
    source: str | None = None,
    timesteps: int | None = None,
    queries: str | None = None,
) -> Origin:
    """Open a run of `dtrak.attribute`, or of `dtrak.lds` with its full model.

    Args:
        folder: of the run.
        output: folder of the experiment, where latents and states of trainings go.
        recipe: file that says how the model was trained; None takes what lies beside it.
        preset: that trained the model, instead.
        source: where the training images lie now; None takes where the run found them.
        timesteps: S of gradient features; None takes the run's, or 10 for one of `dtrak.lds`.
        queries: which of the run's sets of queries; None for the only one that was generated.

    Raises:
        FileNotFoundError: there is no such folder, or its data or model are gone.
        CounterfactualError: the run's queries were not drawn by its model.
        RetrainingError: as `subject.find_trained` and `Retraining.check_data`, or the recipe is for
            another model.
        ValueError: the folder holds no finished run, or the preset is unknown.
    """
    folder, output = expand_path(folder), expand_path(output)
    if EXPERIMENT.is_in(folder):
        return _open_lds(folder, output, timesteps)
    if queries is None and any(name.startswith(GENERATED) for name in list_queries(folder)):
        # what others there are cannot be drawn again
        queries = GENERATED
    run = load_attribution(folder, queries)
    options = run.options
    if options.queries != GENERATED:
        raise CounterfactualError(
            f"the queries of {folder} must be generated to be drawn again, got {options.queries!r}"
        )
    trained = find_trained(folder, recipe=recipe, preset=preset, source=source, queries=queries)
    refuse_inside(output, data=source or options.data)
    inputs = run.load_inputs(source)
    drawing = Drawing(fitting_steps(inputs.model), options.guidance_scale, options.resolution)
    retraining = Retraining(trained.training, output, drawing, data=inputs.train)
    retraining.check_data(inputs.train)
    trained.check()
    # of a method that takes no gradients, what those of others are made with
    asked = options if options.function is not None else replace(options, method=DEFAULT)
    asked = replace(asked, noise_halves=False)
    settings = asked.feature_settings(inputs.model.process)
    # of other formulas on the same gradients there are none here
    scores = {settings.output_function: run.scores} if options.what.is_ridge else {}
    if timesteps is not None:
        process = inputs.model.process
        chosen = select_timesteps(timesteps, "uniform", process.num_timesteps, process.spread)
        if tuple(chosen) != settings.timesteps:
            settings, scores = replace(settings, timesteps=tuple(chosen)), {}
    drawn = inputs.queries
    return Origin(
        folder,
        inputs.train,
        drawn,
        run.load_model,
        retraining,
        dict(zip(drawn.ids, drawn.conditions or [], strict=False)),
        settings,
        preset or options.preset or trained.preset,
        asked.damped,
        scores,
    )


def _open_lds(folder: Path, output: Path, timesteps: int | None) -> Origin:
    experiment = load_lds(folder)
    process = experiment.load_model().process
    count = _TIMESTEPS if timesteps is None else timesteps
    how = ExplainOptions(timesteps=str(count))
    data, device, retraining = experiment.data, torch.device("cpu"), experiment.retraining
    queries = generated_queries(experiment, device)
    items = drawn_from(experiment)
    return Origin(
        folder,
        retraining.samples(TRAIN, data, device),
        retraining.samples(LDS_GENERATED, queries, device),
        experiment.load_model,
        retraining.elsewhere(output),
        {} if items is None else dict(zip(queries.ids, items, strict=True)),
        how.feature_settings(process),
        experiment.subject.preset,
        how.damped,
    )
