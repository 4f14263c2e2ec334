import gc
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

import dtrak.runs.measure
from dtrak.runs.measure import Stage, StageClock, TensorMeter, available_bytes, format_bytes


def counts(meter):
    return meter.live_bytes, meter.peak_bytes, meter.largest_bytes


def test_counts_what_lives():
    with TensorMeter() as meter:
        a = torch.zeros(100)
        assert counts(meter) == (400, 400, 400)
        b = torch.ones(10, dtype=torch.float64)
        assert counts(meter) == (480, 480, 400)
        del a
        assert counts(meter) == (80, 480, 400)
        c = b * 2
        assert counts(meter) == (160, 480, 400)
        d = torch.zeros(1000, dtype=torch.int8)
        assert counts(meter) == (1160, 1160, 1000)
    # the ledger goes on after the block, the tracking does not
    del b, c
    untracked = torch.zeros(500)
    assert counts(meter) == (1000, 1160, 1000)
    del d, untracked
    assert counts(meter) == (0, 1160, 1000)


def test_temporaries_are_freed_at_once():
    with TensorMeter() as meter:
        x = torch.ones(100)
        # two temporaries of 400 bytes live beside x at most
        y = ((x + 1) * 2).sum()
        assert meter.live_bytes == 400 + 4
    assert meter.peak_bytes == 400 + 2 * 400
    del y


def test_views_are_not_counted_twice():
    with TensorMeter() as meter:
        a = torch.zeros(6, 4)
        views = [a[1:], a.T, a.view(4, 6), a.detach(), a.expand(5, 6, 4), a[0, 0], a.unbind(1)]
        assert counts(meter) == (96, 96, 96)
        # any of them keeps the memory
        del a
        views = views[-2:-1]
        assert meter.live_bytes == 96
        del views
        assert meter.live_bytes == 0


def test_operations_in_place_and_into_given_memory_make_nothing():
    with TensorMeter() as meter:
        a, b = torch.zeros(25), torch.ones(25)
        a.add_(b).mul_(2)
        torch.add(a, b, out=b)
        a.relu_()
        a[3:5].zero_()
        assert counts(meter) == (200, 200, 100)


def test_memory_that_grows_is_counted_again():
    with TensorMeter() as meter:
        a = torch.empty(0)
        torch.cat([torch.zeros(30), torch.zeros(20)], out=a)
        assert counts(meter) == (200, 400, 200)
        del a
        assert meter.live_bytes == 0


def test_known_tensors_do_not_count():
    weight, data = torch.zeros(1000), torch.zeros(50, 10)
    with TensorMeter(known=[weight]) as meter:
        row = data[:1]
        view = weight[:10].view(2, 5)
        alias = data.detach().requires_grad_()
        assert counts(meter) == (0, 0, 0)
        out = row.sum() + view.sum()
        assert counts(meter)[0] == 4
        weight.add_(1)
        assert counts(meter)[0] == 4
    del out, alias


def test_a_known_address_that_is_used_again_counts():
    weights = [torch.zeros(64) for _ in range(50)]
    meter, storage = TensorMeter(known=weights), weakref.ref(weights[7].untyped_storage())
    del weights
    # to know is not to keep
    assert storage() is None
    with meter:
        again = [torch.zeros(64) for _ in range(50)]
    assert meter.live_bytes == 50 * 256
    del again


def test_a_tracked_address_that_is_used_again_counts():
    with TensorMeter() as meter:
        for _ in range(20):
            x = torch.zeros(64)
            assert meter.live_bytes == 256
            del x
            assert meter.live_bytes == 0
    assert meter.peak_bytes == 256


def test_lists_and_scalars_made_into_tensors_count():
    with TensorMeter() as meter:
        a = torch.tensor([1.0, 2.0, 3.0])
        b = torch.as_tensor([1, 2])
        assert meter.live_bytes == 12 + 16
    del a, b


def test_memory_of_numpy_counts_where_it_is_taken_in():
    array = np.zeros(1000)
    before = torch.from_numpy(array)
    with TensorMeter() as meter:
        y = before[:10] * 2
        assert meter.live_bytes == 80
        x = torch.from_numpy(np.zeros(100))
        z = x[:10]
        assert meter.live_bytes == 880
    del x, y, z


def test_counts_in_backward():
    """Against the sizes written down by hand: y = (x W)², summed."""
    x, w = torch.randn(8, 16), torch.randn(16, 32, requires_grad=True)
    with TensorMeter(known=[x, w]) as meter:
        product = x @ w
        loss = product.square().sum()
        # the product (kept for backward) and the scalar
        assert meter.live_bytes == 4 * (8 * 32 + 1)
        del product
        assert meter.live_bytes == 4 * (8 * 32 + 1)
        before = meter.peak_bytes
        loss.backward()
        del loss
        gc.collect()
        # all that is left is the gradient
        assert meter.live_bytes == 4 * 16 * 32
    assert meter.largest_bytes == 4 * 16 * 32
    assert meter.peak_bytes >= before + 4 * 16 * 32 - 4 * 8 * 32
    w.grad = None
    assert meter.live_bytes == 0


def test_counts_under_vmap_of_grad():
    """Per-sample gradients show as what they are: B times the parameters."""
    module = torch.nn.Linear(20, 30, bias=False)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(7, 20)

    def output(parameters, row):
        return functional_call(module, parameters, (row,)).square().sum()

    with TensorMeter(known=[*parameters.values(), x]) as meter:
        grads = vmap(grad(output), in_dims=(None, 0))(parameters, x)
        assert meter.live_bytes == 4 * 7 * 20 * 30
        assert meter.largest_bytes == 4 * 7 * 20 * 30
        assert grads["weight"].shape == (7, 30, 20)
        del grads
        gc.collect()
        assert meter.live_bytes == 0
    assert 4 * 7 * 20 * 30 <= meter.peak_bytes < 2 * 4 * 7 * 20 * 30


def test_result_is_that_of_the_operation():
    x = torch.randn(5, 5, requires_grad=True)
    with TensorMeter(known=[x]):
        inside = x.softmax(1).norm()
        inside.backward()
    gradient = x.grad.clone()
    x.grad = None
    outside = x.softmax(1).norm()
    outside.backward()
    assert torch.equal(inside, outside)
    assert torch.equal(gradient, x.grad)


def test_two_meters_count_the_same():
    with TensorMeter() as outer, TensorMeter() as inner:
        a = torch.zeros(10) + torch.ones(10)
        assert counts(inner) == counts(outer) == (40, 120, 40)
    del a


def test_finished_meter_goes_away():
    weights = [torch.zeros(10)]
    with TensorMeter(known=weights) as meter:
        made = weights[0] * 1
    alive = weakref.ref(meter)
    del meter, made
    gc.collect()
    # the weights live on and must not keep every meter that ever knew them
    assert alive() is None


@pytest.mark.gpu
def test_meter_agrees_with_the_allocator():
    module = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU()).cuda()
    x = torch.randn(256, 512, device="cuda")
    module(x).sum().backward()
    module.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with TensorMeter(known=[x, *module.parameters()]) as meter:
        module(x).sum().backward()
    assert meter.live_bytes == torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    # the allocator rounds, and sees cuBLAS' workspace
    assert meter.peak_bytes <= peak < meter.peak_bytes + 64 * 2**20


def test_stages_are_noted_in_order():
    clock = StageClock(torch.device("cpu"))
    start = time.perf_counter()
    with clock.stage("first"):
        torch.ones(10).sum()
    with clock.stage("second"):
        pass
    elapsed = time.perf_counter() - start
    assert [stage.name for stage in clock.stages] == ["first", "second"]
    assert all(isinstance(stage, Stage) and stage.seconds > 0 for stage in clock.stages)
    assert sum(stage.seconds for stage in clock.stages) <= elapsed


def test_seconds_are_wall_clock_time(monkeypatch):
    times = iter([10.0, 12.5, 100.0, 100.25])
    monkeypatch.setattr(dtrak.runs.measure.time, "perf_counter", lambda: next(times))
    clock = StageClock(torch.device("cpu"))
    with clock.stage("a"):
        pass
    with clock.stage("b"):
        pass
    assert [stage.seconds for stage in clock.stages] == [2.5, 0.25]


def test_stage_that_fails_is_not_noted():
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no"), clock.stage("a"):
        raise RuntimeError("no")
    with clock.stage("b"):
        pass
    assert [stage.name for stage in clock.stages] == ["b"]


def test_nested_stages_end_before_their_parent():
    clock = StageClock(torch.device("cpu"))
    with clock.stage("outer"), clock.stage("inner"):
        pass
    assert [stage.name for stage in clock.stages] == ["inner", "outer"]
    assert clock.stages[1].seconds >= clock.stages[0].seconds


def test_peak_memory_of_a_stage_is_its_own():
    clock = StageClock(torch.device("cpu"))
    with clock.stage("before"):
        pass
    size = 200 * 2**20
    with clock.stage("large"):
        np.ones(size, dtype=np.uint8).sum()
    with clock.stage("after"):
        pass
    before, large, after = (stage.peak_bytes for stage in clock.stages)
    assert large - before > 0.9 * size
    if _high_water_mark_can_be_reset():
        assert large - after > 0.9 * size


def _high_water_mark_can_be_reset():
    array = np.ones(64 * 2**20, dtype=np.uint8)
    high = dtrak.runs.measure._peak(torch.device("cpu"))
    del array
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return dtrak.runs.measure._peak(torch.device("cpu")) < high


def test_peak_memory_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(dtrak.runs.measure, "Path", lambda name: tmp_path / "nothing" / name[1:])
    clock = StageClock(torch.device("cpu"))
    with clock.stage("a"):
        pass
    assert 10 * 2**20 < clock.stages[0].peak_bytes < 2**40
    assert available_bytes(torch.device("cpu")) == 10**9


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (12_345, "12.3 kB"),
        (99_960, "100 kB"),
        (123_456, "123 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (12_300_000, "12.3 MB"),
        (2**31, "2.15 GB"),
        (7_500_000_000_000, "7.5 TB"),
        (1_234_000_000_000_000, "1234 TB"),
    ],
)
def test_bytes_for_a_reader(size, text):
    assert format_bytes(size) == text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_available_memory():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 2**20 < available_bytes(torch.device("cpu")) <= total


@pytest.mark.gpu
def test_available_memory_of_a_gpu():
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    assert 2**20 < available_bytes(device) <= total
