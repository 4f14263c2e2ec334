"""What LoRA features of the largest models need of a card: planned, on tensors without values.

    python benchmarks/planned_memory.py [--record] [--docs | --check]

Nothing of the models is there: they are built from their sizes on the meta device, and
`GradientSketcher.plan` runs a forward and a backward of shapes. A batch that fits is the line
through the peaks of one sample and of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pages import ROOT, Table, newest, record, run
from torch import Tensor, nn

from dtrak.pages import tables
from dtrak_kernels import GradientSketcher, Projection

RESULTS = ROOT / "benchmarks" / "results" / "planned_memory.jsonl"
CARD_BYTES = 80 * 10**9
RANK, WIDTH, TEXT = 16, 32768, 4096
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Made = tuple[nn.Module, Callable[[int], Callable[[], Tensor]]]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _scalars(prediction: Tensor) -> Tensor:
    return prediction.float().square().flatten(1).mean(1)


def sdxl(side: int, **changes: Any) -> Made:
    """The U-Net of SDXL 1.0: 2,567,463,684 parameters."""
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    model = UNet2DConditionModel(**sizes | changes)

    def outputs(B: int) -> Callable[[], Tensor]:
        x, t, text = _empty(B, 4, side // 8, side // 8), _empty(B), _empty(B, 77, 2048)
        added = {"text_embeds": _empty(B, 1280), "time_ids": _empty(B, 6)}
        return lambda: _scalars(model(x, t, text, added_cond_kwargs=added).sample)

    return model, outputs


def sd35_medium(side: int, **changes: Any) -> Made:
    """The transformer of Stable Diffusion 3.5 medium: 2,243,171,520 parameters."""
    from diffusers import SD3Transformer2DModel

    sizes: dict[str, Any] = {
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": TEXT,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }
    model = SD3Transformer2DModel(**sizes | changes)

    def outputs(B: int) -> Callable[[], Tensor]:
        x, t = _empty(B, 16, side // 8, side // 8), _empty(B)
        text, pooled = _empty(B, 333, TEXT), _empty(B, 2048)
        return lambda: _scalars(model(x, text, pooled, t).sample)

    return model, outputs


def flux_dev(side: int, **changes: Any) -> Made:
    """The transformer of FLUX.1-dev: 11,901,408,320 parameters."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(guidance_embeds=True, **changes)

    def outputs(B: int) -> Callable[[], Tensor]:
        positions = (side // 16) ** 2
        x, text, pooled = _empty(B, positions, 64), _empty(B, 512, TEXT), _empty(B, 768)
        t, guidance, ids, text_ids = _empty(B), _empty(B), _empty(positions, 3), _empty(512, 3)
        return lambda: _scalars(model(x, text, pooled, t, ids, text_ids, guidance).sample)

    return model, outputs


MODELS = {"SDXL": sdxl, "SD 3.5 medium": sd35_medium, "FLUX.1-dev": flux_dev}
# of a rehearsal
SMALL: dict[str, dict[str, Any]] = {
    "SDXL": {"transformer_layers_per_block": 1},
    "SD 3.5 medium": {"num_layers": 2},
    "FLUX.1-dev": {"num_layers": 1, "num_single_layers": 1},
}


def plan_model(name: str, side: int, checkpointed: bool, **changes: Any) -> dict[str, Any]:
    """One row: a LoRA in float32 on the attention of a model in bfloat16.

    Args:
        name: of `MODELS`.
        side: of the images, in pixels.
        checkpointed: whether the model's blocks are made again in the backward.
        changes: of the model's sizes.

    Raises:
        RuntimeError: the memory could not be told.
    """
    from peft import LoraConfig

    with torch.device("meta"):
        model, outputs = MODELS[name](side, **changes)
        parameters = sum(p.numel() for p in model.parameters())
        model.to(torch.bfloat16).requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # blocks are checkpointed in training mode alone; nothing here drops at random
    model.train(checkpointed)
    if checkpointed:
        model.enable_gradient_checkpointing()
    sketcher = GradientSketcher(model, Projection("sjlt", WIDTH))
    plans = [sketcher.plan(outputs(B), B) for B in (1, 2)]
    for plan in plans:
        if plan.memory is None:
            raise RuntimeError(f"the memory of {name} could not be told: {plan.unknown}")
    one, two = plans
    each = two.batch_bytes - one.batch_bytes
    fixed = one.fixed_bytes + one.batch_bytes - each
    return {
        "model": name,
        "side": side,
        "checkpointed": checkpointed,
        "parameters": parameters,
        "lora": sketcher.grad_dim,
        "weight_bytes": one.weight_bytes,
        "activation_bytes": two.memory.activation_bytes - one.memory.activation_bytes,
        "peak_bytes": one.peak_bytes,
        "fitting": max((CARD_BYTES - fixed) // each, 0),
    }


def measure(wanted: bool, smoke: bool) -> None:
    """Plan every model, with and without checkpointing."""
    rows = []
    for name in MODELS:
        for checkpointed in (True, False):
            changes = SMALL[name] if smoke else {}
            row = plan_model(name, 256 if smoke else 1024, checkpointed, **changes)
            rows.append(row)
            print(line(row), flush=True)
    if wanted:
        record(RESULTS, {"rows": rows})


def line(row: dict[str, Any]) -> list[str]:
    """A row of the page's table."""
    weights = sum(row["weight_bytes"].values())
    return [
        row["model"],
        f"{row['parameters'] / 1e9:.2f} B + {row['lora'] / 1e6:.1f} M",
        f"{weights / 1e9:.1f} GB",
        "yes" if row["checkpointed"] else "no",
        f"{row['activation_bytes'] / 1e9:.2f} GB",
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        f"{row['fitting']}",
    ]


COLUMNS = (
    "model",
    "parameters + LoRA",
    "weights",
    "checkpointing",
    "activations per sample",
    "peak of 1 sample",
    "samples in 80 GB",
)


def make_table() -> list[str]:
    """The page's table, from the last row of results."""
    row = newest(RESULTS)
    return [
        *tables.Table(
            COLUMNS, list(map(line, row["rows"])), words=("parameters + LoRA", "checkpointing")
        ).markdown(),
        "",
        f"**Planned, not measured**: 1024 x 1024 pixels, LoRA of rank {RANK} on "
        f"{', '.join(TARGETS)} in float32, the rest in bfloat16, `sjlt` with K = {WIDTH:,}, S = 1. "
        f"torch {row['torch']}, Diffusers {row['diffusers']}, {row['utc'][:10]}.",
    ]


TABLE = Table(ROOT / "docs" / "memory.md", "planned-memory", make_table)


def main() -> None:
    """Plan, or rewrite or check the page."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    run(TABLE, __doc__, measure)


if __name__ == "__main__":
    main()
