"""Stable Diffusion 1, 2 and XL: U-Nets of latents that read captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .denoiser import Condition, ModelError
from .latent import TextPipeline
from .weights import read_json


class StableDiffusion(TextPipeline):
    """Stable Diffusion 1 and 2: one U-Net, one VAE, one CLIP text encoder; drawn by DDIM (η = 0).

    Attributes:
        module: a `diffusers.UNet2DConditionModel`, with an adapter where one was loaded.
        text_encoder: a `transformers.CLIPTextModel`.
        tokenizer: its `transformers.CLIPTokenizer`.
    """

    parts: ClassVar[dict[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    without: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    # what Diffusers' pipeline sets anyway, with a page of advice; and nothing is clipped
    sampler_changes: ClassVar[dict[str, Any]] = {"clip_sample": False, "steps_offset": 1}
    adapters = "Diffusers, PEFT, kohya, attention processors"
    # what the U-Net reads beside the states of captions
    addition: str | None = None

    @property
    def text_encoder(self) -> Any:
        """See the class."""
        return self.pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        """See the class."""
        return self.pipeline.tokenizer

    def _encode(self, captions: list[str], device: torch.device) -> Condition:
        """The text encoder's last hidden state."""
        hidden, _ = self.pipeline.encode_prompt(
            captions, device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        called = self.module if module is None else module
        time = self.process.time(timesteps, noisy.shape[1:])
        prediction: Tensor = called(noisy, time, **condition).sample
        return prediction

    def _more(self) -> dict[str, Any]:
        return {"eta": 0.0}

    @classmethod
    def _check_folder(cls, base: Path) -> None:
        config = read_json(base / "unet" / "config.json")
        reads = [key for key in ("class_embed_type", "num_class_embeds") if config.get(key)]
        addition = config.get("addition_embed_type")
        if addition is not None and addition != cls.addition:
            reads.insert(0, "addition_embed_type")
        if reads:
            raise ModelError(
                f"{base / 'unet'} must read captions and nothing else, got one with "
                f"{', '.join(reads)}"
            )
        if addition != cls.addition:
            raise ModelError(
                f"{base / 'unet'} must have addition_embed_type {cls.addition!r}, got none"
            )

    def _text_width(self) -> tuple[int, int]:
        width = sum(int(encoder.config.hidden_size) for encoder in self.encoders.values())
        return int(self.module.config["cross_attention_dim"]), width


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two CLIP text encoders, and the size of the picture.

    The size that the U-Net is told, the original one and the target, is that of the picture it is
    given, uncropped: what a picture was before it was resized is not known.

    Source:
        Podell et al. 2023 (arXiv:2307.01952).
    """

    parts: ClassVar[dict[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
    }
    # a watermark would be explained, too
    without: ClassVar[dict[str, Any]] = {
        "image_encoder": None,
        "feature_extractor": None,
        "add_watermarker": False,
    }
    guidance_scale = 5.0
    adapters = "Diffusers, PEFT, kohya"
    addition = "text_time"

    def _encode(self, captions: list[str], device: torch.device) -> Condition:
        """The last hidden states but one, side by side, and the second encoder's pooled output."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def _pooled_width(self) -> tuple[int, int]:
        config = self.module.config
        sizes = 6 * int(config["addition_time_embed_dim"])
        reads = int(config["projection_class_embeddings_input_dim"]) - sizes
        return reads, int(self.pipeline.text_encoder_2.config.projection_dim)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        called = self.module if module is None else module
        height, width = (side * self.factor for side in noisy.shape[-2:])
        sizes = noisy.new_tensor([height, width, 0, 0, height, width]).repeat(len(noisy), 1)
        prediction: Tensor = called(
            noisy,
            self.process.time(timesteps, noisy.shape[1:]),
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": condition["text_embeds"], "time_ids": sizes},
        ).sample
        return prediction
