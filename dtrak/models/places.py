"""Where the parts of a model lie: pipelines, parts of them, checkpoints of a training, files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..runs.choices import EMA, MODEL_INDEX, TRAINED
from .denoiser import ModelError
from .weights import PART_WEIGHTS, read_json

INDEX, CONFIG, SCHEDULE = MODEL_INDEX, "config.json", "scheduler_config.json"
# one of them lies in a folder that `locate` reads
MODEL_FILES = (INDEX, f"unet/{CONFIG}", f"transformer/{CONFIG}")
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_NETWORKS = ("unet", "transformer")
# what the training scripts of Diffusers append for the moving average of a network's weights
_EMA_SUFFIX = "_ema"
# beside a network, they say that it sees latents
_ENCODERS = ("vae", "vqvae", "movq", "text_encoder")
_ADAPTERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
# of accelerate, beside the weights
_STATES = re.compile(r"(optimizer|scheduler|sampler|scaler|random_states|custom_checkpoint).*")


class Place(NamedTuple):
    """Where a model lies.

    Attributes:
        pipeline: folder whose index says of which kind it is; None for a bare network.
        network: folder or file of the network's weights, where it is not the pipeline's own.
        config: folder of the network's configuration, with ``network``.
        schedule: the noise schedule of a bare network; None where none lies there.
        weights: `choices.WEIGHTS` asked for, which a file of weights may hold both of.
    """

    pipeline: Path | None
    network: Path | None = None
    config: Path | None = None
    schedule: Path | None = None
    weights: str | None = None


def locate(base: Path, weights: str | None = None) -> Place:
    """Find the parts of a model; what is guessed is said as a warning.

    Args:
        base: a pipeline, a network of one, a checkpoint of a training (a folder with ``unet`` or
            ``unet_ema``), or a file of weights with its configuration beside it.
        weights: ``"trained"``, or ``"ema"`` for their moving average; None takes what ``base``
            names, else the trained ones.

    Raises:
        ModelError: there is no network, there are no such weights, or two files contradict each
            other.
    """
    if base.is_file():
        return _of_file(base, weights)
    if (base / INDEX).is_file():
        return _of_pipeline(base, weights)
    root, network = _bare(base)
    stem = network.name.removesuffix(_EMA_SUFFIX)
    if _is_whole(root, network.name):
        warnings.warn(
            f"{base} is a part of the pipeline in {root}, which is read as a whole", stacklevel=3
        )
        return _of_pipeline(root, weights)
    network = _choose(network, weights)
    inside = _weights_in(network)
    return _complete(root, stem, inside or network, network, weights)


def _of_pipeline(base: Path, weights: str | None) -> Place:
    """A pipeline, with the moving average of its network where that is asked for."""
    _check_index(base)
    own = next((base / name for name in _NETWORKS if (base / name / CONFIG).is_file()), base)
    chosen = own if own == base and weights != EMA else _choose(own, weights)
    inside = _weights_in(chosen)
    if chosen == own and inside is None:
        return Place(base)
    return Place(base, inside or chosen, chosen, weights=weights)


def _check_index(base: Path) -> None:
    """Refuse a pipeline whose index names another network or kind of schedule than its files.

    Raises:
        ModelError: it does.
    """
    index = read_json(base / INDEX)
    files = {name: base / name / CONFIG for name in _NETWORKS}
    files["scheduler"] = base / "scheduler" / SCHEDULE
    for name, file in files.items():
        named = index.get(name)
        if not isinstance(named, list) or named[-1] is None or not file.is_file():
            continue
        said, found = str(named[-1]), str(read_json(file).get("_class_name", named[-1]))
        # schedulers of one kind stand for one another
        same = said.startswith("FlowMatch") == found.startswith("FlowMatch")
        if not (same if name == "scheduler" else said == found):
            raise ModelError(f"{base / INDEX} names a {said} as its {name}, but {file} a {found}")


def _of_file(file: Path, weights: str | None) -> Place:
    if file.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ModelError(
            f"model must be a folder, or a file of weights ({', '.join(WEIGHT_SUFFIXES)}), got "
            f"{file}"
        )
    folder = file.parent
    _refuse_adapters(folder, [file.name])
    places = (folder, *(folder / name for name in _NETWORKS))
    config = next((place for place in places if (place / CONFIG).is_file()), None)
    if config is None:
        raise ModelError(
            f"{file} must have the {CONFIG} of its network beside it, as Diffusers writes it: got "
            "none. A checkpoint of another program is converted first, with from_single_file and "
            "save_pretrained of its pipeline in Diffusers"
        )
    stem = config.name.removesuffix(_EMA_SUFFIX)
    root = folder if config != folder else folder.parent
    return _complete(root, stem, file, config, weights)


def _complete(root: Path, stem: str, network: Path, config: Path, weights: str | None) -> Place:
    """The place of a network that is no pipeline's own: with the pipeline above it, if any."""
    kind = read_json(config / CONFIG).get("_class_name")
    for above in dict.fromkeys((config, root, root.parent)):
        named = read_json(above / INDEX).get(stem) if (above / INDEX).is_file() else None
        if named is not None and named[-1] == kind:
            warnings.warn(
                f"the weights are those of {network}, all else of the model is read from {above}",
                stacklevel=4,
            )
            return Place(above, network, config, weights=weights)
        if named is not None:
            raise ModelError(
                f"{config} holds a {kind}, but {above / INDEX} names a {named[-1]} as its {stem}"
            )
    beside = [name for name in _ENCODERS if (root / name).is_dir()]
    if beside:
        raise ModelError(
            f"{config} must be explained with what lies beside it ({', '.join(beside)}), which "
            f"says that it sees no pixels: {root} must hold {INDEX}, got none"
        )
    if kind is not None and kind != "UNet2DModel":
        raise ModelError(
            f"{config / CONFIG} must describe a UNet2DModel, got {kind!r}, whose pipeline is not "
            f"there (no {INDEX} above it): name the pipeline's folder, or put this one in it"
        )
    return Place(None, network, config, _schedule(config, root), weights)


def _schedule(config: Path, root: Path) -> Path | None:
    """The noise schedule that lies with a bare network; the folder above counts where no other is.

    Raises:
        ModelError: two contradict each other.
    """
    near = [
        folder / name for folder in (config, root) for name in (SCHEDULE, f"scheduler/{SCHEDULE}")
    ]
    far = [root.parent / "scheduler" / SCHEDULE]
    found = [file for file in dict.fromkeys(near) if file.is_file()]
    found = found or [file for file in far if file.is_file()]
    if not found:
        return None
    facts = [_facts(file) for file in found]
    for file, other in zip(found[1:], facts[1:], strict=True):
        if other != facts[0]:
            differing = sorted(
                k for k in facts[0].keys() | other if facts[0].get(k) != other.get(k)
            )
            raise ModelError(
                f"{found[0]} and {file} must say the same of the noise schedule, got other values "
                f"of {', '.join(differing)}: take the wrong one away"
            )
    if found[0].parent.name == "scheduler" or found[0].parent != config:
        warnings.warn(f"noise schedule of {config}: {found[0]}", stacklevel=5)
    return found[0]


def _facts(file: Path) -> dict[str, Any]:
    """What decides the process of a schedule, of all that its file says."""
    from .weights import read_process

    return read_process(read_json(file), str(file)).describe()


def _is_whole(root: Path, name: str) -> bool:
    """Whether a folder is a pipeline's own network."""
    index = root / INDEX
    return name in _NETWORKS and index.is_file() and bool(read_json(index).get(name))


def _bare(base: Path) -> tuple[Path, Path]:
    """Of a folder without an index: what it is a checkpoint of, and the folder of its network."""
    if (base / CONFIG).is_file():
        return base.resolve().parent, base
    names = [name for stem in _NETWORKS for name in (stem, stem + _EMA_SUFFIX)]
    inside = [base / name for name in names if (base / name / CONFIG).is_file()]
    if inside:
        return base, inside[0]
    files = sorted(file.name for file in base.iterdir())
    _refuse_adapters(base, files)
    checkpoints = [name for name in files if re.fullmatch(r"checkpoint-\d+", name)]
    hint = ""
    if checkpoints:
        hint = f": name one of its checkpoints, such as {base / checkpoints[-1]}"
    elif any(name.endswith(WEIGHT_SUFFIXES) and not _STATES.match(name) for name in files):
        hint = f": put the {CONFIG} of the network beside its weights"
    raise ModelError(
        f"model must be a folder with {CONFIG} of a UNet2DModel, in itself or in unet/, or with "
        f"{INDEX}, got {base} without one{hint}"
    )


def _refuse_adapters(folder: Path, files: list[str]) -> None:
    if any(name in _ADAPTERS for name in files):
        raise ModelError(
            f"{folder} holds an adapter, no model: give it as --lora, and its base as --model"
        )


def _choose(network: Path, weights: str | None) -> Path:
    """The folder of a network's weights or of their moving average, whichever is asked for."""
    is_ema = network.name.endswith(_EMA_SUFFIX)
    stem = network.name.removesuffix(_EMA_SUFFIX)
    trained, ema = network.with_name(stem), network.with_name(stem + _EMA_SUFFIX)
    has_ema = (ema / CONFIG).is_file()
    if weights == EMA:
        if has_ema:
            return ema
        # one file may hold both
        if _weights_in(network) is not None:
            return network
        raise ModelError(
            f"--weights ema must be of a model with a moving average of its weights, got no "
            f"{ema.name} beside {trained}"
        )
    if weights == TRAINED:
        if not (trained / CONFIG).is_file():
            raise ModelError(f"--weights trained must be of a model with them, got {network} alone")
        return trained
    if has_ema and not is_ema:
        warnings.warn(
            f"{ema} lies beside {trained}, whose weights are taken: --weights ema takes the "
            "moving average",
            stacklevel=4,
        )
    elif is_ema:
        warnings.warn(f"the weights are the moving average in {network}", stacklevel=4)
    return network


def _weights_in(folder: Path) -> Path | None:
    """The one file of weights of a network that Diffusers did not name; None where it did.

    Raises:
        ModelError: there are several.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    if any(file.name.startswith(PART_WEIGHTS) for file in files):
        return None
    found = [
        file
        for file in files
        if file.suffix.lower() in WEIGHT_SUFFIXES and not _STATES.match(file.name)
    ]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{folder} must hold one file of weights, got {names}: name one")
    return found[0] if found else None
