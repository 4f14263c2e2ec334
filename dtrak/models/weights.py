"""Parts of a pipeline from a folder that Diffusers wrote, and what does not fit in them."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from .denoiser import ModelError
from .process import PREDICTIONS, DiscreteProcess, FlowMatching, Process, linear_process

_SHOWN = 4


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must be a JSON object, got a {type(content).__name__}")
    return content


def load_part(kind: Any, folder: Path, file: Path | None = None, weights: str | None = None) -> Any:
    """A network of Diffusers in float32, on the CPU; what does not fit its configuration is named.

    Args:
        kind: its class.
        folder: with its configuration and weights, of half precision if there are no others.
        file: of the weights, where it is not one of the names of Diffusers.
        weights: which of them, as in `state.load_state`.

    Raises:
        ModelError: weights are missing, unknown or of another shape, or it cannot be loaded.
    """
    if file is not None and file.is_file():
        from .state import load_state

        try:
            made = kind.from_config(kind.load_config(folder))
        # whatever a broken configuration makes the constructor raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"no {kind.__name__} can be made from {folder}: {reason}") from error
        load_state(made, file, weights)
        return made.float()
    try:
        # Diffusers' own remarks on mismatched weights: each becomes an error, or is fine
        with quiet("diffusers.models.modeling_utils"):
            # together the two last options report misfits instead of raising at the first
            part, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                variant=_variant(folder, _WEIGHTS),
                output_loading_info=True,
                low_cpu_mem_usage=False,
                ignore_mismatched_sizes=True,
            )
    # whatever a broken configuration makes the constructor raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the model in {folder} could not be loaded: {reason}") from error
    refuse_misfits(info, folder)
    return part.float()


def load_component(
    kind: str, folder: Path, file: Path | None = None, weights: str | None = None
) -> Any:
    """A part of a pipeline by its class of Diffusers or Transformers; networks as `load_part`.

    Raises:
        ModelError: it is of another class, or as `load_part`.
    """
    import diffusers
    import transformers

    if hasattr(diffusers, kind):
        config = folder / "config.json"
        found = read_json(config).get("_class_name", kind) if config.is_file() else kind
        if found != kind:
            raise ModelError(f"{config} must describe a {kind}, got a {found}")
        return load_part(getattr(diffusers, kind), folder, file, weights)
    made: Any = getattr(transformers, kind)
    options: dict[str, Any] = {"local_files_only": True}
    is_network = issubclass(made, torch.nn.Module)
    if is_network:
        options |= {"output_loading_info": True, "variant": _variant(folder, _TEXT_WEIGHTS)}
    try:
        with quiet("transformers", progress=False):
            loaded = made.from_pretrained(folder, **options)
    # whatever a broken file makes it raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the {kind} in {folder} could not be loaded: {reason}") from error
    if not is_network:
        return loaded
    # buffers that older versions stored are listed as unexpected
    refuse_misfits({**loaded[1], "unexpected_keys": []}, folder)
    return loaded[0].float()


# how Diffusers calls the weights of a network
PART_WEIGHTS = "diffusion_pytorch_model"
# files of weights, without a variant's name
_WEIGHTS = (
    "diffusion_pytorch_model.{}safetensors",
    "diffusion_pytorch_model.safetensors.index.{}json",
    "diffusion_pytorch_model.{}bin",
)
_TEXT_WEIGHTS = (
    "model.{}safetensors",
    "model.safetensors.index.{}json",
    "pytorch_model.{}bin",
    "pytorch_model.bin.index.{}json",
)


def _variant(folder: Path, names: Sequence[str]) -> str | None:
    """Of a folder without weights in full, such as ``fp16``: the one variant that is there.

    Raises:
        ModelError: there are several.
    """
    there = {file.name for file in folder.iterdir()}
    if any(name.format("") in there for name in names):
        return None
    patterns = [re.escape(name).replace(r"\{\}", r"(?P<variant>[\w-]+)\.") for name in names]
    matches = [re.fullmatch(pattern, file) for pattern in patterns for file in there]
    found = sorted({match["variant"] for match in matches if match})
    # a shard of one is none itself
    found = [name for name in found if not re.search(r"\d+-of-\d+$", name)]
    if len(found) > 1:
        raise ModelError(
            f"{folder} must hold one variant of the weights, got {', '.join(found)}: keep one"
        )
    return found[0] if found else None


def refuse_misfits(info: dict[str, Any], folder: Path) -> None:
    """Refuse weights that are not those of a configuration.

    Args:
        info: what ``from_pretrained`` says about loading.
        folder: for the message.

    Raises:
        ModelError: names what is missing, unknown or of another shape.
    """
    misfits = [
        *(f"{name} is missing" for name in sorted(info["missing_keys"])),
        *(f"{name} is unknown" for name in sorted(info["unexpected_keys"])),
        *(
            f"{name} is {list(found)} and should be {list(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ),
    ]
    if misfits:
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise ModelError(
            f"the checkpoint in {folder} does not match its configuration: "
            f"{'; '.join(misfits[:_SHOWN])}{more}"
        )


def load_process(folder: Path, **flow: Any) -> Process:
    """The process of a pipeline's training schedule.

    Args:
        folder: of the pipeline.
        flow: options of `process.FlowMatching`, for a schedule of that kind; None for its own.

    Raises:
        ModelError: there is none, or one that cannot be used; options of flow matching are given
            for another kind.
    """
    files = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ModelError(f"{folder} is a pipeline and must hold {files[0].relative_to(folder)}")
    return read_process(read_json(file), str(file), **flow)


def guessed_process(network: Path) -> Process:
    """The process of a bare network beside which no schedule lies: DDPM's, which is said."""
    warnings.warn(
        f"no noise schedule lies with {network}: that of DDPM is a guess (1,000 timesteps, betas "
        "linear from 0.0001 to 0.02, a network that predicts the noise); scheduler_config.json "
        "beside it says another",
        stacklevel=2,
    )
    return linear_process()


def read_process(
    config: Mapping[str, Any], name: str = "the noise schedule", **flow: Any
) -> Process:
    """The process of a schedule's configuration; ``flow`` as `load_process`.

    Raises:
        ModelError: it cannot be used; ``name`` says which.
    """
    kind = str(config.get("_class_name"))
    chosen = {option: value for option, value in flow.items() if value is not None}
    try:
        if kind.startswith("FlowMatch"):
            return FlowMatching(FlowMatchEulerDiscreteScheduler.from_config(config), **chosen)
        if config.get("use_flow_sigmas"):
            # a solver of flows, with the shift of Euler's method
            flows = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=config.get("num_train_timesteps", 1000),
                shift=config.get("flow_shift") or 1.0,
            )
            return FlowMatching(flows, **chosen)
        others = sorted(chosen.keys() - {"patch"})
        if others:
            raise ModelError(f"{', '.join(others)} must go with a flow-matching model, got {name}")
        if config.get("trained_betas") is None and "beta_start" not in config:
            raise ModelError(f"{name} must describe a schedule of betas or of flows, got {kind!r}")
        config = {**config, "prediction_type": _predicted(config, name)}
        config.pop("predict_epsilon", None)
        # any scheduler's betas and prediction type, read as the training schedule they come from
        return DiscreteProcess(DDPMScheduler.from_config(config))
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{name} could not be used: {reason}") from error


def _predicted(config: Mapping[str, Any], name: str) -> str:
    """What a network returns: ``prediction_type``, or what said it before Diffusers 0.10."""
    found, old = config.get("prediction_type"), config.get("predict_epsilon")
    implied = None if old is None else "epsilon" if old else "sample"
    if found is not None and implied is not None and found != implied:
        raise ModelError(
            f"{name} must say once what the network predicts, got prediction_type {found!r} and "
            f"predict_epsilon {old}, which is {implied!r}: take the wrong one away"
        )
    predicted = str(found or implied or "epsilon")
    if predicted not in PREDICTIONS:
        raise ModelError(
            f"prediction_type of {name} must be one of {', '.join(PREDICTIONS)}, got {predicted!r}"
        )
    return predicted


@contextmanager
def quiet(*names: str, progress: bool = True) -> Iterator[None]:
    """Without the remarks of the named loggers, and without the libraries' own progress bars."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with nullcontext() if progress else _no_progress():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_progress() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
