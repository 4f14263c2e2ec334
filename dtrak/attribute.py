"""The main job: which training images made this diffusion model draw that picture.

``python -m dtrak.attribute --fused`` trains (or loads) a model, draws pictures (or takes queries),
streams D-TRAK features of training images and queries, applies the kernel-matrix inverse and writes
scores and a report. Every stage is kept in the output folder and reused, so a run that was
interrupted goes on.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # the imports below take seconds, in which Ctrl-C would end in a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import difflib
import errno
import json
import math
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from dtrak_kernels import Projection
from dtrak_kernels.ops import KINDS
from dtrak_kernels.ridge import RidgeSolver

from . import __version__
from .data import ImageData, encode_png, load_data, to_uint8
from .diffusion import DiffusionModel, digits_model, hash_model, load_model
from .features import (
    DTYPES,
    Extractor,
    FeatureSettings,
    FeatureStore,
    FusedExtractor,
    deciding_settings,
    describe_differences,
    fill_store,
    fitting_batch_size,
)
from .files import write_atomically
from .generation import generate
from .measure import StageClock, TensorMeter, available_bytes, format_bytes
from .noise import MAX_TIMESTEPS
from .outputs import OUTPUT_FUNCTIONS, TIMESTEP_STRATEGIES, check_choice, select_timesteps
from .report import write_report
from .scores import top_k
from .training import Recipe, train

DEFAULT_PROJ_DIM = {"sjlt": 8192, "rademacher": 2048, "normal": 2048, "none": 0}
_OPPONENTS, _INFERENCE_STEPS = 3, 50
_NO_SPACE = (
    "no space left on the device: free some and run the same command again; "
    "what was finished is kept"
)
_TRAINING, _GENERATION = "train the model", "generate the queries"


class OutputError(ValueError):
    """An output folder that belongs to something else; the message says what differs."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `attribute`."""

    model: str | None
    data: str
    queries: str
    num_queries: int
    output_function: str
    timesteps: int
    timestep_strategy: str
    noise_seed: int
    projection: str
    proj_dim: int | None
    seed: int
    damping: str
    top_k: int
    batch_size: int | None
    device: str
    dtype: str
    output: str | None
    fused: bool
    skip_corrupt: bool
    resize: bool


@dataclass(frozen=True)
class _Plan:
    """The options after validation."""

    options: Options
    device: torch.device
    settings: FeatureSettings
    damping: float | None
    output: Path


def _plan(options: Options) -> _Plan:
    """Validate every option that needs neither model nor data; the timesteps wait for the model."""
    check_choice("--output-function", options.output_function, OUTPUT_FUNCTIONS)
    check_choice("--timestep-strategy", options.timestep_strategy, TIMESTEP_STRATEGIES)
    check_choice("--projection", options.projection, KINDS)
    check_choice("--dtype", options.dtype, DTYPES)
    for name in ("num_queries", "top_k", "batch_size", "timesteps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= options.noise_seed < 2**63:
        raise ValueError(f"--noise-seed must be in [0, 2**63), got {options.noise_seed}")
    proj_dim = (
        DEFAULT_PROJ_DIM[options.projection] if options.proj_dim is None else options.proj_dim
    )
    settings = FeatureSettings(
        options.output_function,
        (),
        options.noise_seed,
        Projection(options.projection, proj_dim, options.seed),
        options.dtype,
    )
    stem = Path(options.model or options.data).stem or "run"
    output = Path(options.output) if options.output else Path("runs") / stem
    return _Plan(options, _device(options.device), settings, _damping(options.damping), output)


def _with_timesteps(plan: _Plan, model: DiffusionModel) -> _Plan:
    """The plan for a model, whose number of training timesteps bounds ``--timesteps``."""
    if model.num_train_timesteps > MAX_TIMESTEPS:
        raise ValueError(
            f"the model must have at most {MAX_TIMESTEPS} training timesteps, got "
            f"{model.num_train_timesteps}"
        )
    timesteps = select_timesteps(
        plan.options.timesteps, plan.options.timestep_strategy, model.num_train_timesteps
    )
    return replace(plan, settings=replace(plan.settings, timesteps=tuple(timesteps)))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must name a device that is there, got {name!r} with "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return device


def _damping(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"--damping must be 'auto' or a finite number of at least 0, got {text!r}")
    return value


class _Run:
    """One run: its folder, its console, the stages timed so far and those that were reused."""

    def __init__(self, plan: _Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.clock = StageClock(plan.device)
        self.reused: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A timed stage with a progress bar; yields ``progress(done, total)``."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with self.clock.stage(name), Progress(*columns, console=self.console) as bar:
            task = bar.add_task(f"{name:<28}", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
            bar.update(task, total=bar.tasks[0].total or 1, completed=bar.tasks[0].total or 1)

    def claim_output(self, deciding: dict[str, Any]) -> None:
        """Make the output folder ours, or refuse it when it belongs to another run."""
        folder, file = self.plan.output, self.plan.output / "run.json"
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"--output must be a folder, got the file {folder}")
        for name in ("data", "queries"):
            given = Path(getattr(self.plan.options, name))
            if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
                raise OutputError(
                    f"--output must not lie in the folder of --{name}, whose images it would join: "
                    f"got {folder} in {given}"
                )
        if file.is_file():
            try:
                found = json.loads(file.read_text())
            except ValueError as error:
                raise OutputError(
                    f"{file} is damaged: delete {folder} or choose another --output"
                ) from error
            differing = describe_differences(found, deciding)
            if differing:
                raise OutputError(
                    f"{folder} holds another run: {differing}. Choose another --output, or "
                    "delete it"
                )
        elif folder.exists() and any(p.suffix != ".partial" for p in folder.iterdir()):
            raise OutputError(
                f"{folder} is not empty and holds no run of dtrak: choose another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(deciding, indent=1).encode())


def _load_model_and_data(run: _Run) -> tuple[DiffusionModel, ImageData]:
    """The model and its training images; trains the digits model when none is there yet."""
    options, plan = run.plan.options, run.plan
    if options.model is None and options.data != "digits":
        raise ValueError(
            "--model must name a Diffusers folder for --data other than 'digits', which has a "
            "small model that is trained on the spot"
        )
    _check_source("--data", options.data, ["digits"])
    model = digits_model() if options.model is None else load_model(options.model)
    data = load_data(
        options.data,
        channels=model.channels,
        size=model.size,
        skip_corrupt=options.skip_corrupt,
        resize=options.resize,
    )
    recipe = Recipe()
    run.claim_output(
        {
            "data": {"fingerprint": data.fingerprint, "rows": len(data)},
            "model": {"recipe": recipe.to_dict()}
            if options.model is None
            else {"hash": hash_model(model.unet)},
            "schedule": model.schedule,
        }
    )
    run.plan = _with_timesteps(plan, model)
    if options.model is not None:
        return model, data
    folder = plan.output / "model"
    if (folder / "model_index.json").is_file():
        run.reused.append(_TRAINING)
        return load_model(folder), data
    if folder.exists():
        raise OutputError(
            f"{folder} must hold model_index.json, got a folder without it: delete it to train anew"
        )
    checkpoint = plan.output / "training.pt"
    with run.stage(_TRAINING) as progress, _one_thread():
        model.unet.to(plan.device)
        train(model, data.images, recipe, checkpoint=checkpoint, progress=progress)
    # written beside, then renamed: a killed run leaves no half model that passes for a whole one
    partial = plan.output / "model.partial"
    model.save(partial)
    partial.rename(folder)
    checkpoint.unlink(missing_ok=True)
    return load_model(folder), data


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one CPU thread: layers this small gain a quarter from a second one on an idle machine.

    On a busy one its threads wait for each other at every layer, and training takes ten times as
    long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_source(option: str, value: str, names: list[str]) -> None:
    """Refuse a misspelt name before a hub is asked for it."""
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.7)
    if close and close[0] != value and not Path(value).exists():
        raise ValueError(f"{option} {value!r} does not exist; did you mean {close[0]!r}?")


def _load_queries(run: _Run, model: DiffusionModel) -> ImageData:
    """The images to explain."""
    options, plan = run.plan.options, run.plan
    arguments: dict[str, Any] = {
        "channels": model.channels,
        "size": model.size,
        "skip_corrupt": options.skip_corrupt,
        "resize": options.resize,
    }
    if options.queries == "validation":
        if Path(options.data).exists() and not (Path(options.data) / "dataset_dict.json").exists():
            raise ValueError(
                "--queries must be 'generated' or a folder of images where --data has no "
                f"validation part, got 'validation' with {options.data}"
            )
        return load_data(options.data, split="validation", limit=options.num_queries, **arguments)
    if options.queries != "generated":
        _check_source("--queries", options.queries, ["generated", "validation", "digits"])
        return load_data(options.queries, **arguments)
    folder = plan.output / "generated"
    # picture i depends on its seed i alone, so pictures are added to those drawn before
    wanted = [folder / f"{seed:05d}.png" for seed in range(options.num_queries)]
    missing = [seed for seed, file in enumerate(wanted) if not file.is_file()]
    if not missing:
        run.reused.append(_GENERATION)
    else:
        with run.stage(_GENERATION) as progress:
            model.unet.to(plan.device)
            steps = min(_INFERENCE_STEPS, model.num_train_timesteps)
            images = generate(model, missing, num_inference_steps=steps, progress=progress)
        folder.mkdir(exist_ok=True)
        for seed, image in zip(missing, images, strict=True):
            write_atomically(folder / f"{seed:05d}.png", encode_png(to_uint8(image)))
    # the query is the picture as saved, 8 bits a channel
    return load_data(folder, channels=model.channels, limit=options.num_queries)


def _make_extractor(run: _Run, model: DiffusionModel) -> Extractor:
    plan = run.plan
    if plan.options.fused:
        return FusedExtractor(model, plan.settings, plan.device)
    from .published import PublishedExtractor

    return PublishedExtractor(model, plan.settings, plan.device)


def _batch_size(run: _Run, extractor: Extractor, data: ImageData) -> int:
    if run.plan.options.batch_size is not None:
        return run.plan.options.batch_size
    if isinstance(extractor, FusedExtractor):
        return fitting_batch_size(extractor, data)
    from .published import PUBLISHED_BATCH_SIZE

    # gradients, their copy and their sum live at once
    fitting = available_bytes(run.plan.device) // 2 // (3 * 4 * extractor.grad_dim)
    return max(1, min(PUBLISHED_BATCH_SIZE, fitting))


def _compute_features(
    run: _Run, model: DiffusionModel, extractor: Extractor, data: ImageData, role: str
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


def _measure_tensors(extractor: Extractor, data: ImageData, batch_size: int) -> dict[str, int]:
    """What one batch of the feature stage holds, in bytes."""
    if not isinstance(extractor, FusedExtractor):
        return {}
    with TensorMeter(known=extractor.model.unet.state_dict().values()) as meter:
        extractor.extract(data.images[:batch_size], data.ids[:batch_size])
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
    run = _Run(_plan(options), console)
    model, data = _load_model_and_data(run)
    plan = run.plan
    queries = _load_queries(run, model)
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
        "queries": options.queries,
        "method": extractor.method,
        "output function": options.output_function,
        "timesteps": f"{options.timesteps} {options.timestep_strategy}",
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
    with run.stage("report"):
        _write_results(run, data, queries, scores, settings, facts)
    _write_manifest(run, model, data, settings, facts)
    _print_summary(run, facts)
    return plan.output


def _write_results(
    run: _Run,
    data: ImageData,
    queries: ImageData,
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
    ranked = top_k(scores, min(plan.options.top_k, len(data)))
    opposed = top_k(scores, min(_OPPONENTS, len(data)))
    stages = [(stage.name, stage.seconds) for stage in run.clock.stages]
    write_report(
        output / "report.html",
        output / "report.png",
        queries=queries.images,
        train=data.images,
        proponents=(ranked.proponents, ranked.proponent_scores),
        opponents=(opposed.opponents, opposed.opponent_scores),
        train_ids=data.ids,
        query_ids=queries.ids,
        settings=settings,
        stages=stages,
        facts=facts,
        train_labels=data.labels,
        query_kind="generated picture" if plan.options.queries == "generated" else "picture",
    )


def _write_manifest(
    run: _Run,
    model: DiffusionModel,
    data: ImageData,
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
                "model": hash_model(model.unet),
                "data": data.fingerprint,
                "files": ["scores.safetensors", "report.html", "report.png"],
            },
            indent=1,
        ).encode(),
    )


def _print_summary(run: _Run, facts: dict[str, str]) -> None:
    table = Table(title=None, show_header=True, header_style="bold")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory", justify="right")
    for name in run.reused:
        table.add_row(name, "reused", "", style="dim")
    for stage in run.clock.stages:
        table.add_row(stage.name, f"{stage.seconds:.1f}", format_bytes(stage.peak_bytes))
    total = sum(stage.seconds for stage in run.clock.stages)
    table.add_row("total", f"{total:.1f}", "", style="bold")
    console = Console()
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name, value)
    console.print(grid)
    output = run.plan.output
    console.print(f"scores: {output / 'scores.safetensors'}\nreport: {output / 'report.html'}")


def run_comparison(options: Options, console: Console) -> Path:
    """Run both ways on the same samples; print agreement, times and memory."""
    from .published import PUBLISHED_BATCH_SIZE, Comparison, PublishedExtractor, compare

    run = _Run(_plan(options), console)
    model, data = _load_model_and_data(run)
    samples = data.select(range(min(options.batch_size or PUBLISHED_BATCH_SIZE, len(data))))
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


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def attribute(
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder with a UNet2DModel, or a DDPM pipeline. Default: train the "
            "digits model, or reuse the one in the output folder."
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Training images: 'digits', a folder of images, a parquet file, a datasets "
            "folder or a hub name."
        ),
    ] = "digits",
    queries: Annotated[
        str,
        typer.Option(help="Images to explain: 'generated', 'validation' or a folder of images."),
    ] = "generated",
    num_queries: Annotated[
        int, typer.Option(help="How many to generate, or to take from validation.")
    ] = 16,
    output_function: Annotated[
        str, typer.Option(help=f"What is differentiated: {', '.join(OUTPUT_FUNCTIONS)}.")
    ] = "mean_squared_l2_norm",
    timesteps: Annotated[int, typer.Option(help="S, timesteps a feature averages over.")] = 10,
    timestep_strategy: Annotated[
        str, typer.Option(help="uniform or cumulative (the S least noisy).")
    ] = "uniform",
    noise_seed: Annotated[
        int, typer.Option(help="Seed of the noise, with sample id and timestep.")
    ] = 0,
    projection: Annotated[str, typer.Option(help=f"Random matrix: {', '.join(KINDS)}.")] = "sjlt",
    proj_dim: Annotated[
        int | None,
        typer.Option(
            help="K, features per image. Default: 8192 for sjlt, 2048 for the dense kinds."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random matrix.")] = 0,
    damping: Annotated[
        str,
        typer.Option(
            help="λ in units of the Gram matrix ΦᵀΦ, or 'auto' (leave-one-out likelihood of the "
            "training features)."
        ),
    ] = "auto",
    top_k: Annotated[int, typer.Option(help="Proponents shown per query.")] = 5,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per batch. Default: chosen to fit memory.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Precision of the model: {', '.join(DTYPES)}.")
    ] = "float32",
    output: Annotated[
        str | None, typer.Option(help="Output folder. Default: runs/<name of the data or model>.")
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused/--no-fused",
            help="Stream gradients, or the published way: vmap(grad), gradients in memory, "
            "TRAK's projector.",
        ),
    ] = True,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Run both ways on one batch and print agreement, times and memory."
        ),
    ] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that do not decode.")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize and centre-crop images to the model's size.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Find the training images that made a diffusion model draw a picture.

    With no options: trains a small model on embedded digits, draws 16 pictures and explains them.
    """
    options = Options(
        model=model,
        data=data,
        queries=queries,
        num_queries=num_queries,
        output_function=output_function,
        timesteps=timesteps,
        timestep_strategy=timestep_strategy,
        noise_seed=noise_seed,
        projection=projection,
        proj_dim=proj_dim,
        seed=seed,
        damping=damping,
        top_k=top_k,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        output=output,
        fused=fused,
        skip_corrupt=skip_corrupt,
        resize=resize,
    )
    console = Console(stderr=True)
    job = run_comparison if compare else run_attribution
    try:
        with _warnings_on(console):
            job(options, console)
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again, it resumes where it stopped")
        raise typer.Exit(130) from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if traceback:
            raise
        message = " ".join(str(error).split())
        # Diffusers' writer wraps the operating system's error
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in message
        _fail(console, _NO_SPACE if full else message)


@contextmanager
def _warnings_on(console: Console) -> Iterator[None]:
    """Print this package's own warnings as one line each."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def one_line(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
            if Path(filename).parent == Path(__file__).parent:
                console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)
            else:
                show(message, category, filename, *rest)

        warnings.showwarning = one_line  # type: ignore[assignment]
        yield


def _fail(console: Console, message: str) -> None:
    console.print(f"error: {message}", style="red", soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.attribute``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app(
        args=list(arguments) if arguments is not None else sys.argv[1:],
        prog_name="python -m dtrak.attribute",
    )


if __name__ == "__main__":
    main()
