"""What a method scores by: features, checkpoints, journeys, images; made when it asks for them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver
from dtrak_kernels.ridge.group import Group

from ..data.samples import Samples
from ..features.cost import seconds_per_row
from ..features.extraction import (
    Extractor,
    FusedExtractor,
    extract_rows,
    fill_store,
    fitting_batch_size,
    left_in,
    open_store,
)
from ..features.fit import describe_fit, measure_fit
from ..features.halves import Columns
from ..features.packing import packed_bytes
from ..features.settings import FeatureSettings
from ..features.store import MANIFEST, FeatureStore, Part, Store, own_rows
from ..features.whitening import open_extractor
from ..models.denoiser import Denoiser, Drawn
from ..models.hashing import hash_model, hash_tensors
from ..runs.choices import FLOAT32
from ..runs.console import format_seconds
from ..runs.files import write_atomically
from ..runs.measure import TensorMeter, available_bytes, format_bytes
from ..runs.options import ExplainOptions
from ..runs.ranks import LeftToOthers, ranks
from ..runs.stages import Stages
from . import CHECKPOINTS, CLIP, FEATURES, MODELS, NOTHING, TRAJECTORY, check_needs
from .damping import damping_unit
from .scores import check_room, journey_query_features

TRAIN, QUERY, HELD_OUT, REPEATED = "train", "query", "held-out", "repeated"
# images whose features take no longer than measuring what they will take is worth
_FEW = 64
_LABELS = {
    TRAIN: "features of training images",
    QUERY: "features of queries",
    HELD_OUT: "features of held-out images",
    REPEATED: "other noise",
}


@dataclass(frozen=True)
class Drawing:
    """How the queries were drawn, for a method that follows the path they came about on.

    Attributes:
        seeds: of the M queries.
        items: what each was drawn from, for a model that reads anything.
        how: as in `Denoiser.draw`.
    """

    seeds: Sequence[int]
    items: Sequence[Any] | None
    how: dict[str, Any]

    def again(self, model: Denoiser, **more: Any) -> Iterator[Drawn]:
        """Draw them once more, with the clean samples predicted on the way."""
        return model.draw(self.seeds, self.items, trajectories=True, **{**self.how, **more})


@dataclass(frozen=True, eq=False)
class Scored:
    """What scores of features were made of.

    Attributes:
        queries: ``[M, K]`` features.
        train: those of the training images, ``[N, K]``; of settings with halves ``[N, 2K]``.
        query_noise: ``[M, K]``, half differences of the queries' features, where there are any.
        make_solver: the solver on all training features, of a method with a damping.
        damping: λ of it.
    """

    queries: Tensor
    train: Store
    query_noise: Tensor | None = None
    make_solver: Callable[[], RidgeSolver] | None = None
    damping: float = 0.0

    @cached_property
    def solver(self) -> RidgeSolver | None:
        """What `make_solver` gives, made once it is asked for."""
        return None if self.make_solver is None else self.make_solver()


@dataclass(frozen=True, eq=False)
class Retrained:
    """What models trained on parts of the data do.

    Attributes:
        subsets: ``[R, N]`` bool, which samples each of R models was trained on.
        losses: ``[R, M]`` loss of every query under every model.
    """

    subsets: Tensor
    losses: Tensor


class Evidence:
    """Everything a method may ask for about one model, its training data and some queries.

    Letters: M queries, N training samples, K features.

    Args:
        model: that is explained.
        train: N samples it was trained on, with what it reads beside each.
        queries: M samples, likewise.
        how: the options.
        device: where features are computed.
        stages: where the work is timed and shown.
        folder: where features are kept and found again; None keeps them in memory.
        drawing: how the queries were drawn, where this model drew them.
        checkpoints: the model at several points of its training, each loaded when it is its turn.
        clip: folder of a CLIP model.
        dino: folder of a general image encoder, whose look-alikes are found beside the scores.
        retrained: models trained on parts of the data.

    Attributes:
        facts: figures of the work done, as name and text.
        scored: what scores were made of, once they are, for a method on features.
    """

    def __init__(
        self,
        model: Denoiser,
        train: Samples,
        queries: Samples,
        how: ExplainOptions,
        device: torch.device,
        stages: Stages,
        *,
        folder: Path | None = None,
        drawing: Drawing | None = None,
        checkpoints: Sequence[Any] = (),
        clip: str | Path | None = None,
        dino: str | Path | None = None,
        retrained: Retrained | None = None,
    ) -> None:
        self.model, self.train, self.queries, self.how = model, train, queries, how
        self.device, self.stages, self.folder = device, stages, folder
        self.drawing, self.checkpoints, self.clip = drawing, checkpoints, clip
        self.dino, self.retrained = dino, retrained
        self.facts: dict[str, str] = {}
        self.scored: Scored | None = None
        # of the checkpoints, and of CLIP
        self._identities: list[str] = []
        self._batch: int | None = None
        self._is_new = False
        self._extractor: Extractor | None = None

    def check(self) -> None:
        """Refuse a method whose needs are not met, before anything is computed.

        Raises:
            ValueError: what is missing, with what makes it.
        """
        check_needs(
            self.how.what,
            checkpoints=self.checkpoints,
            drawing=self.drawing,
            clip=self.clip,
            retrained=self.retrained,
        )

    def scores(self) -> tuple[Tensor, dict[str, Any]]:
        """Scores ``[M, N]`` float32, positive for proponents, and the settings that decided them.

        Raises:
            ValueError: as `check`, or as the features and scores of the method.
        """
        self.check()
        method, settings = self.how.what, self._settings()
        is_solved = method.needs in (FEATURES, TRAJECTORY) and method.is_damped
        if method.needs not in (FEATURES, CHECKPOINTS, TRAJECTORY):
            self.stages.lead()
        gradients = self._gradient_settings() if method.output_function is not None else {}
        if is_solved:
            check_room(
                len(self.queries),
                len(self.train),
                "explain fewer at a time, or: python -m dtrak.store score --only-top 100 …",
            )
            train = self._features(TRAIN)
            features: Any = train
            left, noise = self._left(), None
            if self.how.noise_halves:
                left, noise = left.chunk(2, dim=1)
                features = Columns(train, 0)
            here = ranks()
            if not here.is_launched:
                self.stages.lead()
            with self.stages.stage("kernel inverse and scores"):
                group = here.group()
                solver = RidgeSolver(_in_memory(own_rows(features, here)), group=group)
                damping, unit = self.how.damped.resolve(solver), damping_unit(solver)
                scores = Group(group).join_columns(method.score(solver, left, damping))
            self.stages.lead()
            # one of a group answers for its own rows, and only together with the others
            make = (lambda: solver) if group is None else lambda: RidgeSolver(_in_memory(features))
            self.scored = Scored(left, train, noise, make, damping)
            auto = " (auto)" if self.how.damped.value is None else ""
            gradients["damping"] = f"{damping:.6g}{auto}"
            gradients["damping in mean squared feature norms"] = f"{damping / unit:.4g}x"
        else:
            arguments = self._arguments()
            self.stages.lead()
            with self.stages.stage("scores"):
                scores = method.score(*arguments)
        return scores.float(), settings | gradients | self._decided()

    def _left(self) -> Tensor:
        """Features of the queries ``[M, K]``, for a method with a damping."""
        if self.how.what.needs != TRAJECTORY:
            return self._features(QUERY).load()
        group = Group(ranks().group())
        # one process draws, and tells the others
        found = self._journeys() if group.rank == 0 else None
        return group.first(found, (len(self.queries), self.extractor.proj_dim), torch.float32)

    def _arguments(self) -> tuple[Any, Any]:
        """What a method without damping is called with."""
        needs = self.how.what.needs
        if needs == FEATURES:
            train = self._features(TRAIN)
            self.scored = Scored(self._features(QUERY).load(), train)
            return self.scored.queries, train
        if needs == CHECKPOINTS:
            return self._checkpoint_features()
        if needs == CLIP:
            return self.embeddings()
        if needs == MODELS:
            assert self.retrained is not None
            return self.retrained.subsets, self.retrained.losses
        return self.queries, self.train

    @cached_property
    def feature_settings(self) -> FeatureSettings:
        """Of the gradients; raises as `ExplainOptions.feature_settings`."""
        return self.how.feature_settings(self.model.process)

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.how.what.name,
            "training images": self.train.fingerprint,
            "queries": self.queries.fingerprint,
            **({} if self.how.what.output_function is None else self.model.identity()),
        }

    def _decided(self) -> dict[str, Any]:
        """What else decided the scores, once it is known."""
        found: dict[str, Any] = {"device": self.device.type}
        if self._batch is not None:
            found["batch size"] = self._batch
        if self._identities:
            found["checkpoints"] = self._identities
        if self.how.what.needs == TRAJECTORY:
            found["steps of the drawing"] = len(self._journey_timesteps())
        if self.how.what.needs == NOTHING and self.train.is_encoded:
            found["inputs"] = _hash(self.model.encoding)
        if self.how.what.needs == MODELS and self.retrained is not None:
            found["retrained"] = hash_tensors(
                {"subsets": self.retrained.subsets, "losses": self.retrained.losses}
            )
        return found

    def _gradient_settings(self) -> dict[str, Any]:
        how, extractor = self.how, self.extractor
        return {
            "features": extractor.method,
            "output function": self.feature_settings.output_function,
            "timesteps": str(how.when),
            "noise seed": how.noise_seed,
            "projection": how.projection,
            "proj_dim": extractor.proj_dim // how.parts,
            "projection seed": how.seed,
            **({"flips": True} if how.flips else {}),
            **({} if how.store_dtype == FLOAT32 else {"store dtype": how.store_dtype}),
            **({} if how.whitening == "none" else {"whitening": how.whitening}),
            "dtype": how.dtype,
            **({"noise halves": True} if how.noise_halves else {}),
        }

    @property
    def extractor(self) -> Extractor:
        """Makes features of the model."""
        if self._extractor is None:
            self._extractor = self._extractor_of(self.model)
        return self._extractor

    def _extractor_of(self, model: Denoiser, part: str = "") -> Extractor:
        """Makes features of a model, whose own lie in ``part`` of the folder of features."""
        settings = self.feature_settings
        # gradients of many samples at once know no checkpoints
        checkpointing = self.how.checkpointing if self.how.fused else False
        if checkpointing is not None:
            model.checkpointing = checkpointing
        key = " ".join(filter(None, (self.how.function, part)))
        return open_extractor(
            model,
            settings,
            self.train,
            self.device,
            None if self.folder is None else self.how.feature_folder(self.folder, part),
            batch_size=self.how.batch_size,
            stage=lambda: self.stages.stage("whitening", key),
            kind=self._kind,
        )

    @property
    def _kind(self) -> type[Extractor]:
        if self.how.fused:
            return FusedExtractor
        from ..features.published import PublishedExtractor

        return PublishedExtractor

    def _batch_size(self, extractor: Extractor, data: Samples) -> int:
        if self.how.batch_size is not None:
            return self.how.batch_size
        if isinstance(extractor, FusedExtractor):
            return fitting_batch_size(extractor, data)
        from ..features.published import PUBLISHED_BATCH_SIZE

        # gradients, their copy and their sum live at once
        fitting = available_bytes(self.device) // 2 // (3 * 4 * extractor.grad_dim)
        return max(1, min(PUBLISHED_BATCH_SIZE, fitting))

    def _features(self, role: str) -> Store:
        data = {TRAIN: self.train, QUERY: self.queries}[role]
        found = self._fill(self.extractor, data, role, _LABELS[role])
        self.facts["parameters"] = f"{self.extractor.grad_dim:,}"
        if role == TRAIN:
            rows = f"{len(self.train):,} + {len(self.queries):,} rows"
            self.facts |= {
                "features": f"{rows} of {found.shape[1] // self.how.parts:,}",
                "batch size": str(found.batch_size),
                **self._kept(
                    f"facts{self.how.halves_suffix}.json", lambda: self._measure(found.batch_size)
                ),
                **self._kept("fit.json", self._measure_fit),
            }
        return found

    def held_out_features(self, held_out: Samples) -> Store:
        """Features of images that the model was not trained on, made as those it was trained on."""
        return self._fill(self.extractor, held_out, HELD_OUT, _LABELS[HELD_OUT])

    def repeated_features(self, rows: Sequence[int]) -> Store:
        """Features of some training images again, with other noise at the same timesteps."""
        # noise is keyed by the role
        return self._fill(self.extractor, self.train.select(rows), REPEATED, _LABELS[REPEATED])

    def _fill(
        self, extractor: Extractor, data: Samples, role: str, label: str, part: str = ""
    ) -> Store:
        """The features of ``data``, computed as far as they are not kept."""
        # a query is what it is, whichever way round training saw its images
        extractor.flips = self.how.flips and role != QUERY
        # sets of queries live side by side, each under the first digits of its fingerprint
        name = role if role == TRAIN else f"{role}-{data.fingerprint[:12]}"
        name += self.how.halves_suffix
        folder = None if self.folder is None else self.how.feature_folder(self.folder, part) / name
        is_new = folder is not None and not MANIFEST.is_in(folder)
        batch_size = partial(self._batch_size, extractor, data)
        # of queries there are few, and each is one row of many scores
        dtype = self.how.store_dtype if role == TRAIN else FLOAT32
        store = open_store(folder, extractor, data, role, batch_size, dtype)
        key = f"{self.how.function} {part} {name}"
        if role == TRAIN:
            self._batch = store.batch_size
        if not store.missing():
            self.stages.reuse(label, key)
            return store
        self._is_new |= role == TRAIN
        if folder is not None and role == TRAIN and ranks().is_main:
            size = format_bytes(len(store) * packed_bytes(store.shape[1], dtype))
            said = f"{label}: {store.shape[0]:,} x {store.shape[1]:,}, {size} in {folder}"
            rows = left_in(store)
            if rows > _FEW:
                # the batch size was chosen by making some
                is_warm = is_new and self.how.batch_size is None and self.how.fused
                given = self.how.batch_size
                seconds = seconds_per_row(extractor, data, given, is_warm=is_warm)
                said += f", {format_seconds(seconds * rows)} or less"
            self.stages.say(said)
        if isinstance(store, FeatureStore):
            store.only_own = role == TRAIN
        with self.stages.stage(label, key) as progress:
            fill_store(
                store,
                extractor,
                data,
                role=f"{role}/",
                batch_size=self.how.batch_size,
                progress=progress,
            )
        missing = store.missing()
        if missing:
            raise LeftToOthers(
                f"{label}: {len(missing)} shards of {store.rows(0).stop} rows are left to other "
                "commands; the last of them makes the scores and the report"
            )
        return store

    def _kept(self, name: str, measure: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Facts about the features, measured when they are made, and kept with them."""
        if self.folder is None:
            return measure()
        file = self.how.feature_folder(self.folder) / name
        if not self._is_new and file.is_file():
            known: dict[str, str] = json.loads(file.read_text())
            return known
        if not ranks().is_main:
            return {}
        facts = measure()
        if facts:
            with ranks().alone(file.parent, file.stem):
                write_atomically(file, json.dumps(facts, indent=1).encode())
        return facts

    def _measure_fit(self) -> dict[str, str]:
        """Whether the model learned anything."""
        return describe_fit(measure_fit(self.model, self.feature_settings, self.train, self.device))

    def _measure(self, batch_size: int) -> dict[str, str]:
        """What one batch of the feature stage holds."""
        if not isinstance(self.extractor, FusedExtractor):
            return {}
        weights = self.extractor.model.module.state_dict().values()
        with TensorMeter(known=weights) as meter:
            extract_rows(self.extractor, self.train, slice(0, batch_size))
        never = 4 * self.extractor.grad_dim * len(self.train)
        return {
            "largest tensor": format_bytes(meter.largest_bytes),
            "live tensors at the peak": format_bytes(meter.peak_bytes),
            "gradients never stored": format_bytes(never),
        }

    def _checkpoint_features(self) -> tuple[list[Tensor], list[Store]]:
        """Features at every checkpoint, of the queries and of the training samples."""
        queries, train = [], []
        for number, checkpoint in enumerate(self.checkpoints):
            model = checkpoint() if callable(checkpoint) else checkpoint
            self._identities.append(_hash(model.identity()))
            where = f"checkpoint-{self._identities[-1][:12]}"
            extractor = self._extractor_of(model, where)
            label = f"checkpoint {number + 1} of {len(self.checkpoints)}"
            train.append(self._fill(extractor, self.train, TRAIN, f"{label}: training", where))
            queries.append(
                self._fill(extractor, self.queries, QUERY, f"{label}: queries", where).load()
            )
        return queries, train

    def _journeys(self) -> Tensor:
        """Features of the queries averaged over the paths they were drawn on, ``[M, K]``.

        The clean sample predicted at each step is given fresh noise of that step's timestep.
        """
        assert self.drawing is not None
        timesteps = self._journey_timesteps()
        one = replace(self.feature_settings, timesteps=tuple(timesteps[:1]))
        extractor = self._kind(self.model, one, self.device, self.extractor.whitening)
        items = None
        if self.drawing.items is not None:
            items = dict(zip(self.drawing.seeds, self.drawing.items, strict=True))
        with self.stages.stage("features of journeys") as progress:
            drawn = self.drawing.again(self.model, progress=progress)
            return journey_features(extractor, drawn, timesteps, items)

    def _journey_timesteps(self) -> list[int]:
        assert self.drawing is not None
        steps = self.drawing.how.get("num_inference_steps")
        return self.model.drawing_timesteps(*([] if steps is None else [steps]))

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """CLIP's, of the queries and of the training images."""
        from .baselines import clip_embeddings, load_clip

        assert self.clip is not None
        model = load_clip(self.clip, self.device)
        self._identities.append(hash_model(model.model))
        with self.stages.stage("CLIP embeddings") as progress:
            train = clip_embeddings(self.train, model, progress=progress)
            return clip_embeddings(self.queries, model), train


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def journey_features(
    extractor: Extractor,
    batches: Iterable[Drawn],
    timesteps: Sequence[int],
    items: Mapping[int, Any] | Sequence[Any] | None,
) -> Tensor:
    """Features ``[M, K]`` of M pictures, averaged over the steps they were drawn in.

    Args:
        extractor: of the model that drew them; its timesteps are replaced.
        batches: the pictures, each with a trajectory of S steps.
        timesteps: S, of the steps.
        items: by seed what each was drawn from, for a model that reads anything.
    """
    found = []
    for drawn in batches:
        assert drawn.trajectories is not None
        ids = [f"journey/{seed}" for seed in drawn.seeds]
        read = None if items is None else [items[seed] for seed in drawn.seeds]
        features = []
        for step, timestep in enumerate(timesteps):
            extractor.settings = replace(extractor.settings, timesteps=(timestep,))
            features.append(extractor.extract(drawn.trajectories[:, step], ids, read).cpu())
        found.append(journey_query_features(torch.stack(features)))
    return torch.cat(found)


def _in_memory(store: Store | Part) -> Any:
    """The features themselves where a quarter of the memory holds them, else the store."""
    fits = 4 * math.prod(store.shape) < available_bytes(torch.device("cpu")) // 4
    return store[: store.shape[0]] if fits else store
