"""Stable Diffusion 1 and 2 with a LoRA: pipelines of latents that read captions."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from ..runs.choices import (
    DRAWN_TOGETHER,
    GUIDANCE_SCALE,
    LORA_TARGETS,
    NUM_INFERENCE_STEPS,
    TRAINING_FILE,
)
from .denoiser import (
    Condition,
    Denoiser,
    Drawn,
    ModelError,
    Progress,
    check_seeds,
    check_steps,
)
from .hashing import hash_captions, hash_model
from .lora import (
    LoraError,
    add_lora,
    hash_base,
    hash_lora,
    load_lora,
    lora_names,
    remove_lora,
    save_lora,
)
from .process import DiscreteProcess
from .weights import load_part, load_process, quiet, read_json, refuse_misfits

if TYPE_CHECKING:
    # its import has remarks to make, which `load` leaves out
    from diffusers import StableDiffusionPipeline

_TEXT_BATCH = 64
# embeddings kept; at 77 tokens of 768 numbers each takes 0.24 MB
_MAX_EMBEDDINGS = 4096
_PARTS = ("unet", "vae", "text_encoder", "tokenizer")


class StableDiffusion(Denoiser):
    """A latent diffusion model that reads captions, its U-Net with a LoRA.

    The U-Net sees latents ``[R, C, h, w]``: VAE latents times the VAE's scaling factor. Pictures
    are ``[N, 3, H, W]`` in [-1, 1], ``factor`` times as large. Only the LoRA is attributed.

    Args:
        pipeline: of Diffusers; its parts are in evaluation mode and float32.
        process: of its training schedule.

    Attributes:
        module: the pipeline's `diffusers.UNet2DConditionModel`, with an adapter where one was
            loaded.
        vae: a `diffusers.AutoencoderKL`.
        text_encoder: a `transformers.CLIPTextModel`.
        tokenizer: its `transformers.CLIPTokenizer`.
    """

    reads = "captions"

    module: UNet2DConditionModel
    process: DiscreteProcess

    def __init__(self, pipeline: StableDiffusionPipeline, process: DiscreteProcess) -> None:
        super().__init__(pipeline.unet, process)
        self.pipeline: Any = pipeline
        self.vae: AutoencoderKL = pipeline.vae
        self.text_encoder: Any = pipeline.text_encoder
        self.tokenizer: Any = pipeline.tokenizer
        self._embeddings: dict[str, Tensor] = {}
        self._frozen: dict[str, str] | None = None

    @property
    def channels(self) -> int:
        """Of a picture, which the VAE takes."""
        return int(self.vae.config["in_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def size(self) -> int | tuple[int, int] | None:
        """See `Denoiser`."""
        size = self.module.config["sample_size"]
        if size is None or isinstance(size, int):
            return size and size * self.factor
        return int(size[0]) * self.factor, int(size[1]) * self.factor

    def parameters(self) -> list[str]:
        """Those of the LoRA."""
        return lora_names(self.module)

    def identity(self) -> dict[str, str]:
        """Hashes of all weights that decide the features; those of frozen parts are made once."""
        if self._frozen is None:
            self._frozen = {
                "model": hash_base(self.module),
                "vae": hash_model(self.vae),
                "text_encoder": hash_model(self.text_encoder),
            }
        return self._frozen | {"lora": hash_lora(self.module)}

    def base_identity(self) -> dict[str, str]:
        """Hashes of the frozen parts."""
        identity = self.identity()
        del identity["lora"]
        return identity

    # what goes with a picture

    @property
    def max_tokens(self) -> int:
        """Tokens a caption may have, with the two at its ends; the rest is cut off."""
        limit = int(self.text_encoder.config.max_position_embeddings)
        return min(int(self.tokenizer.model_max_length), limit)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of every caption, ``max_tokens`` each; warns of captions that are cut."""
        if not captions:
            return []
        with quiet("transformers.tokenization_utils_base"):
            # one call, two lengths: the tokenizer does not say what it cut
            whole = self.tokenizer(list(captions)).input_ids
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
            rows: list[list[int]] = self.tokenizer(
                list(captions), padding="max_length", max_length=self.max_tokens, truncation=True
            ).input_ids
            return rows

    def identify_items(self, items: Sequence[str]) -> str:
        """Hash of the captions and of the tokens they are read as."""
        return hash_captions(items, self.tokenize(items))

    def condition(self, items: Sequence[str] | None, device: torch.device) -> Condition:
        """See `Denoiser.condition`: the embedded captions, ``encoder_hidden_states [B, T, D]``."""
        if items is None:
            raise ValueError("captions must be given for a model that reads them, got none")
        return {"encoder_hidden_states": self.embed(items, device)}

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
            # captions are cut, which is said where they are read
            with quiet("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
                hidden, _ = self.pipeline.encode_prompt(
                    chosen, device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            fresh.update(zip(chosen, hidden.float().unbind(), strict=True))
        rows = [fresh[t] if t in fresh else self._embeddings[t].to(device) for t in captions]
        result = torch.stack(rows)
        self._embeddings.update(fresh)
        while len(self._embeddings) > _MAX_EMBEDDINGS:
            del self._embeddings[next(iter(self._embeddings))]
        return result

    # what the U-Net is given

    def input_shape(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """``(C, h, w)`` of the latents of pictures of shape ``(3, H, W)``.

        Raises:
            ValueError: a side of the pictures is no multiple of the VAE's factor.
        """
        *_, height, width = pixels
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images must have sides that are multiples of {self.factor}, got "
                f"{width}x{height} pixels"
            )
        return int(self.vae.config["latent_channels"]), height // self.factor, width // self.factor

    @property
    def encoding(self) -> dict[str, Any]:
        """See `Denoiser.encoding`: the VAE, and how its latents are scaled."""
        return {
            "vae": self.identity()["vae"],
            "scaling_factor": float(self.vae.config["scaling_factor"]),
        }

    def inputs(self, pixels: Tensor, device: torch.device) -> Tensor:
        """The mode of the VAE's posterior, ``[B, C, h, w]`` float32."""
        return self.posterior(pixels, device)[:, 0]

    @torch.no_grad()
    def posterior(self, pixels: Tensor, device: torch.device) -> Tensor:
        """The VAE's posterior of pictures, in the U-Net's units.

        Args:
            pixels: ``[B, 3, H, W]`` in [-1, 1], sides multiples of ``factor``.
            device: where the VAE works.

        Returns:
            ``[B, 2, C, h, w]`` float32 on the device: mean (which is the mode) and standard
            deviation, both times the scaling factor, the mean shifted as the VAE's configuration
            says.

        Raises:
            ValueError: a side is no multiple of ``factor``.
        """
        self.input_shape(pixels.shape[1:])
        self.vae.to(device)
        posterior = self.vae.encode(pixels.to(device, torch.float32)).latent_dist
        scale = float(self.vae.config["scaling_factor"])
        shift = float(self.vae.config.get("shift_factor") or 0.0)
        return torch.stack([(posterior.mean - shift) * scale, posterior.std * scale], dim=1)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        called = self.module if module is None else module
        prediction: Tensor = called(noisy, timesteps, **condition).sample
        return prediction

    # drawing

    def drawing_timesteps(self, num_inference_steps: int) -> list[int]:
        """See `Denoiser.drawing_timesteps`."""
        scheduler = _drawing_scheduler(self.process)
        scheduler.set_timesteps(num_inference_steps)
        timesteps: list[int] = scheduler.timesteps.tolist()
        return timesteps

    def draw(
        self,
        seeds: Sequence[int],
        items: Sequence[Any] | None = None,
        *,
        num_inference_steps: int = NUM_INFERENCE_STEPS,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
        trajectories: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Drawn]:
        """See `Denoiser.draw`: guided by captions, in small batches; trajectories are latents.

        Trajectories are predicted with guidance, in the U-Net's units, and never clipped.

        Source:
            Song et al. 2021 (arXiv:2010.02502); Ho and Salimans 2022 (arXiv:2207.12598); one
            generator per image as in D-TRAK's gen_text_to_image_lora.py at e2a0c2e. Trajectories:
            Journey-TRAK (arXiv:2312.06205) as D-TRAK computes it
            (TRAK_gen_sampling_trajectory.ipynb at e2a0c2e).
        """
        batch_size = DRAWN_TOGETHER if batch_size is None else batch_size
        guidance = GUIDANCE_SCALE if guidance_scale is None else guidance_scale
        if items is None:
            raise ValueError("prompts must be given for a model that reads them, got none")
        if len(items) != len(seeds):
            raise ValueError(f"seeds must be {len(items)}, one for each prompt, got {len(seeds)}")
        check_seeds(seeds)
        if not 0 <= guidance < math.inf:
            raise ValueError(
                f"guidance_scale must be a finite number of at least 0, got {guidance}"
            )
        check_steps(num_inference_steps, self.process.num_timesteps, batch_size)
        height, width = self._drawn_size(size)
        options = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
        }
        return self._draw(seeds, items, options, batch_size, trajectories, progress)

    def _drawn_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        chosen = self.size if size is None else size
        if chosen is None:
            raise ValueError("the model must have a sample_size to draw from it, got None")
        height, width = (chosen, chosen) if isinstance(chosen, int) else chosen
        if min(height, width) < 1 or height % self.factor or width % self.factor:
            raise ValueError(
                f"size must be positive multiples of {self.factor} pixels, got {width}x{height}"
            )
        return height, width

    @torch.no_grad()
    def _draw(
        self,
        seeds: Sequence[int],
        prompts: Sequence[str],
        options: dict[str, Any],
        batch_size: int,
        trajectories: bool,
        progress: Progress | None,
    ) -> Iterator[Drawn]:
        firsts = range(0, len(seeds), batch_size)
        count = _count_steps(progress, len(firsts) * options["num_inference_steps"])
        for first in firsts:
            rows, device = slice(first, first + batch_size), self.device
            chosen = list(seeds[rows])
            predicted: list[Tensor] = []
            pipeline = self._drawing_pipeline(predicted if trajectories else None)
            drawn = pipeline(
                list(prompts[rows]),
                eta=0.0,
                generator=[torch.Generator().manual_seed(seed) for seed in chosen],
                output_type="pt",
                callback_on_step_end=count,
                **options,
            ).images
            self.module.to(device)
            paths = torch.stack(predicted, 1) if trajectories else None
            for row, seed in enumerate(chosen):
                if not torch.isfinite(drawn[row]).all():
                    raise ValueError(f"the model drew a non-finite image from seed {seed}")
                if paths is not None and not torch.isfinite(paths[row]).all():
                    raise ValueError(f"the model predicted non-finite latents from seed {seed}")
            yield Drawn(chosen, (drawn.to(torch.float32) * 2 - 1).clamp(-1, 1).cpu(), paths)

    def _drawing_pipeline(self, predicted: list[Tensor] | None) -> Callable[..., Any]:
        """The pipeline on the device of the U-Net, with the scheduler pictures are drawn with.

        Args:
            predicted: gets the clean latents predicted at every step; None to look at none.
        """
        pipeline, scheduler = self.pipeline, _drawing_scheduler(self.process)
        pipeline.unet, pipeline.scheduler = self.module, scheduler
        pipeline.set_progress_bar_config(disable=True)
        self.vae.to(self.device)
        self.text_encoder.to(self.device)
        if predicted is not None:
            step = scheduler.step

            # the pipeline reads from the signature which options the scheduler takes
            @functools.wraps(step)
            def record(*arguments: Any, **options: Any) -> tuple[Tensor]:
                result = step(*arguments, **{**options, "return_dict": True})
                predicted.append(result.pred_original_sample.float().cpu())
                return (result.prev_sample,)

            scheduler.step = record

        def run(*arguments: Any, **options: Any) -> Any:
            # prompts are cut as captions are, which is said where they are read
            with quiet("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
                return pipeline(*arguments, **options)

        return run

    # what is trained

    def put_adapter(self, rank: int, *, seed: int = 0, targets: Sequence[str] = ()) -> Self:
        """See `Denoiser.put_adapter` and `lora.add_lora`; attention layers by default."""
        remove_lora(self.module)
        add_lora(self.module, rank, seed=seed, targets=targets or LORA_TARGETS)
        return self

    def load_adapter(self, folder: str | Path) -> Self:
        """Put a LoRA from a folder or file in the place of the one there is, if any.

        Raises:
            FileNotFoundError, LoraError: as `lora.load_lora`.
        """
        remove_lora(self.module)
        load_lora(self.module, folder)
        self.module.eval()
        return self

    def save(self, folder: str | Path) -> None:
        """Write the LoRA as a folder that `load` and Diffusers read; the base is where it was.

        Raises:
            ModelError: there is no LoRA.
        """
        if not self.parameters():
            raise ModelError("a text-to-image model must have a LoRA to be written, got none")
        save_lora(self.module, folder)

    @classmethod
    def load(cls, base: Path, lora: str | Path | None = None) -> StableDiffusion:
        """Load Stable Diffusion and an adapter.

        Args:
            base: a Stable Diffusion pipeline that Diffusers wrote (1.x or 2.x: one U-Net, one VAE,
                one CLIP text encoder).
            lora: as in `lora.load_lora`; None loads the base alone.

        Returns:
            The model in evaluation mode, float32, on the CPU; only the adapter requires gradients.

        Raises:
            FileNotFoundError: there is no such LoRA.
            ModelError: the folder is incomplete or unreadable, or its parts do not fit each other.
            LoraError: as in `lora.load_lora`, or the LoRA says that it was trained on another base.
        """
        _check_pipeline(base)
        parts = {
            "unet": load_part(UNet2DConditionModel, base / "unet"),
            "vae": load_part(AutoencoderKL, base / "vae"),
            **_load_text(base),
        }
        process = load_process(base)
        with quiet("transformers", "diffusers", progress=False):
            pipeline = DiffusionPipeline.from_pretrained(
                base,
                local_files_only=True,
                scheduler=_drawing_scheduler(process),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **parts,
            )
        model = cls(pipeline, process)
        _check_parts(model, base)
        for part in (model.module, model.vae, model.text_encoder):
            part.requires_grad_(False)
            part.eval()
        if lora is not None:
            model.load_adapter(lora)
            _check_origin(model, Path(lora), base)
        return model


def _drawing_scheduler(process: DiscreteProcess) -> DDIMScheduler:
    """What pictures are drawn with; nothing is clipped."""
    # what Diffusers' pipeline sets anyway, with a page of advice
    config = process.scheduler.config
    return DDIMScheduler.from_config(config, clip_sample=False, steps_offset=1)


def _check_pipeline(base: Path) -> None:
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


def _load_text(base: Path) -> dict[str, Any]:
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
    refuse_misfits({**info, "unexpected_keys": []}, folder)
    # a tokenizer that does not say how long a text may be is told
    longest = int(encoder.config.max_position_embeddings)
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), longest)
    return {"text_encoder": encoder.float(), "tokenizer": tokenizer}


def _check_parts(model: StableDiffusion, base: Path) -> None:
    """Refuse parts that were not made for each other."""
    unet, vae = model.module.config, model.vae.config
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


def _check_origin(model: StableDiffusion, lora: Path, base: Path) -> None:
    """Refuse a LoRA that says it was trained on another base of the same shape."""
    file = (lora if lora.is_dir() else lora.parent) / TRAINING_FILE
    if not file.is_file():
        return
    trained_on = read_json(file).get("settings", {}).get("model", {}).get("model")
    if trained_on is not None and trained_on != model.base_identity()["model"]:
        raise LoraError(
            f"the LoRA in {lora} must be of the base model in {base}, got one that {file} says was "
            "trained on another"
        )


def _count_steps(progress: Progress | None, total: int) -> Callable[..., Any]:
    """What a pipeline calls after every step."""
    done = 0

    def count(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)
        return values

    return count
