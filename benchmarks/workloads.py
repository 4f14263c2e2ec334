"""Models of the size people attribute, and one batch for each: what the suites differentiate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from protocol import Absent
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel


LAYERS = Path(__file__).parent / "cifar2_layers.json"


def diffusers() -> ModuleType:
    """The library of U-Nets.

    Raises:
        Absent: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise Absent("diffusers is not installed") from error
    return diffusers


@dataclass
class Workload:
    """A batch whose per-sample gradients are wanted.

    Attributes:
        name: of the model.
        model: in evaluation mode; the chosen parameters require a gradient, the others do not.
        inputs: arguments of the model, each with ``B · rows_per_sample`` rows, sample by sample.
        rows_per_sample: S.
        dtype: ``"float32"``, or a 16-bit type the forward runs in under autocast.
        call: runs the model: ``call(model, *inputs) -> [rows, ...]``.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    rows_per_sample: int = 1
    dtype: str = "float32"
    call: Callable[..., Tensor] = lambda model, *inputs: model(*inputs)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.inputs[0].device

    @property
    def samples(self) -> int:
        """B."""
        return len(self.inputs[0]) // self.rows_per_sample

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def grad_dim(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def sizes(self) -> dict[str, int]:
        """B, S and P, for a row."""
        return {"B": self.samples, "S": self.rows_per_sample, "P": self.grad_dim}

    def outputs(self, model: Callable[..., Any] | None = None, *inputs: Tensor) -> Tensor:
        """The mean squared output of every row: D-TRAK's function.

        Args:
            model: stands in for the model (a functional call of it).
            inputs: stand in for the batch.

        Returns:
            ``[rows]``, in at least float32.
        """
        inputs = inputs or self.inputs
        enabled = self.dtype != "float32"
        autocast = torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=enabled)
        with autocast if enabled else torch.enable_grad():
            out = self.call(model or self.model, *inputs)
        wide = out.double() if out.dtype == torch.float64 else out.float()
        return wide.square().flatten(1).mean(1)

    def backward(self) -> list[Tensor]:
        """One ordinary step of the whole batch, weight gradients included.

        Returns:
            The gradient of the sum of outputs, per chosen parameter.
        """
        chosen = list(self.parameters.values())
        self.outputs().sum().backward()
        # a parameter the output does not depend on has none
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
        for parameter in chosen:
            parameter.grad = None
        return grads


def sample_of(model: Callable[..., Any], *inputs: Tensor) -> Tensor:
    return model(*inputs).sample


def _conditional(model: Callable[..., Any], x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    return model(x, timesteps, encoder_hidden_states=text).sample


def random_rows(
    samples: int, rows_per_sample: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = samples * rows_per_sample
    x = torch.randn(rows, *shape, generator=generator).to(device)
    steps = torch.randint(1000, (rows,), generator=generator).to(device)
    return x, steps


def digits(
    device: torch.device,
    samples: int,
    rows_per_sample: int,
    dtype: str,
    *,
    smoke: bool = False,
) -> Workload:
    """The main job's U-Net: 186,081 parameters, 8 x 8 pixels, also in a smoke run."""
    diffusers()
    from dtrak.models.unet import digits_model

    unet = digits_model().module.to(device)
    inputs = random_rows(samples, rows_per_sample, (1, 8, 8), device)
    return Workload("digits U-Net", unet, inputs, rows_per_sample, dtype, sample_of)


def cifar_unet() -> UNet2DModel:
    """The U-Net of D-TRAK's CIFAR experiments: 38,306,691 parameters, 32 x 32 pixels.

    Source:
        D-TRAK's CIFAR2 configuration at e2a0c2e, with the scale-shift time conditioning its script
        switches on.
    """
    return (
        diffusers()
        .UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            resnet_time_scale_shift="scale_shift",
        )
        .eval()
    )


def thin_unet(width: int = 32) -> UNet2DModel:
    """The CIFAR U-Net at a laptop's scale: 1,192,259 parameters at the default width."""
    return (
        diffusers()
        .UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(width, 2 * width, 2 * width),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
        )
        .eval()
    )


def cifar(
    device: torch.device,
    samples: int,
    rows_per_sample: int,
    dtype: str,
    *,
    smoke: bool = False,
) -> Workload:
    """32 x 32 pixels: the real U-Net on a GPU, a thinner one elsewhere."""
    if device.type == "cuda" and not smoke:
        return whole_cifar(device, samples, rows_per_sample, dtype)
    thin = partial(thin_unet, 8 if smoke else 32)
    return _small_images("thin CIFAR U-Net", thin, device, samples, rows_per_sample, dtype)


def whole_cifar(
    device: torch.device, samples: int, rows_per_sample: int, dtype: str, **_: Any
) -> Workload:
    """32 x 32 pixels: the real U-Net, wherever."""
    return _small_images("CIFAR U-Net", cifar_unet, device, samples, rows_per_sample, dtype)


def _small_images(
    name: str,
    make: Callable[[], nn.Module],
    device: torch.device,
    samples: int,
    rows_per_sample: int,
    dtype: str,
) -> Workload:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = make().to(device)
    inputs = random_rows(samples, rows_per_sample, (3, 32, 32), device)
    return Workload(name, unet, inputs, rows_per_sample, dtype, sample_of)


def stable_diffusion_unet() -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.x: 859.5 M parameters."""
    unet = diffusers().UNet2DConditionModel
    return unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def tiny_conditional_unet() -> UNet2DConditionModel:
    """The same kinds of layers at a laptop's scale."""
    return diffusers().UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def lora_config(rank: int) -> Any:
    """Low-rank pairs beside the attention projections.

    Raises:
        Absent: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise Absent("peft is not installed") from error
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the U-Net and put trainable low-rank pairs beside its attention projections.

    Raises:
        Absent: PEFT is not installed.
    """
    config = lora_config(rank)
    unet.requires_grad_(False)
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        # as after training: a fresh pair has a zero side, and so a gradient that is half zero
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def lora(
    device: torch.device,
    samples: int,
    rows_per_sample: int,
    dtype: str,
    *,
    smoke: bool = False,
) -> Workload:
    """LoRA: rank 128 on SD-1.x at 256 pixels on a GPU, rank 4 on a tiny U-Net elsewhere."""
    cuda = device.type == "cuda" and not smoke
    # known before 860 M parameters are made, and they are made where they are wanted
    lora_config(4)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        unet = stable_diffusion_unet() if cuda else tiny_conditional_unet()
        add_lora(unet, 128 if cuda else 4)
    size, tokens, width = (32, 77, 768) if cuda else (16, 8, 32)
    x, steps = random_rows(samples, rows_per_sample, (4, size, size), device)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(samples, tokens, width, generator=generator).to(device)
    text = text.repeat_interleave(rows_per_sample, dim=0)
    name = "SD-1.x LoRA" if cuda else "tiny SD LoRA"
    unet = unet.to(device).eval()
    return Workload(name, unet, (x, steps, text), rows_per_sample, dtype, _conditional)


@dataclass(frozen=True)
class LayerShape:
    """A layer of a U-Net, as one forward of it was seen.

    Attributes:
        kind: ``"linear"`` or ``"conv"``.
        options: arguments of the module.
        x: shape of one row of its input.
        count: how often the U-Net has it.
    """

    kind: str
    options: tuple[tuple[str, Any], ...]
    x: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        """``conv3x3 256→256 @16x16`` or ``linear 512→256 @1``."""
        o = dict(self.options)
        if self.kind == "linear":
            positions = math.prod(self.x[:-1])
            return f"linear {o['in_features']}→{o['out_features']} @{positions}"
        kernel = "x".join(map(str, o["kernel_size"]))
        stride = f"/{o['stride'][0]}" if o["stride"] != (1, 1) else ""
        size = "x".join(map(str, self.x[1:]))
        return f"conv{kernel}{stride} {o['in_channels']}→{o['out_channels']} @{size}"

    def make(self) -> nn.Module:
        """The module."""
        return (nn.Linear if self.kind == "linear" else nn.Conv2d)(**dict(self.options))


_OPTIONS = {
    "linear": ("in_features", "out_features"),
    "conv": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"),
}


def layer_shapes(unet: nn.Module, call: Callable[..., Any], *inputs: Tensor) -> list[LayerShape]:
    """The distinct Linear and Conv2d layers of a model, in the order a forward meets them.

    Args:
        unet: on the meta device, as are the inputs: nothing is computed.
        call: runs it.
        inputs: one row each.
    """
    found: dict[LayerShape, int] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        names = _OPTIONS[kind]
        options = [(name, getattr(module, name)) for name in names]
        options.append(("bias", module.bias is not None))
        shape = LayerShape(kind, tuple(options), tuple(args[0].shape[1:]))
        found[shape] = found.get(shape, 0) + 1

    handles = [
        module.register_forward_hook(note)
        for module in unet.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        call(unet, *inputs)
    for handle in handles:
        handle.remove()
    return [LayerShape(s.kind, s.options, s.x, count) for s, count in found.items()]


def recorded_layers() -> list[LayerShape]:
    """The layers of the CIFAR U-Net, as `stages` recorded them."""
    found = []
    for entry in json.loads(LAYERS.read_text())["layers"]:
        options = {"groups": 1} if entry["kind"] == "conv" else {}
        options |= {k: tuple(v) if isinstance(v, list) else v for k, v in entry["options"].items()}
        names = (*_OPTIONS[entry["kind"]], "bias")
        named = tuple((name, options[name]) for name in names)
        found.append(LayerShape(entry["kind"], named, tuple(entry["x"]), entry["count"]))
    return found


def parameter_shapes(model: str) -> list[tuple[int, ...]]:
    """Shapes of the parameters of the digits or the CIFAR U-Net.

    Raises:
        Absent: diffusers is not installed, without which only the layers of the CIFAR U-Net are
            known: all its parameters but those of norms.
    """
    try:
        diffusers()
    except Absent:
        if model != "cifar":
            raise
        layers = [layer for layer in recorded_layers() for _ in range(layer.count)]
        with torch.device("meta"):
            return [tuple(p.shape) for layer in layers for p in layer.make().parameters()]
    from dtrak.models.unet import digits_model

    with torch.device("meta"):
        unet = digits_model().module if model == "digits" else cifar_unet()
    return [tuple(parameter.shape) for parameter in unet.parameters()]


def unet_layers(device: torch.device) -> dict[str, list[LayerShape]]:
    """Every distinct layer: of the CIFAR and SD-1.x U-Nets on a GPU, of the thin one elsewhere.

    Without diffusers those of the CIFAR U-Net are known, and no others.
    """
    try:
        diffusers()
    except Absent:
        return {"CIFAR U-Net": recorded_layers()} if device.type == "cuda" else {}
    with torch.device("meta"):
        steps = torch.zeros(1)
        if device.type != "cuda":
            image = torch.zeros(1, 3, 32, 32)
            return {"thin CIFAR U-Net": layer_shapes(thin_unet(), sample_of, image, steps)}
        image, latent = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 32, 32)
        text = torch.zeros(1, 77, 768)
        conditional = stable_diffusion_unet()
        return {
            "CIFAR U-Net": layer_shapes(cifar_unet(), sample_of, image, steps),
            "SD-1.x U-Net": layer_shapes(conditional, _conditional, latent, steps, text),
        }


def layer(
    shape: LayerShape, device: torch.device, samples: int, rows_per_sample: int, dtype: str
) -> Workload:
    """One layer in the middle of a network: its input needs a gradient too."""
    generator = torch.Generator().manual_seed(0)
    rows = samples * rows_per_sample
    x = torch.randn(rows, *shape.x, generator=generator).to(device).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = shape.make().to(device)
    return Workload(shape.name, module, (x,), rows_per_sample, dtype)


MODELS = {"digits": digits, "cifar": cifar, "lora": lora}
