"""What is explained: a kind of model is one file here, and the pipelines it reads in `_KINDS`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .denoiser import Denoiser as Denoiser
from .denoiser import Drawn as Drawn
from .denoiser import ModelError as ModelError
from .process import DiscreteProcess as DiscreteProcess
from .process import Process as Process

# the class of a kind by the pipelines it reads; its file is imported when one of them is loaded
_KINDS = {
    "DDPMPipeline": "unet:UNet",
    "DDIMPipeline": "unet:UNet",
    "PNDMPipeline": "unet:UNet",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion:StableDiffusionXL",
    "DiTPipeline": "transformers:DiT",
    "StableDiffusion3Pipeline": "transformers:StableDiffusion3",
    "FluxPipeline": "transformers:Flux",
}
# what a folder without an index is read as: it may hold a bare network
_BARE = "DDPMPipeline"
_HUB_HINT = "a folder that Diffusers wrote, or a hub name such as owner/name"


def load(
    name: str | Path,
    lora: str | Path | None = None,
    *,
    guidance: float | None = None,
    density: str | None = None,
    weighting: str | None = None,
    shift: str | None = None,
) -> Denoiser:
    """Load a model from what Diffusers wrote; its ``model_index.json`` says of which kind it is.

    Args:
        name: a folder with a pipeline, or with a bare UNet2DModel; or a hub name ``owner/name``, of
            which only what is needed is downloaded, once.
        lora: an adapter, a folder or file, for a kind that has one; only it is attributed then.
        guidance: that a model with embedded guidance (FLUX.1 dev) was trained with, which no file
            says; 3.5 by default.
        density: of the timesteps a flow is trained on, one of `process.DENSITIES`; None is what is
            usual for its kind. Likewise
        weighting: of its loss, one of `process.WEIGHTINGS`, and
        shift: of its noise levels, one of `process.SHIFTS`.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder, adapter or hub name.
        ModelError: no kind of model here serves it (its class is named), it is incomplete or
            unreadable, or an adapter or a way of training is given for a kind that has none.
        LoraError: as in `lora.load_lora`.
    """
    from .weights import read_json

    base = find(name)
    index = base / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() else _BARE
    if pipeline not in _KINDS:
        raise ModelError(
            f"{index} must describe one of {', '.join(_KINDS)}, got {pipeline!r}, which no kind of "
            "model here serves: wrap its network with dtrak.models.Denoiser.of to explain it from "
            "Python"
        )
    file, _, kind = _KINDS[pipeline].partition(":")
    trained = {"guidance": guidance, "density": density, "weighting": weighting, "shift": shift}
    made = getattr(import_module(f".{file}", __name__), kind)
    loaded: Denoiser = made.load(base, lora, **trained)
    return loaded


def find(name: str | Path) -> Path:
    """The folder of a model, downloaded if it is a hub's.

    Raises:
        FileNotFoundError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    text = str(name)
    if isinstance(name, Path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model must be {_HUB_HINT}, got {name}")
    from diffusers import DiffusionPipeline

    from .weights import quiet

    try:
        with quiet("diffusers.pipelines.pipeline_utils"):
            return Path(DiffusionPipeline.download(text))
    # the hub's client raises whatever the network does
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"model must be {_HUB_HINT}, got {text!r}, which is no folder and cannot be "
            f"downloaded: {reason}"
        ) from error


def wrap(pipeline: Any) -> Denoiser:
    """A Diffusers pipeline in memory as a model; of a LoRA in it only that is attributed.

    Args:
        pipeline: of one of the classes that `load` reads. It is used as it is: its modules move to
            the device of the features, and are put in evaluation mode.

    Raises:
        ModelError: no kind of model here serves its class.
    """
    name = type(pipeline).__name__
    if name not in _KINDS:
        raise ModelError(
            f"model must be a pipeline of one of {', '.join(_KINDS)}, a folder of one, or a "
            f"dtrak.Denoiser, got a {name}"
        )
    file, _, kind = _KINDS[name].partition(":")
    wrapped: Denoiser = getattr(import_module(f".{file}", __name__), kind).wrap(pipeline)
    return wrapped
