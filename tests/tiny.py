"""A U-Net small enough that a test can train it."""

import torch
from diffusers import DDPMScheduler, UNet2DModel

from dtrak.models.process import DiscreteProcess, linear_process
from dtrak.models.unet import UNet


def tiny_unet(seed: int = 0, **options) -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "block_out_channels": (8,),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",),
                "norm_num_groups": 4,
                "add_attention": False,
                "resnet_time_scale_shift": "scale_shift",
                **options,
            }
        ).eval()


def tiny_model(seed: int = 0, scheduler: DDPMScheduler | None = None, **options) -> UNet:
    process = linear_process() if scheduler is None else DiscreteProcess(scheduler)
    return UNet(tiny_unet(seed, **options), process)
