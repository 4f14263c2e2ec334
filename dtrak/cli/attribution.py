"""The main job: a model, its data and queries, explained; a report, and a record of it all."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..data.samples import Samples
from ..explanation import explain_samples
from ..features.extraction import FusedExtractor, fitting_batch_size, item_identity
from ..features.whitening import open_whitening
from ..methods.evidence import Drawing
from ..models import load
from ..models.denoiser import Denoiser
from ..models.lora import LORA_FILES
from ..models.places import MODEL_FILES
from ..pages.index import write_index
from ..pages.report import Explained, gather_report, write_picture
from ..pages.summary import print_findings, print_summary
from ..pages.tables import Table
from ..runs.choices import counted
from ..runs.files import encode_text, write_atomically
from ..runs.finished import record_finish
from ..runs.folders import describe_differences
from ..runs.inputs import drawing_facts, load_held_out, load_model_and_data, load_queries
from ..runs.measure import format_bytes
from ..runs.options import Options, lasting
from ..runs.ranks import LeftToOthers
from ..runs.record import (
    GENERATED,
    MANIFEST,
    PICTURE,
    REPORT,
    RUN_FILE,
    SCORES,
    ResultsError,
    read_json,
    results_folder,
)
from ..runs.run import Run, make_plan


def run_attribution(options: Options, console: Console) -> Path | None:
    """Run the whole job.

    Args:
        options: what to do.
        console: where progress goes.

    Returns:
        The folder of the results, in the output folder; None where another process of several that
        share the run makes them.

    Raises:
        ValueError: an option, the model, the data or the output folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    with ExitStack() as held:
        run = Run(make_plan(options), console, held)
        model, data = load_model_and_data(run)
        queries, drawing = load_queries(run, model)
        try:
            return _explain(run, model, data, queries, drawing)
        except LeftToOthers as left:
            run.say(str(left))
            return None


def _explain(
    run: Run, model: Denoiser, data: Samples, queries: Samples, drawing: Drawing | None
) -> Path:
    plan, options = run.plan, run.plan.options
    found = explain_samples(
        model,
        data,
        queries,
        options,
        run,
        folder=plan.output,
        drawing=drawing,
        checkpoints=_checkpoints(options),
        clip=options.clip,
        dino=options.dino,
        held_out=load_held_out(run, model, data, queries),
        groups=options.groups,
    )
    results = results_folder(plan.output, options.queries, queries.fingerprint, options.variant)
    results.mkdir(parents=True, exist_ok=True)
    if (results / MANIFEST).is_file():
        before = read_json(results / MANIFEST)["settings"]
        settings = json.loads(json.dumps(found.settings))
        differing = describe_differences({k: before.get(k) for k in settings}, settings)
        if differing:
            run.say(f"{results} is written anew with other settings: {differing}")
    places = {
        "data": data.source,
        "model": options.model or "trained on the spot",
        **({} if options.lora is None else {"LoRA": options.lora}),
        "queries": options.queries,
    }
    facts = {"pictures": str(len(queries)), **found.facts}
    facts |= drawing_facts(run, model, queries)
    with run.stage("report", f" {results.name}"):
        found.write_scores(results / SCORES)
        explained = Explained(
            data,
            queries,
            found.scores,
            options.top_k,
            "generated picture" if options.queries == GENERATED else "picture",
            places | found.shown_settings,
            facts,
            [(stage.name, stage.seconds) for stage in run.clock.stages],
            _environment(plan.device),
            found.findings,
        )
        page = gather_report(plan.output, explained=explained)
        write_atomically(results / REPORT, encode_text(page))
        write_picture(results / PICTURE, explained)
    manifest = {
        "settings": places | found.settings,
        "options": lasting(options),
        "facts": facts,
        "stages": [asdict(stage) for stage in run.clock.stages],
        "reused": run.reused,
        "environment": _environment(plan.device),
        **model.identity(),
        "data": data.fingerprint,
        "queries": queries.fingerprint,
        **item_identity(model, data),
        "finished": record_finish(plan, results, model, queries.fingerprint),
    }
    write_atomically(results / MANIFEST, json.dumps(manifest, indent=1).encode())
    write_index(plan.output)
    print_summary(results, run.reused, run.clock.stages, facts)
    print_findings(queries.ids, found.scores, found.findings)
    return results


def _environment(device: torch.device) -> dict[str, str]:
    cuda = device.type == "cuda"
    return {
        "dtrak": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
    }


def _checkpoints(options: Options) -> list[Callable[[], Denoiser]]:
    """The models in the folder of checkpoints, in the order of their names' numbers.

    Raises:
        ValueError: the folder holds no models.
    """
    if options.checkpoints is None:
        return []
    folder = Path(options.checkpoints)
    model = MODEL_FILES if options.lora is None else LORA_FILES
    found = [place for place in folder.iterdir() if any((place / name).is_file() for name in model)]
    if not found:
        raise ValueError(
            f"--checkpoints must be a folder of folders with {' or '.join(model)}, as dtrak.train "
            f"--keep-checkpoints leaves them, got none in {folder}"
        )
    ordered = sorted(found, key=lambda place: (len(place.name), place.name))
    if options.lora is None:
        return [partial(load, place, **options.trained) for place in ordered]
    assert options.model is not None
    return [partial(load, options.model, place, **options.trained) for place in ordered]


# what a run is about: other ones are another run
_OF_THE_RUN = ("model", "weights", "lora", "data", "preset", "caption", "output")


def options_of_run(options: Options, typed: set[str]) -> Options:
    """The options of a finished run, with those that were typed in their place.

    Args:
        options: with ``run``.
        typed: names of the options that were.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it is none of `dtrak.attribute`, or the model or the data of another one was
            typed.
    """
    assert options.run is not None
    folder = Path(options.run)
    for name in _OF_THE_RUN:
        if name in typed:
            raise ValueError(f"--run takes the run's own --{name}, got another one")
    if not folder.is_dir():
        raise FileNotFoundError(f"--run must be an existing folder, got {folder}")
    record = read_json(folder / RUN_FILE)
    try:
        kept = Options(**record["options"])
    except (KeyError, TypeError) as error:
        raise ResultsError(
            f"--run must be a run of dtrak.attribute that says how it is run again, got {folder}: "
            "give --model, --data and --output"
        ) from error
    chosen = {name: getattr(options, name) for name in typed - {"run", "traceback"}}
    if chosen.get("queries", GENERATED) != GENERATED:
        # what the run's own pictures were drawn from says nothing of these
        chosen = {"classes": None, "prompts": None, **chosen}
    return replace(kept, **chosen, output=options.run)


def run_comparison(options: Options, console: Console) -> Path:
    """Run both ways on the same samples; print agreement, times and memory."""
    with ExitStack() as held:
        return _compare(Run(make_plan(options), console, held))


def _compare(run: Run) -> Path:
    from ..features.published import PUBLISHED_BATCH_SIZE, Comparison, PublishedExtractor, compare

    options = run.plan.options
    model, data = load_model_and_data(run)
    settings = run.plan.settings
    if settings is None:
        raise ValueError(f"--compare is for methods that take gradients, got {options.method}")
    count = min(options.batch_size or PUBLISHED_BATCH_SIZE, len(data))
    samples = data.select(range(count))
    if options.checkpointing:
        raise ValueError("--compare must go without --checkpointing, which the published way lacks")
    model.checkpointing = False
    whitening = open_whitening(
        model, settings, data, run.plan.device, stage=lambda: run.stage("whitening")
    )
    published = PublishedExtractor(model, settings, run.plan.device, whitening)
    fused = FusedExtractor(model, settings, run.plan.device, whitening)
    with run.stage(f"both ways on {counted(len(samples), 'image')}"):
        result: Comparison = compare(fused, published, samples, fitting_batch_size(fused, samples))
    rows = [
        ("gradients", "", f"{result.gradient_seconds:.2f} s", ""),
        ("projection", "", f"{result.projection_seconds:.2f} s", ""),
        (
            "features",
            f"{result.fused_seconds:.2f} s",
            f"{result.published_seconds:.2f} s",
            f"{result.published_seconds / result.fused_seconds:.1f}x",
        ),
        (
            "live tensors at the peak",
            format_bytes(result.fused_peak_bytes),
            format_bytes(result.published_peak_bytes),
            f"{result.published_peak_bytes / result.fused_peak_bytes:.1f}x",
        ),
    ]
    console = Console()
    Table(("", "fused", "published", "ratio"), rows, total=(2, 3)).show(console)
    console.print(
        "agreement: features against the same projection of vmap(grad)'s gradients: relative error "
        f"{result.gradient_error:.1e}\n"
        "inner products against TRAK's projection (another random matrix): "
        f"correlation {result.gram_correlation:.4f}"
    )
    return run.plan.output
