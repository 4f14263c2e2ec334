"""CIFAR-10, CelebA and ArtBench-10 as their authors hand them out, and damaged ones."""

import pickle
import pickletools

import numpy as np
import pytest
from PIL import Image

from dtrak.data.images import DataError, load_data
from dtrak.data.layouts import ARTBENCH_CLASSES, CIFAR10_CLASSES

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 3072), dtype=np.uint8)
LABELS = [int(label) for label in RNG.integers(0, 10, 12)]


def batch(rows, **changes):
    fields = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": LABELS[rows],
        b"data": PIXELS[rows],
        b"filenames": [b"x_%d.png" % i for i in range(12)][rows],
    }
    return fields | changes


def write_pickles(folder, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        content = pickle.dumps(batch(slice(2 * number, 2 * number + 2)), protocol=protocol)
        (folder / f"data_batch_{number + 1}").write_bytes(content)
    (folder / "test_batch").write_bytes(pickle.dumps(batch(slice(10, 12)), protocol=protocol))
    return folder


def write_binaries(folder):
    folder.mkdir(parents=True)
    rows = np.concatenate([np.array(LABELS, np.uint8)[:, None], PIXELS], 1)
    for number in range(5):
        rows[2 * number : 2 * number + 2].tofile(folder / f"data_batch_{number + 1}.bin")
    rows[10:].tofile(folder / "test_batch.bin")
    return folder


def python2(content):
    """How Python 2 wrote the original batches: bytes as short strings, arrays by numpy.core."""
    import io

    class Writer(pickle._Pickler):
        dispatch = pickle._Pickler.dispatch.copy()

        def save_bytes(self, value):
            if len(value) < 256:
                self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
            else:
                self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
            self.memoize(value)

        dispatch[bytes] = save_bytes

    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("split, rows", [("train", range(10)), ("validation", range(10, 12))])
def test_cifar_batches_give_the_same_images_however_stored(tmp_path, split, rows):
    loaded = [
        load_data(write_pickles(tmp_path / f"p{protocol}", protocol), split=split)
        for protocol in (2, 4, 5)
    ]
    loaded.append(load_data(write_binaries(tmp_path / "b"), split=split))
    old = write_pickles(tmp_path / "old")
    for file in old.iterdir():
        file.write_bytes(python2(pickle.loads(file.read_bytes())))
    assert b"numpy.core" in (old / "test_batch").read_bytes()
    loaded.append(load_data(old, split=split))
    # and in the folder an archive unpacks to
    write_pickles(tmp_path / "up" / "cifar-10-batches-py")
    loaded.append(load_data(tmp_path / "up", split=split))
    assert len({data.fingerprint for data in loaded}) == 1
    for data in loaded:
        assert data.labels == [LABELS[row] for row in rows]
        part = "train" if split == "train" else "test"
        assert data.ids == [f"{part}/{row:05d}" for row in range(len(rows))]
        for image, row in zip(data.images, rows, strict=True):
            planes = PIXELS[row].reshape(3, 32, 32)
            assert np.abs(image.numpy() - (planes / 127.5 - 1)).max() < 1e-6


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.target}",)


class Evaluate:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize("bad", ["system", "eval", "object array"])
def test_pickles_cannot_run_code(tmp_path, bad):
    folder = write_pickles(tmp_path / "cifar")
    content = {
        "system": Exploit(tmp_path / "owned"),
        "eval": batch(slice(0, 2), labels=Evaluate()),
        "object array": batch(slice(0, 2), **{"labels": np.array([1, None], object)}),
    }[bad]
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
    expected = {
        "system": "asks for .*system",
        "eval": "asks for .*eval",
        "object array": "integers",
    }
    with pytest.raises(
        DataError, match=f"data_batch_1' is not a batch of CIFAR-10: .*{expected[bad]}"
    ):
        load_data(folder)
    assert not (tmp_path / "owned").exists()


def test_pickles_of_numpy_cannot_reach_further(tmp_path):
    """Every global a hostile pickle could name is refused but the five that a batch needs."""
    folder = write_pickles(tmp_path / "cifar")
    names = {
        (opcode.name, argument)
        for opcode, argument, _ in pickletools.genops((folder / "data_batch_1").read_bytes())
        if opcode.name == "GLOBAL"
    }
    assert names <= {
        ("GLOBAL", f"{module} {name}")
        for module, name in (
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "_reconstruct"),
        )
    }
    for name in (b"numpy\nfromfile", b"numpy.f2py.diagnose\nrun", b"builtins\ngetattr"):
        (folder / "data_batch_1").write_bytes(b"c" + name + b"\n.")
        with pytest.raises(DataError, match="for which a batch of CIFAR-10 has no use"):
            load_data(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({b"data": PIXELS[:2, :100]}, r"must hold data \[N, 3072\] uint8, got \[2, 100\] uint8"),
        ({b"data": PIXELS[:2].astype(np.int64)}, r"uint8, got \[2, 3072\] int64"),
        ({b"labels": [1, 2, 3]}, r"must hold 2 integer labels, got \[3\]"),
        ({b"labels": [1.5, 2.0]}, r"must hold 2 integer labels, got \[2\] float64"),
        ({b"labels": [3, 10]}, "must hold labels from 0 to 9, got up to 10"),
        ({b"labels": [-1, 1]}, "must hold labels from 0 to 9"),
    ],
)
def test_batches_that_hold_something_else(tmp_path, changes, message):
    folder = write_pickles(tmp_path / "cifar")
    content = pickle.dumps(batch(slice(0, 2), **{}) | changes, protocol=2)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(folder)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02}q\x00.", pickle.dumps([1, 2])])
def test_damaged_batches(tmp_path, content):
    folder = write_pickles(tmp_path / "cifar")
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_3' is not a batch of CIFAR-10"):
        load_data(folder)


def test_missing_and_truncated_batches(tmp_path):
    folder = write_binaries(tmp_path / "b")
    file = folder / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"must hold records of 3073 bytes, got 6145 bytes"):
        load_data(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"must hold the file data_batch_2.bin of CIFAR-10"):
        load_data(folder)
    with pytest.raises(ValueError, match="must be one of train, validation, test, got 'dev'"):
        load_data(folder, split="dev")


def write_faces(folder, names, size=(178, 218)):
    folder.mkdir(parents=True)
    for level, name in enumerate(names):
        Image.new("RGB", size, (level, level, level)).save(folder / name)


@pytest.mark.parametrize("place", ["img_align_celeba", "Img/img_align_celeba", "."])
@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_celeba_partitions(tmp_path, place, kind):
    names = [f"{i:06d}.png" for i in range(6)]
    folder = tmp_path / "celeba"
    write_faces(folder / place, names)
    separator, head = (" ", []) if kind == "txt" else (",", ["image_id,partition"])
    lines = [f"{name}{separator}{part}" for name, part in zip(names, "001122", strict=True)]
    (folder / f"list_eval_partition.{kind}").write_text("\n".join(head + lines) + "\n")
    for split, rows in (("train", [0, 1]), ("validation", [2, 3]), ("test", [4, 5])):
        data = load_data(folder, split=split)
        assert data.ids == [names[row] for row in rows]
        assert [round((level + 1) * 127.5) for level in data.images[:, 0, 0, 0].tolist()] == rows


def test_damaged_celeba(tmp_path):
    (tmp_path / "list_eval_partition.txt").write_text("a.jpg 0\nb.jpg three\n")
    with pytest.raises(DataError, match=r"must hold 'a.jpg' in one of img_align_celeba"):
        load_data(tmp_path)
    write_faces(tmp_path / "img", ["a.jpg"])
    with pytest.raises(
        DataError, match=r"line 2 of .* must be an image and its part 0, 1 or 2, got"
    ):
        load_data(tmp_path)
    (tmp_path / "list_eval_partition.txt").write_text("a.jpg 0\n")
    with pytest.raises(DataError, match=r"has no image in part 1 \(validation\)"):
        load_data(tmp_path, split="validation")
    (tmp_path / "list_eval_partition.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="must be text, got"):
        load_data(tmp_path)


@pytest.mark.parametrize("place", [".", "artbench-10-imagefolder", "data/artbench-10-imagefolder"])
def test_artbench_table(tmp_path, place):
    rows = [
        ("b.png", "ukiyo_e", "train"),
        ("a.png", "baroque", "train"),
        ("c.png", "realism", "test"),
    ]
    lines = ["artist,name,split,label", *(f"x,{n},{s},{c}" for n, c, s in rows)]
    (tmp_path / "ArtBench-10.csv").write_text("\n".join(lines))
    for name, label, _ in rows:
        write = tmp_path / place / label
        write.mkdir(parents=True)
        Image.new("RGB", (4, 4), (9, 9, 9)).save(write / name)
    train, test = (load_data(tmp_path, split=split) for split in ("train", "validation"))
    # the order of the table, not of the names
    assert train.ids == ["ukiyo_e/b.png", "baroque/a.png"]
    assert [ARTBENCH_CLASSES[label] for label in train.labels] == ["ukiyo_e", "baroque"]
    assert (test.ids, test.labels) == (["realism/c.png"], [5])


def test_damaged_artbench(tmp_path):
    table = tmp_path / "ArtBench-10.csv"
    table.write_text("name,label\na.jpg,baroque\n")
    with pytest.raises(DataError, match="must have the columns name, label and split"):
        load_data(tmp_path)
    table.write_text("name,label,split\na.jpg,baroqe,train\n")
    with pytest.raises(DataError, match=r"got 'baroqe' \(at 'ArtBench-10.csv, row 0'\)"):
        load_data(tmp_path)
    table.write_text("name,label,split\na.jpg,baroque,train\n")
    with pytest.raises(DataError, match=r"must hold 'baroque/a.jpg', in itself or in artbench-10"):
        load_data(tmp_path)
    with pytest.raises(DataError, match="has no image of the part test"):
        load_data(tmp_path, split="test")


def test_class_names():
    assert (len(CIFAR10_CLASSES), len(ARTBENCH_CLASSES)) == (10, 10)
    assert list(ARTBENCH_CLASSES) == sorted(ARTBENCH_CLASSES)
    assert (CIFAR10_CLASSES[1], CIFAR10_CLASSES[7]) == ("automobile", "horse")
