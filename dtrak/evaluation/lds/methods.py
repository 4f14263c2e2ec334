"""Every attribution method's prediction of what the retrained models do.

A method is judged by its group predictions alone: minus the sum of the scores of the images a
subset holds. They are a few hundred numbers per query where a score matrix has one per training
image, so they are what is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dtrak_kernels import Projection
from dtrak_kernels.ridge import RidgeSolver

from ... import NUMERICS
from ...data.samples import Samples, join
from ...features.cost import seconds_per_row
from ...features.extraction import Extractor, FusedExtractor, complete_pair
from ...features.settings import AUTO, FeatureSettings, WhiteningSettings, choose_whitening
from ...features.store import MANIFEST, Store
from ...features.timesteps import select_timesteps
from ...features.whitening import open_extractor
from ...methods import CHECKPOINTS, CLIP, TRAJECTORY, Method
from ...methods.evidence import journey_features
from ...models.denoiser import Denoiser
from ...models.hashing import hash_tensors
from ...runs.choices import DEFAULT_PROJ_DIM, counted
from ...runs.console import format_seconds
from ...runs.files import write_atomically
from ...runs.folders import alone_at
from ...runs.measure import format_bytes
from ...runs.ranks import ranks
from ..retraining import TRAIN
from .clip import ClipEncoder
from .experiment import Experiment
from .names import CLIP_METHODS as CLIP_METHODS
from .names import METHODS
from .options import FULL, GENERATED, RETRAIN, WHITENED, ExperimentError
from .queries import drawn_from, generated_queries
from .statistics import predict_groups

# λ in units of the mean squared feature norm, two a decade
DAMPING_FACTORS = tuple(float(f"{digit}e{power}") for power in range(-4, 4) for digit in (1, 3))
_MEMORY_BUDGET = 2 * 2**30


# the methods whose projections are compared, and those whose whitenings are
_PROJECTED = ("d-trak", "trak")
_WHITENED = (*_PROJECTED, "d-trak-mean")


@dataclass(frozen=True)
class Setting:
    """A method with everything but its damping.

    Attributes:
        method: which.
        num_timesteps: S of its features; 0 for a method without.
        projection: kind of the random matrix; empty for a method without.
        model: name of the model its features are of; the full one by default.
        whitening: kind of the whitening of its gradients.
        ensemble: what it is of several models, in words; empty for one model.
    """

    method: Method
    num_timesteps: int = 0
    projection: str = ""
    model: str = FULL
    whitening: str = "none"
    ensemble: str = ""

    @property
    def key(self) -> str:
        """A name for files: lower case, no blanks."""
        words = self.method.name
        if self.model != FULL:
            words += f"-{self.model}"
        if self.projection:
            words += f"-{self.projection}-{self.num_timesteps}"
        return words + self.way

    @property
    def way(self) -> str:
        """The end of names of files of whitened gradients."""
        return "" if self.whitening == "none" else f"-{self.whitening}"

    @property
    def title(self) -> str:
        """In tables."""
        way = ""
        if self.whitening != "none":
            is_usual = self.whitening == choose_whitening(AUTO, self.projection)
            way = WHITENED if is_usual else f"{WHITENED} ({self.whitening})"
        return ", ".join(filter(None, (self.method.title, way, self.ensemble)))


def list_settings(
    num_timesteps: Sequence[int],
    projections: Sequence[str],
    methods: Sequence[Method] = METHODS,
    whitenings: Sequence[str] = ("none",),
) -> list[Setting]:
    """What is evaluated: every method with the first of each choice, D-TRAK and TRAK with all.

    D-TRAK with f = mean has every whitening of the first projection.

    Args:
        num_timesteps: S, one or more.
        projections: kinds, one or more.
        methods: that are evaluated; those without a damping are never whitened.
        whitenings: as ``--whiten`` of `dtrak.attribute`, one or more.
    """
    settings = [Setting(method) for method in methods if not method.output_function]
    for kind in projections:
        compared = _WHITENED if kind == projections[0] else _PROJECTED
        chosen = list(dict.fromkeys(choose_whitening(asked, kind) for asked in whitenings))
        for way in chosen:
            is_first = kind == projections[0] and way == chosen[0]
            settings += [
                Setting(method, S, kind, whitening=way if method.is_damped else "none")
                for S in num_timesteps
                for method in methods
                if method.output_function and (is_first or method.name in compared)
            ]
    return settings


def _groups(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings of one kind of features together, so that its solver is shared."""
    groups: dict[tuple[str | None, str, int, str, str], list[Setting]] = {}
    for setting in settings:
        function = setting.method.output_function
        group = (
            function,
            setting.projection,
            setting.num_timesteps,
            setting.model,
            setting.whitening,
        )
        groups.setdefault(group, []).append(setting)
    return list(groups.values())


def feature_bytes(experiment: Experiment) -> tuple[int, int]:
    """What the features in a run's folder take: of all models, and of the retrain family's."""
    folder = experiment.folder / "features"
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    members = [
        size for file, size in sizes.items() if f"-{RETRAIN}-" in file.relative_to(folder).parts[0]
    ]
    return sum(sizes.values()), sum(members)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method predicts for every subset and query, at every damping tried.

    Attributes:
        setting: the method.
        kinds: the kinds of queries, in the order of the columns.
        dampings: L values of λ in units of the Gram; one NaN for a method without.
        rules: L names: the multiple of the mean squared feature norm, ``"auto"``, or empty.
        values: ``[L, M, Q]`` float64, M subsets and Q queries.
    """

    setting: Setting
    kinds: tuple[str, ...]
    dampings: tuple[float, ...]
    rules: tuple[str, ...]
    values: Tensor


class Predictor:
    """Computes the predictions of a run, and keeps features and predictions in its folder.

    Args:
        experiment: with a full model that is trained.
        queries: by their kind.
        device: where features are computed.
        progress_bar: opens a progress bar with a label, as `console.progress_bar` does.
        clip: of the methods that compare embeddings.
        batch_size: images per batch of features; None chooses one.
        flips: average features of training images over the image and its mirror image.
    """

    def __init__(
        self,
        experiment: Experiment,
        queries: Mapping[str, Samples],
        device: torch.device,
        progress_bar: Callable[[str], Any],
        clip: ClipEncoder | None = None,
        *,
        batch_size: int | None = None,
        flips: bool = False,
    ) -> None:
        self.experiment, self.device = experiment, device
        self.batch_size, self.flips = batch_size, flips
        self.sizes = {kind: len(images) for kind, images in queries.items()}
        self.queries = join(list(queries.values()), "queries")
        self.train = experiment.retraining.samples(TRAIN, experiment.data, device)
        self.progress_bar, self.clip = progress_bar, clip
        self._loaded: tuple[str, Denoiser] | None = None
        self._digests: dict[str, str | None] = {}

    def predict(self, settings: Sequence[Setting]) -> Iterator[Prediction]:
        """The predictions of ``settings``, one after the other; what is in the folder is reused.

        Several commands may share a run: what one of them makes the others wait for.

        Raises:
            ExperimentError: a file is damaged.
            ValueError: as the features and scores of a method.
        """
        for members in _groups(settings):
            kept = {setting: self._read(setting) for setting in members}
            if None in kept.values():
                with self._alone_at(members[0]):
                    missing = [setting for setting in members if self._read(setting) is None]
                    if missing:
                        self._compute(missing)
                    kept = {setting: self._read(setting) for setting in members}
            for setting in members:
                prediction = kept[setting]
                assert prediction is not None
                yield prediction

    def share(self, settings: Sequence[Setting]) -> None:
        """Make what no other process is at, of those launched together; the rest is left to them.

        Raises:
            ExperimentError, ValueError: as `predict`.
        """
        here, groups = ranks(), _groups(settings)
        own = groups[here.rank :: here.world]
        for members in (*own, *(group for group in groups if group not in own)):
            with self._claim(members[0], False) as is_ours:
                missing = [setting for setting in members if self._read(setting) is None]
                if is_ours and missing:
                    self._compute(missing)

    def estimate(self, settings: Sequence[Setting]) -> str | None:
        """What the features will cost that predictions are still to be made of; None for nothing.

        The time of one image and timestep is measured on the first of them.
        """
        sets: dict[Path, Setting] = {}
        for setting in settings:
            method = setting.method
            if method.output_function is None or self._read(setting) is not None:
                continue
            last = self._num_checkpoints - 1
            for number in range(0 if method.needs == CHECKPOINTS else last, last + 1):
                folder = self._feature_folder(setting, number)
                if not MANIFEST.is_in(folder / "query"):
                    sets.setdefault(folder, setting)
        if not sets:
            return None
        first = min(sets.values(), key=lambda setting: setting.num_timesteps)
        model = self._model(-1, first.model)
        process, count = model.process, first.num_timesteps
        chosen = select_timesteps(count, "uniform", process.num_timesteps, process.spread)
        plain = self._feature_settings(replace(first, whitening="none"), chosen)
        extractor = FusedExtractor(model, plain, self.device)
        seconds = seconds_per_row(extractor, self.train, self.batch_size) / first.num_timesteps
        rows = len(self.train) + len(self.queries)
        passes = len(self.train) * (2 if self.flips else 1) + len(self.queries)
        size = 0
        for setting in sets.values():
            width = DEFAULT_PROJ_DIM[setting.projection] or extractor.grad_dim
            size += 4 * rows * width
        total = seconds * passes * sum(setting.num_timesteps for setting in sets.values())
        return (
            f"features: {counted(len(sets), 'set')} of {counted(rows, 'image')} to make, "
            f"{format_bytes(size)} on disk, {format_seconds(total)} or less"
        )

    @contextmanager
    def _alone_at(self, setting: Setting) -> Iterator[None]:
        """Wait until no other command makes these features: two would begin different shards."""
        name = self._feature_folder(setting, -1).name
        with ExitStack() as stack:
            if not stack.enter_context(self._claim(setting, False)):
                with self.progress_bar(f"wait for another command: {name}"):
                    stack.enter_context(self._claim(setting, True))
            yield

    def _claim(self, setting: Setting, wait: bool) -> AbstractContextManager[bool]:
        name = self._feature_folder(setting, -1).name
        return alone_at(self.experiment.folder, f"features-{name}", wait=wait)

    def _file(self, setting: Setting) -> Path:
        flips = "-flips" if self.flips and setting.method.output_function else ""
        return self.experiment.folder / "predictions" / f"{setting.key}{flips}.safetensors"

    def _identity(self, setting: Setting) -> str:
        """What a kept prediction is of, besides its setting: it is made anew when that changes."""
        identity = hash_tensors({"subsets": self.experiment.subsets}) + self.queries.fingerprint
        identity += f" numerics {NUMERICS}"
        if setting.method.needs == CLIP and self.clip is not None:
            identity += self.clip.identity
        return identity

    def _weights(self, setting: Setting) -> str | None:
        """A digest of the weights predictions are of; None for a method without a model."""
        if setting.method.output_function is None:
            return None
        if setting.model not in self._digests:
            self._digests[setting.model] = self.experiment.sample_weights(setting.model)
        return self._digests[setting.model]

    def _read(self, setting: Setting) -> Prediction | None:
        """What is kept of a setting; None for nothing, or predictions of something else.

        Predictions that do not say of which weights, as those of older versions, are taken for
        those of the model that is there.
        """
        file = self._file(setting)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["about"])
                values = opened.get_tensor("values")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ExperimentError(f"{file} is damaged: delete it and run again") from error
        if about["identity"] != self._identity(setting):
            return None
        weights = about.get("weights")
        if weights is not None and self._weights(setting) not in (None, weights):
            return None
        kinds = (GENERATED,) if setting.method.needs == TRAJECTORY else tuple(self.sizes)
        return Prediction(setting, kinds, tuple(about["dampings"]), tuple(about["rules"]), values)

    def _write(self, setting: Setting, parts: Sequence[tuple[str, float, Tensor]]) -> None:
        """Keep the predictions of (rule, damping, scores ``[Q, N]``) triples."""
        about = {
            "identity": self._identity(setting),
            "weights": self._weights(setting),
            "rules": [rule for rule, _, _ in parts],
            "dampings": [damping for _, damping, _ in parts],
        }
        values = torch.stack([predict_groups(m, self.experiment.subsets) for _, _, m in parts])
        file = self._file(setting)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, save({"values": values}, metadata={"about": json.dumps(about)}))

    def _compute(self, settings: Sequence[Setting]) -> None:
        """The predictions of settings that share their features."""
        first = settings[0]
        if first.method.output_function is None:
            for setting in settings:
                self._write(setting, [("", float("nan"), self._plain_scores(setting.method))])
            return
        train, queries = self._features(first, -1)
        solver = RidgeSolver(train, memory_budget=_MEMORY_BUDGET)
        for setting in settings:
            method = setting.method
            if method.is_damped:
                # one factorisation serves every damping and method of these features
                unit = solver.mean_squared_norm()
                rules = {f"{factor:g}": factor * unit for factor in DAMPING_FACTORS}
                rules["auto"] = solver.auto_damping()
                is_journey = method.needs == TRAJECTORY
                left = self._journey_features(setting) if is_journey else queries
                parts = [
                    (rule, lam, method.score(solver, left, lam)) for rule, lam in rules.items()
                ]
                self._write(setting, parts)
                continue
            if method.needs == CHECKPOINTS:
                pairs = [self._features(setting, number) for number in range(self._num_checkpoints)]
                matrix = method.score(
                    [query for _, query in pairs], [features for features, _ in pairs]
                )
            else:
                matrix = method.score(queries, train)
            self._write(setting, [("", float("nan"), matrix)])
        if first.projection == "none":
            # as large as all gradients together, and quickly made again
            shutil.rmtree(self._feature_folder(first, -1))

    def _plain_scores(self, method: Method) -> Tensor:
        if method.needs == CLIP:
            found: Tensor = method.score(*self._embeddings())
        else:
            found = method.score(self.queries, self.train)
        return found

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        """CLIP's of the queries and of the training images."""
        if self.clip is None:
            raise ValueError("clip must be given for the methods that compare CLIP's embeddings")
        experiment, folder = self.experiment, self.experiment.folder / "clip"
        # the pictures, whatever the model is given in their place
        pictures = {
            kind: generated_queries(experiment, self.device)
            if kind == GENERATED
            else experiment.validation
            for kind in self.sizes
        }
        with self.progress_bar("CLIP") as progress:
            queries = [
                self.clip.embed(folder / f"{kind}.safetensors", images)
                for kind, images in pictures.items()
                if images is not None
            ]
            train = self.clip.embed(folder / "train.safetensors", experiment.data, progress)
        return torch.cat(queries), train

    @property
    def _num_checkpoints(self) -> int:
        return len(self.experiment.checkpoint_steps) + 1

    def _feature_folder(self, setting: Setting, number: int) -> Path:
        checkpoint = number % self._num_checkpoints if setting.model == FULL else setting.model
        return (
            self.experiment.folder
            / "features"
            / (
                f"{setting.method.output_function}-{setting.projection}-{setting.num_timesteps}"
                f"-{checkpoint}{'-flips' if self.flips else ''}{setting.way}"
            )
        )

    def _feature_settings(self, setting: Setting, timesteps: Sequence[int]) -> FeatureSettings:
        assert setting.method.output_function is not None
        projection = Projection(setting.projection, DEFAULT_PROJ_DIM[setting.projection])
        dtype = self.experiment.retraining.dtype(self.device)
        return FeatureSettings(
            setting.method.output_function,
            tuple(timesteps),
            0,
            projection,
            dtype,
            whitening=WhiteningSettings.of(setting.whitening),
        )

    def _extractor(
        self, setting: Setting, model: Denoiser, settings: FeatureSettings, number: int
    ) -> Extractor:
        folder = self._feature_folder(setting, number)
        extractor = open_extractor(
            model,
            settings,
            self.train,
            self.device,
            folder,
            batch_size=self.batch_size,
            stage=lambda: self.progress_bar(f"whitening {folder.name}"),
        )
        extractor.flips = self.flips
        return extractor

    def _model(self, number: int, name: str = FULL) -> Denoiser:
        """The full model at a checkpoint, of which -1 is its end; or another one."""
        if name == FULL:
            name = self.experiment.checkpoint_names[number]
        # one at a time: loading one may end the use of the one before
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = name, self.experiment.load_model(name)
        return self._loaded[1]

    def _features(self, setting: Setting, number: int) -> tuple[Store, Tensor]:
        """Features of the training images and of the queries at a checkpoint of the model."""
        model = self._model(number, setting.model)
        process = model.process
        timesteps = select_timesteps(
            setting.num_timesteps, "uniform", process.num_timesteps, process.spread
        )
        settings = self._feature_settings(setting, timesteps)
        folder = self._feature_folder(setting, number)
        extractor = self._extractor(setting, model, settings, number)
        bar = lambda role: self.progress_bar(f"features {folder.name} {role}")
        stores = complete_pair(folder, extractor, self.train, self.queries, bar, self.batch_size)
        return stores[0], stores[1].load()

    def _journey_features(self, setting: Setting) -> Tensor:
        """Features of the generated queries averaged over the paths they were drawn on.

        The clean image predicted at each step is given fresh noise of that step's timestep.
        """
        retraining, model = self.experiment.retraining, self._model(-1)
        timesteps = model.drawing_timesteps(retraining.drawing.num_inference_steps)
        settings = self._feature_settings(setting, timesteps[:1])
        # that of the training features, which lie there already
        extractor = self._extractor(setting, model, settings, -1)
        seeds, items = range(self.sizes[GENERATED]), drawn_from(self.experiment)
        with self.progress_bar(f"journeys {setting.key}") as progress:
            drawn = retraining.draw(
                model, seeds, items, self.device, trajectories=True, progress=progress
            )
            return journey_features(extractor, drawn, timesteps, items)
