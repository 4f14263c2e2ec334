"""A finished run of the main job, recognised by content: the same command has nothing to do.

Whatever went into a run is compared: options, code, versions, model, images, and each file of the
output folder that a later stage reads. Where anything differs, the command runs as if this were not
here, and refuses what it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..features.output_names import describe_output_function
from ..features.settings import FILE
from ..methods import FEATURES, NOTHING
from .choices import MODEL_INDEX
from .code import describe_code, hash_file
from .files import picture_name
from .folders import alone_in
from .options import Options, lasting
from .ranks import ranks
from .record import MANIFEST, PICTURE, REPORT, RUN_FILE, SCORES, list_queries
from .run import Plan, make_plan

if TYPE_CHECKING:
    from ..models.denoiser import Denoiser

_RESULTS = (SCORES, REPORT, PICTURE)


def record_finish(
    plan: Plan, results: Path, model: Denoiser, queries: str
) -> dict[str, Any] | None:
    """What `reuse_finished` compares, for the manifest of a run; None for a run it leaves alone.

    Args:
        plan: of the run.
        results: folder of what it left.
        model: that was explained.
        queries: fingerprint of the queries.
    """
    if not _is_recognised(plan.options) or model.reads is not None:
        return None
    size = model.size
    return {
        "channels": model.channels,
        "size": list(size) if isinstance(size, tuple) else size,
        **_describe(plan, results, queries),
    }


def find_finished(options: Options, console: Console) -> tuple[Path, dict[str, Any]] | None:
    """The results in the output folder, if the same run made them and nothing has changed.

    Args:
        options: already checked.
        console: for warnings on images.

    Returns:
        Their folder and manifest; None where it is not so.

    Raises:
        OutputError: another command is at work in the folder.
    """
    plan = make_plan(options)
    for results in list_queries(plan.output).values():
        manifest = _read_manifest(plan, results)
        if manifest is None:
            continue
        # those that share a run keep each other company
        with nullcontext() if ranks().is_shared else alone_in(plan.output):
            if not _is_unchanged(plan, results, manifest):
                continue
        return results, manifest
    return None


def _is_recognised(options: Options) -> bool:
    """Whether all that a run reads is cheaper to compare than to load."""
    alone = options.lora is None and options.preset is None
    # files and images that lie elsewhere too
    alone = alone and (options.held_out or options.groups or options.clip or options.dino) is None
    # not one of a hub, or with parts that lie elsewhere: which, is not known here
    alone = alone and (options.model is None or (Path(options.model) / MODEL_INDEX).is_file())
    return alone and options.fused and options.what.needs in (FEATURES, NOTHING)


def _read_manifest(plan: Plan, results: Path) -> dict[str, Any] | None:
    """The manifest of results of a finished run with these options; None for any others."""
    if not _is_recognised(plan.options):
        return None
    try:
        manifest: dict[str, Any] = json.loads((results / MANIFEST).read_text())
        # a folder may be called by another name
        same = manifest["options"] == lasting(plan.options)
        whole = isinstance(manifest["finished"], dict) and isinstance(manifest["facts"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if same and whole else None


def _is_unchanged(plan: Plan, results: Path, manifest: dict[str, Any]) -> bool:
    record = manifest["finished"]
    try:
        found = _describe(plan, results, manifest["queries"])
        if any(record[key] != value for key, value in found.items()):
            return False
        return _are_images_unchanged(plan.options, manifest)
    # the run in full says what is wrong with them
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _describe(plan: Plan, results: Path, queries: str) -> dict[str, Any]:
    """What decided a run besides its options and images, and what it left, by content."""
    options, output = plan.options, plan.output
    pictures: Iterable[Path] = ()
    if options.queries == "generated":
        pictures = [output / "generated" / picture_name(i) for i in range(options.num_queries)]
    return {
        **describe_code(),
        "device": str(plan.device),
        **({} if options.function is None else describe_output_function(options.function)),
        "model": _hash_folder(output / "model" if options.model is None else Path(options.model)),
        "features": {
            name: _hash_folder(options.feature_folder(output) / name)
            for name in (
                f"train{options.halves_suffix}",
                f"query-{queries[:12]}{options.halves_suffix}",
            )
            if options.function is not None
        },
        "files": {
            str(file.relative_to(output)): hash_file(file)
            for file in (
                output / RUN_FILE,
                *pictures,
                *([] if options.whitening == "none" else [options.feature_folder(output) / FILE]),
                *(results / name for name in _RESULTS),
            )
        },
    }


def _are_images_unchanged(options: Options, manifest: dict[str, Any]) -> bool:
    """Whether images that lie outside the output folder are those of the run."""
    sources: list[tuple[str, str, str, int | None]] = []
    if options.data != "digits":
        sources.append(("data", options.data, "train", None))
        if options.queries == "validation":
            sources.append(("queries", options.data, "validation", options.num_queries))
    if options.queries not in ("generated", "validation"):
        sources.append(("queries", options.queries, "train", None))
    # the digits come with scikit-learn, whose version stands for them
    if not sources:
        return True
    from ..data.images import load_data

    record = manifest["finished"]
    size = record["size"]
    for key, source, split, limit in sources:
        found = load_data(
            source,
            channels=record["channels"],
            size=tuple(size) if isinstance(size, list) else size,
            split=split,
            limit=limit,
            skip_corrupt=options.skip_corrupt,
            resize=options.resize,
        )
        if found.fingerprint != manifest[key]:
            return False
    return True


def _hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its place in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hash_file(file) for file in files}
