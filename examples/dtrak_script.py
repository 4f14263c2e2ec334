"""D-TRAK's feature loop, with the lines that change.

    python examples/dtrak_script.py

The published script makes, for every batch and each of S timesteps, per-sample gradients of the
squared norm of the model's output by ``vmap(grad)``, adds them up in full, and projects the mean
with TRAK's CUDA projector. `published` is that loop, in short, and runs on any device here because
`install` puts our ``fast_jl`` in place of the extension; `fused` replaces its body.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import dtrak_kernels.trak
from dtrak_kernels import GradientSketcher, Projection

dtrak_kernels.trak.install()  # new: before anything imports fast_jl
import fast_jl  # noqa: E402

N, S, K = 12, 4, 512
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


class Denoiser(nn.Module):
    """Stands in for the U-Net: an image and a timestep to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.time(t[:, None] / 1000)[:, :, None, None]
        return self.leave(torch.nn.functional.silu(self.norm(self.enter(x) + shift)))


model = Denoiser().to(device).eval()
images = torch.randn(N, 3, 8, 8, device=device)
timesteps = torch.tensor([100.0, 300.0, 500.0, 700.0], device=device)
alphas = torch.cos(timesteps / 1000 * torch.pi / 2) ** 2
noise = torch.randn(N, S, 3, 8, 8, device=device)
# [N, S, ...]: every image at every timestep
noisy = alphas.sqrt()[:, None, None, None] * images[:, None]
noisy = noisy + (1 - alphas).sqrt()[:, None, None, None] * noise


def published(batch: Tensor) -> Iterator[Tensor]:
    """Features as the published script makes them."""
    parameters = dict(model.named_parameters())

    def output(parameters: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None], t[None])).square().mean()

    for rows in batch.split(4):
        total = 0.0
        for step in range(S):
            t = timesteps[step].expand(len(rows))
            grads = vmap(grad(output), in_dims=(None, 0, 0))(parameters, rows[:, step], t)
            total = total + torch.cat([g.flatten(1) for g in grads.values()], dim=1)
        # TRAK's own CUDA kernel; here for the matrix of an H100, on any device
        yield fast_jl.project_rademacher_32(total.detach() / S, K, 42, 132)


# new: one sketcher for all batches; kind "sjlt" costs least
sketcher = GradientSketcher(
    model,
    Projection("rademacher", K, seed=42, generator="fast_jl", num_sms="h100"),
    rows_per_sample=S,
)


def fused(batch: Tensor) -> Iterator[Tensor]:
    """The same features: no per-sample gradient is ever stored, timesteps are rows."""
    for rows in batch.split(4):
        x, t = rows.flatten(0, 1), timesteps.repeat(len(rows))
        outputs = lambda x=x, t=t: model(x, t).square().flatten(1).mean(1) / S
        yield sketcher.sketch(outputs, num_samples=len(rows)) * K**0.5  # TRAK does not scale by √K


before, after = torch.cat(list(published(noisy))), torch.cat(list(fused(noisy)))
print(
    f"features {list(after.shape)}, difference {float((after - before).norm() / before.norm()):.1e}"
)
