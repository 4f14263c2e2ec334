"""Transformers of latents: DiT, Stable Diffusion 3 and FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..runs.choices import TRAINED_GUIDANCE
from .denoiser import Condition, ModelError, check_labels
from .latent import LatentPipeline, TextPipeline
from .process import FlowMatching, Process, shift_of


class DiT(LatentPipeline):
    """A DiT of classes, in the latents of a VAE; drawn by DDIM (η = 0).

    A model that learnt its variance, too, returns twice as many channels: the first half is what
    its process calls the target, the second is not attributed.

    Attributes:
        module: a `diffusers.DiTTransformer2DModel`.

    Source:
        Peebles and Xie 2023 (arXiv:2212.09748).
    """

    reads = "labels"
    adapters = "PEFT"
    parts: ClassVar[dict[str, str]] = {
        "transformer": "DiTTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    network = "transformer"
    guidance_scale: float | None = 4.0
    sampler_changes: ClassVar[dict[str, Any]] = {"clip_sample": False}

    @property
    def num_classes(self) -> int:
        """Classes it can tell apart, without the one for none."""
        return int(self.module.config["num_embeds_ada_norm"])

    @property
    def patch(self) -> int:
        """See `LatentPipeline`."""
        return int(self.module.config["patch_size"])

    def condition(self, items: Sequence[int] | None, device: torch.device) -> Condition:
        """See `Denoiser.condition`: the labels."""
        return {"class_labels": check_labels(items, self.num_classes, device)}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        called = self.module if module is None else module
        time = self.process.time(timesteps, noisy.shape[1:])
        prediction: Tensor = called(noisy, timestep=time, **condition).sample
        return prediction[:, : noisy.shape[1]]

    def _check_drawn(self, seeds: Sequence[int], items: Sequence[Any] | None) -> None:
        if len(items or ()) != len(seeds):
            got = "none" if items is None else str(len(items))
            raise ValueError(f"labels must be {len(seeds)}, one for each seed, got {got}")
        check_labels(items or (), self.num_classes, torch.device("cpu"))

    def _drawn_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        own = super()._drawn_size(None)
        if size is not None and super()._drawn_size(size) != own:
            raise ValueError(f"size must be that of the model, {own[0]} pixels, got {size}")
        return own

    def _run(
        self,
        pipeline: Any,
        items: Sequence[Any],
        size: tuple[int, int],
        generators: list[torch.Generator],
        options: dict[str, Any],
    ) -> Tensor:
        last = self.num_classes

        # the pipeline asks for no class by ImageNet's number of it
        def name_none(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"class_labels": kwargs["class_labels"].clamp(max=last)}

        hook = self.module.register_forward_pre_hook(name_none, with_kwargs=True)
        try:
            drawn: Tensor = pipeline(
                list(items), generator=generators, output_type="pt", **options
            ).images
        finally:
            hook.remove()
        return drawn

    def _check_parts(self, base: Path | str) -> None:
        super()._check_parts(base)
        if not isinstance(self.module.config["sample_size"], int):
            raise ModelError(f"the transformer in {base} must have one sample_size, got another")

    def _latent_channels(self) -> tuple[int, int]:
        takes, returns = super()._latent_channels()
        return takes, returns // 2 if returns == 2 * takes else returns


class _Flow(TextPipeline):
    """A flow-matching transformer that reads captions."""

    network = "transformer"
    text_batch = 16
    adapters: str | None = "Diffusers, PEFT"
    noised_by = "flow matching"

    process: FlowMatching

    @classmethod
    def _flow_options(cls, network: Any, trained: dict[str, Any], name: str) -> dict[str, Any]:
        patch = cls._patch_of(network)
        return super()._flow_options(network, trained, name) | {"patch": patch}

    @classmethod
    def _patch_of(cls, network: Any) -> int:
        """Latent pixels along one side of a token."""
        return int(network.config["patch_size"])

    def _set_times(self, scheduler: Any, count: int, shape: Sequence[int]) -> None:
        options = {}
        if scheduler.config["use_dynamic_shifting"]:
            options["mu"] = shift_of(scheduler, self.process.tokens(shape))
        scheduler.set_timesteps(count, **options)


class StableDiffusion3(_Flow):
    """Stable Diffusion 3 and 3.5: an MMDiT that reads two CLIPs and a T5, which may be missing.

    Trained as in the paper: timesteps are logit-normal, the velocity's error is not weighed.

    Attributes:
        module: a `diffusers.SD3Transformer2DModel`.

    Source:
        Esser et al. 2024 (arXiv:2403.03206).
    """

    parts: ClassVar[dict[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5TokenizerFast",
    }
    optional = ("text_encoder_3", "tokenizer_3")
    without: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    flow: ClassVar[dict[str, Any]] = {"density": "logit_normal"}
    guidance_scale = 7.0
    num_inference_steps = 28

    @property
    def patch(self) -> int:
        """See `LatentPipeline`."""
        return int(self.module.config["patch_size"])

    def input_shape(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """See `LatentPipeline.input_shape`; raises as there, or a side is too long."""
        longest = int(self.module.config["pos_embed_max_size"]) * self.patch * self.factor
        if max(pixels[1:]) > longest:
            raise ValueError(
                f"images must have sides of at most {longest} pixels, whose places the network "
                f"knows, got {pixels[2]}x{pixels[1]} pixels"
            )
        return super().input_shape(pixels)

    @property
    def tokens(self) -> int:
        """See `TextPipeline`."""
        return 256

    def _encode(self, captions: list[str], device: torch.device) -> Condition:
        """What the pipeline makes of captions: hidden states, and the CLIPs' pooled outputs."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            captions,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        called = self.module if module is None else module
        time = self.process.time(timesteps, noisy.shape[1:])
        prediction: Tensor = called(hidden_states=noisy, timestep=time, **condition).sample
        return prediction

    def _more(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    def _text_width(self) -> tuple[int, int]:
        reads = int(self.module.config["joint_attention_dim"])
        t5 = self.encoders.get("text_encoder_3")
        return reads, reads if t5 is None else int(t5.config.d_model)

    def _pooled_width(self) -> tuple[int, int]:
        clips = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        width = sum(int(clip.config.projection_dim) for clip in clips)
        return int(self.module.config["pooled_projection_dim"]), width


class Flux(_Flow):
    """FLUX.1: an MMDiT of packed latents that reads a CLIP's pooled output and a T5.

    Trained as Diffusers' script does: timesteps are uniform, the velocity's error is not weighed.

    Args:
        pipeline: of Diffusers.
        process: of its training schedule.
        guidance: that a model with embedded guidance was trained with, which no file says.

    Attributes:
        module: a `diffusers.FluxTransformer2DModel`.
        guidance: as above; None for one that embeds none (schnell).

    Source:
        Diffusers' pipeline_flux.py and train_dreambooth_lora_flux.py.
    """

    parts: ClassVar[dict[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5TokenizerFast",
    }
    without: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    adapters = "Diffusers, PEFT, kohya, XLabs, fal"
    guidance_scale: float | None = 3.5
    num_inference_steps = 28

    def __init__(self, pipeline: Any, process: Process, guidance: float | None = None) -> None:
        super().__init__(pipeline, process)
        embeds = bool(self.module.config["guidance_embeds"])
        if guidance is not None and not embeds:
            raise ModelError(
                f"the trained guidance must go with a model that embeds it, got {guidance:g} for "
                "one without guidance_embeds"
            )
        self.guidance = (TRAINED_GUIDANCE if guidance is None else guidance) if embeds else None
        if not embeds:
            # schnell is distilled to a few steps
            self.guidance_scale, self.num_inference_steps = None, 4

    @property
    def patch(self) -> int:
        """See `LatentPipeline`."""
        return 2

    @classmethod
    def _patch_of(cls, network: Any) -> int:
        return 2

    @property
    def size(self) -> int:
        """See `Denoiser`; as the pipeline's default."""
        return int(self.pipeline.default_sample_size) * self.factor

    @property
    def tokens(self) -> int:
        """See `TextPipeline`; schnell was made for half as many."""
        return 256 if self.guidance is None else 512

    def identity(self) -> dict[str, str]:
        """See `LatentPipeline.identity`; with the guidance that is embedded."""
        told = {} if self.guidance is None else {"guidance": f"{self.guidance:g}"}
        return super().identity() | told

    def _encode(self, captions: list[str], device: torch.device) -> Condition:
        """The T5's hidden states and the CLIP's pooled output."""
        hidden, pooled, _ = self.pipeline.encode_prompt(
            captions, None, device=device, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`; the latents are packed and unpacked as the pipeline does."""
        called = self.module if module is None else module
        rows, channels, height, width = noisy.shape
        pipeline, text = self.pipeline, condition["encoder_hidden_states"]
        guidance = None if self.guidance is None else noisy.new_full((rows,), self.guidance)
        prediction: Tensor = called(
            hidden_states=pipeline._pack_latents(noisy, rows, channels, height, width),
            timestep=self.process.time(timesteps, noisy.shape[1:]) / 1000,
            guidance=guidance,
            img_ids=pipeline._prepare_latent_image_ids(
                rows, height // 2, width // 2, noisy.device, noisy.dtype
            ),
            txt_ids=noisy.new_zeros(text.shape[1], 3),
            **condition,
        ).sample
        return self._unpacked(prediction, (height * self.factor, width * self.factor))

    def _unpacked(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        unpacked: Tensor = self.pipeline._unpack_latents(latents, *size, self.factor)
        return unpacked

    def _set_times(self, scheduler: Any, count: int, shape: Sequence[int]) -> None:
        mu = shift_of(scheduler, self.process.tokens(shape))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=mu)

    def _guidance(self, chosen: float | None) -> float:
        if self.guidance_scale is None and chosen:
            raise ValueError(
                f"guidance_scale must be None or 0 for a model without guidance, got {chosen:g}"
            )
        return super()._guidance(chosen)

    def _more(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    @classmethod
    def _options(cls, trained: dict[str, Any]) -> dict[str, Any]:
        return {"guidance": trained.get("guidance")}

    def _latent_channels(self) -> tuple[int, int]:
        takes, returns = super()._latent_channels()
        return takes // 4, returns // 4

    def _text_width(self) -> tuple[int, int]:
        t5 = self.pipeline.text_encoder_2
        return int(self.module.config["joint_attention_dim"]), int(t5.config.d_model)

    def _pooled_width(self) -> tuple[int, int]:
        clip = self.pipeline.text_encoder
        return int(self.module.config["pooled_projection_dim"]), int(clip.config.hidden_size)
