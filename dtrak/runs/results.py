"""What a finished attribution left in its folder, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.samples import Samples
from ..findings import Findings
from ..models import load
from ..models.denoiser import Denoiser
from .files import expand_path
from .inputs import load_model_and_data, load_queries
from .options import Options
from .record import GENERATED, SCORES, ResultsError, find_queries, read_record
from .run import Run, make_plan


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a finished run was about, loaded again.

    Attributes:
        model: that was explained, on the CPU.
        train: N training images.
        queries: M queries.
        run: with the plan of its features.
    """

    model: Denoiser
    train: Samples
    queries: Samples
    run: Run


@dataclass(frozen=True, eq=False)
class Attribution:
    """A set of queries of a finished run of `dtrak.attribute`.

    Attributes:
        folder: where it lies.
        results: where the scores of these queries lie.
        manifest: what the run wrote about itself.
        deciding: what decided the model and the data, as the run's folder records it.
        scores: ``[M, N]`` float32, positive for proponents.
        query_ids: M names, the rows.
        train_ids: N names, the columns.
        findings: what the run found out beside the scores, if it was asked to.
    """

    folder: Path
    results: Path
    manifest: dict[str, Any]
    deciding: dict[str, Any]
    scores: Tensor
    query_ids: list[str]
    train_ids: list[str]
    findings: Findings | None = None

    @property
    def options(self) -> Options:
        """What the command line asked for, on the CPU and in the folder as it lies now."""
        options = Options(**self.manifest["options"])
        return replace(options, output=str(self.folder), device="cpu")

    @property
    def query_kind(self) -> str:
        """What one query is, in words."""
        return "generated picture" if self.options.queries == GENERATED else "picture"

    @property
    def model_folder(self) -> Path:
        """Where the model that was explained lies."""
        given = self.options.model
        return self.folder / "model" if given is None else Path(given)

    def load_model(self) -> Denoiser:
        """The model that was explained, on the CPU.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: it cannot be used.
        """
        given = self.options.model
        place = self.model_folder if given is None else given
        return load(place, self.options.lora, **self.options.trained)

    def load_inputs(self, source: str | None = None) -> Inputs:
        """The model, the training images and the queries, checked to be those of the scores.

        Args:
            source: where the training images lie now; by default where the run found them.

        Raises:
            FileNotFoundError: the model or the images are gone.
            ResultsError: the images are not those the run saw.
            ValueError: the model or the images cannot be used.
        """
        options = self.options if source is None else replace(self.options, data=source)
        run = Run(make_plan(options), Console(quiet=True))
        model, train = load_model_and_data(run)
        queries, _ = load_queries(run, model)
        for what, found, wanted in (
            ("training images", train.ids, self.train_ids),
            ("queries", queries.ids, self.query_ids),
        ):
            if found != wanted:
                raise ResultsError(
                    f"the {what} must be those {self.folder} was made with, got {len(found)} "
                    "images with other names"
                )
        for what, samples, hashed in (
            ("training images", train, self.manifest["data"]),
            ("queries", queries, self.manifest["queries"]),
        ):
            if samples.fingerprint != hashed:
                raise ResultsError(
                    f"the {what} must be those {self.folder} was made with, got others of the same "
                    "names"
                )
        return Inputs(model, train, queries, run)


def load_attribution(folder: str | Path, queries: str | None = None) -> Attribution:
    """Open the output folder of `dtrak.attribute`.

    Args:
        folder: of the run.
        queries: which of its sets of queries, as `record.find_queries`.

    Raises:
        FileNotFoundError: there is no such folder.
        ResultsError: it holds no finished run, a damaged one, or several sets of queries of which
            none is named.
    """
    folder = expand_path(folder)
    manifest, deciding = read_record(folder, queries)
    results = find_queries(folder, queries)
    scores, metadata = read_scores(results / SCORES)
    return Attribution(
        folder,
        results,
        manifest,
        deciding,
        scores,
        json.loads(metadata["rows"]),
        json.loads(metadata["columns"]),
        read_findings(results / SCORES, metadata),
    )


def read_findings(file: Path, metadata: dict[str, str]) -> Findings | None:
    """What lies beside the scores of a file with this metadata; None where there is nothing.

    Raises:
        ResultsError: it is damaged.
    """
    if "findings" not in metadata:
        return None
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return Findings.read(tensors, json.loads(metadata["findings"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{file} is damaged, its findings cannot be read: {error}") from error


def read_scores(file: str | Path) -> tuple[Tensor, dict[str, str]]:
    """Scores ``[M, N]`` and their metadata: names of rows and columns, settings.

    Raises:
        FileNotFoundError: there is no such file.
        ResultsError: it is damaged, or holds no scores of `dtrak.attribute`.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"scores must be an existing file, got {file}")
    try:
        with safe_open(file, "pt") as opened:
            scores: Tensor = opened.get_tensor("scores")
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ResultsError(f"{file} is damaged, or holds no scores: {reason}") from error
    missing = [name for name in ("rows", "columns") if name not in metadata]
    if missing:
        raise ResultsError(f"{file} must name its {' and '.join(missing)} in its metadata")
    try:
        shape = [len(list(json.loads(metadata[name]))) for name in ("rows", "columns")]
    except (TypeError, ValueError) as error:
        raise ResultsError(f"{file} must name its rows and columns as lists of JSON") from error
    if list(scores.shape) != shape:
        raise ResultsError(f"{file} must hold scores {shape}, got {list(scores.shape)}")
    return scores, metadata
