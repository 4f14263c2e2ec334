"""Stable Diffusion with a LoRA: the base from a folder that Diffusers wrote, and its adapter."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..runs.choices import GUIDANCE_SCALE
from .lora import LoraError, add_lora, hash_base, hash_lora, load_lora, lora_names
from .unet import DiffusionModel, ModelError, hash_model
from .unet import load_schedule as load_schedule
from .unet import read_json as read_json

# pictures drawn, and kept, at a time
DRAWN_TOGETHER = 8
# what `dtrak.train_lora` writes beside a LoRA
TRAINING_FILE = "training.json"
_TEXT_BATCH = 64
# embeddings kept; at 77 tokens of 768 numbers each takes 0.24 MB
_MAX_EMBEDDINGS = 4096
_PARTS = ("unet", "vae", "text_encoder", "tokenizer")
_HUB_HINT = "a folder that Diffusers wrote, or a hub name such as owner/name"


@dataclass(frozen=True, eq=False)
class TextToImageModel(DiffusionModel):
    """A latent diffusion model that reads captions, its U-Net with a LoRA.

    The U-Net sees latents ``[R, C, h, w]``: VAE latents times the VAE's scaling factor. Images are
    ``[N, 3, H, W]`` in [-1, 1], ``factor`` times as large.

    Attributes:
        unet: a `diffusers.UNet2DConditionModel`, with an adapter where one was loaded.
        scheduler: its training schedule.
        vae: a `diffusers.AutoencoderKL`, float32.
        text_encoder: a `transformers.CLIPTextModel`, float32.
        tokenizer: its `transformers.CLIPTokenizer`.
    """

    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    _embeddings: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def channels(self) -> int:
        """Image channels the VAE takes."""
        return int(self.vae.config["in_channels"])

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def size(self) -> int | tuple[int, int] | None:
        """Image size the model was made for, in pixels: a side, (height, width), or unknown."""
        size = super().size
        if size is None or isinstance(size, int):
            return size and size * self.factor
        return size[0] * self.factor, size[1] * self.factor

    @property
    def lora_names(self) -> list[str]:
        """Names of the trainable parameters of the U-Net, in ``named_parameters()`` order."""
        return lora_names(self.unet)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of all weights that decide the features; those of frozen parts are made once."""
        return self._frozen_identity | {"lora": hash_lora(self.unet)}

    @functools.cached_property
    def _frozen_identity(self) -> dict[str, str]:
        return {
            "model": hash_base(self.unet),
            "vae": hash_model(self.vae),
            "text_encoder": hash_model(self.text_encoder),
        }

    def save(self, folder: str | Path) -> None:
        """Refused: save the adapter with `dtrak.models.lora.save_lora`; the base is where it was.

        Raises:
            ModelError: always.
        """
        raise ModelError("a text-to-image model is its base and its LoRA: save the LoRA")

    @property
    def max_tokens(self) -> int:
        """Tokens a caption may have, with the two at its ends; the rest is cut off."""
        limit = int(self.text_encoder.config.max_position_embeddings)
        return min(int(self.tokenizer.model_max_length), limit)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of every caption, ``max_tokens`` each; warns of captions that are cut."""
        with quiet("transformers.tokenization_utils_base"):
            # one call, two lengths: the tokenizer does not say what it cut
            whole = self.tokenizer(list(captions)).input_ids if captions else []
            cut = [
                caption
                for caption, row in zip(captions, whole, strict=True)
                if len(row) > self.max_tokens
            ]
            if cut:
                warnings.warn(
                    f"{len(cut)} captions have more than {self.max_tokens} tokens and are cut; the "
                    f"first: {cut[0][:60]!r}",
                    stacklevel=2,
                )
            return self._token_rows(captions)

    def _token_rows(self, captions: Sequence[str]) -> list[list[int]]:
        if not captions:
            return []
        rows: list[list[int]] = self.tokenizer(
            list(captions), padding="max_length", max_length=self.max_tokens, truncation=True
        ).input_ids
        return rows

    @torch.no_grad()
    def embed(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """What the U-Net reads: the text encoder's last hidden state.

        Every distinct caption is encoded once.

        Args:
            captions: B texts, cut after `max_tokens`.
            device: where the result goes and the text encoder works.

        Returns:
            ``[B, T, D]`` float32.
        """
        missing = [text for text in dict.fromkeys(captions) if text not in self._embeddings]
        self.text_encoder.to(device)
        fresh: dict[str, Tensor] = {}
        for first in range(0, len(missing), _TEXT_BATCH):
            chosen = missing[first : first + _TEXT_BATCH]
            ids = torch.tensor(self._token_rows(chosen), device=device)
            hidden = self.text_encoder(ids)[0].float()
            fresh.update(zip(chosen, hidden.unbind(), strict=True))
        rows = [fresh[t] if t in fresh else self._embeddings[t].to(device) for t in captions]
        result = torch.stack(rows)
        self._embeddings.update(fresh)
        while len(self._embeddings) > _MAX_EMBEDDINGS:
            del self._embeddings[next(iter(self._embeddings))]
        return result

    def embed_apart(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """As `embed`, each caption by itself, so that its bits do not depend on the others."""
        return torch.cat([self.embed([caption], device) for caption in captions])

    @torch.no_grad()
    def encode(self, images: Tensor, device: torch.device) -> Tensor:
        """The VAE's posterior of images, in the U-Net's units.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1], sides multiples of ``factor``.
            device: where the VAE works.

        Returns:
            ``[B, 2, C, h, w]`` float32 on the device: mean (which is the mode) and standard
            deviation, both times the scaling factor, the mean shifted as the VAE's configuration
            says.

        Raises:
            ValueError: a side is no multiple of ``factor``.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images must have sides that are multiples of {self.factor}, got "
                f"{width}x{height} pixels"
            )
        self.vae.to(device)
        posterior = self.vae.encode(images.to(device, torch.float32)).latent_dist
        scale = float(self.vae.config["scaling_factor"])
        shift = float(self.vae.config.get("shift_factor") or 0.0)
        return torch.stack([(posterior.mean - shift) * scale, posterior.std * scale], dim=1)


def is_text_to_image(folder: str | Path) -> bool:
    """Whether a folder holds a pipeline of Diffusers that reads captions."""
    file = Path(folder) / "model_index.json"
    return file.is_file() and "StableDiffusion" in str(read_json(file).get("_class_name"))


def load_text_to_image(
    folder: str | Path, lora: str | Path | None = None, *, rank: int | None = None, seed: int = 0
) -> TextToImageModel:
    """Load Stable Diffusion and an adapter.

    Args:
        folder: a Stable Diffusion pipeline that Diffusers wrote (1.x or 2.x: one U-Net, one VAE,
            one CLIP text encoder), or a hub name ``owner/name``, of which only what is needed is
            downloaded, once.
        lora: as in `dtrak.models.lora.load_lora`; None loads the base alone.
        rank: put a fresh adapter of this rank in instead, to train it.
        seed: of the fresh adapter.

    Returns:
        The model in evaluation mode, float32, on the CPU; only the adapter requires gradients.

    Raises:
        FileNotFoundError: there is no such folder, file or hub name.
        ModelError: the folder holds another kind of model, is incomplete or unreadable, or its
            parts do not fit each other.
        LoraError: as in `dtrak.models.lora.load_lora` and `dtrak.models.lora.add_lora`.
    """
    base = _find_base(folder)
    _check_pipeline(base)
    unet = _load_part(UNet2DConditionModel, base / "unet")
    vae = _load_part(AutoencoderKL, base / "vae")
    text_encoder, tokenizer = _load_text(base)
    model = TextToImageModel(unet, load_schedule(base), vae, text_encoder, tokenizer)
    _check_parts(model, base)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False)
    if lora is not None:
        load_lora(unet, lora)
        _check_origin(unet, Path(lora), base)
    elif rank is not None:
        add_lora(unet, rank, seed=seed)
    for part in (unet, vae, text_encoder):
        part.eval()
    return model


def _find_base(folder: str | Path) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    name = str(folder)
    if isinstance(folder, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model must be {_HUB_HINT}, got {folder}")
    from diffusers import DiffusionPipeline

    try:
        with quiet("diffusers.pipelines.pipeline_utils"):
            return Path(DiffusionPipeline.download(name))
    # the hub's client raises whatever the network does
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"model must be {_HUB_HINT}, got {name!r}, which is no folder and cannot be "
            f"downloaded: {reason}"
        ) from error


def _check_pipeline(base: Path) -> None:
    index = base / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model must be a Stable Diffusion pipeline, got {base} without {index}")
    kind = read_json(index).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"{index} must describe a StableDiffusionPipeline, got {kind!r}")
    for name in _PARTS:
        if not (base / name).is_dir():
            raise ModelError(f"{base} must hold the folder {name}")
    config = read_json(base / "unet" / "config.json")
    reads = [
        key
        for key in ("addition_embed_type", "class_embed_type", "num_class_embeds")
        if config.get(key)
    ]
    if reads:
        raise ModelError(
            f"{base / 'unet'} must read captions and nothing else, got one with {', '.join(reads)}"
        )


def _load_part(kind: Any, folder: Path) -> Any:
    """A U-Net or VAE in float32; whatever does not fit its configuration is refused."""
    variant = None
    names = [file.name for file in folder.iterdir()]
    if not any(name in names for name in _weight_names("")):
        # a folder downloaded in half precision only
        variant = "fp16" if any(name in names for name in _weight_names(".fp16")) else None
    try:
        with quiet("diffusers.models.modeling_utils"):
            # together the two last options report misfits instead of raising at the first
            part, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                variant=variant,
                output_loading_info=True,
                low_cpu_mem_usage=False,
                ignore_mismatched_sizes=True,
            )
    # whatever a broken configuration makes the constructor raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the model in {folder} could not be loaded: {reason}") from error
    _refuse_misfits(info, folder)
    return part.float()


def _weight_names(variant: str) -> list[str]:
    stem = f"diffusion_pytorch_model{variant}"
    return [f"{stem}.{end}" for end in ("safetensors", "safetensors.index.json", "bin")]


def _load_text(base: Path) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = base / "text_encoder"
    try:
        with quiet("transformers", progress=False):
            loaded: Any = CLIPTextModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            encoder, info = loaded
            tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the CLIP text model in {folder} and {base / 'tokenizer'} could not be loaded: "
            f"{reason}"
        ) from error
    # buffers that older versions stored are listed as unexpected
    _refuse_misfits({**info, "unexpected_keys": []}, folder)
    return encoder.float(), tokenizer


def _refuse_misfits(info: dict[str, Any], folder: Path) -> None:
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


def _check_parts(model: TextToImageModel, base: Path) -> None:
    """Refuse parts that were not made for each other."""
    unet, vae = model.unet.config, model.vae.config
    latents = int(vae["latent_channels"])
    if not unet["in_channels"] == unet["out_channels"] == latents:
        raise ModelError(
            f"the U-Net in {base} must take and return the {latents} channels of its VAE's "
            f"latents, got {unet['in_channels']} and {unet['out_channels']}"
        )
    width = int(model.text_encoder.config.hidden_size)
    if unet["cross_attention_dim"] != width:
        raise ModelError(
            f"the U-Net in {base} must read the {width} numbers per token of its text encoder, got "
            f"{unet['cross_attention_dim']}"
        )
    words, rows = len(model.tokenizer), int(model.text_encoder.config.vocab_size)
    if words > rows:
        raise ModelError(
            f"the tokenizer in {base} must have at most the {rows} tokens of its text encoder, got "
            f"{words}"
        )


def _check_origin(unet: UNet2DConditionModel, lora: Path, base: Path) -> None:
    """Refuse a LoRA that says it was trained on another base of the same shape."""
    file = (lora if lora.is_dir() else lora.parent) / TRAINING_FILE
    if not file.is_file():
        return
    trained_on = read_json(file).get("settings", {}).get("model", {}).get("model")
    if trained_on is not None and trained_on != hash_base(unet):
        raise LoraError(
            f"the LoRA in {lora} must be of the base model in {base}, got one that {file} says was "
            "trained on another"
        )


@torch.no_grad()
def generate_from_prompts(
    model: TextToImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    num_inference_steps: int = 50,
    size: int | tuple[int, int] | None = None,
    batch_size: int = DRAWN_TOGETHER,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image per prompt and seed with DDIM (η = 0) and classifier-free guidance.

    Every image starts from noise of a CPU generator of its own, so it does not depend on which
    others are drawn with it (up to rounding), nor on the device.

    Args:
        model: the model, its U-Net on its device.
        prompts: M texts.
        seeds: M seeds in ``[0, 2**32)``.
        guidance_scale: 1 is no guidance.
        num_inference_steps: DDIM steps, in ``[1, T]``.
        size: of the images in pixels, a side or (height, width); None is the model's own.
        batch_size: images drawn at a time.
        progress: called with (DDIM steps done, DDIM steps), summed over batches, after every step.

    Returns:
        ``[M, 3, H, W]`` float32 in [-1, 1], on the CPU.

    Raises:
        ValueError: there is not one seed for each prompt, a number is out of range, the size is
            unknown or no multiple of the VAE's factor, or an image is not finite (from which seed).

    Source:
        Song et al. 2021 (arXiv:2010.02502); Ho and Salimans 2022 (arXiv:2207.12598); one generator
        per image as in D-TRAK's gen_text_to_image_lora.py at e2a0c2e.
    """
    height, width = check_drawing(
        model, prompts, seeds, guidance_scale, num_inference_steps, size, batch_size
    )
    pipeline = make_pipeline(model)
    device = next(model.unet.parameters()).device
    firsts = range(0, len(seeds), batch_size)
    count = count_steps(progress, len(firsts) * num_inference_steps)
    images = torch.empty(len(seeds), 3, height, width)
    for first in firsts:
        rows = slice(first, first + batch_size)
        drawn = run_pipeline(
            pipeline,
            prompts[rows],
            seeds[rows],
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
            callback_on_step_end=count,
        )
        for seed, image in zip(seeds[rows], drawn, strict=True):
            if not torch.isfinite(image).all():
                raise ValueError(f"the model drew a non-finite image from seed {seed}")
        images[rows] = (drawn.to(torch.float32) * 2 - 1).clamp(-1, 1).cpu()
    model.unet.to(device)
    return images


def run_pipeline(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> Tensor:
    """What a pipeline of Diffusers returns as images, each from a generator of its own."""
    # prompts are cut as captions are, which is said where they are read
    with quiet("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
        drawn: Tensor = pipeline(
            list(prompts),
            eta=0.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **options,
        ).images
    return drawn


def drawing_groups(
    seeds: Sequence[int], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[list[int], Callable[[int, int], None]]]:
    """Seeds to draw together, so that a killed run keeps what it drew.

    Args:
        seeds: of all pictures.
        progress: called with (DDIM steps done, DDIM steps), summed over groups.

    Yields:
        A group, and the ``progress`` of drawing it.
    """
    firsts = range(0, len(seeds), DRAWN_TOGETHER)
    for number, first in enumerate(firsts):

        def report(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(firsts) * total)

        yield list(seeds[first : first + DRAWN_TOGETHER]), report


def count_steps(progress: Callable[[int, int], None] | None, total: int) -> Callable[..., Any]:
    """What a pipeline calls after every step."""
    done = 0

    def count(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)
        return values

    return count


def check_drawing(
    model: TextToImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    num_inference_steps: int,
    size: int | tuple[int, int] | None,
    batch_size: int,
) -> tuple[int, int]:
    """Refuse what `generate_from_prompts` refuses; (height, width) of the images."""
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds must be {len(prompts)}, one for each prompt, got {len(seeds)}")
    for seed in seeds:
        # torch's CPU generator ignores higher bits: two seeds would draw one image
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must be in [0, 2**32), got {seed}")
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(
            f"guidance_scale must be a finite number of at least 0, got {guidance_scale}"
        )
    if not 1 <= num_inference_steps <= model.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be in [1, {model.num_train_timesteps}], got "
            f"{num_inference_steps}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = model.size if size is None else size
    if size is None:
        raise ValueError("the model must have a sample_size to draw from it, got None")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or height % model.factor or width % model.factor:
        raise ValueError(
            f"size must be positive multiples of {model.factor} pixels, got {width}x{height}"
        )
    return height, width


def drawing_scheduler(model: TextToImageModel) -> DDIMScheduler:
    """The DDIM scheduler pictures are drawn with; nothing is clipped."""
    # what Diffusers' pipeline sets anyway, with a page of advice
    return DDIMScheduler.from_config(model.scheduler.config, clip_sample=False, steps_offset=1)


def make_pipeline(model: TextToImageModel) -> Any:
    """Diffusers' own pipeline around the parts of ``model``, on the device of its U-Net."""
    with quiet("transformers", "diffusers"):
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=drawing_scheduler(model),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    device = next(model.unet.parameters()).device
    model.vae.to(device)
    model.text_encoder.to(device)
    return pipeline


@contextmanager
def quiet(*names: str, progress: bool = True) -> Iterator[None]:
    """Without the remarks of the named loggers, and without transformers' own progress bars."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    shown = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not progress and shown:
            transformers_logging.enable_progress_bar()
