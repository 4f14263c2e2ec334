"""What is explained: a kind of model is one file here, and the pipelines it reads in `_KINDS`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..runs.choices import check_weights
from ..runs.files import check_utf8, expand_path
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
# every other pipeline: how it calls its network is recorded
_OTHERS = "recorded:Recorded"
# the same by the class of a network, for those that can be made from a configuration alone
_NETWORKS = {"UNet2DModel": "unet:UNet"}
# why others are not served, by their names or the beginnings of those
_REFUSED = {
    "LDMPipeline": "the latents of a VQ autoencoder",
    "StableDiffusionInpaint, StableDiffusionXLInpaint, FluxFill": "a network that sees a picture "
    "and a mask, too",
    "StableDiffusionXLImg2Img": "SDXL's refiner, which continues pictures of another model",
    "StableDiffusionControlNet, StableDiffusionXLControlNet, FluxControl": "a network that sees "
    "another picture, too",
    "ZImage": "a network that takes lists",
    "HiDream": "experts that pass no gradient outside training mode",
    "Kandinsky, StableCascade, Wuerstchen": "several networks, one after the other",
    "Wan, LTX, CogVideoX, HunyuanVideo, Mochi, Cosmos, SkyReels": "video",
    "ConsistencyModel, KarrasVe, EDM": "noise of another process",
}
# what a network without a pipeline is read as
_BARE = "DDPMPipeline"
_HUB_HINT = "a folder that Diffusers wrote, or a hub name such as owner/name"


def load(
    name: str | Path,
    lora: str | Path | None = None,
    *,
    weights: str | None = None,
    guidance: float | None = None,
    density: str | None = None,
    weighting: str | None = None,
    shift: str | None = None,
) -> Denoiser:
    """Load a model from what Diffusers wrote; its ``model_index.json`` says of which kind it is.

    What no file says and is guessed, a noise schedule for instance, is said as a warning.

    Args:
        name: a folder with a pipeline; a network of one, in it or alone (a UNet2DModel); a
            checkpoint of a training, a folder with ``unet`` or a file of weights with the network's
            configuration beside it, from which no code is run; or a hub name ``owner/name``, of
            which only what is needed is downloaded, once.
        lora: an adapter, a folder, file or hub name, for a kind that has one; only it is attributed
            then.
        weights: ``"trained"`` or ``"ema"``, the exponential moving average that a training kept
            beside them; None is what ``name`` says, else the trained ones.
        guidance: that a model with embedded guidance (FLUX.1 dev) was trained with, which no file
            says; 3.5 by default.
        density: of the timesteps a flow is trained on, one of `choices.DENSITIES`; None is what is
            usual for its kind. Likewise
        weighting: of its loss, one of `process.WEIGHTINGS`, and
        shift: of its noise levels, one of `choices.SHIFTS`.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder, adapter or hub name.
        ModelError: no kind of model here serves it (its class is named), it is incomplete or
            unreadable, its files contradict each other, it has no such weights, or an adapter or a
            way of training is given for a kind that has none.
        LoraError: as in `lora.load_lora`.
    """
    from .places import locate

    check_weights(weights, name)
    if lora is not None:
        lora = find_adapter(lora)
    recorded = _recorded(lora)
    # those it was trained on
    of_adapter = recorded.pop("weights", None)
    place = locate(find(name), weights or of_adapter)
    pipeline = _BARE if place.pipeline is None else _pipeline_in(place.pipeline)
    chosen = {"guidance": guidance, "density": density, "weighting": weighting, "shift": shift}
    trained = {**recorded, **{k: v for k, v in chosen.items() if v is not None}}
    loaded: Denoiser = _class_of(pipeline).load(place, lora, **trained)
    return loaded


def _pipeline_in(folder: Path) -> str:
    """The class that a pipeline's index names, if it is not one that is refused."""
    from .places import INDEX
    from .weights import read_json

    index = folder / INDEX
    pipeline = read_json(index).get("_class_name")
    if not isinstance(pipeline, str) or _reason(pipeline):
        raise ModelError(
            f"{index} must describe a pipeline that is served, such as {', '.join(_KINDS)}, got "
            f"{pipeline!r} ({_reason(str(pipeline)) or 'no name'}): wrap its network with "
            "dtrak.models.Denoiser.of to explain it from Python"
        )
    return pipeline


def find_adapter(name: str | Path) -> Path:
    """The folder or file of an adapter, downloaded if it is a hub's.

    Raises:
        FileNotFoundError: there is none.
    """
    text, path = str(name), expand_path(name)
    is_hub = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    # `lora.load_lora` says what is not there
    if path.exists() or isinstance(name, Path) or not is_hub or path.parent.is_dir():
        return check_utf8(path, "lora")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.safetensors", "adapter_config.json", "*/adapter_config.json", "*.bin"]
        return Path(snapshot_download(text, allow_patterns=files))
    # the hub's client raises whatever the network does
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"lora must be an existing file or folder, or a hub name, got {text!r}, which cannot "
            f"be downloaded: {reason}"
        ) from error


def wrap(pipeline: Any, **trained: Any) -> Denoiser:
    """A Diffusers pipeline in memory as a model; of a LoRA in it only that is attributed.

    Args:
        pipeline: of one of the classes that `load` reads. It is used as it is: its modules become
            float32, move to the device of the features, and are put in evaluation mode.
        trained: as in `load`.

    Raises:
        ModelError: no kind of model here serves its class, or as `load`.
        LoraError: it has several adapters, or one that is merged into the weights.
    """
    name = type(pipeline).__name__
    parts = getattr(pipeline, "components", {})
    if name not in _KINDS and (_reason(name) or not {"vae", "scheduler"} <= parts.keys()):
        why = f" ({_reason(name)})" if _reason(name) else ""
        raise ModelError(
            f"model must be a pipeline such as {', '.join(_KINDS)}, a folder of one, or a "
            f"dtrak.Denoiser, got a {name}{why}"
        )
    wrapped: Denoiser = _class_of(name).wrap(pipeline, **trained)
    if not wrapped.parameters():
        raise ModelError(
            f"the {name} must have parameters that require gradients, those that were trained, got "
            "none: requires_grad_(True) of its network says that all were"
        )
    return wrapped


def _class_of(pipeline: str) -> Any:
    return _kind(_KINDS.get(pipeline, _OTHERS))


def _kind(place: str) -> Any:
    file, _, name = place.partition(":")
    return getattr(import_module(f".{file}", __name__), name)


def _reason(pipeline: str) -> str:
    """Why a pipeline is not served, where that is known."""
    for names, reason in _REFUSED.items():
        if any(pipeline.startswith(name) for name in names.split(", ")):
            return reason
    return ""


def _recorded(lora: str | Path | None) -> dict[str, Any]:
    """How an adapter was trained, where `dtrak.train` wrote it down."""
    from ..runs.choices import TRAINING_FILE
    from .weights import read_json

    if lora is None:
        return {}
    file = (Path(lora) if Path(lora).is_dir() else Path(lora).parent) / TRAINING_FILE
    if not file.is_file():
        return {}
    settings = read_json(file).get("settings", {})
    schedule = settings.get("schedule", {})
    found = {name: schedule.get(name) for name in ("density", "weighting")}
    guidance = settings.get("model", {}).get("guidance")
    found |= {"shift": schedule.get("shifted by"), "guidance": guidance and float(guidance)}
    found |= {"weights": settings.get("start", {}).get("weights")}
    return {name: value for name, value in found.items() if value is not None}


def read_config(file: str | Path) -> dict[str, Any]:
    """The configuration of a network, and of its noise schedule if there is one.

    Args:
        file: JSON as Diffusers writes it; ``scheduler_config.json`` beside it, or in ``scheduler/``
            beside its folder as in a pipeline, is the schedule.

    Returns:
        ``{"network": …, "scheduler": … or None}`` for `make`.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: it is not such a configuration, or no kind of model here is made from it.
    """
    from .weights import read_json

    file = expand_path(file)
    if not file.is_file():
        raise FileNotFoundError(f"--config must be a file with a configuration, got {file}")
    network = read_json(file)
    name = network.setdefault("_class_name", "UNet2DModel")
    if name not in _NETWORKS:
        raise ModelError(f"{file} must describe one of {', '.join(_NETWORKS)}, got {name!r}")
    name = "scheduler_config.json"
    places = (file.with_name(name), file.parent.parent / "scheduler" / name)
    scheduler = next((place for place in places if place.is_file()), None)
    return {
        "network": network,
        "scheduler": None if scheduler is None else read_json(scheduler),
    }


def make(config: Mapping[str, Any], seed: int) -> Denoiser:
    """A freshly initialised model of a configuration.

    Args:
        config: of `read_config`.
        seed: of its weights; the global random state is left as it was.

    Raises:
        ModelError: the network or the schedule cannot be made from it.
    """
    made: Denoiser = _kind(_NETWORKS[config["network"]["_class_name"]]).make(config, seed)
    return made


def find(name: str | Path) -> Path:
    """The folder or file of a model, downloaded if it is a hub's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its path is no UTF-8.
    """
    path, text = expand_path(name), str(name)
    if path.is_dir() or (path.is_file() and path.suffix):
        return check_utf8(path, "model")
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
