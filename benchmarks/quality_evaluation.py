"""Whether scores hold beyond LDS, on the digits: groups, deletion, planted and memorised images.

``python benchmarks/quality_evaluation.py --record`` appends a row per combination that
benchmarks/results/evaluation.jsonl lacks, ``--docs`` rewrites the tables of docs/findings.md,
``--check`` only says whether they are up to date. Models and features are kept in ``--folder``, so
that a run that was stopped goes on. ``--preset cifar2-16 --data FOLDER`` plants ships among natural
images.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pages import PRESETS, ROOT, Table, read_rows, record, run
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

import dtrak
from dtrak.cli.planted_experiment import DRAWN, HELD_OUT
from dtrak.data.images import load_data
from dtrak.data.samples import Samples, join
from dtrak.evaluation.counterfactual.results import summarise
from dtrak.evaluation.lds.losses import query_losses
from dtrak.evaluation.lds.options import LossSettings
from dtrak.evaluation.lds.table import packaged_results
from dtrak.evaluation.planted.options import INVERTED, ROTATED
from dtrak.evaluation.planted.options import Options as PlantedOptions
from dtrak.evaluation.planted.retrieval import mean_interval
from dtrak.evaluation.retraining import Drawing, Retraining
from dtrak.evaluation.subject import find_trained
from dtrak.explanation import explain_samples
from dtrak.methods import METHODS, TRAJECTORY, get_method
from dtrak.methods.evidence import Drawing as Journey
from dtrak.methods.evidence import Evidence
from dtrak.methods.self_influence import SelfInfluence, self_influence
from dtrak.methods.similarity import pixel_cosine
from dtrak.pages.tables import Table as Cells
from dtrak.runs.options import ExplainOptions
from dtrak.runs.stages import Stages
from dtrak.training.command import is_saved, save_model
from dtrak.training.presets import get_preset

RESULTS = ROOT / "benchmarks" / "results" / "evaluation.jsonl"
PAGE = ROOT / "docs" / "findings.md"
FOLDER = Path("runs") / "evaluation"
CPU = torch.device("cpu")

# of models that are trained many times over, the one that is explained among them
STEPS, BATCH, QUARTERS = 500, 16, 4
GENERATED, VALIDATION, TIMESTEPS = 16, 40, 10
LOSSES = LossSettings(100, 1)
SEEDS = 1
# of each kind of copy
COPIES, NOISE = 10, 0.1
# of memorisation: few digits, models on half of them each, long enough to know them by heart, and
# the part of the digits that are called memorised
FEW, MODELS, LONG, MOST = 200, 8, 1500, 0.05
LOSS = "loss"
BOOTSTRAPS = 1000
# what is planted, in words, and in which preset
PLANTED = {
    INVERTED: ("inverted digits", "digits"),
    ROTATED: ("rotated digits", "digits"),
    "ships": ("ships", "cifar2-16"),
}
# CIFAR-10's number of a ship, and the file it comes from
_SHIP, _SHIPS = 8, "cifar10-test.parquet"
# the first ones tell most
FIRST = ("random", "d-trak", "d-trak-mean", "trak", "raw-pixels-cosine", "gradient-cosine")
RANDOM = "random"


def settings() -> list[ExplainOptions]:
    """Every method that needs no retraining, whitened and not; those that tell most come first."""
    found = PlantedOptions(timesteps=TIMESTEPS, device="cpu").settings
    names = [how.method for how in found]
    place = {name: FIRST.index(name) if name in FIRST else len(FIRST) for name in names}
    return sorted(found, key=lambda how: place[str(how.method)])


COPY_KINDS = ("exact", "noisy", "moved")


def digits() -> Samples:
    """The training images."""
    return load_data("digits", channels=1, size=8)


def command(main: Callable[..., None], *words: Any) -> None:
    """Call a command; raises SystemExit where it fails."""
    try:
        main(list(map(str, words)))
    except SystemExit as end:
        if end.code:
            raise


def short_run(folder: Path) -> Path:
    """A run on the digits' model after few steps, which is trained again in a quarter of a minute.

    Its 16 queries are drawn, and nothing is attributed yet.
    """
    from dtrak.attribute import main as attribute
    from dtrak.train import main as train

    model, place = folder / "model", folder / "run"
    if not is_saved(model):
        how = ("--steps", STEPS, "--batch-size", BATCH, "--keep-checkpoints", QUARTERS)
        command(train, "--preset", "digits", "--output", model, "--device", "cpu", *how)
    if not (place / "index.html").is_file():
        how = ("--method", RANDOM, "--num-queries", GENERATED, "--timesteps", TIMESTEPS)
        data = ("--model", model, "--data", "digits", "--output", place, "--device", "cpu")
        command(attribute, *data, *how)
    return place


def queries_of(place: Path) -> Samples:
    """Those that the model of a run drew, and held-out digits after them."""
    drawn = load_data(place / "generated", channels=1, limit=GENERATED)
    held = load_data("digits", channels=1, size=8, split="validation", limit=VALIDATION)
    return join([drawn, held], "queries")


def scores_of(folder: Path, how: ExplainOptions, queries: Samples, train: Samples) -> Any:
    """An attribution by the model of the short run, with features that are kept."""
    trained = find_trained(folder / "model")
    drawing = None
    if how.what.needs == TRAJECTORY:
        queries, steps = queries.select(range(GENERATED)), trained.load().num_inference_steps
        drawing = Journey(range(GENERATED), None, {"num_inference_steps": steps})
    return explain_samples(
        trained.load(),
        train,
        queries,
        how,
        Stages(CPU, Console(stderr=True)),
        folder=folder / "run",
        drawing=drawing,
        checkpoints=[partial(dtrak.load, place) for place in trained.checkpoints().values()],
        groups="label",
    )


def group_rises(folder: Path, queries: Samples, train: Samples) -> Tensor:
    """How much losses rise without each class of the digits, ``[SEEDS, classes, queries]``."""
    training = find_trained(folder / "model").training
    retraining = Retraining(training, folder / "groups", Drawing(), data=train)
    labels = torch.tensor(train.labels)
    losses = {}
    for seed in range(SEEDS):
        for left in (None, *labels.unique().tolist()):
            name = f"{'all' if left is None else left}-{seed}"
            file = folder / "groups" / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)

            def finish(model: Any, file: Path = file) -> None:
                found = query_losses(model, queries, LOSSES, CPU).mean((0, 1))
                file.write_text(json.dumps(found.tolist()))

            retraining.train_once(
                name,
                None if left is None else labels != left,
                (seed, seed),
                CPU,
                is_done=file.is_file,
                finish=finish,
            )
            losses[seed, left] = torch.tensor(json.loads(file.read_text()))
    classes = labels.unique().tolist()
    rises = [[losses[s, c] - losses[s, None] for c in classes] for s in range(SEEDS)]
    return torch.stack([torch.stack(part) for part in rises])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; 0 where all are the same."""
    if min(len(a.unique()), len(b.unique())) < 2:
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def agreement(scores: Tensor, rises: Tensor) -> dict[str, Any]:
    """How scores of groups ``[Q, G]`` agree with the rise of losses ``[Q, G]`` without them."""
    first = rises.argmax(1)
    others = [torch.arange(rises.shape[1]) != column for column in first.tolist()]
    return {
        "top1": (scores.argmax(1) == first).double().tolist(),
        "correlation": [spearman(s, r) for s, r in zip(scores, rises, strict=True)],
        # without the group that matters most by far
        "correlation_of_others": [
            spearman(s[o], r[o]) for s, r, o in zip(scores, rises, others, strict=True)
        ],
    }


def group_row(folder: Path, how: ExplainOptions) -> dict[str, Any]:
    """Scores of the classes against retraining without each."""
    train, queries = digits(), queries_of(short_run(folder))
    found = scores_of(folder, how, queries, train).findings.groups
    order = sorted(range(len(found.names)), key=lambda column: int(found.names[column]))
    rises = group_rises(folder, queries, train).mean(0).T[: len(found.scores)]
    return {
        "queries": [GENERATED, len(found.scores) - GENERATED],
        "seeds": SEEDS,
        **agreement(found.scores[:, order], rises),
    }


def deletion_row(folder: Path, how: ExplainOptions) -> dict[str, Any]:
    """How much more the loss rises without the highest scores than without random images."""
    from dtrak.counterfactual import main as counterfactual

    place = short_run(folder)
    words, name = [], how.variant
    if name != RANDOM:
        queries = queries_of(place).select(range(GENERATED))
        found = scores_of(folder, how, queries, digits())
        file = folder / "scores" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        found.write_scores(file)
        name = f"by-{name}"
        words = [f"{name}={file}"]
    methods = ",".join([RANDOM, *words])
    command(counterfactual, place, "--methods", methods, "--num-queries", GENERATED)
    table = json.loads((place / "counterfactual" / "results.json").read_text())
    row: dict[str, Any] = {"removed": table["settings"]["removed"], "queries": GENERATED}
    for metric, values in table["metrics"].items():
        own, other = (torch.tensor(values[one]["values"]) for one in (name, RANDOM))
        row[metric] = own.mean(1).tolist()
        beyond = summarise(own - other)
        row[f"{metric}_beyond_random"] = [beyond.median, *(beyond.interval or ())]
    return row


def with_copies() -> tuple[Samples, dict[tuple[int, int], str]]:
    """Digits and copies of some of them at the end; which are pairs, and of which kind."""
    data, generator = digits(), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data), generator=generator)[: 3 * COPIES]
    images = data.images[chosen].clone()
    noisy, moved = slice(COPIES, 2 * COPIES), slice(2 * COPIES, 3 * COPIES)
    images[noisy] += NOISE * torch.randn(images[noisy].shape, generator=generator)
    # one to the right; the background comes in from the left
    images[moved] = torch.nn.functional.pad(images[moved][..., :-1], (1, 0), value=-1.0)
    kinds = ["exact"] * COPIES + ["noisy"] * COPIES + ["moved"] * COPIES
    names = [f"{kind}/{data.ids[row]}" for kind, row in zip(kinds, chosen.tolist(), strict=True)]
    copies = Samples(images, names, None, "copies")
    pairs = {
        (row, len(data) + place): kind
        for place, (row, kind) in enumerate(zip(chosen.tolist(), kinds, strict=True))
    }
    return join([data, copies], "digits and copies"), pairs


def influence_on_itself(
    model: Any, train: Samples, how: ExplainOptions, folder: Path
) -> SelfInfluence:
    """Self-influence of all training images, with features that are kept in ``folder``."""
    few, stages = train.select(range(2)), Stages(CPU, Console(stderr=True))
    known = Evidence(model, train, few, how, CPU, stages, folder=folder)
    known.scores()
    assert known.scored is not None
    features = known.scored.train[: len(train)]
    return self_influence(features, known.scored.damping, train.ids)


def copies_row(folder: Path, how: ExplainOptions) -> dict[str, Any]:
    """Which planted copies are among the most alike pairs."""
    train, pairs = with_copies()
    if how.function is None:
        alike = pixel_cosine(train, train).double()
        alike.fill_diagonal_(-torch.inf)
        best = alike.max(1)
        found = SelfInfluence(train.ids, best.values, best.indices, best.values)
    else:
        training = find_trained(short_run(folder).parent / "model").training
        retraining = Retraining(training, folder / "copies", Drawing(), data=train)
        place = folder / "copies" / "model"
        retraining.train_once(
            "model",
            None,
            (0, 0),
            CPU,
            is_done=lambda: is_saved(place),
            finish=lambda model: save_model(model, place),
        )
        found = influence_on_itself(retraining.load(place), train, how, place.parent)
    ranked = [(one, other) for one, other, _ in found.pairs()]
    places = {pair: ranked.index(pair) if pair in ranked else None for pair in pairs}
    return {
        "train": len(train),
        "copies": COPIES,
        "places": {kind: [places[p] for p in pairs if pairs[p] == kind] for kind in COPY_KINDS},
        # of chance, the pairs that there are
        "pairs": len(train) * (len(train) - 1) // 2,
        "natural": sum(pair not in pairs for pair in ranked[: len(pairs)]),
    }


def few_digits() -> Samples:
    """Training images that are few enough to be learnt by heart."""
    data = digits()
    return data.select([place * len(data) // FEW for place in range(FEW)])


def halves() -> Tensor:
    """Which of `few_digits` each model is trained on, ``[MODELS, FEW]``; two share all of them."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(MODELS, FEW, dtype=torch.bool)
    for number in range(0, MODELS, 2):
        masks[number, torch.randperm(FEW, generator=generator)[: FEW // 2]] = True
        masks[number + 1] = ~masks[number]
    return masks


def memorisation(losses: Tensor, masks: Tensor) -> Tensor:
    """The mean loss of models trained without an image less that of those trained with it.

    Args:
        losses: ``[R, N]``.
        masks: ``[R, N]`` bool, what each of them was trained on.

    Source:
        Feldman and Zhang 2020 (arXiv:2008.03703), their estimate from subsets.
    """
    out = (losses * ~masks).sum(0) / (~masks).sum(0)
    return out - (losses * masks).sum(0) / masks.sum(0)


def losses_of_halves(folder: Path) -> tuple[Tensor, Path]:
    """Of `few_digits` under models on halves ``[MODELS, FEW]``; and the model on all of them."""
    training = find_trained(short_run(folder).parent / "model").training
    training = replace(training, recipe=replace(training.recipe, steps=LONG))
    data, place = few_digits(), folder / "memorised"
    retraining = Retraining(training, place, Drawing(), data=data)
    model = place / "model"
    place.mkdir(exist_ok=True)
    retraining.train_once(
        "model",
        None,
        (MODELS, MODELS),
        CPU,
        is_done=lambda: is_saved(model),
        finish=lambda trained: save_model(trained, model),
    )
    files = [place / f"{number}.json" for number in range(MODELS)]
    for number, (file, mask) in enumerate(zip(files, halves(), strict=True)):

        def finish(trained: Any, file: Path = file) -> None:
            found = query_losses(trained, data, LOSSES, CPU).mean((0, 1))
            file.write_text(json.dumps(found.tolist()))

        retraining.train_once(
            str(number), mask, (number, number), CPU, is_done=file.is_file, finish=finish
        )
    losses = [json.loads(file.read_text()) for file in files]
    return torch.tensor(losses, dtype=torch.float64), model


def finds_memorised(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Rank correlation, and the share of the most memorised that are among the highest."""
    count = round(MOST * len(truth))
    highest, most = (set(v.topk(count).indices.tolist()) for v in (found, truth))
    return spearman(found, truth), len(highest & most) / count


def memorised_row(folder: Path, how: ExplainOptions | None) -> dict[str, Any]:
    """Self-influence, or the loss or being unlike all others in pixels, against memorisation."""
    losses, place = losses_of_halves(folder)
    train, masks = few_digits(), halves()
    truth = memorisation(losses, masks)
    # pairs stay together
    first = 2 * -(-MODELS // 4)
    parts = [memorisation(losses[p], masks[p]) for p in (slice(first), slice(first, None))]
    if how is None:
        found = query_losses(dtrak.load(place), train, LOSSES, CPU).mean((0, 1)).double()
    elif how.function is None:
        found = -pixel_cosine(train, train).double().fill_diagonal_(-torch.inf).amax(1)
    else:
        found = influence_on_itself(dtrak.load(place), train, how, place.parent).own
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(truth), (BOOTSTRAPS, len(truth)), generator=generator)
    again = torch.tensor([finds_memorised(found[rows], truth[rows]) for rows in drawn])
    ends = again.quantile(torch.tensor([0.025, 0.975]), dim=0).tolist()
    correlation, share = finds_memorised(found, truth)
    return {
        "steps": LONG,
        "train": FEW,
        "models": MODELS,
        "loss_within": float((losses * masks).sum() / masks.sum()),
        "loss_without": float((losses * ~masks).sum() / (~masks).sum()),
        "parts_of_models_correlate": spearman(*parts),
        "correlation": [correlation, ends[0][0], ends[1][0]],
        "share_of_most": [share, ends[0][1], ends[1][1]],
    }


def combinations() -> Iterator[tuple[str, ExplainOptions | None]]:
    """Case and scores of every row; what tells most comes first."""
    every = settings()
    first = [how for how in every if how.method in FIRST]
    # journeys are of drawn queries, checkpoints of none of these models: their scores are no pairs
    alike = [how for how in first if how.what.is_damped or how.method == "raw-pixels-cosine"]
    for case, chosen in (("groups", first), ("copies", alike), ("deletion", first)):
        yield from ((case, how) for how in chosen)
    # the last one is the loss itself
    yield from (("memorised", how) for how in (*alike, None))
    rest = [how for how in every if how not in first]
    for case in ("groups", "deletion"):
        yield from ((case, how) for how in rest)


MEASURES: dict[str, Callable[[Path, Any], dict[str, Any]]] = {
    "groups": group_row,
    "copies": copies_row,
    "deletion": deletion_row,
    "memorised": memorised_row,
}


def measure_and_record(
    is_recorded: bool, smoke: bool, folder: Path, preset: str, source: str | None
) -> None:
    """Append what is missing; without ``--record`` only print it."""
    torch.set_num_threads(1)
    if smoke:
        sys.stdout.write(f"{agreement(torch.eye(4), torch.eye(4))}\n")
        return
    done = {(row["case"], row["variant"]) for row in read_rows(RESULTS)}
    for case, how in combinations() if preset == "digits" else ():
        if (case, named(how)["variant"]) in done:
            continue
        begin = time.perf_counter()
        found = MEASURES[case](folder.resolve(), how)
        write({"case": case, **named(how), "steps": STEPS} | found, is_recorded, begin)
    for concept, (_, where) in PLANTED.items():
        if where == preset:
            measure_planted(folder / f"planted-{concept}", concept, source, is_recorded)


def measure_planted(place: Path, concept: str, source: str | None, is_recorded: bool) -> None:
    """Rows of `dtrak.planted` that are missing; what is in ``place`` already is used."""
    from dtrak.planted import main as planted

    begin, kept = time.perf_counter(), {row["variant"] for row in _rows(concept)}
    if kept >= {how.variant for how in settings()}:
        return
    words: list[Any] = ["--concept", concept]
    if concept not in (INVERTED, ROTATED):
        if source is None:
            raise ValueError(f"--data must say in which folder {_SHIPS} lies")
        foreign = ("--concept", Path(source) / _SHIPS, "--labels", _SHIP)
        words = ["--preset", PLANTED[concept][1], "--data", source, *foreign]
    command(planted, *words, "--output", place, "--device", "cpu")
    take_planted(place / "results.json", concept, is_recorded, begin)


def take_planted(file: Path, concept: str, is_recorded: bool, begin: float) -> None:
    """Rows of a run of `dtrak.planted`, finished or not."""
    kept = {(row["variant"], row["queries"]) for row in _rows(concept)}
    for row in json.loads(file.read_text())["rows"]:
        if (row["variant"], row["queries"]) not in kept:
            write({"case": concept, **row, "timesteps": TIMESTEPS}, is_recorded, begin)


def named(how: ExplainOptions | None) -> dict[str, Any]:
    """Which scores, in a row; None for the loss."""
    if how is None:
        return {"method": LOSS, "variant": LOSS, "whitening": "none"}
    return {
        "method": how.what.name,
        "variant": how.variant,
        "whitening": how.whitening,
        "timesteps": TIMESTEPS,
    }


def write(row: dict[str, Any], is_recorded: bool, begin: float) -> None:
    """Append a row, and print it."""
    if is_recorded:
        record(RESULTS, row)
    sys.stdout.write(f"{row} ({time.perf_counter() - begin:.0f} s)\n")
    sys.stdout.flush()


def _rows(case: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(RESULTS) if row["case"] == case]


def _name(row: dict[str, Any]) -> tuple[str, str]:
    """The cells that say which scores."""
    method = get_method(row["method"])
    way = {"none": "no", "lowrank": "yes"}.get(row["whitening"], row["whitening"])
    return method.title, way if method.is_damped else ""


def _interval(values: list[float], digits: int = 2) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]], note: str, case: str) -> list[str]:
    last = _rows(case)[-1]
    said = f"{note} {last['device']}, torch {last['torch']}."
    return [*Cells(heads, rows, words=("whitened",)).markdown(), "", said]


def planted_table(concept: str) -> list[str]:
    """Lines of the table of planted images."""
    rows = _rows(concept)
    cells = []
    for way in {(row["method"], row["whitening"]): row for row in rows}.values():
        of = {
            row["queries"]: row
            for row in rows
            if (row["method"], row["whitening"]) == (way["method"], way["whitening"])
        }
        held, drawn = (of.get(kind) for kind in (HELD_OUT, DRAWN))
        cells.append(
            (
                *_name(way),
                "" if held is None else _interval(held["average_precision"]),
                "" if held is None else f"{mean_interval(held['precision'])[0]:.0%}",
                "" if held is None else f"{mean_interval(held['recall'])[0]:.0%}",
                "" if drawn is None else _interval(drawn["average_precision"]),
                "" if drawn is None else f"{mean_interval(drawn['recall'])[0]:.0%}",
            )
        )
    counts = [
        len(next(row for row in rows if row["queries"] == kind)["recall"])
        for kind in (HELD_OUT, DRAWN)
    ]
    heads = (
        "method", "whitened", "held out: average precision", "of the first 10", "found in 50",
        "drawn: average precision", "drawn: found in 50",
    )  # fmt: skip
    what, name = PLANTED[concept]
    preset = get_preset(name)
    note = (
        f"50 {what} among 1,000 images of {preset.title}, one training of {preset.recipe.steps:,} "
        f"steps, S = {TIMESTEPS}; queries: {counts[0]} held-out {what}, {counts[1]} that the model "
        "drew. A random order has an average precision of 0.05. In brackets: 95 % bootstrap "
        "intervals over queries."
    )
    return _lines(heads, sorted(cells, key=_by(2, 5)), note, concept)


def _by(*places: int) -> Callable[[Sequence[str]], float]:
    """Rows with the largest number first, in the first of these cells that has one."""
    return lambda cells: -next(float(cells[p].split()[0]) for p in places if cells[p])


def groups_table() -> list[str]:
    """Lines of the table of groups."""
    rows, cells = _rows("groups"), []
    for row in rows:
        # the drawn ones come first
        held = slice(row["queries"][0], None)
        parts = [row[name][held] for name in ("top1", "correlation", "correlation_of_others")]
        drawn = [row[name][: row["queries"][0]] for name in ("top1", "correlation_of_others")]
        cells.append(
            (
                *_name(row),
                f"{mean_interval(parts[0])[0]:.0%}" if parts[0] else "",
                *(_interval(part) if part else "" for part in parts[1:]),
                f"{mean_interval(drawn[0])[0]:.0%}",
                _interval(drawn[1]),
            )
        )
    heads = (
        "method", "whitened", "same first class", "correlation", "of the other nine",
        "drawn: same first class", "drawn: of the other nine",
    )  # fmt: skip
    last = rows[-1]
    note = (
        "Scores of the ten classes of 1,000 digits against the rise of a query's loss when the "
        f"model is trained without each ({last['seeds']} training of each), {VALIDATION} "
        f"validation digits and {GENERATED} drawn ones, S = {TIMESTEPS}; {STEPS} steps of {BATCH} "
        "images, of the full model too. Correlation: of ranks, mean over queries; of the other "
        "nine: without the class that matters most. In brackets: 95 % bootstrap intervals over "
        "queries."
    )
    return _lines(heads, sorted(cells, key=_by(4, 6)), note, "groups")


def copies_table() -> list[str]:
    """Lines of the table of copies."""
    rows, cells = _rows("copies"), []
    for row in rows:
        places = row["places"]
        count = sum(map(len, places.values()))
        within = [
            sum(place is not None and place < count for place in places[kind])
            for kind in COPY_KINDS
        ]
        cells.append(
            (
                *_name(row),
                *(f"{found} of {row['copies']}" for found in within),
                f"{sum(within) / count:.0%}",
            )
        )
    last = rows[-1]
    heads = ("method", "whitened", *COPY_KINDS, f"of the first {3 * COPIES}")
    note = (
        f"{3 * COPIES} copies among {last['train']:,} digits: exact, with noise of {NOISE} (pixels "
        f"in [-1, 1]), moved by one pixel; found are those among the {3 * COPIES} most alike pairs "
        f"of {last['pairs']:,}, of which chance finds none. {STEPS} steps of {BATCH} images, S = "
        f"{TIMESTEPS}."
    )
    return _lines(heads, cells, note, "copies")


def memorised_table() -> list[str]:
    """Lines of the table of memorisation."""
    rows, cells = _rows("memorised"), []
    for row in rows:
        name = ("Loss of the image", "")
        if row["method"] == "raw-pixels-cosine":
            name = ("Unlike all others in pixels", "")
        elif row["method"] != LOSS:
            name = _name(row)
        low, high = row["share_of_most"][1:]
        cells.append(
            (
                *name,
                "{:.2f} ({:.2f} to {:.2f})".format(*row["correlation"]),
                f"{row['share_of_most'][0]:.0%} ({low:.0%} to {high:.0%})",
            )
        )
    last = rows[-1]
    count = round(MOST * last["train"])
    heads = ("self-influence by", "whitened", "correlation", f"of the {count} most")
    note = (
        f"{last['train']} digits. Memorisation of an image: the mean loss on it of models trained "
        f"without it less that of models with it, {last['models']} models of half the digits each, "
        f"{last['steps']:,} steps of {BATCH} images; the loss is {last['loss_within']:.4f} within "
        f"a model's half and {last['loss_without']:.4f} outside. Two parts of the models agree on "
        f"it with a correlation of {last['parts_of_models_correlate']:.2f}. Self-influence: of a "
        f"model of all digits, S = {TIMESTEPS}. Correlation: of ranks; of the {count} most: the "
        f"{MOST:.0%} most memorised that are among the {MOST:.0%} highest. In brackets: 95 % "
        "bootstrap intervals over images."
    )
    return _lines(heads, sorted(cells, key=_by(2)), note, "memorised")


def deletion_table() -> list[str]:
    """Lines of the table of deletion."""
    rows, cells = _rows("deletion"), []
    for row in rows:
        middle = sorted(row["loss"])[len(row["loss"]) // 2]
        beyond = ["", ""]
        if row["method"] != RANDOM:
            beyond = [
                "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["loss_beyond_random"]),
                "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["pixel_l2_beyond_random"]),
            ]
        cells.append((*_name(row), f"{middle:.4f}", *beyond))
    last = rows[-1]
    heads = ("removed by", "whitened", "rise of the loss", "beyond random", "pixels beyond random")
    note = (
        f"The {last['removed']} highest of 1,000 digits removed for each of {last['queries']} "
        f"drawn queries, one retraining each, {STEPS} steps of {BATCH} images, of the full model "
        f"too; S = {TIMESTEPS}. Medians; beyond random: of the differences query by query, with "
        "95 % bootstrap intervals over queries."
    )
    return _lines(heads, cells, note, "deletion")


# gradients of what, in benchmarks/results/whitening.jsonl
_WHITENED = {"mean_squared_l2_norm": "d-trak", "loss": "trak", "mean": "d-trak-mean"}


def known_lds() -> dict[tuple[str, str], float]:
    """LDS of validation digits by method and whitening, S = 10 and damping as by default."""
    found = {}
    for row in read_rows(RESULTS.with_name("whitening.jsonl")):
        kind = (row["projection"], row["proj_dim"], row["timesteps"], row["models"])
        if kind == ("sjlt", 8192, TIMESTEPS, 64) and row["kind"] in ("none", "lowrank"):
            case = next(one for one in row["cases"] if one["queries"] == "validation")
            rule = "auto" if row["kind"] == "none" else "1"
            found[_WHITENED[row["function"]], row["kind"]] = case[rule]["lds"]
    packaged = packaged_results("digits")
    assert packaged is not None
    by_title = {method.title: method for method in METHODS.values()}
    for row in packaged[1]["rows"]:
        is_same = row["queries"] == "validation" and row["timesteps"] in (0, TIMESTEPS)
        if is_same and "all" in row and row["method"] in by_title:
            found[by_title[row["method"]].name, "none"] = row["all"]["lds"]
    return found


def compared() -> list[tuple[str, str, dict[str, float]]]:
    """What each evaluation says of each method: title, whitened, numbers by evaluation."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in known_lds().items():
        found.setdefault(key, {})["LDS"] = value
    for row in _rows("groups"):
        held = row["correlation_of_others"][row["queries"][0] :]
        if held:
            found.setdefault(_key(row), {})["groups"] = mean_interval(held)[0]
    for concept in PLANTED:
        for row in _rows(concept):
            if row["queries"] == HELD_OUT:
                value = mean_interval(row["average_precision"])[0]
                found.setdefault(_key(row), {})[concept] = value
    for row in _rows("deletion"):
        if row["method"] != RANDOM:
            found.setdefault(_key(row), {})["deletion"] = row["loss_beyond_random"][0]
    several = {key: values for key, values in found.items() if len(values) > 1}
    return [
        (*_name({"method": method, "whitening": way}), values)
        for (method, way), values in several.items()
    ]


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["whitening"]


def believe_table() -> list[str]:
    """Lines of the table that puts them side by side."""
    rows = compared()
    styles = {"LDS": "{:.1%}", "groups": "{:.2f}"} | dict.fromkeys(PLANTED, "{:.2f}")
    styles["deletion"] = "{:+.4f}"
    kinds = [kind for kind in styles if any(kind in row[2] for row in rows)]
    cells = [
        (title, way, *(styles[k].format(v[k]) if k in v else "" for k in kinds))
        for title, way, v in sorted(rows, key=lambda row: -row[2].get("LDS", -1))
    ]
    heads = ("method", "whitened", *kinds)
    note = (
        f"Digits, S = {TIMESTEPS}, damping as by default. LDS: of validation digits, from the "
        "package and docs/whitening.md (1,200 steps of 64). Groups: correlation of the other nine "
        "classes, validation digits. Inverted, rotated, ships (in `cifar2-16`): average precision "
        "for planted images, held-out queries."
    )
    return [*Cells(heads, cells, words=("whitened",)).markdown(), "", note]


TABLES = {
    **{concept: partial(planted_table, concept) for concept in PLANTED},
    "groups": groups_table,
    "copies": copies_table,
    "memorised": memorised_table,
    "deletion": deletion_table,
    "believe": believe_table,
}


@dataclass(frozen=True)
class Page(Table):
    """All tables of which there are rows."""

    def bring_up_to_date(self, *, only_check: bool) -> None:
        """See `Table.bring_up_to_date`."""
        for marker, make in TABLES.items():
            if marker == "believe" or _rows(marker):
                Table(PAGE, marker, make).bring_up_to_date(only_check=only_check)


TABLE = Page(PAGE, "believe", believe_table)


def main() -> None:
    """Measure, or rewrite or check the page."""
    run(TABLE, __doc__, measure_and_record, folder=FOLDER, presets=PRESETS)


if __name__ == "__main__":
    main()
