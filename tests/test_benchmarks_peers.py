"""What the benchmarks compare with: gradients by other ways, other projectors, real layers."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unet
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
peers = importlib.import_module("peers")
protocol = importlib.import_module("protocol")
workloads = importlib.import_module("workloads")
prices = importlib.import_module("prices")

CPU = torch.device("cpu")


class Net(nn.Module):
    """Every layer the einsum rules know, and a layer that no input reaches."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
        self.norm = nn.GroupNorm(2, 6)
        self.time = nn.Linear(3, 6, bias=False)
        self.linear = nn.Linear(6, 5)
        self.layer_norm = nn.LayerNorm(5)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        ones = torch.ones(len(x), 1, 3, dtype=x.dtype)
        return self.layer_norm(F.silu(self.linear(x + self.time(ones))))


def net_workload():
    torch.manual_seed(0)
    return workloads.Workload("net", Net(), (torch.randn(6, 4, 7, 8),), rows_per_sample=2)


def unet_workload():
    unet = tiny_unet()
    x, steps = workloads.random_rows(3, 2, (1, 8, 8), CPU)
    return workloads.Workload("unet", unet, (x, steps), 2, "float32", workloads.sample_of)


def oracle(workload):
    """Gradients of single samples in float64, by autograd, sharing nothing with the peers."""
    model = workload.model.double()
    rows = []
    for b in range(workload.samples):
        model.zero_grad()
        part = slice(b * workload.rows_per_sample, (b + 1) * workload.rows_per_sample)
        inputs = [x[part].double() if x.is_floating_point() else x[part] for x in workload.inputs]
        out = model(*inputs)
        out = out if isinstance(out, torch.Tensor) else out.sample
        (out.flatten(1) ** 2).mean(1).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    model.float()
    return torch.stack(rows)


@pytest.mark.parametrize("make", [net_workload, unet_workload])
@pytest.mark.parametrize("name", peers.GRADIENTS)
def test_gradients_are_those_of_single_samples(name, make):
    workload = make()
    expected = oracle(workload)
    found = peers.GRADIENTS[name](workload)
    assert found.shape == (workload.samples, workload.grad_dim)
    assert protocol.relative_error(found, expected) < 1e-5
    # nothing is left behind
    assert not any(module._forward_hooks for module in workload.model.modules())
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_a_training_step_is_the_sum_over_samples():
    workload = net_workload()
    expected = oracle(workload).sum(0)
    for _ in range(2):
        found = torch.cat([grad.flatten() for grad in workload.backward()])
        assert protocol.relative_error(found, expected) < 1e-5


def test_vmap_puts_the_attention_back():
    workload = workloads.digits(CPU, 2, 1, "float32")
    before = [m.processor for m in workload.model.modules() if hasattr(m, "set_processor")]
    assert before
    peers.vmap_gradients(workload)
    after = [m.processor for m in workload.model.modules() if hasattr(m, "set_processor")]
    assert before == after


def test_einsum_refuses_what_it_has_no_rule_for():
    model = nn.Sequential(nn.Conv1d(2, 3, 1))
    workload = workloads.Workload("conv1d", model, (torch.randn(2, 2, 5),))
    with pytest.raises(NotImplementedError, match="no rule for Conv1d"):
        peers.einsum_gradients(workload)
    workload = workloads.Workload(
        "same", nn.Conv2d(1, 1, 3, padding="same"), (torch.ones(1, 1, 3, 3),)
    )
    with pytest.raises(NotImplementedError, match="padding"):
        peers.einsum_gradients(workload)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("name", ["stored_matrix", "trak_basic", "dattri", "bergson"])
def test_projectors_keep_inner_products(name, kind):
    grads = torch.randn(16, 1500)
    try:
        if name == "stored_matrix":
            run = peers.stored_matrix(kind, 1500, 256, CPU, torch.float32)
        elif name == "dattri":
            run = peers.dattri_projector(kind, [(1000,), (500,)], 256, CPU)
        else:
            make = peers.trak_basic if name == "trak_basic" else peers.bergson_projector
            run = make(kind, 1500, 256, CPU)
    except protocol.Absent as reason:
        pytest.skip(str(reason))
    features = run(grads)
    assert features.shape == (16, 256)
    assert protocol.gram_error(features, grads) < 1.6


def test_count_sketch_keeps_inner_products():
    grads = torch.randn(16, 1500)
    assert protocol.gram_error(peers.count_sketch(1500, 256, CPU)(grads), grads) < 1.6


def test_absent_peers_say_why(monkeypatch):
    with pytest.raises(protocol.Absent, match="nowhere is not installed"):
        peers.load("surely_not_a_module.part", "nowhere")
    needy = types.ModuleType("needy_peer")
    monkeypatch.setitem(sys.modules, "needy_peer", needy)
    with pytest.raises(protocol.Absent, match="needy is not installed"):
        peers.load("needy_peer.inside", "needy")
    monkeypatch.setattr(importlib, "import_module", lambda name: exec("import surely_not_a_module"))
    with pytest.raises(protocol.Absent, match="cannot be imported: no module surely_not_a_module"):
        peers.load("needy_peer", "needy")


def test_our_stand_in_is_not_taken_for_the_cuda_extension(monkeypatch):
    from dtrak_kernels import fast_jl

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fast_jl", fast_jl)
    with pytest.raises(protocol.Absent, match="stand-in"):
        peers.fast_jl_extension()


def test_matrices_that_do_not_fit_are_absent(monkeypatch):
    monkeypatch.setattr(peers, "available_bytes", lambda device: 1000)
    with pytest.raises(protocol.Absent, match="would take"):
        peers.stored_matrix("normal", 1000, 100, CPU, torch.float32)
    with pytest.raises(protocol.Absent, match="would take"):
        peers.trak_basic("normal", 1000, 100, CPU)


def test_models_have_the_published_sizes():
    with torch.device("meta"):
        cifar, unet = workloads.cifar_unet(), workloads.stable_diffusion_unet()
        total = sum(parameter.numel() for parameter in unet.parameters())
        workloads.add_lora(unet, 128)
    assert sum(parameter.numel() for parameter in cifar.parameters()) == 38_306_691
    assert total == 859_520_964
    chosen = [p.numel() for p in unet.parameters() if p.requires_grad]
    assert sum(chosen) == 25_509_888


def suite(name):
    """A suite's module; a test file of the same name may be loaded, too."""
    file = Path(peers.__file__).parent / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"suite_{name}", file)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_gpu_s_cases_are_real_ones_and_fit_into_it():
    third, P = 130 * 2**30 / 3, 38_306_691
    projection = suite("projection").make_cases(cuda=True)
    for kind in ("rademacher", "normal", "sjlt"):
        widths = {c.proj_dim for c in projection if (c.kind, c.model) == (kind, "cifar")}
        assert 65536 in widths
        # a baseline that stores its matrix is there, too
        assert kind == "sjlt" or 2 * P * min(widths) < third
    assert {c.dtype for c in projection} == {"float32", "bfloat16"}
    sketcher = suite("sketcher").make_cases(smoke=False, cuda=True)
    assert {c.model for c in sketcher} == set(workloads.MODELS)
    assert 65536 in sketcher[0].sparse
    for case in sketcher:
        assert case.peers in case.dense, "peers are beside ours of the same width"
        assert 4 * P * case.peers < third / 2 or case.model == "digits"
    # the dtype of a GPU is rehearsed
    assert any(c.dtype == "bfloat16" for c in suite("sketcher").make_cases(smoke=True, cuda=True))


def without(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_the_layers_of_cifar_are_known_without_diffusers(monkeypatch):
    cuda = torch.device("cuda")
    expected = workloads.unet_layers(cuda)["CIFAR U-Net"]
    known = set(workloads.parameter_shapes("cifar"))
    without(monkeypatch, "diffusers")
    found = workloads.unet_layers(cuda)
    assert list(found) == ["CIFAR U-Net"]
    assert {(s.name, s.options) for s in found["CIFAR U-Net"]} == {
        (s.name, s.options) for s in expected
    }
    shapes = workloads.parameter_shapes("cifar")
    assert set(shapes) <= known
    assert 0.998 < sum(torch.Size(shape).numel() for shape in shapes) / 38_306_691 < 1
    for make in (workloads.cifar_unet, workloads.stable_diffusion_unet):
        with pytest.raises(protocol.Absent, match="diffusers is not installed"):
            make()
    with pytest.raises(protocol.Absent, match="diffusers is not installed"):
        workloads.digits(CPU, 2, 1, "float32")
    with pytest.raises(protocol.Absent, match="diffusers is not installed"):
        workloads.parameter_shapes("digits")


def test_a_missing_peft_is_known_before_the_model_is_made(monkeypatch):
    without(monkeypatch, "peft")
    monkeypatch.setattr(workloads, "tiny_conditional_unet", lambda: pytest.fail("was made"))
    with pytest.raises(protocol.Absent, match="peft is not installed"):
        workloads.lora(CPU, 1, 1, "float32")


def test_layers_are_those_of_the_model():
    x, steps = workloads.random_rows(1, 1, (1, 8, 8), CPU)
    unet = tiny_unet()
    shapes = workloads.layer_shapes(unet, workloads.sample_of, x, steps)
    kinds = (nn.Linear, nn.Conv2d)
    assert sum(shape.count for shape in shapes) == sum(isinstance(m, kinds) for m in unet.modules())
    wanted = sorted(tuple(m.weight.shape) for m in unet.modules() if isinstance(m, kinds))
    found = sorted(tuple(shape.make().weight.shape) for shape in shapes for _ in range(shape.count))
    assert found == wanted
    assert len({shape.name for shape in shapes}) == len(shapes)


def test_a_contest_is_right_about_who_agrees():
    """The price of a backward on a tiny layer, and with a sketcher that is wrong by 1%."""
    shape = workloads.LayerShape(
        "conv",
        (
            ("in_channels", 4),
            ("out_channels", 6),
            ("kernel_size", (3, 3)),
            ("stride", (1, 1)),
            ("padding", (1, 1)),
        ),
        (4, 5, 5),
    )
    workload = workloads.layer(shape, CPU, 3, 2, "float32")
    wanted = prices.projections((256,), (32,))
    contest = prices.make_contest(
        workload,
        "layers",
        wanted,
        gradients=list(peers.GRADIENTS),
        peer_projection=wanted[0],
    )
    found = protocol.race(contest.providers, CPU, seconds=0.0, rounds=(1, 1))
    names = [prices.STEP, *map(prices.projection_name, wanted), *peers.GRADIENTS, prices.STORED]
    assert set(names) <= set(found)
    failures = {name: o.failure for name, o in found.items() if o.failure}
    assert failures == {}
    # one forward and two products of its size: 2 · 3 · rows · positions · weights
    step = contest.providers[0].work
    assert step.flops == 3 * 2 * 6 * 25 * (4 * 6 * 9)
    ours = contest.providers[1]
    result = ours.prepare()()
    assert ours.checks[0].error(result) <= ours.checks[0].allowed
    assert ours.checks[0].error(result * 1.01) > ours.checks[0].allowed
    assert ours.checks[0].error(result.roll(1, dims=0)) > ours.checks[0].allowed
