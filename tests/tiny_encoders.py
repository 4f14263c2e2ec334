"""A CLIP, a DINO and a VAE in miniature, with weights that spread."""

from pathlib import Path

import torch


def build_clip(folder: Path) -> Path:
    """A whole CLIP, text encoder and all."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 30, "patch_size": 10, "projection_dim": 24,
    }  # fmt: skip
    text = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 50, "projection_dim": 24,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}
    )
    processor.save_pretrained(folder)
    return folder


def build_dino(folder: Path) -> Path:
    """A vision transformer without a pooler, as DINO's weights are published."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = ViTModel(
            ViTConfig(
                hidden_size=24,
                intermediate_size=30,
                num_hidden_layers=2,
                num_attention_heads=3,
                image_size=32,
                patch_size=8,
            ),
            add_pooling_layer=False,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def build_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=2,
        )
    vae.save_pretrained(folder / "vae")
    return folder
