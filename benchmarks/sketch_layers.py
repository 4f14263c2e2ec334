"""The layers that launch configurations of the fused sketch are searched for, and what is tried.

One per form and length of the reduction that the CIFAR U-Net and the LoRA of Stable Diffusion have
at S = 10; K = 32,768. ``tests/compile_all.py`` compiles what `candidates` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dtrak_kernels.sjlt.config import Form, SketchConfig, find_config, refusal
from dtrak_kernels.sjlt.torch import ParameterSketch

# values of each field, in the order they are tried
CHOICES: dict[str, tuple[int, ...]] = {
    "num_warps": (4, 8, 16),
    "block_t": (16, 32, 64, 128),
    "num_stages": (2, 3, 4),
}


@dataclass(frozen=True)
class Layer:
    """A layer on one batch.

    Attributes:
        name: in words.
        shape: of its weight, ``(O, I)`` or ``(O, I, 3, 3)``.
        size: side of its image, or number of tokens of a Linear.
        dtype: of its input.
        samples: ``B``.
        timesteps: rows per sample.
        proj_dim: ``K``.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    dtype: torch.dtype = torch.bfloat16
    samples: int = 16
    timesteps: int = 10
    proj_dim: int = 32768

    @property
    def sketch(self) -> ParameterSketch:
        """Of its weight."""
        return ParameterSketch(self.shape, 0, self.proj_dim, 1)

    @property
    def reduction(self) -> int:
        """Rows per sample times positions."""
        return self.timesteps * self.size ** (len(self.shape) // 2)

    @property
    def form(self) -> Form:
        """As the launch finds it."""
        tile, is_linear = self.sketch.tile, len(self.shape) == 2
        is_one_tap = is_linear or self.shape[1] % tile[1] == 0
        return Form(tile, self.dtype, is_one_tap, is_one_axis=is_linear)

    def make(self, device: torch.device) -> tuple[nn.Linear | nn.Conv2d, Tensor, Tensor]:
        """The module, its input and the gradient of its output, channels last."""
        generator = torch.Generator(device).manual_seed(0)
        rows, (O, I) = self.samples * self.timesteps, self.shape[:2]
        middle = (self.size, self.size) if len(self.shape) == 4 else (self.size,)

        def random(channels: int) -> Tensor:
            x = torch.randn(rows, *middle, channels, generator=generator, device=device)
            return x.to(self.dtype).movedim(-1, 1 if len(self.shape) == 4 else -1)

        module: nn.Linear | nn.Conv2d = (
            nn.Conv2d(I, O, 3, padding=1, device=device)
            if len(self.shape) == 4
            else nn.Linear(I, O, device=device)
        )
        return module, random(I), random(O)


LAYERS = (
    *(Layer(f"conv 3x3, 256 @{size}", (256, 256, 3, 3), size) for size in (16, 8, 4)),
    Layer("conv 3x3, 128 @32", (128, 128, 3, 3), 32),
    Layer("conv 3x3, 3 to 128 @32", (128, 3, 3, 3), 32),
    Layer("linear 512, 256 tokens", (512, 512), 256),
    Layer("linear 512, 1 token", (512, 512), 1),
    Layer("LoRA down, 320 to 16", (16, 320), 1024, samples=4),
    Layer("LoRA up, 16 to 320", (320, 16), 1024, samples=4),
    Layer("conv 3x3, 256 @16, float32", (256, 256, 3, 3), 16, torch.float32, samples=4),
    Layer("linear 512, 256 tokens, float32", (512, 512), 256, torch.float32, samples=4),
)

# a rehearsal: one tile and several of each form; float32, whose products the interpreter can do
TINY = (
    Layer("conv 3x3, tiny", (5, 16, 3, 3), 3, torch.float32, 1, 2, 256),
    Layer("conv 3x3, 3 channels, tiny", (5, 3, 3, 3), 3, torch.float16, 1, 2, 512),
    Layer("linear, tiny", (33, 20), 10, torch.float16, 1, 2, 512),
)


# what else spilled when it was compiled, which no rule foretells: architecture, form, then warps,
# positions and stages
SPILLED: dict[tuple[int | str, str], set[tuple[int, int, int]]] = {
    (80, "one tap, channels last, 16 bits, tile 128x128"): {(8, 32, 3)},
    (80, "one axis, channels last, 16 bits, tile 128x128"): {(8, 32, 3), (8, 32, 4)},
    (80, "several taps, channels last, 16 bits, tile 128x32"): {(8, 64, 2)},
    (100, "several taps, channels last, 16 bits, tile 128x32"): {(8, 64, 4)},
    (100, "one axis, channels last, 16 bits, tile 16x128"): {(4, 64, 4), (8, 128, 2)},
    (100, "one tap, channels last, 32 bits, tile 128x128"): {(16, 16, 2)},
    (100, "one axis, channels last, 32 bits, tile 128x128"): {(16, 16, 3)},
}


def why_not(config: SketchConfig, form: Form, arch: int | str, reduction: int) -> str:
    """Why a configuration is not tried, empty if it is."""
    if (config.num_warps, config.block_t, config.num_stages) in SPILLED.get((arch, str(form)), ()):
        return "it spills on this architecture"
    return refusal(config, form, arch, reduction)


def candidates(form: Form, arch: int | str, reduction: int) -> Iterator[tuple[SketchConfig, str]]:
    """Every combination of `CHOICES` with why it is not tried, empty for those that are."""
    base = find_config(form, arch, reduction)
    for num_warps in CHOICES["num_warps"]:
        for block_t in CHOICES["block_t"]:
            for num_stages in CHOICES["num_stages"]:
                config = replace(base, num_warps=num_warps, block_t=block_t, num_stages=num_stages)
                yield config, why_not(config, form, arch, reduction)
