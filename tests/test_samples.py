"""Samples are decoded as they are needed, and keep one fingerprint each."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dtrak.data import images as images_module
from dtrak.data.images import DataError, encode_png, load_data
from dtrak.data.rows import InMemory, Joined, Stored
from dtrak.data.samples import Samples, as_samples, join

COUNT = 9


def pictures(count=COUNT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 6, 5), generator=generator, dtype=torch.uint8)


def write_folder(folder):
    folder.mkdir()
    for number, picture in enumerate(pictures()):
        (folder / f"{number}.png").write_bytes(encode_png(picture))
    return folder


def write_parquet(file, rows_per_group=4):
    column = [{"bytes": encode_png(p), "path": None} for p in pictures()]
    table = pa.table({"image": column, "label": list(range(COUNT))})
    pq.write_table(table, file, row_group_size=rows_per_group)
    return file


def write_datasets(folder):
    import datasets

    column = [Image.fromarray(p.movedim(0, -1).numpy()) for p in pictures()]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": column}, features=features).save_to_disk(folder)
    return folder


SOURCES = {"folder": write_folder, "parquet": write_parquet, "datasets": write_datasets}


@pytest.fixture
def few_kept(monkeypatch):
    """Two pictures are kept decoded; the number of those decoded, counted."""
    monkeypatch.setattr(images_module, "KEPT_BYTES", 2 * 3 * 6 * 5)
    decoded, decode = [], images_module._decode
    monkeypatch.setattr(images_module, "_decode", lambda c: decoded.append(1) or decode(c))
    return decoded


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_not_kept_is_decoded_when_it_is_asked_for(kind, tmp_path, few_kept, monkeypatch):
    source = SOURCES[kind](tmp_path / ("x.parquet" if kind == "parquet" else "x"))
    data = load_data(source)
    assert len(few_kept) == COUNT
    assert data.shape == (3, 6, 5)
    expected = pictures().float() / 127.5 - 1
    assert torch.equal(data.batch([0, 1]), expected[:2])
    assert len(few_kept) == COUNT, "the first two are kept"
    assert torch.equal(data.batch([8, 0, 4]), expected[[8, 0, 4]])
    assert len(few_kept) == COUNT + 2
    assert torch.equal(data.images, expected)
    assert torch.equal(data.pictures(slice(3, 6)), expected[3:6])
    assert torch.equal(data.select([7, 1]).batch(slice(None)), expected[[7, 1]])
    # made in the one pass over the data
    before = len(few_kept)
    fingerprint = data.fingerprint
    assert len(few_kept) == before
    monkeypatch.undo()
    whole = load_data(source)
    assert (whole.fingerprint, whole.fingerprints()) == (fingerprint, data.fingerprints())


def test_a_picture_that_is_gone_since_is_named(tmp_path, few_kept):
    folder = write_folder(tmp_path / "x")
    data = load_data(folder)
    (folder / "5.png").unlink()
    with pytest.raises(DataError, match=r"image '5\.png' in '.*' could be read before and cannot"):
        data.batch([5])
    assert torch.equal(data.batch([6]), pictures()[6:7].float() / 127.5 - 1)


def test_fingerprints_are_of_id_pixels_and_condition():
    pixels = torch.rand(3, 1, 4, 4)
    base = Samples(pixels, list("abc"), None, "x").conditioned(["one", "two", ""])

    def differing(other):
        pairs = zip(base.fingerprints(), other.fingerprints(), strict=True)
        return [row for row, (a, b) in enumerate(pairs) if a != b]

    assert differing(Samples(pixels, list("abc"), [1, 2, 3], "y", ["one", "two", ""])) == []
    assert differing(Samples(pixels, ["a", "B", "c"], None, "x", ["one", "two", ""])) == [1]
    assert differing(base.conditioned(["one", "two", "three"])) == [2]
    assert differing(base.conditioned(None)) == [0, 1, 2]
    changed = pixels.clone()
    changed[0, 0, 3, 3] += 1e-6
    assert differing(Samples(changed, list("abc"), None, "x", ["one", "two", ""])) == [0]
    # an empty caption is a caption
    assert base.fingerprint != base.conditioned(["one", "two", None]).fingerprint
    assert base.fingerprint != base.select([1, 0, 2]).fingerprint
    assert base.select([2]).fingerprints() == base.fingerprints()[2:]
    reshaped = Samples(pixels.reshape(3, 4, 2, 2), list("abc"), None, "x", base.conditions)
    assert reshaped.fingerprint != base.fingerprint


def test_what_is_encoded_follows_its_samples():
    base = Samples(torch.rand(4, 1, 2, 2), list("abcd"), [0, 1, 0, 1], "x", list("wxyz"))
    latents = torch.rand(4, 6)
    encoded = base.encoded(InMemory(latents.unflatten(1, (6, 1, 1))))
    assert encoded.is_encoded
    assert not base.is_encoded
    assert encoded.fingerprint == base.fingerprint
    part = encoded.select([3, 0])
    assert torch.equal(part.batch(slice(None)).flatten(1), latents[[3, 0]])
    assert torch.equal(part.images, base.images[[3, 0]])
    assert (part.ids, part.labels, part.conditions) == (["d", "a"], [1, 0], ["z", "w"])
    both = join([part, encoded], "both")
    assert both.ids == ["d", "a", *"abcd"]
    assert both.conditions == ["z", "w", *"wxyz"]
    assert torch.equal(both.batch([1, 5]).flatten(1), latents[[0, 3]])
    assert join([base.conditioned(None)] * 2, "x").conditions is None
    with pytest.raises(ValueError, match="inputs must be 4 rows, got 3"):
        base.encoded(InMemory(latents[:3]))


class Store:
    """Reads like a feature store, and says what was read."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.reads = tensor, tuple(tensor.shape), []

    def __getitem__(self, rows):
        self.reads.append((rows.start, rows.stop))
        return self.tensor[rows]


def test_neighbours_in_a_store_are_read_together():
    store = Store(torch.arange(24.0).reshape(6, 4))
    rows = Stored(store, (2, 2))
    assert torch.equal(rows.read([1, 2, 3, 0, 5]).flatten(1), store.tensor[[1, 2, 3, 0, 5]])
    assert store.reads == [(1, 4), (0, 1), (5, 6)]
    assert rows.read([]).shape == (0, 2, 2)
    joined = Joined([rows, InMemory(torch.zeros(2, 2, 2))])
    assert joined.shape == (8, 2, 2)
    assert torch.equal(
        joined.read([7, 5]).flatten(1), torch.stack([torch.zeros(4), store.tensor[5]])
    )


def test_a_tensor_is_named_by_its_rows():
    data = as_samples(torch.zeros(3, 2))
    assert (data.ids, data.conditions, data.shape) == (["0", "1", "2"], None, (2,))
    assert as_samples(data) is data


MEMORY = """
import resource, sys, time
from dtrak.data.images import load_data
load_data("digits", limit=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = load_data(sys.argv[1])
data.fingerprint
for first in range(0, len(data), 1000):
    data.batch(slice(first, first + 1000))
print(len(data), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux counts it")
def test_a_hundred_thousand_small_pictures_take_less_than_a_gigabyte(tmp_path):
    generator = np.random.default_rng(0)
    encoded = [
        encode_png(torch.from_numpy(generator.integers(0, 256, (3, 32, 32), dtype=np.uint8)))
        for _ in range(500)
    ]
    column = [{"bytes": encoded[n % 500], "path": None} for n in range(100_000)]
    pq.write_table(pa.table({"image": column}), tmp_path / "many.parquet", row_group_size=5000)
    del column
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "many.parquet"],
        check=True,
        capture_output=True,
        text=True,
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 100_000
    assert megabytes < 1000


def test_samples_that_differ_in_kind_are_not_joined():
    data = as_samples(torch.rand(2, 5))
    for other in (data.conditioned([0, 1]), data.encoded(InMemory(torch.rand(2, 5)))):
        with pytest.raises(ValueError, match="to be joined, or none"):
            join([other, data], "both")


def test_a_condition_that_has_no_fingerprint_is_named():
    data = as_samples(torch.rand(2, 5)).conditioned([torch.zeros(1), torch.ones(1)])
    with pytest.raises(ValueError, match=r"conditions must be JSON values .* a Tensor .* '0'"):
        _ = data.fingerprint
