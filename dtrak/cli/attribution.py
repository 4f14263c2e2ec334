"""The main job: features of training images and queries, the kernel inverse, scores, a report."""

from __future__ import annotations

import json
import math
import platform
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver

from .. import __version__
from ..data.samples import Samples
from ..features.extraction import (
    Extractor,
    FusedExtractor,
    deciding_settings,
    extract_rows,
    fill_store,
    fitting_batch_size,
    item_identity,
)
from ..features.store import FeatureStore
from ..models.denoiser import Denoiser
from ..pages.report import ranked_matches, write_report
from ..runs.files import write_atomically
from ..runs.finished import record_finish
from ..runs.inputs import drawing_facts, load_model_and_data, load_queries
from ..runs.measure import TensorMeter, available_bytes, format_bytes
from ..runs.options import Options
from ..runs.run import Run, make_plan, print_summary


def _make_extractor(run: Run, model: Denoiser) -> Extractor:
    plan = run.plan
    if plan.options.fused:
        return FusedExtractor(model, plan.settings, plan.device)
    from ..features.published import PublishedExtractor

    return PublishedExtractor(model, plan.settings, plan.device)


def _batch_size(run: Run, extractor: Extractor, data: Samples) -> int:
    if run.plan.options.batch_size is not None:
        return run.plan.options.batch_size
    if isinstance(extractor, FusedExtractor):
        return fitting_batch_size(extractor, data)
    from ..features.published import PUBLISHED_BATCH_SIZE

    # gradients, their copy and their sum live at once
    fitting = available_bytes(run.plan.device) // 2 // (3 * 4 * extractor.grad_dim)
    return max(1, min(PUBLISHED_BATCH_SIZE, fitting))


def _compute_features(
    run: Run, model: Denoiser, extractor: Extractor, data: Samples, role: str
) -> FeatureStore:
    plan = run.plan
    label = {"train": "features of training images", "query": "features of queries"}[role]
    # sets of queries live side by side, each under the first digits of its fingerprint
    name = role if role == "train" else f"{role}-{data.fingerprint[:12]}"
    folder = plan.output / ("features" if plan.options.fused else "features-published") / name
    known = (folder / "manifest.json").is_file()
    store = FeatureStore.open(
        folder,
        {**deciding_settings(model, plan.settings, data, extractor.method), "role": role},
        data.ids,
        extractor.proj_dim,
        1 if known else _batch_size(run, extractor, data),
    )
    if not store.missing():
        run.reused.append(label)
    else:
        with run.stage(label) as progress:
            fill_store(
                store,
                extractor,
                data,
                role=f"{role}/",
                batch_size=plan.options.batch_size,
                progress=progress,
            )
    return store


def _measure_tensors(extractor: Extractor, data: Samples, batch_size: int) -> dict[str, int]:
    """What one batch of the feature stage holds, in bytes."""
    if not isinstance(extractor, FusedExtractor):
        return {}
    with TensorMeter(known=extractor.model.module.state_dict().values()) as meter:
        extract_rows(extractor, data, slice(0, batch_size))
    return {"largest tensor": meter.largest_bytes, "live tensors at the peak": meter.peak_bytes}


def _environment(device: torch.device) -> dict[str, str]:
    return {
        "dtrak": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
    }


def run_attribution(options: Options, console: Console) -> Path:
    """Run the whole job.

    Args:
        options: what to do.
        console: where progress goes.

    Returns:
        The output folder.

    Raises:
        ValueError: an option, the model, the data or the output folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    with ExitStack() as held:
        return _attribute(Run(make_plan(options), console, held))


def _attribute(run: Run) -> Path:
    model, data = load_model_and_data(run)
    plan, options = run.plan, run.plan.options
    queries = load_queries(run, model)
    extractor = _make_extractor(run, model)
    train_store = _compute_features(run, model, extractor, data, "train")
    query_store = _compute_features(run, model, extractor, queries, "query")
    tensors = _measure_tensors(extractor, data, train_store.batch_size)
    with run.stage("kernel inverse and scores"):
        features = (
            train_store.load()
            if 4 * math.prod(train_store.shape) < available_bytes(torch.device("cpu")) // 4
            else train_store
        )
        solver = RidgeSolver(features)
        damping = solver.auto_damping() if plan.damping is None else plan.damping
        scores = solver.scores(query_store.load(), damping=damping).float()
    settings = {
        "data": data.source,
        "model": options.model or "trained on the spot",
        **({} if options.lora is None else {"LoRA": options.lora}),
        "queries": options.queries,
        "method": extractor.method,
        "output function": plan.settings.output_function,
        "timesteps": str(options.when),
        "noise seed": options.noise_seed,
        "projection": options.projection,
        "proj_dim": extractor.proj_dim,
        "projection seed": options.seed,
        "damping": f"{damping:.6g}" + (" (auto)" if plan.damping is None else ""),
        "dtype": options.dtype,
    }
    facts = {
        "parameters": f"{extractor.grad_dim:,}",
        "features": (f"{len(train_store):,} + {len(query_store):,} rows of {extractor.proj_dim:,}"),
        "batch size": str(train_store.batch_size),
        **{name: format_bytes(size) for name, size in tensors.items()},
        "gradients never stored": format_bytes(4 * extractor.grad_dim * len(data)),
    }
    if not options.fused:
        del facts["gradients never stored"]
    facts |= drawing_facts(run, queries)
    with run.stage("report"):
        _write_results(run, data, queries, scores, settings, facts)
    _write_manifest(run, model, data, queries, settings, facts)
    print_summary(plan.output, run.reused, run.clock.stages, facts)
    return plan.output


def _write_results(
    run: Run,
    data: Samples,
    queries: Samples,
    scores: Tensor,
    settings: dict[str, Any],
    facts: dict[str, str],
) -> None:
    plan, output = run.plan, run.plan.output
    write_atomically(
        output / "scores.safetensors",
        save(
            {"scores": scores.contiguous()},
            metadata={
                "rows": json.dumps(queries.ids),
                "columns": json.dumps(data.ids),
                "settings": json.dumps(settings),
                "sign": "positive = proponent: its presence lowers the model's loss on the query",
            },
        ),
    )
    stages = [(stage.name, stage.seconds) for stage in run.clock.stages]
    write_report(
        output / "report.html",
        output / "report.png",
        **ranked_matches(data, queries, scores, plan.options.top_k),
        settings=settings,
        stages=stages,
        facts=facts,
        query_kind="generated picture" if plan.options.queries == "generated" else "picture",
    )


def _write_manifest(
    run: Run,
    model: Denoiser,
    data: Samples,
    queries: Samples,
    settings: dict[str, Any],
    facts: dict[str, str],
) -> None:
    plan = run.plan
    write_atomically(
        plan.output / "manifest.json",
        json.dumps(
            {
                "settings": settings,
                "options": asdict(plan.options),
                "facts": facts,
                "stages": [asdict(stage) for stage in run.clock.stages],
                "environment": _environment(plan.device),
                **model.identity(),
                "data": data.fingerprint,
                "queries": queries.fingerprint,
                **item_identity(model, data),
                "finished": record_finish(plan, model, queries.fingerprint),
                "files": ["scores.safetensors", "report.html", "report.png"],
            },
            indent=1,
        ).encode(),
    )


def run_comparison(options: Options, console: Console) -> Path:
    """Run both ways on the same samples; print agreement, times and memory."""
    with ExitStack() as held:
        return _compare(Run(make_plan(options), console, held))


def _compare(run: Run) -> Path:
    from ..features.published import PUBLISHED_BATCH_SIZE, Comparison, PublishedExtractor, compare

    options = run.plan.options
    model, data = load_model_and_data(run)
    count = min(options.batch_size or PUBLISHED_BATCH_SIZE, len(data))
    samples = data.select(range(count))
    published = PublishedExtractor(model, run.plan.settings, run.plan.device)
    fused = FusedExtractor(model, run.plan.settings, run.plan.device)
    with run.stage(f"both ways on {len(samples)} images"):
        result: Comparison = compare(fused, published, samples, fitting_batch_size(fused, samples))
    table = Table(header_style="bold")
    for column in ("", "fused", "published", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("gradients", "", f"{result.gradient_seconds:.2f} s", "")
    table.add_row("projection", "", f"{result.projection_seconds:.2f} s", "")
    table.add_row(
        "features",
        f"{result.fused_seconds:.2f} s",
        f"{result.published_seconds:.2f} s",
        f"{result.published_seconds / result.fused_seconds:.1f}x",
        style="bold",
    )
    table.add_row(
        "live tensors at the peak",
        format_bytes(result.fused_peak_bytes),
        format_bytes(result.published_peak_bytes),
        f"{result.published_peak_bytes / result.fused_peak_bytes:.1f}x",
        style="bold",
    )
    console = Console()
    console.print(table)
    console.print(
        "agreement: features against the same projection of vmap(grad)'s gradients: relative error "
        f"{result.gradient_error:.1e}\n"
        "inner products against TRAK's projection (another random matrix): "
        f"correlation {result.gram_correlation:.4f}"
    )
    return run.plan.output
