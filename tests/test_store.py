"""Stores in fewer bytes, and as files: checked, joined, taken in from elsewhere, scored."""

import csv
import json

import numpy as np
import pytest
import torch
from numerics import relative_error
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save, save_file
from test_features import make_data, make_store
from typer.testing import CliRunner

from dtrak.cli.store import app
from dtrak.features import store as stores
from dtrak.features.imported import import_rows, open_dtrak, open_trak
from dtrak.features.packing import GROUP, pack, packed_bytes, unpack
from dtrak.features.store import FeatureStore, StoreError, StoreInMemory
from dtrak.features.upkeep import find_faults, merge
from dtrak.runs.ranks import share


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stores, "_ROWS_PER_SHARD", 8)
    yield
    share(None)


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def filled(folder, rows, **how):
    """A store of rows ``[N, K]``."""
    ids = [f"{row:02d}" for row in range(len(rows))]
    store = FeatureStore.open(folder, {"a": 1}, ids, rows.shape[1], 4, **how)
    for shard in store.missing():
        store.write(shard, rows[store.rows(shard)])
    return store


def random_rows(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("K", [1, GROUP, 300])
def test_eight_bits_are_off_by_half_a_step(K):
    rows = random_rows(6, K) * torch.logspace(-20, 20, 6)[:, None]
    rows[3] = 0
    kept = pack(rows, "int8")
    assert sum(t.nbytes for t in kept.values()) == 6 * packed_bytes(K, "int8")
    read = unpack(kept)
    for first in range(0, K, GROUP):
        part = slice(first, first + GROUP)
        step = rows[:, part].double().abs().amax(1, keepdim=True) / 127
        error = (read[:, part].double() - rows[:, part].double()).abs()
        assert (error <= 0.5001 * step).all()
        # the largest is kept to rounding
        assert relative_error(read[:, part].abs().amax(1), rows[:, part].abs().amax(1)) < 1e-6
    assert torch.equal(unpack(pack(rows, "float32")), rows)
    assert torch.equal(unpack(pack(rows, "bfloat16")), rows.bfloat16().float())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_store_rounds_its_rows_once(tmp_path, dtype):
    rows = random_rows(20, 200)
    store = filled(tmp_path / "a", rows, dtype=dtype)
    assert torch.equal(store[5:17], unpack(pack(rows, dtype))[5:17])
    size = sum(file.stat().st_size for file in store.folder.glob("*.safetensors"))
    assert size < 20 * packed_bytes(200, dtype) + 3 * 300
    # rows of a shard that is not whole are kept as they are
    store.file(1).unlink()
    store.keep(1, 0, rows[8:12])
    assert torch.equal(store.begun(1), rows[8:12])
    memory = StoreInMemory(store.ids, 200, 4, dtype)
    for shard in memory.missing():
        memory.write(shard, rows[memory.rows(shard)])
    assert torch.equal(memory[0:8], store[0:8])
    with pytest.raises(
        StoreError, match=r'store dtype is "int8" there and null here|"bfloat16" th'
    ):
        FeatureStore.open(tmp_path / "a", {"a": 1}, store.ids, 200, 4)


def test_missing_and_cut_shards_are_named(tmp_path):
    store = filled(tmp_path / "a", random_rows(40, 3))
    assert run("check", store.folder) == (0, f"check: 5 of 5 in 1 s {store.folder}: 5 shards, "
                                          "nothing is wrong")  # fmt: skip
    store.file(0).unlink()
    store.keep(0, 0, random_rows(4, 3))
    store.file(1).write_bytes(store.file(1).read_bytes()[:-1])
    bad = load_file(store.file(2))["features"]
    bad[5, 1] = torch.nan
    save_file({"features": bad}, store.file(2))
    save_file({"features": bad[:3].nan_to_num()}, store.file(3))
    faults = find_faults(store)
    assert faults.keys() == {f"00000{n}.safetensors" for n in range(4)}
    told = list(faults.values())
    assert told[0] == "missing, 4 of its 8 rows are kept"
    assert "cut or damaged" in told[1]
    assert told[2] == "features must be finite, got NaN or infinity in row 21"
    assert told[3] == "features must be torch.float32 (8, 3), got torch.float32 (3, 3)"
    code, output = run("check", store.folder)
    assert (code, "4 of 5 shards are missing or damaged: 000000.safetensors" in output) == (2, True)
    # whoever reads it says so, too
    for row, name in ((0, "000000.safetensors is missing"), (8, "000001.safetensors is damaged")):
        with pytest.raises(StoreError, match=name):
            store[row : row + 1]
    code, output = run("info", store.folder)
    assert (code, "shards 4 of 5, 8 rows each" in output, "rows 40 of 3" in output) == (
        0,
        True,
        True,
    )
    assert run("info", tmp_path)[0] == 2


def test_shards_made_apart_are_joined(tmp_path):
    rows = random_rows(20, 3)
    whole, parts = filled(tmp_path / "whole", rows), [tmp_path / name for name in "ab"]
    for folder, shards in zip(parts, ([0, 2], [1, 2]), strict=True):
        for shard in set(range(3)) - set(shards):
            filled(folder, rows).file(shard).unlink()
    code, output = run("merge", tmp_path / "joined", parts[0])
    assert (code, "16 of 20 rows" not in output, "without 000001.safetensors" in output) == (
        0, True, True)  # fmt: skip
    merge(tmp_path / "joined", parts)
    assert torch.equal(FeatureStore.read(tmp_path / "joined").load(), whole.load())
    other = FeatureStore.open(tmp_path / "other", {"a": 2}, whole.ids, 3, 4)
    with pytest.raises(StoreError, match="but is of other features: a is 1 there and 2 here"):
        merge(tmp_path / "joined", [other.folder])
    filled(tmp_path / "wrong", rows + 1)
    with pytest.raises(StoreError, match=r"must be the shard that .* is, got other rows"):
        merge(tmp_path / "joined", [tmp_path / "wrong"])
    assert torch.equal(FeatureStore.read(tmp_path / "joined").load(), whole.load())


def trak_folder(folder, rows, left=()):
    """What traker leaves of a model, as its ``MmapSaver`` does."""
    place = folder / "0"
    place.mkdir(parents=True)
    for name, values in (("grads", rows), ("q_grads", rows[:3])):
        file = open_memmap(place / f"{name}.mmap", "w+", values.dtype, values.shape)
        file[:] = values
    done = open_memmap(place / "_is_featurized.mmap", "w+", np.int32, (len(rows),))
    done[:] = [row not in left for row in range(len(rows))]
    return folder


def test_features_of_trak(tmp_path):
    rows = random_rows(21, 5).half().numpy()
    folder = trak_folder(tmp_path / "trak", rows)
    store = import_rows(tmp_path / "a", [open_trak(folder)], "trak")
    assert torch.equal(store.load(), torch.from_numpy(rows).float())
    code, output = run(
        "import", folder, "--format", "trak", "--experiment", "q", "--output", tmp_path / "q"
    )
    assert (code, "3 of 3 rows" in output) == (0, True), output
    assert torch.equal(FeatureStore.read(tmp_path / "q").load(), store[:3])
    half = trak_folder(tmp_path / "half", rows, left=(4, 7))
    with pytest.raises(StoreError, match="all 21 samples, got none of 2, the first in row 4"):
        open_trak(half)
    with pytest.raises(
        StoreError, match=r"must be there, as TRAK leaves it, got grads.mmap, q_gra"
    ):
        open_trak(folder, experiment="x")
    (folder / "0" / "grads.mmap").write_bytes(b"x" * 400)
    with pytest.raises(StoreError, match="must be a memory map of NumPy"):
        open_trak(folder)


def test_features_of_d_trak_are_scored_as_dense_algebra_does(tmp_path):
    rows, queries = random_rows(21, 5), random_rows(4, 5, seed=1)
    files = [tmp_path / f"keys-{n}.npy" for n in range(2)]
    for file, part in zip(files, (rows[:13], rows[13:]), strict=True):
        part.numpy().tofile(file)
    queries.numpy().tofile(tmp_path / "gen.npy")
    words = ("--format", "d-trak", "--width", 5, "--output")
    assert run("import", *files, *words, tmp_path / "train")[0] == 0
    assert run("import", tmp_path / "gen.npy", *words, tmp_path / "gen")[0] == 0
    # again: nothing to do; another file is another store
    assert run("import", *files, *words, tmp_path / "train")[0] == 0
    code, output = run("import", files[0], *words, tmp_path / "train")
    assert (code, "holds features made with other settings: content is" in output) == (2, True)
    with pytest.raises(StoreError, match="must hold rows of 7 float32, got 260 bytes, which are 9"):
        open_dtrak(files[:1], 7)
    with pytest.raises(FileNotFoundError):
        open_dtrak([tmp_path / "nowhere"], 7)

    phi, psi, unit = rows.double(), queries.double(), rows.double().square().sum(1).mean()
    expected = psi @ torch.linalg.inv(phi.T @ phi + 2 * unit * torch.eye(5)) @ phi.T
    stores_ = (tmp_path / "train", tmp_path / "gen", "--damping", "2x", "--output", tmp_path / "s")
    assert run("score", *stores_)[0] == 0
    scores = load_file(tmp_path / "s" / "scores.safetensors")["scores"]
    assert relative_error(scores, expected) < 1e-5
    assert run("score", *stores_, "--only-top", 3)[0] == 0
    top = load_file(tmp_path / "s" / "top.safetensors")
    assert torch.equal(top["proponents"], expected.argsort(1, descending=True)[:, :3])
    assert torch.equal(top["opponents"], expected.argsort(1)[:, :3])
    with (tmp_path / "s" / "top.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 6
    best = lines[0]
    assert (best["query"], best["kind"], best["rank"]) == ("0", "proponent", "1")
    assert best["training image"] == f"{int(top['proponents'][0, 0]):02d}"
    FeatureStore.read(tmp_path / "train").file(1).unlink()
    code, output = run("score", *stores_)
    assert (code, "must be complete, got it without 000001.safetensors" in output) == (2, True)


def test_names_lie_with_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_ROWS_PER_SHARD", 4)
    names = ["…/a b.png", "é", *(f"{row:02d}" for row in range(8))]
    store = FeatureStore.open(tmp_path / "a", {"a": 1}, names, 3, 4)
    assert "00" not in (tmp_path / "a" / "manifest.json").read_text()
    for shard in store.missing():
        store.write(shard, random_rows(len(range(*store.rows(shard).indices(10))), 3))
    assert FeatureStore.read(tmp_path / "a").ids == names
    # no shard is read but those of the rows
    store.file(1).unlink()
    read = FeatureStore.read(tmp_path / "a")
    assert read.ids_of([9, 0, 2, 9]) == ["07", names[0], "00", "07"]
    with pytest.raises(StoreError, match=r"incomplete: 000001.safetensors is missing"):
        read.ids_of([4])
    with pytest.raises(StoreError, match="must be opened with the ids of its rows"):
        read.write(1, random_rows(4, 3))
    with pytest.raises(StoreError, match="must hold features of the 10 given samples, got others"):
        FeatureStore.open(tmp_path / "a", {"a": 1}, names[::-1], 3, 4)
    for about, message in (
        (None, "is damaged"),
        ({"ids": "["}, "is damaged"),
        ({"ids": '["x"]'}, "must name 4 samples, got 1"),
    ):
        store.file(1).write_bytes(save({"features": torch.ones(4, 3)}, metadata=about))
        code, output = run("check", tmp_path / "a")
        assert (code, "000001.safetensors: the names of its rows" in output) == (2, True)
        assert message in output


@pytest.mark.parametrize(
    "words, message",
    [
        (("import", "x", "--format", "dtrak", "--output", "y"), "did you mean 'd-trak'?"),
        (
            ("import", "x", "--format", "d-trak", "--output", "y"),
            "--width must be given for d-trak",
        ),
        (
            ("import", "x", "z", "--format", "trak", "--output", "y"),
            "--format trak takes one folder",
        ),
        (("score", "x", "z", "--output", "y", "--damping", "a"), "--damping must be 'auto'"),
        (
            ("score", "x", "z", "--output", "y", "--data", "a"),
            "--data and --pictures must be given",
        ),
        (("info", "nowhere"), "nowhere must hold a store of features, got no manifest.json"),
    ],
)
def test_refusals(words, message):
    code, output = run(*words)
    assert code == 2
    assert message in output


def test_a_damaged_manifest_is_named(tmp_path):
    store = make_store(tmp_path / "a", make_data(3))
    manifest = json.loads((store.folder / "manifest.json").read_text())
    del manifest["num_samples"]
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"manifest.json is damaged"):
        FeatureStore.read(store.folder)
