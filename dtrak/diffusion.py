"""Diffusion models: the small one the digits train, and loading any Diffusers UNet2DModel folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from torch import nn


class ModelError(ValueError):
    """A model folder that cannot be used; the message says why and what was expected."""


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A U-Net and the noise schedule it was trained with.

    Attributes:
        unet: predicts noise (or a sample, or a velocity) from ``[R, C, H, W]`` and ``[R]`` timesteps.
        scheduler: its training schedule.
    """

    unet: UNet2DModel
    scheduler: SchedulerMixin

    @property
    def channels(self) -> int:
        """Image channels the model takes."""
        return int(self.unet.config.in_channels)

    @property
    def size(self) -> int | tuple[int, int] | None:
        """Image size the model was made for, in pixels."""
        size = self.unet.config.sample_size
        return tuple(size) if isinstance(size, list) else size

    @property
    def num_train_timesteps(self) -> int:
        """``T``."""
        return int(self.scheduler.config.num_train_timesteps)

    def save(self, folder: Path) -> None:
        """Write a DDPM pipeline that `load_model` and Diffusers read."""
        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_pretrained(folder)


def linear_schedule() -> DDPMScheduler:
    """The DDPM schedule of Ho et al. 2020 (arXiv:2006.11239): β from 1e-4 to 0.02 in T = 1000 steps."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def digits_model(seed: int = 0) -> DiffusionModel:
    """The U-Net for 8 x 8 digits, freshly initialised: 186,081 parameters.

    The published CIFAR recipe at a laptop's scale: scale-shift time conditioning, attention at one
    resolution, the linear schedule.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
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
    return DiffusionModel(unet.eval(), linear_schedule())


def load_model(folder: str | Path) -> DiffusionModel:
    """Load a folder that Diffusers wrote: a UNet2DModel, or a pipeline around one.

    Args:
        folder: holds ``config.json`` of a UNet2DModel, or ``model_index.json`` with ``unet/`` and
            ``scheduler/``. A bare U-Net gets the linear DDPM schedule, unless
            ``scheduler_config.json`` lies beside it.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ModelError: it holds no UNet2DModel, its weights are missing or unreadable, or their names or
            shapes do not match its configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model must be a folder that Diffusers wrote, got {folder}: no such folder")
    unet_folder = folder / "unet" if (folder / "model_index.json").is_file() else folder
    config_file = unet_folder / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"model must hold config.json of a UNet2DModel, or model_index.json with unet/: {folder} has "
            f"neither"
        )
    try:
        kind = json.loads(config_file.read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{config_file} must be JSON, got {error}") from error
    if kind != "UNet2DModel":
        raise ModelError(f"{config_file} must describe a UNet2DModel, got {kind!r}")
    try:
        unet, info = UNet2DModel.from_pretrained(
            unet_folder, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the weights in {unet_folder} could not be loaded: {reason}") from error
    for key, what in (
        ("missing_keys", "lacks the parameter"),
        ("unexpected_keys", "has the unknown parameter"),
        ("mismatched_keys", "has another shape for the parameter"),
    ):
        if info[key]:
            first = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info[key])[0]
            raise ModelError(
                f"the checkpoint in {unet_folder} does not match its configuration: it {what} {first!r} "
                f"({len(info[key])} such)"
            )
    scheduler_folder = folder / "scheduler" if unet_folder != folder else folder
    has_schedule = (scheduler_folder / "scheduler_config.json").is_file()
    scheduler = DDPMScheduler.from_pretrained(scheduler_folder) if has_schedule else linear_schedule()
    return DiffusionModel(unet.eval(), scheduler)


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
