import json
from dataclasses import replace

import pytest
import torch
from numerics import relative_error
from test_sketcher import small_unet

import dtrak
from dtrak.data.samples import Samples
from dtrak.features import extraction
from dtrak.features import extraction as features
from dtrak.features.extraction import (
    FeatureSettings,
    FusedExtractor,
    check_prediction,
    deciding_settings,
    fill_store,
    fitting_batch_size,
    left_in,
)
from dtrak.features.store import FeatureStore, StoreError
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.files import write_atomically
from dtrak.runs.folders import describe_differences
from dtrak_kernels import Projection
from dtrak_kernels.compiling import rehearse

CPU = torch.device("cpu")
SETTINGS = FeatureSettings("mean_squared_l2_norm", (0, 500), 0, Projection("sjlt", 512))


def make_model():
    return UNet(small_unet().float(), linear_process())


def make_data(count=10):
    torch.manual_seed(4)
    images = torch.rand(count, 1, 8, 8) * 2 - 1
    return Samples(images, [f"image/{i}" for i in range(count)], None, "test")


class Counting:
    """An extractor whose features are the images' first pixels; fails after some batches."""

    method, grad_dim, proj_dim, flips = "counting", 64, 3, False
    model, device = make_model(), CPU

    def __init__(self, batches=10**9):
        self.left = batches

    def extract(self, images, ids, items=None):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return images.flatten(1)[:, :3]


def make_store(folder, data, batch_size=4, **changes):
    return FeatureStore.open(
        folder, {"a": 1, "nested": {"b": 2}} | changes, data.ids, 3, batch_size
    )


def test_an_interrupted_store_resumes_with_the_same_rows(tmp_path):
    data = make_data(700)
    store = make_store(tmp_path / "broken", data)
    with pytest.raises(KeyboardInterrupt):
        fill_store(store, Counting(batches=52), data)
    # 208 rows were made, and the first 192 are kept
    assert (store.missing(), len(store.begun(0)), left_in(store)) == ([0, 1], 192, 508)
    with pytest.raises(KeyboardInterrupt):
        fill_store(store, Counting(batches=85), data)
    assert (store.missing(), len(store.begun(1)), left_in(store)) == ([1], 0, 188)
    assert [file.name for file in (tmp_path / "broken").iterdir() if "from" in file.name] == []
    seen = []
    # another batch size was asked for: the store keeps the one its rows were computed with
    store = make_store(tmp_path / "broken", data, batch_size=7)
    assert store.batch_size == 4
    counting = Counting()
    fill_store(store, counting, data, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (512, 700)
    assert seen[-1] == (700, 700)
    assert 10**9 - counting.left == 47
    assert torch.equal(store.load(), data.images.flatten(1)[:, :3])
    assert store.missing() == []


def test_shards_are_of_one_size_whatever_the_batch(tmp_path):
    data = make_data(1100)
    for batch_size in (4, 100, 1000):
        store = make_store(tmp_path / str(batch_size), data, batch_size=batch_size)
        fill_store(store, Counting(), data)
        assert [len(store[slice(*store.rows(n).indices(1100))]) for n in range(3)] == [512, 512, 76]
        assert torch.equal(store.load(), data.images.flatten(1)[:, :3])
    # a shard is held in memory: of exact gradients it has fewer rows
    wide = FeatureStore.open(tmp_path / "wide", {}, data.ids, 2**20, 4)
    assert wide.rows(0) == slice(0, 64)


@pytest.mark.parametrize("rows", [(0, 600), (3, 5), (500, 520), (512, 600), (599, 700), (20, 20)])
def test_slices(rows, tmp_path):
    data = make_data(600)
    store = make_store(tmp_path, data)
    fill_store(store, Counting(), data)
    expected = data.images.flatten(1)[:, :3][slice(*rows)]
    assert torch.equal(store[slice(*rows)], expected)
    assert (len(store), store.shape) == (600, (600, 3))


def test_refuses_other_settings_by_name(tmp_path):
    data = make_data()
    make_store(tmp_path, data)
    with pytest.raises(StoreError, match=r"a is 1 there and 5 here; nested\.b is 2 there and 7"):
        make_store(tmp_path, data, a=5, nested={"b": 7})
    with pytest.raises(StoreError, match="extra is null there and true here"):
        make_store(tmp_path, data, extra=True)


def test_refuses_a_damaged_manifest(tmp_path):
    data = make_data()
    make_store(tmp_path, data)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: choose another --output"):
        make_store(tmp_path, data)


def test_refuses_an_incomplete_or_damaged_shard(tmp_path):
    data = make_data()
    store = make_store(tmp_path, data)
    with pytest.raises(StoreError, match=r"000000\.safetensors is missing"):
        store.load()
    fill_store(store, Counting(), data)
    file = tmp_path / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StoreError, match=r"000000\.safetensors is damaged"):
        store.load()
    store.write(0, torch.zeros(9, 3))
    with pytest.raises(StoreError, match=r"must hold features \(10, 3\), got \(9, 3\)"):
        store.load()
    with pytest.raises(IndexError, match="contiguous"):
        store[::2]


def test_a_file_changes_only_when_it_is_whole(tmp_path, monkeypatch):
    import os

    file, seen = tmp_path / "file", []
    write_atomically(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(file.read_bytes()))
    write_atomically(file, b"new")
    assert seen == [b"old"]
    assert file.read_bytes() == b"new"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_every_deciding_setting_is_in_the_manifest(monkeypatch):
    model, data = make_model(), make_data()
    base = deciding_settings(model, SETTINGS, data, "fused")
    json.dumps(base)

    def differs(settings=SETTINGS, model=model, data=data, method="fused"):
        return describe_differences(base, deciding_settings(model, settings, data, method))

    other = {
        "output_function": FeatureSettings("loss", (0, 500), 0, SETTINGS.projection),
        "timesteps": FeatureSettings("mean_squared_l2_norm", (0, 501), 0, SETTINGS.projection),
        "noise_seed": FeatureSettings("mean_squared_l2_norm", (0, 500), 1, SETTINGS.projection),
        "projection.seed": FeatureSettings(
            "mean_squared_l2_norm", (0, 500), 0, Projection("sjlt", 512, 1)
        ),
        "projection.proj_dim": FeatureSettings(
            "mean_squared_l2_norm", (0, 500), 0, Projection("sjlt", 513)
        ),
        "dtype": FeatureSettings(
            "mean_squared_l2_norm", (0, 500), 0, SETTINGS.projection, "float64"
        ),
    }
    for key, settings in other.items():
        assert differs(settings).startswith(f"{key} is"), key
    assert differs() == ""
    assert differs(method="published").startswith("method is")
    assert differs(data=data.select([1, 0])).startswith("data is")
    changed = make_model()
    with torch.no_grad():
        changed.module.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert differs(model=changed).startswith("model is")
    changed = make_model()
    changed.process.scheduler.register_to_config(beta_end=0.03)
    assert differs(model=changed).startswith("schedule.beta_end is")
    # a release changes no numbers; what does is said by hand
    assert dtrak.__version__ not in base.values()
    monkeypatch.setattr(extraction, "NUMERICS", dtrak.NUMERICS + 1)
    assert differs() == f"numerics is {dtrak.NUMERICS} there and {dtrak.NUMERICS + 1} here"


def test_features_do_not_depend_on_batch_or_order():
    data = make_data(6)
    extractor = FusedExtractor(make_model(), SETTINGS, CPU)
    whole = extractor.extract(data.images, data.ids)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = data.select(order)
    parts = [
        extractor.extract(shuffled.images[i : i + 2], shuffled.ids[i : i + 2]) for i in (0, 2, 4)
    ]
    assert relative_error(torch.cat(parts), whole[order]) < 1e-6


def test_kernels_are_compiled_before_the_first_batch(monkeypatch):
    """On a GPU: by a rehearsal of that batch, which changes nothing."""
    data, rehearsed = make_data(3), []
    expected = FusedExtractor(make_model(), SETTINGS, CPU).extract(data.images, data.ids)
    extractor = FusedExtractor(make_model(), SETTINGS, CPU)
    assert not extractor.compiles
    extractor.compiles = True
    monkeypatch.setattr(features, "compile_ahead", lambda run: rehearsed.append(rehearse(run)))
    for _ in range(2):
        assert torch.equal(extractor.extract(data.images, data.ids), expected)
    assert len(rehearsed) == 1


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-5), ("bfloat16", 0.1)])
def test_dtypes(dtype, tolerance):
    data = make_data(3)
    expected = FusedExtractor(make_model(), SETTINGS, CPU).extract(data.images, data.ids)
    settings = FeatureSettings(
        SETTINGS.output_function, SETTINGS.timesteps, 0, SETTINGS.projection, dtype
    )
    features = FusedExtractor(make_model(), settings, CPU).extract(data.images, data.ids)
    assert features.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert relative_error(features, expected) < tolerance


def test_sums_over_pixels_do_not_overflow_in_half_precision():
    data = make_data(3)
    model = make_model()
    with torch.no_grad():
        model.module.conv_out.weight.mul_(300)
    settings = replace(SETTINGS, output_function="l1_norm")
    expected = FusedExtractor(model, settings, CPU).extract(data.images, data.ids)
    half = FusedExtractor(model, replace(settings, dtype="float16"), CPU)
    assert relative_error(half.extract(data.images, data.ids), expected) < 0.02


def test_a_model_that_breaks_is_refused_by_sample_and_timestep():
    prediction = torch.zeros(6, 1, 2, 2)
    prediction[3, 0, 1, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"not finite for sample 'b' at timestep 900 \(1 of 6 rows"
    ):
        check_prediction(prediction, ["a", "b", "c"], torch.tensor([0, 900] * 3))
    model = make_model()
    with torch.no_grad():
        model.module.conv_out.bias.fill_(float("nan"))
    data = make_data(2)
    with pytest.raises(ValueError, match="not finite for sample 'image/0' at timestep 0"):
        FusedExtractor(model, SETTINGS, CPU).extract(data.images, data.ids)


def test_a_zero_feature_is_refused(tmp_path):
    data = make_data()
    data.images[3] = 0
    store = make_store(tmp_path, data)
    with pytest.raises(ValueError, match="features of samples 'image/0' to 'image/3'"):
        fill_store(store, Counting(), data)


def test_the_default_batch_fits(tmp_path):
    data = make_data(40)
    extractor = FusedExtractor(make_model(), SETTINGS, CPU)
    assert 1 <= fitting_batch_size(extractor, data) <= 40
    assert fitting_batch_size(extractor, make_data(2)) <= 2


def test_the_batch_does_not_depend_on_what_a_projection_keeps(monkeypatch):
    monkeypatch.setattr(features, "available_bytes", lambda _: 40 * 10**6)
    data, extractor = make_data(300), FusedExtractor(make_model(), SETTINGS, CPU)
    fresh = fitting_batch_size(extractor, data)
    assert 1 < fresh < 256
    assert fitting_batch_size(extractor, data) == fresh
