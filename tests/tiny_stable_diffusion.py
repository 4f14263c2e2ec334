"""A Stable Diffusion pipeline small enough for a test, with a vocabulary of bytes."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dtrak.data.images import encode_png, to_uint8
from dtrak.models import load
from dtrak.models.stable_diffusion import StableDiffusion

MAX_TOKENS = 16
PICTURES = {
    "ukiyo_e/wave.png": "a ukiyo e painting",
    "ukiyo_e/fuji.png": "a ukiyo e painting",
    "romanticism/fog.png": "a romanticism painting",
    "romanticism/sea.png": "monk by the sea",
    "baroque/feast.png": "",
}


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in CLIP's vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + n) for n in range(len(others))]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS
    )


def build_unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
            **options,
        }
    )


def build_pipeline(folder: Path, seed: int = 0, scheduler=None, **unet) -> Path:
    """Save a pipeline for images of 16 x 16 pixels, latents of 8 x 8, in ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            unet=build_unet(**unet),
            vae=AutoencoderKL(
                latent_channels=4,
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                sample_size=16,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=514,
                    hidden_size=12,
                    intermediate_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=MAX_TOKENS,
                    bos_token_id=512,
                    eos_token_id=513,
                )
            ),
            tokenizer=build_tokenizer(folder.parent / "vocabulary"),
            # what Stable Diffusion 1.x ships
            scheduler=scheduler
            or PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
    return folder


def shake_lora(model: StableDiffusion, seed: int = 1) -> StableDiffusion:
    """Give a fresh adapter weights that matter: both factors far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def load_tiny(folder: Path, rank: int = 3, seed: int = 1) -> StableDiffusion:
    return shake_lora(load(folder).put_adapter(rank), seed)


def write_pictures(folder: Path, metadata: bool = True) -> Path:
    """A folder of pictures in folders of their class, with captions."""
    generator = torch.Generator().manual_seed(5)
    for name in PICTURES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        # smooth, so that a VAE's latents differ from noise
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")[0]
        file.write_bytes(encode_png(to_uint8(image)))
    if metadata:
        lines = [json.dumps({"file_name": n, "text": t}) for n, t in PICTURES.items()]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
