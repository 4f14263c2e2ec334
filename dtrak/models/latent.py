"""Pipelines whose network sees the latents of a VAE: loaded whole, with or without an adapter."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..runs.choices import LORA_TARGETS, TRAINING_FILE
from ..runs.measure import available_bytes
from .denoiser import (
    Condition,
    Denoiser,
    Drawn,
    ModelError,
    Progress,
    check_seeds,
    check_size,
    check_steps,
)
from .hashing import hash_captions, hash_model
from .lora import (
    LoraError,
    add_lora,
    adopt_lora,
    hash_base,
    hash_lora,
    load_lora,
    lora_names,
    lora_weights,
    remove_lora,
    save_lora,
)
from .places import INDEX, Place
from .process import FlowMatching, Process
from .weights import load_component, load_process, quiet, read_json, read_process

_HALVES = ("bfloat16", "float16")
# how a VAE's configuration says that its latents are shifted and scaled
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# bytes of embedded captions that are kept, or more where there is more memory
_KEPT_BYTES = 2**31


class LatentPipeline(Denoiser):
    """A pipeline of Diffusers: a network of latents, its VAE, and what reads the condition.

    The network sees latents ``[R, C, h, w]``: VAE latents minus the VAE's shift, times its scaling
    factor. Pictures are ``[N, 3, H, W]`` in [-1, 1], ``factor`` times as large. With an adapter
    only that is attributed, without one every parameter of the network.

    Args:
        pipeline: of Diffusers; its parts are in evaluation mode and float32.
        process: of its training schedule.

    Attributes:
        parts: of the pipeline that must be there, and their classes.
        optional: those of them that may be missing.
        without: arguments of the pipeline's class, for what is left out.
        network: the part that is differentiated.
        flow: how a flow-matching model of this kind is trained, see `process.FlowMatching`.
        targets: ends of the names of the layers that a fresh adapter is put into.
        sampler_changes: of the scheduler that draws.
        module: the network, with an adapter where one was loaded.
        vae: a `diffusers.AutoencoderKL`, or what encodes and decodes like one.
        of_videos: whether that takes videos, of which a picture is one frame.
        patch: latent pixels along one side of what the network takes as one.
    """

    parts: ClassVar[dict[str, str]]
    optional: tuple[str, ...] = ()
    without: ClassVar[dict[str, Any]] = {}
    network = "unet"
    noised_by = "discrete"
    flow: ClassVar[dict[str, Any]] = {}
    targets: Sequence[str] = LORA_TARGETS
    sampler_changes: ClassVar[dict[str, Any]] = {}
    of_videos = False

    module: Any

    def __init__(self, pipeline: Any, process: Process) -> None:
        super().__init__(getattr(pipeline, self.network), process)
        self.pipeline = pipeline
        self.vae = pipeline.vae
        self._frozen: dict[str, str] = {}

    @property
    def channels(self) -> int:
        """Of a picture, which the VAE takes."""
        config = self.vae.config
        return int(config.get("in_channels") or config["input_channels"])

    @property
    def latent_channels(self) -> int:
        """Of what the VAE makes of a picture."""
        config = self.vae.config
        return int(config.get("latent_channels") or config["z_dim"])

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        config = self.vae.config
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        return int(2 ** (len(blocks) - 1) if blocks else self.vae.spatial_compression_ratio)

    @property
    def patch(self) -> int:
        """See the class."""
        return 1

    @property
    def size(self) -> int | tuple[int, int] | None:
        """See `Denoiser`."""
        size = self.module.config["sample_size"]
        if size is None or isinstance(size, int):
            return size and size * self.factor
        return int(size[0]) * self.factor, int(size[1]) * self.factor

    @property
    def has_adapter(self) -> bool:
        """See `Denoiser`."""
        return bool(lora_names(self.module))

    def parameters(self) -> list[str]:
        """Those of the adapter where there is one, else all that require gradients."""
        return lora_names(self.module) or super().parameters()

    @property
    def encoders(self) -> dict[str, Any]:
        """What reads captions, by the name of the part."""
        names = [name for name in self.parts if name.startswith("text_encoder")]
        found = {name: getattr(self.pipeline, name) for name in names}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def identity(self) -> dict[str, str]:
        """Hashes of all weights that decide features; of what an adapter leaves alone, once."""
        frozen = {"vae": self.vae, **self.encoders}
        for name, part in frozen.items():
            if name not in self._frozen:
                self._frozen[name] = hash_model(part)
        hashes = {name: self._frozen[name] for name in frozen}
        if not self.has_adapter:
            return {"model": hash_base(self.module), **hashes}
        if "model" not in self._frozen:
            self._frozen["model"] = hash_base(self.module)
        return {"model": self._frozen["model"], **hashes, "lora": hash_lora(self.module)}

    def base_identity(self) -> dict[str, str]:
        """Hashes without the adapter's."""
        return {name: value for name, value in self.identity().items() if name != "lora"}

    # what the network is given

    def input_shape(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """``(C, h, w)`` of the latents of pictures of shape ``(3, H, W)``.

        Raises:
            ValueError: a side of the pictures is no multiple of what one token covers.
        """
        *_, height, width = pixels
        step = self.factor * self.patch
        if height % step or width % step or not min(height, width):
            raise ValueError(
                f"images must have sides that are multiples of {step}, got {width}x{height} pixels"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    @property
    def encoding(self) -> dict[str, Any]:
        """See `Denoiser.encoding`: the VAE, and how its latents are shifted and scaled."""
        if "vae" not in self._frozen:
            self._frozen["vae"] = hash_model(self.vae)
        found: dict[str, Any] = {"vae": self._frozen["vae"]}
        for name in SCALES:
            value = self.vae.config.get(name)
            if value:
                found[name] = list(value) if isinstance(value, list | tuple) else float(value)
        return found

    def scaling(self, shape: Sequence[int]) -> tuple[float | Tensor, float | Tensor]:
        """What is taken off the VAE's latents, and what they are multiplied with then.

        Args:
            shape: ``(C, h, w)`` of the latents.

        Returns:
            Numbers, or float32 tensors that broadcast to the shape.
        """
        scale, shift, mean, std = (self.vae.config.get(name) for name in SCALES)
        if mean is None or std is None:
            return float(shift or 0.0), float(scale or 1.0)
        by_channel = torch.tensor([mean, std]).view(2, -1, 1, 1)
        return by_channel[0] + float(shift or 0.0), float(scale or 1.0) / by_channel[1]

    def inputs(self, pixels: Tensor, device: torch.device) -> Tensor:
        """The mode of the VAE's posterior, ``[B, C, h, w]`` float32."""
        return self.posterior(pixels, device)[:, 0]

    @torch.no_grad()
    def posterior(self, pixels: Tensor, device: torch.device) -> Tensor:
        """The VAE's posterior of pictures, in the network's units.

        Args:
            pixels: ``[B, 3, H, W]`` in [-1, 1], sides as in `input_shape`.
            device: where the VAE works.

        Returns:
            ``[B, 2, C, h, w]`` float32 on the device: mean (which is the mode) and standard
            deviation, both times the scaling factor, the mean shifted as the VAE's configuration
            says.

        Raises:
            ValueError: as `input_shape`.
        """
        shift, scale = (
            x.to(device) if isinstance(x, Tensor) else x
            for x in self.scaling(self.input_shape(pixels.shape[1:]))
        )
        self.vae.to(device)
        pixels = pixels.to(device, torch.float32)
        encoded = self.vae.encode(pixels.unsqueeze(2) if self.of_videos else pixels)
        if hasattr(encoded, "latent"):
            # of one that does not draw its latents
            mean, std = encoded.latent, torch.zeros_like(encoded.latent)
        else:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        if self.of_videos:
            mean, std = mean.squeeze(2), std.squeeze(2)
        return torch.stack([(mean - shift) * scale, std * scale], dim=1)

    def prepare(self, items: Sequence[Any] | None, device: torch.device) -> None:
        """See `Denoiser.prepare`; on a CPU there is one memory for all."""
        if device.type != "cpu":
            self.vae.to("cpu")

    # drawing

    def drawing_timesteps(self, num_inference_steps: int) -> list[int]:
        """See `Denoiser.drawing_timesteps`; of a flow those whose noise is nearest."""
        scheduler = self._sampler()
        shape = self.input_shape((self.channels, *self._drawn_size(None)))
        if isinstance(self.process, FlowMatching):
            self._set_times(scheduler, num_inference_steps, shape)
            return self.process.nearest(scheduler.timesteps, shape)
        scheduler.set_timesteps(num_inference_steps)
        timesteps: list[int] = scheduler.timesteps.tolist()
        return timesteps

    def _set_times(self, scheduler: Any, count: int, shape: Sequence[int]) -> None:
        """Set the steps of a flow's scheduler as this kind's pipeline does."""
        scheduler.set_timesteps(count)

    def _sampler(self) -> Any:
        return self.process.sampler(**self.sampler_changes)

    def draw(
        self,
        seeds: Sequence[int],
        items: Sequence[Any] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
        trajectories: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Drawn]:
        """See `Denoiser.draw`: by the pipeline, in small batches; trajectories are latents.

        Trajectories are predicted with guidance, in the network's units, and never clipped.

        Source:
            Ho and Salimans 2022 (arXiv:2207.12598); one generator per image as in D-TRAK's
            gen_text_to_image_lora.py at e2a0c2e. Trajectories: Journey-TRAK (arXiv:2312.06205) as
            D-TRAK computes it (TRAK_gen_sampling_trajectory.ipynb at e2a0c2e).
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        batch_size = self.drawn_together if batch_size is None else batch_size
        self._check_drawn(seeds, items)
        check_seeds(seeds)
        guidance = self._guidance(guidance_scale)
        check_steps(steps, self.process.num_timesteps, batch_size)
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        shape = self._drawn_size(size)
        return self._draw(
            seeds, list(items or []), shape, options, batch_size, trajectories, progress
        )

    @abstractmethod
    def _check_drawn(self, seeds: Sequence[int], items: Sequence[Any] | None) -> None:
        """Refuse items that cannot be drawn from."""

    def _guidance(self, chosen: float | None) -> float:
        guidance = float(self.guidance_scale or 0.0) if chosen is None else chosen
        if not 0 <= guidance < math.inf:
            raise ValueError(
                f"guidance_scale must be a finite number of at least 0, got {guidance}"
            )
        return guidance

    def _drawn_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        chosen = self.size if size is None else size
        if chosen is None:
            raise ValueError("the model must have a sample_size to draw from it, got None")
        return check_size(chosen, self.factor * self.patch)

    @torch.no_grad()
    def _draw(
        self,
        seeds: Sequence[int],
        items: Sequence[Any],
        size: tuple[int, int],
        options: dict[str, Any],
        batch_size: int,
        trajectories: bool,
        progress: Progress | None,
    ) -> Iterator[Drawn]:
        firsts = range(0, len(seeds), batch_size)
        done, total = 0, len(firsts) * options["num_inference_steps"]
        predicted: list[Tensor] = []

        def count(clean: Tensor) -> None:
            nonlocal done
            done += 1
            if trajectories:
                predicted.append(clean.float().cpu())
            if progress is not None:
                progress(done, total)

        for first in firsts:
            rows, device = slice(first, first + batch_size), self.device
            chosen = list(seeds[rows])
            predicted.clear()
            pipeline = self._drawing_pipeline(count, size)
            generators = [torch.Generator().manual_seed(seed) for seed in chosen]
            with quiet(*self._talkers()), self._autocast():
                drawn = self._run(pipeline, items[rows], size, generators, options)
            self.module.to(device)
            # guidance may have doubled the rows
            paths = torch.stack([p[: len(chosen)] for p in predicted], 1) if predicted else None
            for row, seed in enumerate(chosen):
                if not torch.isfinite(drawn[row]).all():
                    raise ValueError(f"the model drew a non-finite image from seed {seed}")
                if paths is not None and not torch.isfinite(paths[row]).all():
                    raise ValueError(f"the model predicted non-finite latents from seed {seed}")
            yield Drawn(chosen, (drawn.to(torch.float32) * 2 - 1).clamp(-1, 1).cpu(), paths)

    @abstractmethod
    def _run(
        self,
        pipeline: Any,
        items: Sequence[Any],
        size: tuple[int, int],
        generators: list[torch.Generator],
        options: dict[str, Any],
    ) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1] that the pipeline draws from items."""

    def _drawing_pipeline(self, seen: Callable[[Tensor], None], size: tuple[int, int]) -> Any:
        """The pipeline on the device of the network, with the scheduler pictures are drawn with.

        Args:
            seen: called with the clean latents that are predicted at every step.
            size: of the pictures.
        """
        pipeline, scheduler = self.pipeline, self._sampler()
        setattr(pipeline, self.network, self.module)
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(disable=True)
        for part in (self.vae, *self.encoders.values()):
            part.to(self.device)
        step = scheduler.step

        # the pipeline reads from the signature which options the scheduler takes
        @functools.wraps(step)
        def record(prediction: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            result = step(prediction, timestep, sample, **{**options, "return_dict": True})
            clean = getattr(result, "pred_original_sample", None)
            if clean is None:
                # Euler's method steps along the velocity, of which all of σ leads to the sample
                clean = sample - scheduler.sigmas[scheduler.step_index - 1] * prediction
            seen(self._unpacked(clean, size))
            return result if options.get("return_dict", True) else (result.prev_sample,)

        scheduler.step = record
        return pipeline

    def _autocast(self) -> Any:
        """Autocast for a network that is kept in 16 bits."""
        dtype = next(self.module.parameters()).dtype
        if dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def _unpacked(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents ``[R, C, h, w]`` of what the pipeline steps with."""
        return latents

    def _talkers(self) -> tuple[str, ...]:
        """Loggers with remarks on captions that are cut, which is said where they are read."""
        return type(self.pipeline).__module__, "transformers.tokenization_utils_base"

    def to(self, device: torch.device, dtype: str | None = None) -> None:
        """See `Denoiser.to`; in a 16-bit dtype what an adapter leaves alone is kept in it.

        That is once and for all: FLUX.1 takes 24 GB.

        Raises:
            ModelError: as there, or the network was made 16-bit before and another dtype is asked
                for.
        """
        base = [p for n, p in self.module.named_parameters() if ".lora_" not in n]
        found = str(base[0].dtype).removeprefix("torch.")
        if found in _HALVES and dtype not in (None, found):
            raise ModelError(
                f"the model was made {found} and must be loaded again for {dtype}: what it lost "
                "does not come back"
            )
        if dtype in _HALVES and self.has_adapter and found != dtype:
            # of the weights as they were
            self.identity()
            for parameter in base:
                parameter.data = parameter.data.to(getattr(torch, dtype))
        super().to(device, dtype)

    # what is trained

    def with_module(self, module: Any) -> Self:
        """See `Denoiser.with_module`."""
        other = super().with_module(module)
        other._frozen = {name: value for name, value in self._frozen.items() if name != "model"}
        return other

    def put_adapter(self, rank: int, *, seed: int = 0, targets: Sequence[str] = ()) -> Self:
        """See `Denoiser.put_adapter` and `lora.add_lora`; attention layers by default."""
        self._take_adapter()
        add_lora(self.module, rank, seed=seed, targets=targets or self.targets)
        return self

    def load_adapter(self, folder: str | Path) -> Self:
        """Put a LoRA from a folder or file in the place of the one there is, if any.

        Raises:
            FileNotFoundError, LoraError: as `lora.load_lora`.
        """
        self._take_adapter()
        load_lora(self.module, folder)
        return self

    def _take_adapter(self) -> None:
        """Take the adapter out, if any; without one the network may have been trained meanwhile."""
        if not self.has_adapter:
            self._frozen.pop("model", None)
        remove_lora(self.module)

    def adapter(self) -> dict[str, Any]:
        """See `Denoiser.adapter`.

        Raises:
            ModelError: there is none, its layers have different ranks, or it is a DoRA.
        """
        weights = lora_weights(self.module)
        ranks = {len(weight) for name, weight in weights.items() if ".lora_A." in name}
        if len(ranks) != 1 or any("magnitude" in name for name in weights):
            raise ModelError(
                f"the LoRA must have one rank and no magnitudes to be trained anew, got "
                f"{sorted(ranks)}"
            )
        layers = dict.fromkeys(name.partition(".lora_")[0] for name in weights)
        return {"rank": ranks.pop(), "targets": list(layers)}

    def fresh(self, seed: int) -> Self:
        """The same model round an untrained network of the same configuration, without adapter."""
        config = {k: v for k, v in self.module.config.items() if not k.startswith("_")}
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would reseed CUDA devices too
            torch.default_generator.manual_seed(seed)
            fresh = self.with_module(type(self.module)(**config).eval())
        # drawing puts a network into its pipeline
        fresh.pipeline = copy.copy(self.pipeline)
        return fresh

    def save(self, folder: str | Path) -> None:
        """Write the adapter, or the whole pipeline where there is none, as `load` reads it."""
        if self.has_adapter:
            save_lora(self.module, folder)
            return
        pipeline = self.pipeline
        setattr(pipeline, self.network, self.module)
        # as trained: drawing changes it
        pipeline.scheduler = self.process.scheduler  # type: ignore[attr-defined]
        with quiet("transformers", "diffusers", progress=False):
            pipeline.save_pretrained(folder)

    @classmethod
    def load(cls, place: Place, lora: str | Path | None = None, **trained: Any) -> Self:
        """Load a pipeline, and an adapter.

        Args:
            place: of a folder that Diffusers wrote, and of its network if that lies elsewhere.
            lora: as in `lora.load_lora`; None loads the base alone.
            trained: as in `models.load`.

        Returns:
            The model in evaluation mode, float32, on the CPU; only what is attributed requires
            gradients.

        Raises:
            FileNotFoundError: there is no such LoRA.
            ModelError: the folder is incomplete or unreadable, or its parts do not fit each other;
                this kind is not trained in such ways.
            LoraError: as in `lora.load_lora`, or the LoRA says that it was trained on another base.
        """
        base = place.pipeline
        assert base is not None
        index = read_json(base / INDEX)
        options = cls._options(trained)
        kinds, network = cls._described(index)
        parts: dict[str, Any] = {}
        for name in kinds:
            if name in cls.optional and index.get(name, [None])[0] is None:
                parts[name] = None
            elif not (base / name).is_dir():
                raise ModelError(f"{base} must hold the folder {name}")
        cls._check_folder(base)
        for name, kind in kinds.items():
            if name == network and place.config is not None:
                parts[name] = load_component(kind, place.config, place.network, place.weights)
            elif name not in parts:
                parts[name] = load_component(kind, base / name)
        _match_tokenizers(parts)
        flow = cls._flow_options(parts[network], trained, str(base))
        process = cls._check_process(load_process(base, **flow), str(base))
        try:
            with quiet("transformers", "diffusers", progress=False):
                pipeline = DiffusionPipeline.from_pretrained(
                    base,
                    local_files_only=True,
                    scheduler=process.sampler(**cls.sampler_changes),
                    **cls.without,
                    **parts,
                )
        # whatever a broken index makes it raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"the pipeline in {base} could not be loaded: {reason}") from error
        model = cls(pipeline, process, **options)
        for part in (model.vae, *model.encoders.values()):
            part.requires_grad_(False).eval()
        model.module.eval()
        model._check_parts(base)
        if lora is not None:
            model.load_adapter(lora)
            _check_origin(model, Path(lora), base)
        return model

    @classmethod
    def wrap(cls, pipeline: Any, **trained: Any) -> Self:
        """A pipeline in memory, with the adapter that is in it, if any; see `models.wrap`.

        Raises:
            ModelError: a part is missing, or as `load`.
            LoraError: it has several adapters, or one that is merged into the weights.
        """
        options, name = cls._options(trained), f"the {type(pipeline).__name__}"
        missing = [
            part
            for part in cls.parts
            if getattr(pipeline, part, None) is None and part not in cls.optional
        ]
        if missing:
            raise ModelError(f"{name} must have its {', '.join(missing)}, got none")
        network, scheduler = getattr(pipeline, cls._network_of(pipeline)), pipeline.scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        flow = cls._flow_options(network, trained, name)
        process = cls._check_process(read_process(config, name, **flow), name)
        model = cls(pipeline, process, **options)
        for part in (model.vae, *model.encoders.values()):
            part.float().requires_grad_(False).eval()
        network.float().eval()
        model._check_parts(name)
        adopt_lora(network)
        return model

    @classmethod
    def _described(cls, index: Mapping[str, Any]) -> tuple[dict[str, str], str]:
        """The parts that must be there and their classes, and which is the network."""
        return cls.parts, cls.network

    @classmethod
    def _network_of(cls, pipeline: Any) -> str:
        return cls.network

    @classmethod
    def _options(cls, trained: dict[str, Any]) -> dict[str, Any]:
        """What the class takes beside pipeline and process, of how it was trained."""
        if trained.get("guidance") is not None:
            raise ModelError(
                f"the trained guidance must go with a model that embeds it, got "
                f"{trained['guidance']:g} for a {cls.__name__}"
            )
        return {}

    @classmethod
    def _flow_options(cls, network: Any, trained: dict[str, Any], name: str) -> dict[str, Any]:
        """Options of `process.FlowMatching`, of this kind or as said."""
        chosen = {k: v for k, v in trained.items() if k != "guidance" and v is not None}
        if chosen and cls.noised_by == "discrete":
            raise ModelError(f"{', '.join(chosen)} must go with a flow-matching model, got {name}")
        return cls.flow | chosen

    @classmethod
    def _check_process(cls, process: Process, name: str) -> Process:
        kind = "flow matching" if isinstance(process, FlowMatching) else "discrete"
        if kind != cls.noised_by:
            raise ModelError(
                f"the schedule of {name} must be {cls.noised_by} for a {cls.__name__}, got {kind}"
            )
        return process

    @classmethod
    def _check_folder(cls, base: Path) -> None:
        """Refuse a pipeline by what its configurations say."""

    def _check_parts(self, base: Path | str) -> None:
        """Refuse parts that were not made for each other."""
        latents = self.latent_channels
        takes, returns = self._latent_channels()
        if not takes == returns == latents:
            kind = "U-Net" if self.network == "unet" else "transformer"
            raise ModelError(
                f"the {kind} in {base} must take and return the {latents} channels of its VAE's "
                f"latents, got {takes} and {returns}"
            )

    def _latent_channels(self) -> tuple[int, int]:
        """Channels that the network takes and returns."""
        config = self.module.config
        takes = int(config["in_channels"])
        return takes, int(config["out_channels"] or takes)


class TextPipeline(LatentPipeline):
    """A pipeline that reads captions.

    Attributes:
        tokens: of a caption that a T5 reads, the rest is cut off.
        text_batch: captions encoded at a time.
    """

    reads = "captions"
    guidance_scale: float | None = 7.5
    text_batch = 64

    def __init__(self, pipeline: Any, process: Process) -> None:
        super().__init__(pipeline, process)
        self._embeddings: dict[str, Condition] = {}
        self._kept_bytes = 0

    @property
    def tokens(self) -> int:
        """See the class."""
        return 0

    @property
    def tokenizers(self) -> list[tuple[Any, int]]:
        """Every tokenizer, and how many tokens of a caption are read, with those at its ends."""
        found = []
        for name, encoder in self.encoders.items():
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
            positions = getattr(encoder.config, "max_position_embeddings", None)
            limit = self.tokens if positions is None else positions
            found.append((tokenizer, min(int(tokenizer.model_max_length), int(limit))))
        return found

    @property
    def max_tokens(self) -> int:
        """Tokens that the reader of the longest texts takes, with the two at their ends."""
        return max(limit for _, limit in self.tokenizers)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of every caption, of one tokenizer after the other; warns of what is cut."""
        if not captions:
            return []
        rows: list[list[int]] = [[] for _ in captions]
        several = len(self.tokenizers) > 1
        with quiet("transformers.tokenization_utils_base"):
            for tokenizer, limit in self.tokenizers:
                # one call, two lengths: the tokenizer does not say what it cut
                whole = tokenizer(list(captions)).input_ids
                cut = [c for c, row in zip(captions, whole, strict=True) if len(row) > limit]
                if cut:
                    kind = f" of {type(tokenizer).__name__}" if several else ""
                    warnings.warn(
                        f"captions have more than {limit} tokens{kind} and are cut: {len(cut)} of "
                        f"{len(captions)}; the first: {cut[0][:60]!r}",
                        stacklevel=2,
                    )
                read = tokenizer(
                    list(captions), padding="max_length", max_length=limit, truncation=True
                ).input_ids
                for row, ids in zip(rows, read, strict=True):
                    row.extend(ids)
        return rows

    def identify_items(self, items: Sequence[str]) -> str:
        """Hash of the captions and of the tokens they are read as."""
        return hash_captions(items, self.tokenize(items))

    def condition(self, items: Sequence[str] | None, device: torch.device) -> Condition:
        """See `Denoiser.condition`: what the text encoders make of captions, float32.

        Every distinct caption is encoded once, as long as 2 GB or a quarter of the free memory hold
        them.

        Args:
            items: B texts, cut after `max_tokens`.
            device: where the result goes and the text encoders work.

        Returns:
            ``encoder_hidden_states [B, T, D]``, and what else this kind reads.
        """
        if items is None:
            raise ValueError("captions must be given for a model that reads them, got none")
        missing = [text for text in dict.fromkeys(items) if text not in self._embeddings]
        fresh: dict[str, Condition] = {}
        if missing:
            for encoder in self.encoders.values():
                encoder.to(device)
        for first in range(0, len(missing), self.text_batch):
            chosen = missing[first : first + self.text_batch]
            # captions are cut, which is said where they are read
            with quiet(*self._talkers()), torch.no_grad():
                encoded = self._encode(chosen, device)
            for row, text in enumerate(chosen):
                fresh[text] = {name: _kept(value[row]) for name, value in encoded.items()}
        self._embeddings.update(fresh)
        rows = [self._embeddings[text] for text in items]
        result = {name: value.to(device) for name, value in self._stacked(rows).items()}
        self._kept_bytes += sum(_bytes(one) for one in fresh.values())
        while self._kept_bytes > max(_KEPT_BYTES, available_bytes(torch.device("cpu")) // 4):
            self._kept_bytes -= _bytes(self._embeddings.pop(next(iter(self._embeddings))))
        return result

    def _stacked(self, rows: Sequence[Condition]) -> Condition:
        """Conditions of a row each as one."""
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def prepare(self, items: Sequence[str] | None, device: torch.device) -> None:
        """See `Denoiser.prepare`."""
        super().prepare(items, device)
        if device.type != "cpu" and items is not None:
            self.embed_ahead(items, device)

    def embed_ahead(self, captions: Sequence[str], device: torch.device) -> None:
        """Embed distinct captions, as many as are kept, and take the encoders off the device."""
        distinct = list(dict.fromkeys(captions))
        for first in range(0, len(distinct), self.text_batch):
            before = len(self._embeddings)
            chosen = distinct[first : first + self.text_batch]
            self.condition(chosen, device)
            if len(self._embeddings) - before < len(chosen):
                # full: the others are embedded when their batch comes
                return
        for encoder in self.encoders.values():
            encoder.to("cpu")

    def embed(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """``encoder_hidden_states`` of `condition` alone."""
        return self.condition(captions, device)["encoder_hidden_states"]

    @abstractmethod
    def _encode(self, captions: list[str], device: torch.device) -> Condition:
        """What the text encoders make of captions, by the pipeline's own method."""

    def _check_drawn(self, seeds: Sequence[int], items: Sequence[Any] | None) -> None:
        if items is None and len(seeds):
            raise ValueError("prompts must be given for a model that reads them, got none")
        count = len(items or ())
        if count != len(seeds):
            raise ValueError(f"seeds must be {count}, one for each prompt, got {len(seeds)}")

    def _run(
        self,
        pipeline: Any,
        items: Sequence[Any],
        size: tuple[int, int],
        generators: list[torch.Generator],
        options: dict[str, Any],
    ) -> Tensor:
        height, width = size
        drawn: Tensor = pipeline(
            list(items),
            height=height,
            width=width,
            generator=generators,
            output_type="pt",
            **self._more(),
            **options,
        ).images
        return drawn

    def _more(self) -> dict[str, Any]:
        """Further arguments of the pipeline."""
        return {}

    def _check_parts(self, base: Path | str) -> None:
        super()._check_parts(base)
        for what, (reads, width) in (
            ("numbers per token", self._text_width()),
            ("pooled numbers", self._pooled_width()),
        ):
            if reads != width:
                kind = "U-Net" if self.network == "unet" else "transformer"
                raise ModelError(
                    f"the {kind} in {base} must read the {width} {what} of its text encoder, got "
                    f"{reads}"
                )
        for (tokenizer, _), (name, encoder) in zip(
            self.tokenizers, self.encoders.items(), strict=True
        ):
            words, rows = len(tokenizer), int(encoder.config.vocab_size)
            if words > rows:
                raise ModelError(
                    f"the {name.replace('text_encoder', 'tokenizer')} in {base} must have at most "
                    f"the {rows} tokens of its text encoder, got {words}"
                )

    @abstractmethod
    def _text_width(self) -> tuple[int, int]:
        """Numbers per token that the network reads, and that its text encoders make."""

    def _pooled_width(self) -> tuple[int, int]:
        """The same of a whole caption."""
        return 0, 0


def _kept(value: Tensor) -> Tensor:
    """A row of a condition as it is kept; masks and numbers of classes stay what they are."""
    return (value.float() if value.is_floating_point() else value).cpu()


def _bytes(condition: Condition) -> int:
    return sum(value.nbytes for value in condition.values())


def _match_tokenizers(parts: dict[str, Any]) -> None:
    """Tell a tokenizer that does not say how long a text may be."""
    for name, encoder in parts.items():
        if not name.startswith("text_encoder") or encoder is None:
            continue
        longest = getattr(encoder.config, "max_position_embeddings", None)
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if longest is not None and tokenizer is not None:
            tokenizer.model_max_length = min(int(tokenizer.model_max_length), int(longest))


def _check_origin(model: LatentPipeline, lora: Path, base: Path) -> None:
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
