"""Diffusion models: the small one the digits train, and loading any UNet2DModel of Diffusers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ..runs.choices import check_model_folder


class ModelError(ValueError):
    """A model folder that cannot be used; the message says why and what was expected."""


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A U-Net and the noise schedule it was trained with.

    Attributes:
        unet: predicts noise (or a sample, or a velocity) from images ``[R, C, H, W]`` and timestep
            indices ``[R]``.
        scheduler: its training schedule.
    """

    unet: UNet2DModel
    scheduler: DDPMScheduler

    @property
    def channels(self) -> int:
        """Image channels the model takes."""
        return int(self.unet.config["in_channels"])

    @property
    def size(self) -> int | tuple[int, int] | None:
        """Image size the model was made for, in pixels: a side, (height, width), or unknown."""
        size = self.unet.config["sample_size"]
        return size if size is None or isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def schedule(self) -> dict[str, Any]:
        """Everything about the noise schedule that decides numbers, JSON-serialisable."""
        config = {
            key: value
            for key, value in sorted(dict(self.scheduler.config).items())
            if not key.startswith("_") and key != "trained_betas"
        }
        return config | {"betas": hash_tensors({"betas": self.scheduler.betas})}

    @property
    def num_train_timesteps(self) -> int:
        """``T``."""
        return int(self.scheduler.config["num_train_timesteps"])

    def save(self, folder: str | Path) -> None:
        """Write a DDPM pipeline that `load_model` and Diffusers read."""
        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_pretrained(folder)


def linear_schedule() -> DDPMScheduler:
    """The DDPM schedule: β from 1e-4 to 0.02 in T = 1000 equal steps.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), section 4.
    """
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )


def make_unet(seed: int, **config: Any) -> UNet2DModel:
    """A freshly initialised U-Net in evaluation mode.

    Args:
        seed: of the initial weights; the global random state is left as it was.
        config: arguments of `diffusers.UNet2DModel`.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would reseed CUDA devices too
        torch.default_generator.manual_seed(seed)
        return UNet2DModel(**config).eval()


def digits_model(seed: int = 0) -> DiffusionModel:
    """The U-Net for 8 x 8 digits, freshly initialised: 186,081 parameters.

    The published CIFAR recipe at a laptop's scale: scale-shift time conditioning, attention at one
    resolution, the linear schedule.

    Args:
        seed: of the initial weights; the global random state is left as it was.
    """
    unet = make_unet(
        seed,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        add_attention=False,
    )
    return DiffusionModel(unet, linear_schedule())


def load_model(folder: str | Path) -> DiffusionModel:
    """Load a folder that Diffusers wrote: a UNet2DModel, or a pipeline around one.

    Args:
        folder: a pipeline with ``unet/`` and ``scheduler/``, or with both in the folder itself as
            older ones have; or a bare U-Net, which gets the linear DDPM schedule unless
            ``scheduler_config.json`` lies beside it.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ModelError: it holds no UNet2DModel, or one that takes more than images and timesteps, or
            returns something else than an image; its configuration, weights or schedule are missing
            or unreadable; or the names or shapes of its weights do not match its configuration.
    """
    check_model_folder(folder)
    folder = Path(folder)
    unet_folder = next(
        (f for f in (folder / "unet", folder) if (f / "config.json").is_file()), None
    )
    if unet_folder is None:
        raise ModelError(
            "model must be a folder with config.json of a UNet2DModel, in itself or in unet/, got "
            f"{folder} without one"
        )
    _check_config(unet_folder / "config.json")
    return DiffusionModel(_load_unet(unet_folder), load_schedule(folder))


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


def _check_config(file: Path) -> None:
    config = read_json(file)
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ModelError(f"{file} must describe a UNet2DModel, got {kind!r}")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise ModelError(f"{file} must describe an unconditional model, got one that takes classes")
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels[0] != channels[1]:
        raise ModelError(
            f"{file} must have as many out_channels as in_channels, got {channels[1]} and "
            f"{channels[0]}"
        )


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Without Diffusers' own remarks on mismatched weights: each becomes an error, or is fine."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_unet(folder: Path) -> UNet2DModel:
    try:
        with _quiet_loader():
            # together the two last options report misfits instead of raising at the first
            unet, info = UNet2DModel.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                low_cpu_mem_usage=False,
                ignore_mismatched_sizes=True,
            )
    # whatever a broken configuration makes the constructor raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the model in {folder} could not be loaded: {reason}") from error
    misfits = [
        *(f"{name} is missing" for name in sorted(info["missing_keys"])),
        *(f"{name} is unknown" for name in sorted(info["unexpected_keys"])),
        *(
            f"{name} is {list(found)} and should be {list(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ),
    ]
    if misfits:
        more = f"; and {len(misfits) - 4} more" if len(misfits) > 4 else ""
        raise ModelError(
            f"the checkpoint in {folder} does not match its configuration: "
            f"{'; '.join(misfits[:4])}{more}"
        )
    return unet.eval()


def load_schedule(folder: Path) -> DDPMScheduler:
    """The training schedule of a pipeline's folder; the linear one for a bare model.

    Raises:
        ModelError: a pipeline without one, or one that cannot be used.
    """
    files = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is a pipeline and must hold {files[0].relative_to(folder)}")
        return linear_schedule()
    config = read_json(file)
    if config.get("trained_betas") is None and "beta_start" not in config:
        raise ModelError(
            f"{file} must describe a schedule of betas, got {config.get('_class_name')!r}"
        )
    try:
        # any scheduler's betas and prediction type, read as the training schedule they come from
        return DDPMScheduler.from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file} could not be used: {reason}") from error


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes, whatever their order or device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, dtypes, shapes and bytes."""
    return hash_tensors(model.state_dict())
