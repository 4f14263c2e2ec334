"""An attribution: how much each training image speaks for each query, and who they are."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .data.samples import Samples
from .findings import Findings
from .methods.scores import top_k
from .runs.files import encode_tensors, expand_path, write_atomically
from .runs.record import RUN_FILE, SCORES, ResultsError
from .runs.results import read_findings, read_scores

_SIGN = "positive = proponent: its presence lowers the model's loss on the query"
# of hashes, shown to a reader
_DIGITS = 12
_SHOWN_ROWS, _SHOWN_MATCHES = 8, 5
_TOP = 10


class Proponent(NamedTuple):
    """A training image beside a query: its id and its score."""

    id: str
    score: float


@dataclass(frozen=True, eq=False)
class Attribution:
    """What `dtrak.explain` found out.

    Letters: M queries, N training images.

    Attributes:
        scores: ``[M, N]`` float32 on the CPU, positive for proponents.
        train: the training images; None where they were not kept, as in what `open` gives.
        queries: the queries, likewise.
        settings: what decided the scores, as name and value.
        facts: figures of the work, as name and text.
        ids: N names of the training images.
        query_ids: M names of the queries.
        findings: how noisy the scores are and what stands out, as far as it was asked for.
    """

    scores: Tensor
    train: Samples | None
    queries: Samples | None
    settings: dict[str, Any]
    facts: dict[str, str] = field(default_factory=dict)
    names: tuple[list[str], list[str]] | None = None
    findings: Findings | None = None

    @property
    def ids(self) -> list[str]:
        """Names of the N training images."""
        return self._names[1]

    @property
    def query_ids(self) -> list[str]:
        """Names of the M queries."""
        return self._names[0]

    @property
    def _names(self) -> tuple[list[str], list[str]]:
        if self.names is not None:
            return self.names
        assert self.train is not None
        assert self.queries is not None
        return self.queries.ids, self.train.ids

    @property
    def shown_settings(self) -> dict[str, Any]:
        """The settings for a reader: the first digits of hashes, which are in `settings` whole."""
        return {name: _shorten(value) for name, value in self.settings.items()}

    def top(self, k: int | None = None) -> list[list[Proponent]]:
        """The k training images with the highest scores for each query, the highest first.

        Args:
            k: how many; by default 10, or all N where they are fewer.

        Raises:
            ValueError: k is not in [1, N].
        """
        found = top_k(self.scores, min(_TOP, len(self.ids)) if k is None else k)
        return [
            [Proponent(self.ids[i], score) for i, score in zip(row, values, strict=True)]
            for row, values in zip(
                found.proponents.tolist(), found.proponent_scores.tolist(), strict=True
            )
        ]

    def to_csv(self, file: str | Path, k: int | None = None) -> Path:
        """Write lines of (query, rank, training image, score), the highest score first.

        Args:
            file: written anew.
            k: training images per query; None is all N.

        Returns:
            The file.

        Raises:
            ValueError: as `top`.
        """
        file = expand_path(file)
        with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
            writer = csv.writer(opened)
            writer.writerow(["query", "rank", "training image", "score"])
            for query, row in zip(self.query_ids, self.top(k or len(self.ids)), strict=True):
                for rank, match in enumerate(row, start=1):
                    writer.writerow([query, rank, match.id, f"{match.score:.9g}"])
        return file

    def save(self, folder: str | Path) -> Path:
        """Write ``scores.safetensors``; the same settings and scores give the same bytes.

        Returns:
            The file, which `open` reads.
        """
        folder = expand_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return self.write_scores(folder / SCORES)

    def write_scores(self, file: Path) -> Path:
        """As `save`, under a name of its own."""
        metadata = {
            "rows": json.dumps(self.query_ids),
            "columns": json.dumps(self.ids),
            "settings": json.dumps(self.settings),
            "sign": _SIGN,
        }
        tensors = {"scores": self.scores.contiguous()}
        if self.findings is not None:
            metadata["findings"] = json.dumps(self.findings.about())
            tensors |= self.findings.tensors()
        write_atomically(file, encode_tensors(tensors, metadata))
        return file

    @classmethod
    def open(cls, folder: str | Path, queries: str | None = None) -> Attribution:
        """Read what `save` wrote, or a set of queries of a run of `dtrak.attribute`.

        Args:
            folder: of `save`, of a run, or the file itself.
            queries: which of a run's sets; None for the only one.

        Raises:
            FileNotFoundError: there is nothing.
            ResultsError: it is damaged, holds no scores, or several sets of which none is named.
        """
        file = expand_path(folder)
        if (file / RUN_FILE).is_file() and not (file / SCORES).is_file():
            from .runs.record import find_queries

            file = find_queries(file, queries)
        file = file / SCORES if file.is_dir() else file
        scores, metadata = read_scores(file)
        names = json.loads(metadata["rows"]), json.loads(metadata["columns"])
        try:
            settings = dict(json.loads(metadata["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{file} must say its settings in its metadata") from error
        return cls(
            scores, None, None, settings, names=names, findings=read_findings(file, metadata)
        )

    def report(
        self, file: str | Path = "report.html", *, k: int = 5, megabytes: float = 20.0
    ) -> Path:
        """Write one self-contained page, each query beside its proponents and opponents.

        Args:
            file: the page; a picture of its first queries is written beside it, as PNG.
            k: proponents shown per query, before a reader asks for more.
            megabytes: of the page, at most, in millions of bytes; what that leaves out is said in
                it.

        Returns:
            The page.

        Raises:
            ValueError: there are no pictures to show: the attribution was read from a file, or what
                was explained are no grey or RGB pictures.
        """
        from .pages.report import Explained, write_report

        file = expand_path(file)
        train, queries = self._pictures()
        explained = Explained(
            train,
            queries,
            self.scores,
            k,
            "picture",
            self.shown_settings,
            self.facts,
            (),
            {},
            self.findings,
        )
        write_report(file, file.with_suffix(".png"), explained, megabytes=megabytes)
        return file

    def _pictures(self) -> tuple[Samples, Samples]:
        if self.train is None or self.queries is None:
            raise ValueError(
                "an attribution must have its images to be shown, got one read from a file: python "
                "-m dtrak.report shows a run again"
            )
        return self.train, self.queries

    def __repr__(self) -> str:
        M, N = self.scores.shape
        method = self.settings.get("method", "scores")
        return f"Attribution({method}, {M} queries x {N} training images)"

    def _repr_html_(self) -> str:
        """The first queries with their proponents, in a notebook."""
        try:
            train, queries = self._pictures()
            from .pages.influence import render_strips

            k = min(_SHOWN_MATCHES, len(self.ids))
            return render_strips(train, queries, self.scores[:_SHOWN_ROWS], k)
        # samples that are no pictures have names
        except ValueError:
            from .pages.tables import values_table

            best = self.top(min(_SHOWN_MATCHES, len(self.ids)))[:_SHOWN_ROWS]
            texts = [", ".join(f"{m.id} {m.score:+.3g}" for m in row) for row in best]
            pairs = list(zip(self.query_ids, texts, strict=False))
            return values_table(repr(self), pairs).html()


def _shorten(value: Any) -> Any:
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:_DIGITS] if is_hash else value
