"""The other ways: per-sample gradients without us, and other libraries' projectors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Absent
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from workloads import Workload

from dtrak.runs.measure import available_bytes


def load(name: str, wanted: str) -> ModuleType:
    """Import a peer.

    Raises:
        Absent: it is not installed, or cannot be imported here.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise Absent(f"{wanted} is not installed") from error
        raise Absent(f"{wanted} cannot be imported: no module {error.name}") from error
    # a peer built for other versions may fail in any way
    except Exception as error:
        raise Absent(f"{wanted} cannot be imported: {type(error).__name__}: {error}") from error


class _PlainAttention:
    """Attention written out while it is open: the fused kind has no batching rule under vmap."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = [m for m in model.modules() if hasattr(m, "set_processor")]

    def __enter__(self) -> None:
        self.before = [module.processor for module in self.modules]
        for module in self.modules:
            # only modules of diffusers have processors
            from diffusers.models.attention_processor import AttnProcessor

            module.set_processor(AttnProcessor())

    def __exit__(self, *_: Any) -> None:
        for module, processor in zip(self.modules, self.before, strict=True):
            module.set_processor(processor)


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in grads.values()], dim=1)


def vmap_gradients(workload: Workload) -> Tensor:
    """``vmap(grad)`` over the samples of the batch, flattened: ``[B, P]``."""
    chosen = {name: p.detach() for name, p in workload.parameters.items()}
    rest = {
        name: tensor.detach()
        for name, tensor in workload.model.state_dict(keep_vars=True).items()
        if name not in chosen
    }

    def output(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        model = partial(_functional, workload.model, parameters | rest)
        return workload.outputs(model, *inputs).sum()

    samples = [x.detach().unflatten(0, (-1, workload.rows_per_sample)) for x in workload.inputs]
    with _PlainAttention(workload.model):
        per_sample = vmap(grad(output), in_dims=(None, *(0 for _ in samples)))
        return _flat(per_sample(chosen, *samples))


def _functional(model: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(model, tensors, args, kwargs)


def loop_gradients(workload: Workload) -> Tensor:
    """One backward per sample, ``[B, P]``."""
    chosen = list(workload.parameters.values())
    out = torch.empty(
        workload.samples, workload.grad_dim, dtype=chosen[0].dtype, device=workload.device
    )
    for sample, rows in enumerate(workload.inputs[0].split(workload.rows_per_sample)):
        first = sample * workload.rows_per_sample
        inputs = [x[first : first + len(rows)] for x in workload.inputs]
        grads = torch.autograd.grad(
            workload.outputs(None, *inputs).sum(), chosen, materialize_grads=True
        )
        torch.cat([part.flatten() for part in grads], out=out[sample])
    return out


def _conv_grads(module: nn.Conv2d, x: Tensor, delta: Tensor, rows: int) -> Tensor:
    """``[B, O, I/groups, kh, kw]`` from unfolded patches."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NotImplementedError("einsum needs numbers of zeros as padding")
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    patches = patches.unflatten(1, (module.groups, -1)).unflatten(0, (-1, rows))
    delta = delta.flatten(2).unflatten(1, (module.groups, -1)).unflatten(0, (-1, rows))
    weight = torch.einsum("bsgit,bsgot->bgoi", patches, delta)
    return weight.reshape(-1, *module.weight.shape)


def _layer_grads(module: nn.Module, x: Tensor, delta: Tensor, rows: int) -> dict[str, Tensor]:
    """Gradients of a module's parameters for every sample of ``rows`` rows."""
    samples = len(x) // rows
    if isinstance(module, nn.Linear):
        x, delta = (y.reshape(samples, -1, y.shape[-1]) for y in (x, delta))
        return {"weight": torch.einsum("bti,bto->boi", x, delta), "bias": delta.sum(1)}
    if isinstance(module, nn.LayerNorm):
        normal = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        normal, delta = (y.reshape(samples, -1, y.shape[-1]) for y in (normal, delta))
        return {"weight": (delta * normal).sum(1), "bias": delta.sum(1)}

    def over_positions(y: Tensor) -> Tensor:
        return y.flatten(2).sum(2).unflatten(0, (samples, rows)).sum(1)

    if isinstance(module, nn.Conv2d):
        return {"weight": _conv_grads(module, x, delta, rows), "bias": over_positions(delta)}
    if isinstance(module, nn.GroupNorm):
        normal = F.group_norm(x, module.num_groups, eps=module.eps)
        return {"weight": over_positions(delta * normal), "bias": over_positions(delta)}
    raise NotImplementedError(f"einsum has no rule for {type(module).__name__}")


def einsum_gradients(workload: Workload) -> Tensor:
    """Hooks and one einsum per layer, as Opacus does it, ``[B, P]``."""
    names = {id(p): name for name, p in workload.parameters.items()}
    grads: dict[str, Tensor] = {}
    handles = []
    anchor = torch.zeros((), device=workload.device, requires_grad=True)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach()

        def receive(delta: Tensor) -> None:
            parts = _layer_grads(module, x.to(delta.dtype), delta, workload.rows_per_sample)
            for attribute, parameter in module.named_parameters(recurse=False):
                name = names.get(id(parameter))
                if name is None:
                    continue
                part = parts[attribute]
                grads[name] = grads[name] + part if name in grads else part

        if not args[0].requires_grad:
            # nothing upstream needs a gradient, yet this layer's output gradient must be seen
            output = output + anchor.to(output.dtype)
        output.register_hook(receive)
        return output

    for module in workload.model.modules():
        if any(id(p) in names for p in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(hook))
    chosen = workload.parameters
    try:
        # gradients of weights are not asked for, so autograd does not compute them
        sources = [anchor, *(x for x in workload.inputs if x.requires_grad)]
        torch.autograd.grad(workload.outputs().sum(), sources, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return _flat(
        {
            name: grads.get(name, p.new_zeros(workload.samples, *p.shape)).float()
            for name, p in chosen.items()
        }
    )


GRADIENTS: dict[str, Callable[[Workload], Tensor]] = {
    "vmap(grad)": vmap_gradients,
    "loop of backwards": loop_gradients,
    "hooks and einsum": einsum_gradients,
}

Project = Callable[[Tensor], Tensor]


def stored_matrix(
    kind: str, grad_dim: int, proj_dim: int, device: torch.device, dtype: torch.dtype
) -> Project:
    """A matrix ``[P, K]`` in the gradients' dtype, kept in memory; making it is not timed.

    Raises:
        Absent: it would take more than a third of the memory.
    """
    size = dtype.itemsize * grad_dim * proj_dim
    if size > available_bytes(device) / 3:
        raise Absent(f"the matrix would take {size / 1e9:.0f} GB")
    matrix = torch.empty(grad_dim, proj_dim, dtype=dtype, device=device)
    if kind == "normal":
        matrix.normal_()
    else:
        matrix.bernoulli_(0.5).mul_(2).sub_(1)
    # exact in 16 bits: unscaled entries
    return lambda grads: (grads @ matrix).float() * proj_dim**-0.5


def trak_basic(kind: str, grad_dim: int, proj_dim: int, device: torch.device) -> Project:
    """TRAK's ``BasicProjector``: Gaussian or sign blocks of 100 columns, made anew in every call.

    Raises:
        Absent: TRAK is not installed, or a block would take more than a third of the memory.
    """
    projectors = load("trak.projectors", "trak")
    size = 4 * grad_dim * min(100, proj_dim)
    if size > available_bytes(device) / 3:
        raise Absent(f"a block of the matrix would take {size / 1e9:.0f} GB")
    projector = projectors.BasicProjector(
        grad_dim, proj_dim, 0, projectors.ProjectionType(kind), device
    )
    return lambda grads: projector.project(grads, model_id=0) * proj_dim**-0.5


def fast_jl_extension() -> ModuleType:
    """The CUDA extension of TRAK, not our stand-in.

    Raises:
        Absent: there is no CUDA device, or the extension is not installed or does not launch.
    """
    if not torch.cuda.is_available():
        raise Absent("fast_jl needs a CUDA device")
    module = load("fast_jl", "fast_jl")
    if module.__name__.startswith("dtrak_kernels"):
        raise Absent("fast_jl is this package's own stand-in here")
    return module


def fast_jl_extension_projector(
    kind: str, grad_dim: int, proj_dim: int, device: torch.device
) -> Project:
    """TRAK's CUDA kernel.

    Raises:
        Absent: see `fast_jl_extension`; or K is not a multiple of 512.
    """
    module = fast_jl_extension()
    if proj_dim % 512:
        raise Absent(f"fast_jl needs K a multiple of 512, got {proj_dim}")
    tiles = torch.cuda.get_device_properties(device).multi_processor_count
    function = getattr(module, f"project_{kind}_32")

    def run(grads: Tensor) -> Tensor:
        wide = grads.float() if grads.dtype == torch.bfloat16 else grads
        return function(wide, proj_dim, 0, tiles) * proj_dim**-0.5

    return run


def dattri_projector(
    kind: str, shapes: list[tuple[int, ...]], proj_dim: int, device: torch.device
) -> Project:
    """dattri's random projector: ``BasicProjector`` on a CPU, a stored matrix on a GPU.

    Raises:
        Absent: dattri, or on a GPU its ``sjlt`` extension, is not installed; or the matrix would
            not fit.
    """
    module = load("dattri.func.projection", "dattri")
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    if kind == "sjlt":
        if device.type != "cuda":
            raise Absent("dattri's sjlt needs a CUDA device")
        load("sjlt", "sjlt")
    elif device.type == "cuda" and 4 * sum(sizes) * proj_dim > available_bytes(device) / 3:
        raise Absent(f"dattri's matrix would take {4e-9 * sum(sizes) * proj_dim:.0f} GB")
    projector = module.make_random_projector(
        param_shape_list=sizes,
        feature_batch_size=32,
        proj_dim=proj_dim,
        proj_max_batch_size=32,
        device=device,
        proj_seed=0,
        proj_type=module.ProjectionType(kind),
    )
    return lambda grads: projector.project(grads.float(), ensemble_id=0)


def bergson_projector(kind: str, grad_dim: int, proj_dim: int, device: torch.device) -> Project:
    """bergson's global projection: blocks of the matrix made anew in every call.

    Raises:
        Absent: bergson is not installed, or has another interface.
    """
    module = load("bergson.collector.collector", "bergson")
    function = getattr(module, "project_global", None)
    if function is None:
        raise Absent("this bergson has no project_global")
    return lambda grads: function("benchmark", grads.float(), proj_dim, kind)


def count_sketch(grad_dim: int, proj_dim: int, device: torch.device) -> Project:
    """A sparse sketch in two lines of torch: stored places and signs, and ``index_add_``."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(proj_dim, (grad_dim,), generator=generator).to(device)
    signs = (2.0 * torch.randint(2, (grad_dim,), generator=generator) - 1).to(device)

    def run(grads: Tensor) -> Tensor:
        out = torch.zeros(len(grads), proj_dim, device=device)
        return out.index_add_(1, places, grads.float() * signs)

    return run
