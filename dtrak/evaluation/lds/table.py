"""What an experiment found: small enough to be kept for good, and the table it gives.

For rank correlations the order of the predictions is all that counts, so one byte per model, query,
method and damping says everything: every figure of the table follows from the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ...methods.baselines import datamodel, empirical_influence
from ...runs.files import encode_text, write_atomically
from .options import NUM_RESAMPLES, WHITENED
from .statistics import (
    Interval,
    ResampledRanks,
    bootstrap_spearman,
    confidence_interval,
    halves,
    predict_groups,
    resample_counts,
    spearman,
)

# models a datamodel can be fitted to: with fewer a fold of its cross-validation has no R²
FEWEST_FITTED = 10
# models with fewer of which an interval says nothing: halves of them have four ranks or less
FEWEST_WITH_INTERVALS = 10
_PUBLISHED_SIZES = (64, 128, 256, 512)
_CROSS_FITTED = "cross-fitted"
AUTO, UNIT = "auto", "1"
# what D-TRAK is compared with, besides chance
# D-TRAK with the mean of the output as f
_MEAN = "D-TRAK, mean"
_RIVALS = (
    "TRAK",
    "Relative influence",
    "Renormalised influence",
    "Gradient dot",
    "Gradient cosine",
    "TracInCP",
    "GAS",
)
# of the split into halves and of the resamples
_SEED = 0
_FORMAT = 2


class ResultsError(ValueError):
    """A file of results that cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What a method predicted.

    Attributes:
        method: its name.
        num_timesteps: S of its features; 0 for a method without.
        projection: kind of the random matrix; empty for a method without.
        kinds: the kinds of queries it has predictions for, in the order of the columns.
        rules: L names of dampings: the multiple of the mean squared feature norm, or `AUTO`; one
            empty name for a method without.
        dampings: L values of λ in units of the Gram.
        ranks: ``[L, R, M]`` uint8, dense rank of the prediction for each model, by query.
        is_fitted: predictions for each half of the models come from a fit to the other half, so
            that they compare within a half only.
    """

    method: str
    num_timesteps: int
    projection: str
    kinds: tuple[str, ...]
    rules: tuple[str, ...]
    dampings: tuple[float, ...]
    ranks: Tensor
    is_fitted: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """Retrained models that methods are fitted to, and that nothing is judged on.

    Attributes:
        subsets: ``[R, N]`` bool.
        losses: by kind of query, ``[R, M]`` float32.
    """

    subsets: Tensor
    losses: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Results:
    """All that the table needs.

    Attributes:
        about: what was done, JSON-serialisable.
        subsets: ``[R, N]`` bool.
        losses: by kind of query, ``[R, M]`` float32.
        entries: one per method, S and projection.
        retrain: the models that datamodels and empirical influence were fitted to, if there are
            any beside those of ``subsets``.
    """

    about: dict[str, Any]
    subsets: Tensor
    losses: dict[str, Tensor]
    entries: list[Entry]
    retrain: Family | None = None

    def ranks(self, entry: Entry, kind: str) -> Tensor:
        """``[L, R, M]``: the columns of ``entry`` that are queries of ``kind``."""
        first = 0
        for other in entry.kinds:
            last = first + self.losses[other].shape[1]
            if other == kind:
                return entry.ranks[:, :, first:last]
            first = last
        raise KeyError(kind)


def dense_ranks(predictions: Tensor) -> Tensor:
    """Ranks from 0 without gaps, equal values sharing one: ``[L, R, M]`` floating to uint8.

    Raises:
        ValueError: there are more than 256 models, or a prediction is not finite.
    """
    if predictions.shape[1] > 256:
        raise ValueError(f"models must be at most 256, got {predictions.shape[1]}")
    if not torch.isfinite(predictions).all():
        raise ValueError("predictions must be finite, got NaN or infinity")
    ranks = rankdata(predictions.double().numpy(), method="dense", axis=1) - 1
    return torch.from_numpy(ranks.astype(np.uint8))


def fitted_entries(
    subsets: Tensor, losses: Mapping[str, Tensor], retrain: Family | None = None
) -> list[Entry]:
    """The methods that need retrained models: empirical influence and datamodels.

    Args:
        subsets: ``[R, N]`` bool, of the models the methods are judged on.
        losses: by kind of query, ``[R, M]``.
        retrain: other models, to which the methods are fitted: to the first 64, 128, 256 and 512 as
            far as there are so many, and to all.

    Returns:
        Fits to ``retrain`` where it has `FEWEST_FITTED` models or more. Else fits to each half of
        the models judged on for the sake of the other: empirical influence, and a datamodel where a
        half has enough models to cross-validate.
    """
    if retrain is not None and len(retrain.subsets) >= FEWEST_FITTED:
        return _retrained_entries(subsets, retrain)
    kinds, targets = tuple(losses), torch.cat(list(losses.values()), 1).double()
    first, second = halves(len(subsets), _SEED)
    fits: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"Empirical influence, {_CROSS_FITTED}": empirical_influence
    }
    if min(len(first), len(second)) >= FEWEST_FITTED:
        fits[f"Datamodel, {_CROSS_FITTED}"] = datamodel
    entries = []
    for name, fit in fits.items():
        predictions = torch.zeros_like(targets)
        for here, there in ((first, second), (second, first)):
            predictions[there] = predict_groups(fit(subsets[here], targets[here]), subsets[there])
        ranks = dense_ranks(predictions[None])
        entries.append(Entry(name, 0, "", kinds, ("",), (float("nan"),), ranks, is_fitted=True))
    return entries


def _retrained_entries(subsets: Tensor, retrain: Family) -> list[Entry]:
    kinds, targets = tuple(retrain.losses), torch.cat(list(retrain.losses.values()), 1).double()
    R = len(retrain.subsets)
    entries = []
    for size in sorted({*(size for size in _PUBLISHED_SIZES if size < R), R}):
        fits = {"Empirical influence": empirical_influence, "Datamodel": datamodel}
        for name, fit in fits.items():
            scores = fit(retrain.subsets[:size], targets[:size])
            ranks = dense_ranks(predict_groups(scores, subsets)[None])
            title = f"{name}, {size} models"
            entries.append(Entry(title, 0, "", kinds, ("",), (float("nan"),), ranks))
    return entries


def save_results(file: Path, results: Results) -> None:
    """Write a compressed ``.npz``.

    Ranks at neighbouring dampings are alike: but for the smallest damping, differences to the next
    smaller one are kept, modulo 256.
    """
    about: dict[str, Any] = {"format": _FORMAT, "about": results.about, "entries": []}
    arrays: dict[str, Any] = {
        "subsets": np.packbits(results.subsets.numpy(), axis=1),
        "num_samples": np.array(results.subsets.shape[1]),
    }
    for kind, losses in results.losses.items():
        arrays[f"losses {kind}"] = losses.numpy()
    if results.retrain is not None:
        arrays["retrain subsets"] = np.packbits(results.retrain.subsets.numpy(), axis=1)
        for kind, losses in results.retrain.losses.items():
            arrays[f"retrain losses {kind}"] = losses.numpy()
    for number, entry in enumerate(results.entries):
        fields = asdict(entry)
        ranks = fields.pop("ranks").numpy()
        # NaN is not JSON
        fields["dampings"] = [d if np.isfinite(d) else None for d in entry.dampings]
        about["entries"].append(fields)
        ranks = ranks[np.argsort(entry.dampings, kind="stable")]
        arrays[f"ranks {number}"] = np.diff(ranks, axis=0, prepend=ranks[:1] * 0)
    text = encode_text(json.dumps(about, ensure_ascii=False))
    arrays["about"] = np.frombuffer(text, dtype=np.uint8)
    buffer = io.BytesIO()
    # as np.savez_compressed, a tenth smaller
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    write_atomically(file, buffer.getbuffer())


def load_results(source: Path | bytes) -> Results:
    """Read what `save_results` wrote.

    Args:
        source: the file, or its content.

    Raises:
        FileNotFoundError: there is no such file.
        ResultsError: it is damaged, or of another version.
    """
    name = "results" if isinstance(source, bytes) else str(source)
    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else source
        with np.load(content, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            family = _read_family(arrays, "")
            retrain = None
            if "retrain subsets" in arrays.files:
                retrain = _read_family(arrays, "retrain ")
            entries = [
                _read_entry(fields, arrays[f"ranks {number}"])
                for number, fields in enumerate(about["entries"])
            ]
    except FileNotFoundError:
        raise
    # a damaged archive raises whatever its bytes happen to ask for
    except Exception as error:
        raise ResultsError(f"{name} must be results of dtrak.lds, but is damaged") from error
    if about["format"] != _FORMAT:
        raise ResultsError(f"{name} must be of format {_FORMAT}, got {about['format']}")
    return Results(about["about"], family.subsets, family.losses, entries, retrain)


def _read_entry(fields: Mapping[str, Any], differences: Any) -> Entry:
    values = {key: _tuple(value) for key, value in fields.items()}
    dampings = tuple(float("nan") if d is None else d for d in fields["dampings"])
    ranks = np.empty_like(differences)
    order = np.argsort(dampings, kind="stable")
    ranks[order] = np.add.accumulate(differences, axis=0, dtype=np.uint8)
    return Entry(**values | {"dampings": dampings, "ranks": torch.from_numpy(ranks)})


def _read_family(arrays: Any, prefix: str) -> Family:
    size = int(arrays["num_samples"])
    subsets = np.unpackbits(arrays[f"{prefix}subsets"], axis=1, count=size).astype(bool)
    start = f"{prefix}losses "
    losses = {
        key.removeprefix(start): torch.from_numpy(arrays[key])
        for key in arrays.files
        if key.startswith(start)
    }
    return Family(torch.from_numpy(subsets), losses)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def packaged_results(preset: str) -> tuple[Results, dict[str, Any]] | None:
    """Results and table that come with the package; None for a preset without."""
    table = packaged_table(preset)
    if table is None:
        return None
    data = files("dtrak") / "lds_results" / f"{preset}.npz"
    return load_results(data.read_bytes()), table


def packaged_table(preset: str) -> dict[str, Any] | None:
    """The table of `packaged_results` without the results, which take much longer to unpack."""
    folder = files("dtrak") / "lds_results"
    data, table = folder / f"{preset}.npz", folder / f"{preset}.json"
    if not (data.is_file() and table.is_file()):
        return None
    found: dict[str, Any] = json.loads(table.read_text(encoding="utf-8"))
    return found


def digest(results: Results) -> str:
    """SHA-256 of everything the table is computed from."""
    value = hashlib.sha256()
    retrain = results.retrain
    fitted = () if retrain is None else (retrain.subsets, *retrain.losses.values())
    for tensor in (results.subsets, *results.losses.values(), *fitted):
        value.update(tensor.numpy().tobytes())
    for entry in results.entries:
        value.update(repr((entry.method, entry.num_timesteps, entry.projection)).encode())
        value.update(entry.ranks.numpy().tobytes())
    return value.hexdigest()


class _Resamples:
    """Resamples and jackknife of one kind of query, and the ranks of its losses within them."""

    def __init__(self, losses: Tensor, num_resamples: int) -> None:
        R = len(losses)
        self.whole = torch.arange(R)
        self.halves = halves(R, _SEED)
        leave_one_out = 1 - torch.eye(R)
        everywhere = resample_counts(R, num_resamples, _SEED)
        self.counts = {"whole": (everywhere, leave_one_out)}
        for number, half in enumerate(self.halves):
            size = len(half)
            drawn = resample_counts(size, num_resamples, _SEED + 1 + number)
            self.counts[f"half {number}"] = (drawn, leave_one_out[:, half])
        rows = {"whole": self.whole, "half 0": self.halves[0], "half 1": self.halves[1]}
        self.rows = rows
        self.losses = {
            part: [list(ResampledRanks(losses[rows[part]], c).chunks()) for c in self.counts[part]]
            for part in rows
        }

    def lds(self, ranks: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """The LDS of ``[R, M]`` ranks on a part of the models: resampled ``[B]``, jackknifed."""
        values = [
            bootstrap_spearman(ranks[self.rows[part]], losses, counts)
            for losses, counts in zip(self.losses[part], self.counts[part], strict=True)
        ]
        return values[0], values[1]


@dataclass(frozen=True)
class _Estimate:
    """A statistic with its resamples and jackknife."""

    value: float
    resampled: Tensor
    jackknifed: Tensor

    def __sub__(self, other: _Estimate) -> _Estimate:
        return _Estimate(
            self.value - other.value,
            self.resampled - other.resampled,
            self.jackknifed - other.jackknifed,
        )

    def to_dict(self) -> dict[str, Any]:
        interval: Interval = confidence_interval(self.value, self.resampled, self.jackknifed)
        return {
            "lds": _rounded(self.value),
            "bca": [_rounded(end) for end in interval.bca],
            "percentile": [_rounded(end) for end in interval.percentile],
        }


def _rounded(value: float) -> float:
    return round(float(value), 6)


def make_table(
    results: Results,
    *,
    num_resamples: int = NUM_RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    pairs: Iterable[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Every figure of the report.

    Args:
        results: of an experiment, with 4 models or more.
        num_resamples: B, at least 1,000 for intervals to mean anything.
        progress: called with (entries done, entries).
        pairs: names of methods whose difference is wanted beside the usual ones.

    Returns:
        JSON-serialisable: ``rows``, one per method, S, projection and kind of query, and
        ``differences`` of pairs of them on the same resamples; without intervals where there are
        fewer than `FEWEST_WITH_INTERVALS` models.

    Raises:
        ValueError: there are fewer than 4 models.
    """
    rows: list[dict[str, Any]] = []
    held_out: dict[tuple[str, str, int, str], _Estimate] = {}
    rules: dict[tuple[str, str, int, str, str], _Estimate] = {}
    total = sum(len(entry.kinds) for entry in results.entries)
    for kind, losses in results.losses.items():
        resamples = _Resamples(losses, num_resamples)
        for entry in results.entries:
            if kind not in entry.kinds:
                continue
            ranks = results.ranks(entry, kind)
            key = (kind, entry.method, entry.num_timesteps, entry.projection)
            row, estimates = _evaluate(entry, ranks, losses, resamples)
            rows.append(
                {
                    "queries": kind,
                    "method": entry.method,
                    "timesteps": entry.num_timesteps,
                    "projection": entry.projection,
                    **row,
                }
            )
            held_out[key] = estimates.pop("held out")
            rules |= {(*key, rule): estimate for rule, estimate in estimates.items()}
            if progress is not None:
                progress(len(rows), total)
    differences = list(_differences(held_out, rules, tuple(pairs)))
    if len(results.subsets) < FEWEST_WITH_INTERVALS:
        for cells in (*rows, *differences):
            _leave_out_intervals(cells)
    return {
        "results": digest(results),
        "num_resamples": num_resamples,
        "about": results.about,
        "rows": rows,
        "differences": differences,
    }


def _leave_out_intervals(cells: dict[str, Any]) -> None:
    for name in ("bca", "percentile"):
        cells.pop(name, None)
    for cell in cells.values():
        if isinstance(cell, dict):
            _leave_out_intervals(cell)


def _evaluate(
    entry: Entry, ranks: Tensor, losses: Tensor, resamples: _Resamples
) -> tuple[dict[str, Any], dict[str, _Estimate]]:
    """A row of the table, and the statistics that are compared with others'."""
    first, second = resamples.halves
    points = [
        [float(spearman(r[half], losses[half]).mean()) for r in ranks] for half in (first, second)
    ]
    drawn = [[resamples.lds(r, f"half {n}") for r in ranks] for n in (0, 1)]
    statistic, chosen = _cross_fit(*(torch.tensor(p)[None].double() for p in points))
    estimates = {
        "held out": _Estimate(
            float(statistic),
            *(
                _cross_fit(*(torch.stack([d[which] for d in half], 1) for half in drawn))[0]
                for which in (0, 1)
            ),
        )
    }
    row: dict[str, Any] = {"held_out": estimates["held out"].to_dict()}
    whole = [float(spearman(r, losses).mean()) for r in ranks]
    if entry.rules != ("",):
        best = int(np.argmax(whole))
        row["chosen"] = [entry.rules[int(number)] for number in chosen[:, 0]]
        row["in_sample"] = {"lds": _rounded(whole[best]), "rule": entry.rules[best]}
        row["sweep"] = {
            rule: {"damping": damping, "lds": _rounded(value)}
            for rule, damping, value in zip(entry.rules, entry.dampings, whole, strict=True)
        }
        for rule in (UNIT, AUTO):
            number = entry.rules.index(rule)
            estimates[rule] = _Estimate(whole[number], *resamples.lds(ranks[number], "whole"))
            row[rule] = estimates[rule].to_dict()
    elif not entry.is_fitted:
        row["all"] = _Estimate(whole[0], *resamples.lds(ranks[0], "whole")).to_dict()
    return row, estimates


def _cross_fit(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a damping on one half and judge it on the other, both ways.

    Args:
        first: ``[B, L]`` LDS on one half.
        second: ``[B, L]`` LDS on the other.

    Returns:
        ``[B]`` mean of the two held-out LDS, and ``[2, B]`` the dampings chosen on each half.
    """
    chosen = torch.stack([first.argmax(1), second.argmax(1)])
    judged = [
        half.gather(1, number[:, None])[:, 0]
        for half, number in zip((second, first), chosen, strict=True)
    ]
    return (judged[0] + judged[1]) / 2, chosen


def _differences(
    held_out: Mapping[tuple[str, str, int, str], _Estimate],
    rules: Mapping[tuple[str, str, int, str, str], _Estimate],
    pairs: Sequence[tuple[str, str]],
) -> Iterable[dict[str, Any]]:
    """What is worth comparing on the same resamples: methods, projections, rules for λ."""
    wanted: list[tuple[str, Any, Any]] = []
    for key in held_out:
        kind, method, S, projection = key
        asked = [(one, other) for one, other in pairs if one == method]
        wanted += [(f"{one} - {other}", key, (kind, other, S, projection)) for one, other in asked]
        if projection == "none":
            continue
        if method == "D-TRAK":
            wanted += [(f"D-TRAK - {o}", key, (kind, o, S, projection)) for o in _RIVALS]
        if method == "TRAK":
            wanted += [("TRAK - Gradient dot", key, (kind, "Gradient dot", S, projection))]
        if method in ("D-TRAK", "Gradient dot"):
            wanted += [(f"{method} - Random", key, (kind, "Random", 0, ""))]
        if method in (_MEAN, f"{_MEAN}, {WHITENED}"):
            other = method.replace(_MEAN, "D-TRAK")
            wanted += [(f"{method} - {other}", key, (kind, other, S, projection))]
        base, _, rest = method.rpartition(", ")
        if rest.startswith(WHITENED):
            wanted += [(f"{method} - {base}", key, (kind, base, S, projection))]
        if rest.startswith("mean of "):
            others = (base, f"{base}, single half-data model")
            wanted += [(f"{method} - {o}", key, (kind, o, S, projection)) for o in others]
    for name, one, other in wanted:
        if other in held_out:
            difference = held_out[one] - held_out[other]
            yield _difference(name, one, difference)
    for (kind, method, S, projection, rule), estimate in rules.items():
        key = (kind, method, S, projection)
        if rule == UNIT:
            name = f"{method}: mean squared norm - auto"
            yield _difference(name, key, estimate - rules[(*key, AUTO)])
        exact = (kind, method, S, "none", AUTO)
        if rule == AUTO and projection != "none" and exact in rules:
            # at one rule for both: a damping chosen from few models would hide the projection
            yield _difference(f"{method}, auto: {projection} - exact", key, estimate - rules[exact])


def _difference(name: str, key: Sequence[Any], estimate: _Estimate) -> dict[str, Any]:
    interval = estimate.to_dict()
    interval["difference"] = interval.pop("lds")
    return {"name": name, "queries": key[0], "timesteps": key[2], "projection": key[3], **interval}


def select_rows(table: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind of query, best first."""
    rows = [row for row in table["rows"] if row["queries"] == kind]
    return sorted(rows, key=lambda row: -row["held_out"]["lds"])
