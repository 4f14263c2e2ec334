"""U-Nets of pixels, unconditional or of classes: a `UNet2DModel` of Diffusers, or its pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

from .denoiser import (
    Condition,
    Denoiser,
    Drawn,
    ModelError,
    Progress,
    check_labels,
    check_seeds,
    check_size,
    check_steps,
)
from .places import CONFIG, INDEX, Place
from .process import DiscreteProcess, FlowMatching, linear_process, shift_of, take_step
from .weights import guessed_process, load_part, load_process, read_json, read_process


class UNet(Denoiser):
    """A U-Net of pixels and the noise schedule it was trained with.

    With ``num_class_embeds`` it reads labels, the classes of its training images; every class it
    was made for is drawn.

    Args:
        module: a `diffusers.UNet2DModel`, which predicts noise (or a sample, or a velocity).
        process: with its training schedule.
    """

    module: UNet2DModel
    process: DiscreteProcess | FlowMatching
    drawn_together = 64

    @property
    def num_classes(self) -> int | None:
        """Classes it can tell apart; None for an unconditional one."""
        return self.module.config.get("num_class_embeds")

    @property
    def reads(self) -> str | None:  # type: ignore[override]
        """See `Denoiser`."""
        return None if self.num_classes is None else "labels"

    @property
    def channels(self) -> int:
        """See `Denoiser`."""
        return int(self.module.config["in_channels"])

    @property
    def size(self) -> int | tuple[int, int] | None:
        """See `Denoiser`."""
        size = self.module.config["sample_size"]
        return size if size is None or isinstance(size, int) else (int(size[0]), int(size[1]))

    def condition(self, items: Sequence[int] | None, device: torch.device) -> Condition:
        """See `Denoiser.condition`: the labels, for a U-Net of classes."""
        if self.num_classes is None:
            return {}
        return {"class_labels": check_labels(items, self.num_classes, device)}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        called = self.module if module is None else module
        time = self.process.time(timesteps, noisy.shape[1:])
        prediction: Tensor = called(noisy, time, **condition).sample
        return prediction

    def input_shape(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """See `Denoiser.input_shape`.

        Raises:
            ValueError: a side is no multiple of what the U-Net halves it by.
        """
        *_, height, width = pixels
        # every block but the last halves both sides, and doubling them must give the same again
        step = 2 ** max(len(self.module.config.get("down_block_types", ())) - 1, 0)
        if height % step or width % step:
            raise ValueError(
                f"images must have sides that are multiples of {step}, as the U-Net halves them, "
                f"got {width}x{height} pixels"
            )
        return tuple(pixels)

    def image_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of a picture the model draws.

        Raises:
            ValueError: the model does not say the size of its pictures, or it is not positive.
        """
        chosen = self.size if size is None else size
        if chosen is None:
            raise ValueError("the model must have a sample_size to draw from it, got None")
        shape = self.channels, *check_size(chosen)
        self.input_shape(shape)
        return shape

    def drawing_timesteps(self, num_inference_steps: int) -> list[int]:
        """See `Denoiser.drawing_timesteps`."""
        scheduler = self._sampler(num_inference_steps, self.image_shape())
        if isinstance(self.process, FlowMatching):
            return self.process.nearest(scheduler.timesteps, self.image_shape())
        timesteps: list[int] = scheduler.timesteps.tolist()
        return timesteps

    def _sampler(self, num_inference_steps: int, shape: tuple[int, int, int]) -> Any:
        scheduler, options = self.process.sampler(), {}
        if isinstance(self.process, FlowMatching) and scheduler.config["use_dynamic_shifting"]:
            options["mu"] = shift_of(scheduler, self.process.tokens(shape))
        scheduler.set_timesteps(num_inference_steps, **options)
        return scheduler

    def draw(
        self,
        seeds: Sequence[int],
        items: Sequence[Any] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        trajectories: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Drawn]:
        """See `Denoiser.draw`; there is no guidance.

        Trajectories are clipped to [-1, 1] where the model's schedule has ``clip_sample``, as the
        published ones have.

        Source:
            Song et al. 2021 (arXiv:2010.02502); one generator per image as in D-TRAK's
            gen_unconditional.py at e2a0c2e. Trajectories: Journey-TRAK (arXiv:2312.06205) as D-TRAK
            computes it (01_gen_sampling_troj_5000_0.5.ipynb at e2a0c2e).
        """
        batch_size = self.drawn_together if batch_size is None else batch_size
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        check_steps(steps, self.process.num_timesteps, batch_size)
        check_seeds(seeds)
        if guidance_scale is not None:
            raise ValueError(
                f"guidance_scale must be None for a U-Net of pixels, got {guidance_scale}"
            )
        if self.num_classes is None and items is not None:
            raise ValueError(f"items must be None for a model that reads nothing, got {len(items)}")
        if self.num_classes is not None and len(items or ()) != len(seeds):
            got = "none" if items is None else str(len(items))
            raise ValueError(f"labels must be {len(seeds)}, one for each seed, got {got}")
        condition = self.condition(items or (), self.device)
        return self._draw(
            seeds,
            condition,
            steps,
            batch_size,
            trajectories,
            self.image_shape(size),
            progress,
        )

    @torch.no_grad()
    def _draw(
        self,
        seeds: Sequence[int],
        condition: Condition,
        num_inference_steps: int,
        batch_size: int,
        trajectories: bool,
        shape: tuple[int, int, int],
        progress: Progress | None,
    ) -> Iterator[Drawn]:
        parameter = next(self.module.parameters())
        scheduler = self._sampler(num_inference_steps, shape)
        firsts = range(0, len(seeds), batch_size)
        done, total = 0, len(firsts) * num_inference_steps
        for first in firsts:
            rows = slice(first, first + batch_size)
            chosen = list(seeds[rows])
            read = {name: values[rows] for name, values in condition.items()}
            generators = [torch.Generator().manual_seed(seed) for seed in chosen]
            sample = torch.stack([torch.randn(shape, generator=g) for g in generators])
            sample, steps = sample.to(parameter), []
            for timestep in scheduler.timesteps:
                # the scheduler counts in the module's time
                prediction = self.module(sample, timestep, **read).sample
                sample, clean = take_step(scheduler, prediction, timestep, sample)
                if trajectories:
                    steps.append(clean.float().cpu())
                done += 1
                if progress is not None:
                    progress(done, total)
            for seed, image in zip(chosen, sample, strict=True):
                if not torch.isfinite(image).all():
                    raise ValueError(f"the model drew a non-finite image from seed {seed}")
            yield Drawn(
                chosen,
                sample.float().clamp(-1, 1).cpu(),
                torch.stack(steps, 1) if trajectories else None,
            )

    def fresh(self, seed: int) -> UNet:
        """A freshly initialised U-Net of the same configuration, in evaluation mode."""
        config = {k: v for k, v in self.module.config.items() if not k.startswith("_")}
        return UNet(make_unet(seed, **config), self.process)

    def save(self, folder: str | Path) -> None:
        """Write a DDPM pipeline that `load` and Diffusers read."""
        scheduler = self.process.scheduler
        DDPMPipeline(unet=self.module, scheduler=scheduler).save_pretrained(folder)

    @classmethod
    def wrap(cls, pipeline: Any, **trained: Any) -> UNet:
        """A pipeline in memory; see `models.wrap`."""
        scheduler, name = pipeline.scheduler, f"the {type(pipeline).__name__}"
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        options = _flow_options(trained, name, config)
        return cls(pipeline.unet.float().eval(), read_process(config, name, **options))

    @classmethod
    def make(cls, config: Mapping[str, Any], seed: int) -> UNet:
        """A freshly initialised U-Net; see `dtrak.models.make`."""
        network, scheduler = config["network"], config["scheduler"]
        _check_config("--config", network)
        given = {name: value for name, value in network.items() if not name.startswith("_")}
        try:
            unet = make_unet(seed, **given)
        # whatever a wrong configuration makes the constructor raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"no U-Net can be made from the configuration: {reason}") from error
        return cls(unet, linear_process() if scheduler is None else read_process(scheduler))

    @classmethod
    def load(cls, place: Place, lora: str | Path | None = None, **trained: Any) -> UNet:
        """Load what Diffusers wrote: a UNet2DModel, or a pipeline around one.

        Args:
            place: of a pipeline with ``unet/`` and ``scheduler/``, or with both in the folder
                itself as older ones have; or of a bare U-Net.
            lora: refused.
            trained: as in `models.load`, of a flow.

        Returns:
            The model in evaluation mode, float32, on the CPU.

        Raises:
            ModelError: its configuration, weights or schedule are missing or unreadable, it returns
                something else than a picture or sees something else, the names or shapes of its
                weights do not match its configuration, or an adapter is given.
        """
        base = place.pipeline
        name = str(base or place.network)
        if lora is not None:
            raise ModelError(
                f"--lora must go with a pipeline that takes one, got the model in {name}, which "
                "takes none"
            )
        if base is not None:
            _check_parts(base)
        folder = place.config or _network_of(base)
        _check_config(folder / CONFIG, read_json(folder / CONFIG))
        process = _process(place, folder)
        options = _flow_options(trained, name, process.describe())
        if options:
            process = _process(place, folder, **options)
        unet = load_part(UNet2DModel, folder, place.network, place.weights)
        return cls(unet.eval(), process)


def _process(place: Place, network: Path, **flow: Any) -> Any:
    if place.pipeline is not None:
        return load_process(place.pipeline, **flow)
    if place.schedule is not None:
        return read_process(read_json(place.schedule), str(place.schedule), **flow)
    return guessed_process(network)


def _network_of(base: Path | None) -> Path:
    """The folder of a pipeline's U-Net.

    Raises:
        ModelError: there is none.
    """
    assert base is not None
    found = next((f for f in (base / "unet", base) if (f / CONFIG).is_file()), None)
    if found is None:
        raise ModelError(
            f"model must be a folder with {CONFIG} of a UNet2DModel, in itself or in unet/, got "
            f"{base} without one"
        )
    return found


def _check_parts(base: Path) -> None:
    """Refuse a pipeline whose U-Net sees something else than pixels and reads something else.

    Raises:
        ModelError: it has parts beside the U-Net and the schedule.
    """
    index = read_json(base / INDEX)
    others = sorted(
        name
        for name, part in index.items()
        if not name.startswith("_")
        and name not in ("unet", "scheduler")
        and isinstance(part, list)
        and part[0] is not None
    )
    if others:
        raise ModelError(
            f"{base / INDEX} must name a U-Net of pixels and its schedule, got {', '.join(others)} "
            "beside them"
        )


def _flow_options(trained: dict[str, Any], name: str, about: dict[str, Any]) -> dict[str, Any]:
    """How a flow is trained, refused for another process."""
    chosen = {option: value for option, value in trained.items() if value is not None}
    is_flow = "process" in about or str(about.get("_class_name")).startswith("FlowMatch")
    if chosen and ("guidance" in chosen or not is_flow):
        raise ModelError(
            f"{', '.join(chosen)} must go with a model that is trained in such a way, got {name}"
        )
    return chosen


def _check_config(file: Path | str, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ModelError(f"{file} must describe a UNet2DModel, got {kind!r}")
    if config.get("class_embed_type"):
        raise ModelError(
            f"{file} must describe a model that reads classes as numbers or not at all, got "
            f"class_embed_type {config['class_embed_type']!r}"
        )
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels[0] != channels[1]:
        raise ModelError(
            f"{file} must have as many out_channels as in_channels, got {channels[1]} and "
            f"{channels[0]}"
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


def digits_model(seed: int = 0) -> UNet:
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
    return UNet(unet, linear_process())
