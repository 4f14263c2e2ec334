"""What else could make attribution more accurate, tried on the packaged benchmarks.

``python benchmarks/quality_trials.py --preset digits --record`` appends a row per group of
trials, output function and whitening that benchmarks/results/trials.jsonl lacks, ``--docs``
rewrites the tables of docs/trials.md, ``--check`` only says whether they are up to date. Kernels
are exact (no projection), S is 10, λ is chosen on one half of the retrained models and judged on
the other.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pages import PRESETS, ROOT, Table, read_rows, record, run
from quality_lds import CPU, exact_gradients, packaged_run
from quality_whitening import FUNCTIONS, KINDS, QUERIES, fitted, reduced
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtrak.data.samples import Samples
from dtrak.evaluation.lds.experiment import Experiment, train_one
from dtrak.evaluation.lds.options import RETRAIN
from dtrak.evaluation.lds.statistics import predict_groups
from dtrak.evaluation.lds.table import (
    AUTO,
    UNIT,
    Entry,
    Results,
    dense_ranks,
    make_table,
    packaged_results,
)
from dtrak.evaluation.retraining import TRAIN
from dtrak.features.extraction import condition_rows, given, output_rows
from dtrak.features.noise import sample_noise
from dtrak.features.settings import FeatureSettings
from dtrak.features.timesteps import select_timesteps
from dtrak.methods.scores import gradient_dot, trak
from dtrak.models.denoiser import Denoiser
from dtrak.pages import tables
from dtrak.runs.console import progress_bar
from dtrak.runs.workers import one_thread
from dtrak_kernels import GradientSketcher, Projection, Whitening, project
from dtrak_kernels.gradients.whitening.roots import DenseRoot
from dtrak_kernels.ridge import RidgeSolver

RESULTS = ROOT / "benchmarks" / "results" / "trials.jsonl"
PAGE = ROOT / "docs" / "trials.md"

TIMESTEPS, MEMBERS, BATCH = 10, 4, 16
# of the mean squared feature norm of the training set
MULTIPLES = ("0.0001", "0.001", "0.01", "0.1", UNIT, "10")
RESAMPLES = 400
WHITENINGS = ("none", "lowrank")
# instead of 0.01
RHOS = (0.1, 1.0)
PROJ_DIM = 8192
PLAIN = "as it is"
# how the S rows of a sample are drawn, beside S evenly spaced timesteps with a noise each
SCHEMES = {
    "stratified": "stratified timesteps",
    "antithetic": "noises in pairs ±η",
    "both": "stratified, in pairs ±η",
}
# of EK-FAC influence: λ of a parameter, of the mean of its second moments; the published one is
# where others have "auto"
_PUBLISHED_DAMPING = 0.01
_TOP = 10


@dataclass(frozen=True, eq=False)
class Gradients:
    """Averaged gradients of the training images and of the queries, one kind after the other.

    Attributes:
        train: ``[N, P]`` float32.
        queries: ``[M, P]`` float32.
    """

    train: Tensor
    queries: Tensor

    def whitened(self, whitening: Whitening) -> "Gradients":
        """The map of both."""
        return Gradients(_apply(whitening, self.train), _apply(whitening, self.queries))


def _apply(whitening: Whitening, grads: Tensor) -> Tensor:
    return torch.cat([whitening.apply(part) for part in grads.split(100)])


def drawn_timesteps(
    scheme: str, ids: Sequence[str], every: Sequence[int], num_train_timesteps: int
) -> list[list[int]]:
    """S timesteps of every sample; pairs of noises share one.

    Args:
        scheme: one of `SCHEMES`; anything else takes ``every``.
        ids: of the samples, which decide the draw.
        every: S evenly spaced timesteps.
        num_train_timesteps: T.
    """
    count = len(every) // 2 if scheme in ("antithetic", "both") else len(every)
    if scheme not in ("stratified", "both"):
        return [[*every[:: len(every) // count]] for _ in ids]
    # one number a sample and stratum, from the noise that the sample owns
    places = sample_noise(ids, list(range(count)), (1,), seed=1, dtype=torch.float64)[..., 0]
    inside = torch.special.ndtr(places)
    steps = (torch.arange(count) + inside) * num_train_timesteps / count
    return steps.long().clamp(max=num_train_timesteps - 1).tolist()


def row_gradients(
    model: Denoiser, settings: FeatureSettings, data: Samples, role: str, scheme: str
) -> Iterator[Tensor]:
    """``[B, S, P]`` gradients of every row of every sample, batch by batch."""
    sketcher = GradientSketcher(
        model.module, Projection("none"), parameters=model.parameters(), rows_per_sample=1
    )
    model.prepare(data.conditions, CPU)
    process, is_paired = model.process, scheme in ("antithetic", "both")
    for first in range(0, len(data), BATCH):
        part = data.select(range(first, min(first + BATCH, len(data))))
        ids = [f"{role}/{name}" for name in part.ids]
        inputs = given(model, part, slice(None), CPU)
        rows = []
        chosen = drawn_timesteps(scheme, ids, settings.timesteps, process.num_timesteps)
        for number, steps in enumerate(chosen):
            one = slice(number, number + 1)
            noise = sample_noise(ids[one], steps, inputs.shape[1:], seed=settings.noise_seed)[0]
            noise = torch.cat([noise, -noise]) if is_paired else noise
            timesteps = torch.tensor(steps * 2 if is_paired else steps)
            clean = inputs[one].expand_as(noise)
            target = process.target(clean, noise, timesteps)
            rows.append((process.add(clean, noise, timesteps), target, timesteps))
        noisy, target, timesteps = (torch.cat(column) for column in zip(*rows, strict=True))
        count = len(timesteps) // len(part)
        condition = condition_rows(model, part.conditions, count, inputs)
        outputs = output_rows(model, settings, (noisy, target, timesteps), part.ids, condition, 1.0)
        yield sketcher.sketch(outputs, len(timesteps)).unflatten(0, (len(part), count))


def averaged(
    model: Denoiser,
    settings: FeatureSettings,
    parts: Mapping[str, Samples],
    scheme: str,
    change: Callable[[Tensor], Tensor],
    label: str,
) -> Gradients:
    """The mean over a sample's rows of a function of its row gradients ``[B, S, P]``."""
    found: dict[str, list[Tensor]] = {}
    done, total = 0, sum(len(data) for data in parts.values())
    with progress_bar(Console(stderr=True), label) as progress:
        for part, data in parts.items():
            role = "train" if part == TRAIN else "query"
            for grads in row_gradients(model, settings, data, role, scheme):
                found.setdefault(part, []).append(change(grads).mean(1))
                done += len(grads)
                progress(done, total)
    queries = [torch.cat(found[kind]) for kind in QUERIES]
    return Gradients(torch.cat(found[TRAIN]), torch.cat(queries))


def unit(grads: Tensor) -> Tensor:
    """Every row over its norm."""
    return torch.nn.functional.normalize(grads, dim=-1, eps=1e-30)


def whitened_unit(whitening: Whitening) -> Callable[[Tensor], Tensor]:
    """Every whitened row over its norm."""
    return lambda grads: unit(whitening.apply(grads.flatten(0, 1)).unflatten(0, grads.shape[:2]))


@dataclass(frozen=True)
class Judge:
    """Turns scores at several λ into an entry of the table.

    Attributes:
        results: the retrained models.
    """

    results: Results

    def entry(
        self, name: str, scores: Callable[[float], Tensor], unit: float, auto: float
    ) -> Entry:
        """An entry of predictions at all multiples of ``unit``, and at ``auto``."""
        dampings = [float(multiple) * unit for multiple in MULTIPLES] + [auto]
        subsets = self.results.subsets
        ranks = dense_ranks(torch.stack([predict_groups(scores(d), subsets) for d in dampings]))
        return Entry(name, TIMESTEPS, "", QUERIES, (*MULTIPLES, AUTO), tuple(dampings), ranks)

    def kernel(self, grads: Gradients, names: Mapping[str, Any]) -> Iterator[Entry]:
        """Entries of the exact kernel, a transformation of its scores each."""
        train, queries = reduced(grads.train, grads.queries)
        solver = RidgeSolver(train)
        norm = float(train.double().square().sum(1).mean())
        auto = solver.auto_damping()
        for name, change in names.items():
            yield self.entry(name, lambda d, f=change: f(solver, train, queries, d), norm, auto)

    def table(self, entries: Sequence[Entry], base: str) -> list[dict[str, Any]]:
        """Figures of all entries, by kind of query, with differences to one of them."""
        kept = {kind: self.results.losses[kind] for kind in QUERIES}
        pairs = [(entry.method, base) for entry in entries if entry.method != base]
        made = make_table(
            Results(self.results.about, self.results.subsets, kept, list(entries)),
            num_resamples=RESAMPLES,
            pairs=pairs,
        )
        differences = {(d["name"], d["queries"]): d for d in made["differences"]}
        cases = []
        for row in made["rows"]:
            found = differences.get((f"{row['method']} - {base}", row["queries"]))
            difference = found and {name: found[name] for name in ("difference", "bca")}
            fields = ("queries", "method", "held_out", "in_sample", "chosen", UNIT, AUTO, "all")
            case = {field: row[field] for field in fields if field in row}
            cases.append(case | {"over": difference})
        return cases


def plain_scores(solver: RidgeSolver, _: Tensor, queries: Tensor, damping: float) -> Tensor:
    """TRAK's."""
    return trak(solver, queries, damping)


def squared(solver: RidgeSolver, _: Tensor, queries: Tensor, damping: float) -> Tensor:
    """Their squares: every image that matters, for or against, counts as a proponent."""
    return trak(solver, queries, damping).double().square()


def left_out(solver: RidgeSolver, train: Tensor, queries: Tensor, damping: float) -> Tensor:
    """Over 1 - h, h the leverage of the training image: what leaving it out does to its fit."""
    leverage = torch.cat(
        [
            trak(solver, train[i : i + 200], damping)[:, i : i + 200].diagonal()
            for i in range(0, len(train), 200)
        ]
    ).double()
    return trak(solver, queries, damping).double() / (1 - leverage).clamp(min=1e-6)


def layer_weighted(
    grads: Gradients, groups: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> tuple[Callable[[float], Tensor], float, float]:
    """Scores whose layers are weighted so that the best matches stand out; no label is looked at.

    The weights w, of a softmax, make ``mean of the k largest scores / norm of all`` of a query
    largest, over all queries of a kind, minus ``‖w‖²``: the criterion of Li et al. 2026
    (arXiv:2506.05647), with k = 10, 200 steps of Adam.

    Args:
        grads: of all queries, one kind after the other.
        groups: first and last column of every layer.
        sizes: how many queries of each kind there are.

    Returns:
        Scores by λ, the mean squared norm of a feature, and λ auto.
    """
    N = len(grads.train)
    gram, crosses = torch.zeros(N, N, dtype=torch.float64), []
    for first, last in groups:
        train = grads.train[:, first:last].double()
        gram += train @ train.T
        crosses.append(grads.queries[:, first:last].double() @ train.T)
    cross = torch.stack(crosses)
    values, vectors = torch.linalg.eigh(gram)
    train = vectors * values.clamp(min=0).sqrt()

    def scores(damping: float) -> Tensor:
        inverse = (vectors / (values.clamp(min=0) + damping)) @ vectors.T
        by_layer = cross @ inverse
        kinds = by_layer.split(list(sizes), dim=1)
        return torch.cat([torch.einsum("l,lmn->mn", _weights(x), x) for x in kinds])

    return scores, float(values.sum() / N), RidgeSolver(train).auto_damping()


def _weights(by_layer: Tensor) -> Tensor:
    """``[L]`` weights for scores ``[L, M, N]``."""
    logits = torch.zeros(len(by_layer), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        weights = logits.softmax(0)
        scores = torch.einsum("l,lmn->mn", weights, by_layer)
        best = scores.topk(_TOP, dim=1).values.mean(1) / scores.norm(dim=1).clamp(min=1e-300)
        # a norm of N alike scores is √N times one of them
        loss = -(best * by_layer.shape[2] ** 0.5).mean() + weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(0)


def layers_of(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """First and last column of every module's parameters."""
    groups: dict[str, list[int]] = {}
    column = 0
    for name, shape in zip(names, shapes, strict=True):
        size = torch.Size(shape).numel()
        groups.setdefault(name.rpartition(".")[0], [column, column])[1] = column + size
        column += size
    return [(first, last) for first, last in groups.values()]


def into_eigenbasis(whitening: Whitening) -> Whitening:
    """The rotation of a K-FAC whitening into the eigenvectors of A and B, without any scale."""
    parameters = []
    for parameter in whitening.parameters:
        is_bias = len(parameter.shape) == 1
        rows, columns = (
            _eigenvectors(root, is_transposed)
            for root, is_transposed in ((parameter.rows, not is_bias), (parameter.columns, False))
        )
        is_kept = not parameter.is_zero
        scale = torch.tensor(float(is_kept))
        parameters.append(replace(parameter, scale=scale, rows=rows, columns=columns))
    return replace(whitening, parameters=tuple(parameters))


def _eigenvectors(root: Any, is_transposed: bool) -> DenseRoot | None:
    if root is None:
        return None
    if not isinstance(root, DenseRoot):
        raise TypeError("factors must be at most 1,024 wide")
    vectors = torch.linalg.eigh(root.matrix.double())[1].float()
    return DenseRoot(vectors.mT if is_transposed else vectors)


def ekfac_influence(grads: Gradients, whitening: Whitening) -> Callable[[float], Tensor]:
    """EK-FAC influence of averaged gradients by its damping, of each parameter's mean.

    Source:
        Grosse et al. 2023 (arXiv:2308.03296); second moments of gradients averaged over the
        timesteps, as features are.
    """
    rotated = grads.whitened(into_eigenbasis(whitening))
    moments = sum(part.double().square().sum(0) for part in rotated.train.split(100))
    moments = moments / len(rotated.train)
    sizes = [torch.Size(shape).numel() for shape in whitening.shapes]
    means = torch.cat([part.mean().expand(len(part)) for part in moments.split(sizes)])

    def scores(damping: float) -> Tensor:
        inverse = (1 / (moments + damping * means).clamp(min=1e-300)).float()
        inverse[means == 0] = 0
        return gradient_dot(rotated.queries * inverse, rotated.train)

    return scores


@dataclass(frozen=True, eq=False)
class Trials:
    """Every trial on one benchmark, group by group, the cheapest first.

    Attributes:
        experiment: with its full model and `MEMBERS` models of the retrain family.
        queries: by their kind.
        judge: of scores.
    """

    experiment: Experiment
    queries: Mapping[str, Samples]
    judge: Judge

    @property
    def groups(self) -> dict[str, Callable[[str, str], Iterator[Entry]]]:
        """Trials of an output function and a kind of whitening, by the name of their group."""
        return {
            "scores": self.scores,
            "ensemble": self.ensemble,
            "unit": self.unit_timesteps,
            "draws": self.draws,
            "rho": self.rho,
            "kinds": self.kinds,
        }

    def plain(self, function: str, kind: str, of: str | None = None) -> Gradients:
        """Averaged gradients, whitened as those of another function are if ``of`` says so."""
        found, _ = exact_gradients(self.experiment, self.queries, function, TIMESTEPS)
        grads = Gradients(found[TRAIN], torch.cat([found[name] for name in QUERIES]))
        whitening = self.whitening(of or function, kind)
        return grads if whitening is None else grads.whitened(whitening)

    def whitening(self, function: str, kind: str) -> Whitening | None:
        """Fitted to gradients of a function; None for none."""
        return None if kind == "none" else fitted(self.experiment, function, TIMESTEPS, kind)

    def base(self, function: str, kind: str) -> Iterator[Entry]:
        """What trials are compared with."""
        yield from self.judge.kernel(self.plain(function, kind), {PLAIN: plain_scores})

    def scores(self, function: str, kind: str) -> Iterator[Entry]:
        """What is made of the gradients as they are."""
        plain = self.plain(function, kind)
        changes = {PLAIN: plain_scores, "over 1 - h": left_out, "squared": squared}
        yield from self.judge.kernel(plain, changes)
        model = self.experiment.load_model()
        names = list(model.parameters())
        shapes = [model.module.get_parameter(name).shape for name in names]
        sizes = [len(self.queries[kind]) for kind in QUERIES]
        scores, norm, auto = layer_weighted(plain, layers_of(names, shapes), sizes)
        yield self.judge.entry("layers weighted", scores, norm, auto)
        for other, title in FUNCTIONS.items():
            if other != function:
                queries = self.plain(other, kind, of=function).queries
                mixed = {f"queries by f of {title}": plain_scores}
                yield from self.judge.kernel(Gradients(plain.train, queries), mixed)
        if kind != "none":
            kfac = fitted(self.experiment, function, TIMESTEPS, "kfac")
            influence = ekfac_influence(self.plain(function, "none"), kfac)
            yield self.judge.entry("EK-FAC, no kernel", influence, 1.0, _PUBLISHED_DAMPING)

    def ensemble(self, function: str, kind: str) -> Iterator[Entry]:
        """Mean scores of models trained on halves of their own, λ a multiple of each one's norm."""
        yield from self.base(function, kind)
        members = []
        for name in self.experiment.names(0, MEMBERS, RETRAIN):
            found, _ = exact_gradients(self.experiment, self.queries, function, TIMESTEPS, name)
            grads = Gradients(found[TRAIN], torch.cat([found[query] for query in QUERIES]))
            if kind != "none":
                whitening = fitted(self.experiment, function, TIMESTEPS, kind, name)
                grads = grads.whitened(whitening)
            train, queries = reduced(grads.train, grads.queries)
            solver = RidgeSolver(train)
            norm = float(train.double().square().sum(1).mean())
            members.append((solver, queries, norm, solver.auto_damping() / norm))
        automatic = members[0][3]

        def scores(multiple: float) -> Tensor:
            total: Any = 0
            for solver, queries, norm, auto in members:
                chosen = auto if multiple == automatic else multiple
                total = total + trak(solver, queries, chosen * norm).double()
            return total / len(members)

        yield self.judge.entry(f"{MEMBERS} models", scores, 1.0, automatic)

    def unit_timesteps(self, function: str, kind: str) -> Iterator[Entry]:
        """Every timestep's gradient over its norm."""
        yield from self.base(function, kind)
        whitening = self.whitening(function, kind)
        change = unit if whitening is None else whitened_unit(whitening)
        found = self.averaged(function, "", change, f"{function} {kind} unit")
        yield from self.judge.kernel(found, {"unit timesteps": plain_scores})

    def draws(self, function: str, kind: str) -> Iterator[Entry]:
        """Other timesteps and noises."""
        yield from self.base(function, kind)
        whitening = self.whitening(function, kind)
        for scheme, title in SCHEMES.items():
            grads = self.drawn(function, scheme)
            grads = grads if whitening is None else grads.whitened(whitening)
            yield from self.judge.kernel(grads, {title: plain_scores})

    def rho(self, function: str, kind: str) -> Iterator[Entry]:
        """A whitening that blows up less of what is small."""
        if kind == "none":
            return
        yield from self.base(function, kind)
        plain = self.plain(function, "none")
        for rho in RHOS:
            grads = plain.whitened(fitted(self.experiment, function, TIMESTEPS, kind, rho=rho))
            yield from self.judge.kernel(grads, {f"ρ = {rho}": plain_scores})

    def kinds(self, function: str, kind: str) -> Iterator[Entry]:
        """Other kinds of whitening at the usual width, where a flat spectrum costs something."""
        if kind == "none":
            return
        plain, sketch = self.plain(function, "none"), Projection("sjlt", PROJ_DIM, 0)
        model = self.experiment.load_model()
        shapes = [model.module.get_parameter(name).shape for name in model.parameters()]
        wanted = {f"K = {PROJ_DIM:,}": (kind, None)}
        wanted |= {f"K = {PROJ_DIM:,}, `{each}`": (each, None) for each in KINDS if each != kind}
        wanted |= {f"K = {PROJ_DIM:,}, ρ = {rho}": (kind, rho) for rho in RHOS}
        for name, (each, rho) in wanted.items():
            grads = plain
            if each != "none":
                grads = plain.whitened(fitted(self.experiment, function, TIMESTEPS, each, rho=rho))
            found = (project(rows, sketch, shapes=shapes) for rows in (grads.train, grads.queries))
            yield from self.judge.kernel(Gradients(*found), {name: plain_scores})

    def drawn(self, function: str, scheme: str) -> Gradients:
        """Averaged gradients at other timesteps and noises, kept in the folder."""
        file = self.experiment.folder / "gradients" / f"{function}-{TIMESTEPS}-{scheme}.safetensors"
        if file.is_file():
            return Gradients(**load_file(file))
        found = self.averaged(function, scheme, lambda rows: rows, f"{function} {scheme}")
        partial = file.with_suffix(".partial")
        save_file({"train": found.train, "queries": found.queries}, partial)
        partial.replace(file)
        return found

    def averaged(
        self, function: str, scheme: str, change: Callable[[Tensor], Tensor], label: str
    ) -> Gradients:
        """As `averaged`, of the full model."""
        model, retraining = self.experiment.load_model(), self.experiment.retraining
        parts = {TRAIN: retraining.samples(TRAIN, self.experiment.data, CPU), **self.queries}
        process = model.process
        steps = select_timesteps(TIMESTEPS, "uniform", process.num_timesteps, process.spread)
        settings = FeatureSettings(function, tuple(steps), 0, Projection("none"))
        return averaged(model, settings, parts, scheme, change, label)


def measure_and_record(
    is_recorded: bool, smoke: bool, folder: Path, preset: str, source: str | None
) -> None:
    """Append what is missing; without ``--record`` only print it."""
    if smoke:
        rehearse()
        return
    packaged = packaged_results(preset)
    if packaged is None:
        sys.exit(f"the package must have results of {preset}, but has none")
    results, _ = packaged
    torch.set_num_threads(1)
    experiment, queries = packaged_run(folder, results, preset, source, num_retrain=MEMBERS)
    for name in experiment.names(0, MEMBERS, RETRAIN):
        with progress_bar(Console(stderr=True), f"train {name}") as progress, one_thread():
            train_one(experiment, name, CPU, progress)
    trials = Trials(experiment, queries, Judge(results))
    keys = ("preset", "group", "function", "whitening")
    done = {tuple(row[key] for key in keys) for row in read_rows(RESULTS)}
    # all of the default first
    wanted = product(FUNCTIONS, reversed(WHITENINGS), trials.groups)
    for function, kind, group in wanted:
        if (preset, group, function, kind) in done:
            continue
        entries = list(trials.groups[group](function, kind))
        if not entries:
            continue
        row = {
            "case": "trials",
            "preset": preset,
            "group": group,
            "function": function,
            "whitening": kind,
            "timesteps": TIMESTEPS,
            "models": len(results.subsets),
            "resamples": RESAMPLES,
            "cases": trials.judge.table(entries, entries[0].method),
        }
        if is_recorded:
            record(RESULTS, row)
        for case in row["cases"]:
            sys.stdout.write(
                f"{preset} {function} {kind}, {case['method']}, {case['queries']}: "
                f"{100 * case['held_out']['lds']:.1f}\n"
            )
        sys.stdout.flush()


def rehearse() -> None:
    """Random gradients of the digits' sizes: everything but the model."""
    packaged = packaged_results("digits")
    assert packaged is not None
    judge, generator = Judge(packaged[0]), torch.Generator().manual_seed(0)
    N, M = judge.results.subsets.shape[1], sum(judge.results.losses[k].shape[1] for k in QUERIES)
    grads = Gradients(*(torch.randn(n, 256, generator=generator) for n in (N, M)))
    entries = list(judge.kernel(grads, {PLAIN: plain_scores, "squared": squared}))
    sizes = [judge.results.losses[kind].shape[1] for kind in QUERIES]
    weighted = layer_weighted(grads, [(0, 100), (100, 256)], sizes)
    entries.append(judge.entry("layers weighted", *weighted))
    for case in judge.table(entries, PLAIN):
        sys.stdout.write(f"random, {case['method']}, {case['queries']}: {case['held_out']}\n")


def table() -> list[str]:
    """Lines of the page's tables, one per benchmark."""
    rows = read_rows(RESULTS)
    lines: list[str] = []
    for preset in PRESETS:
        cases: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
        for row in (row for row in rows if row["preset"] == preset):
            for case in row["cases"]:
                found = cases.setdefault((row["function"], row["whitening"]), {})
                kept = found.setdefault(case["method"], [])
                kept[:] = [c for c in kept if c["queries"] != case["queries"]] + [case]
        if not cases:
            continue
        columns = [key for key in product(FUNCTIONS, WHITENINGS) if key in cases]
        methods = dict.fromkeys(method for key in columns for method in cases[key])
        heads = [
            f"{FUNCTIONS[function]}{'' if kind == 'none' else ', whitened'}"
            for function, kind in columns
        ]
        body = [
            (method, *(_cell(cases[key].get(method, [])) for key in columns))
            for method in sorted(methods, key=lambda name: name != PLAIN)
        ]
        last = rows[-1]
        lines += [
            f"### {preset}",
            "",
            *tables.Table(("", *heads), body, words=("",)).markdown(),
            "",
            f"LDS in %, validation / generated queries, {last['models']} retrained models, S = "
            f"{last['timesteps']}, exact gradients, λ held out. Bold: the 95 % interval of the "
            f'paired difference to "{PLAIN}" (of a line with a K: to the first with it) lies above '
            f"zero; struck out: below ({last['resamples']} resamples). torch {last['torch']}.",
            "",
        ]
    return lines[:-1]


def _cell(cases: Sequence[Mapping[str, Any]]) -> str:
    texts = []
    for case in sorted(cases, key=lambda case: QUERIES.index(case["queries"])):
        text = f"{100 * case['held_out']['lds']:.1f}"
        if case["over"] is not None:
            low, high = case["over"]["bca"]
            text = f"**{text}**" if low > 0 else f"~~{text}~~" if high < 0 else text
        texts.append(text)
    return " / ".join(texts)


TABLE = Table(PAGE, "trials", table)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record, presets=PRESETS)


if __name__ == "__main__":
    main()
