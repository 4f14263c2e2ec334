"""Which files decide the training set: links, hidden ones, parts, classes, sets of several."""

import io
import json
import os
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dtrak
from dtrak.data.captions import caption_all, read_captions
from dtrak.data.images import DataError, load_data
from dtrak.data.walk import class_folders


def png(level=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def put(folder, *names):
    """Images of one grey level each, in the order of their names."""
    for level, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(level))
    return folder


def table(file, *levels, labels=None, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(level), "path": None} for level in levels]
    pq.write_table(pa.table({"image": rows, **columns}), file)
    return file


def silent(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_data(source, **options)


def left_out(source, **options):
    """Ids of what was taken, and what the warning says of the rest."""
    with pytest.warns(UserWarning, match="left out: ") as said:
        found = load_data(source, **options)
    assert len(said) == 1
    assert str(said[0].message) == f"{found.taken}; left out: {found.left_out}"
    return found.ids, found.left_out


def test_linked_folders_are_followed_and_taken_once(tmp_path):
    put(tmp_path / "elsewhere", "b.png")
    data = put(tmp_path / "data", "cat/a.png")
    (data / "dog").symlink_to(tmp_path / "elsewhere")
    assert silent(data).ids == ["cat/a.png", "dog/b.png"]
    # before cat in the order of names, but not what the folder is called
    (data / "a-link").symlink_to(data / "cat")
    (data / "cat" / "above").symlink_to(data)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    ids, rest = left_out(data)
    assert ids == ["cat/a.png", "dog/b.png"]
    assert "a-link, cat/above (the same folder again, or one above it)" in rest
    assert "gone, gone.png (a link to nothing)" in rest


def test_hidden_files_and_folders_are_left_out(tmp_path):
    names = ("a.png", ".ipynb_checkpoints/a-checkpoint.png", ".cache/x/b.png", "__MACOSX/._a.png")
    put(tmp_path, *names, "@eaDir/a.png/thumb.jpg", "._a.png", ".git/objects/c")
    for name in ("Thumbs.db", ".DS_Store", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes(b"")
    ids, rest = left_out(tmp_path)
    assert ids == ["a.png"]
    for name in (".ipynb_checkpoints/", ".cache/", "__MACOSX/", "@eaDir/"):
        assert f"1 of {name}" in rest
    assert "Thumbs" not in rest
    # a hidden folder that is named is meant
    assert silent(tmp_path / ".cache").ids == ["x/b.png"]


def test_other_suffixes_are_said(tmp_path):
    put(tmp_path, "a.png", "b.PNG", "c.JPEG", "d.npy", "e.heic", "f.heic", "noise")
    ids, rest = left_out(tmp_path)
    assert ids == ["a.png", "b.PNG", "c.JPEG"]
    assert "2 .heic, 1 .npy, 1 without a suffix (no suffix of an image)" in rest
    only = put(tmp_path / "only", "d.npy")
    with pytest.raises(DataError, match=r"no images .* left out: 1 \.npy"):
        load_data(only)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jfif", "ppm", "tif", "tiff", "webp"])
def test_every_format_of_images_is_taken(tmp_path, suffix):
    put(tmp_path, "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / f"b.{suffix}", "jpeg" if suffix == "jfif" else None)
    assert silent(tmp_path).ids == ["a.png", f"b.{suffix}"]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "validation"),
        ("Train", "Val"),
        ("training", "testing"),
        ("archive/data/train", "archive/data/test"),
        ("seg_train", "seg_test"),
        ("train_images", "dev_images"),
        ("train2017", "val2017"),
        ("trainA", "testA"),
        ("trainset", "testset"),
    ],
)
def test_parts_of_a_folder(tmp_path, train, held_out):
    put(tmp_path, f"{train}/cat/a.png", f"{train}/dog/b.png", f"{held_out}/cat/c.png")
    ids, rest = left_out(tmp_path)
    assert ids == [f"{train}/cat/a.png", f"{train}/dog/b.png"]
    assert f"1 of {held_out} (in another part or none)" in rest
    assert load_data(tmp_path).labels == [0, 1]
    assert left_out(tmp_path, split="validation")[0] == [f"{held_out}/cat/c.png"]


def test_all_parts_of_classes_and_what_is_of_none(tmp_path):
    put(tmp_path, "cat/train/a.png", "cat/test/b.png", "dog/train/c.png", "dog/test/d.png")
    assert left_out(tmp_path)[0] == ["cat/train/a.png", "dog/train/c.png"]
    put(tmp_path / "stl", "train/a.png", "test/b.png", "unlabeled/c.png", "d.png")
    ids, rest = left_out(tmp_path / "stl")
    assert ids == ["train/a.png"]
    assert "1 of unlabeled" in rest
    assert "1 of the folder itself" in rest


def test_parts_that_cannot_be_told(tmp_path):
    put(tmp_path / "a", "train/a.png", "car/b.png", "boat/c.png")
    with pytest.raises(DataError, match="'train' beside boat, car, which may be a part"):
        load_data(tmp_path / "a")
    put(tmp_path / "b", "train/a.png", "b.png")
    with pytest.raises(DataError, match="'train' beside images, which may be a part"):
        load_data(tmp_path / "b")
    put(tmp_path / "c", "validation/a.png", "test/b.png")
    with pytest.raises(ValueError, match=r"must have a folder train or training .* got test, val"):
        load_data(tmp_path / "c")
    put(tmp_path / "d", "train/a.png")
    assert silent(tmp_path / "d").ids == ["train/a.png"]
    with pytest.raises(ValueError, match=r"must have a folder validation or .* got train"):
        load_data(tmp_path / "d", split="validation")
    put(tmp_path / "e", "a.png")
    with pytest.raises(ValueError, match="split must be 'train' for a folder of images"):
        load_data(tmp_path / "e", split="validation")


def test_classes_by_folder(tmp_path):
    put(tmp_path, "dog/a.png", "cat/b.png", "cat/c.png")
    found = silent(tmp_path)
    assert found.labels == [0, 0, 1]
    assert "classes by folder: cat 0, dog 1" in found.taken
    assert caption_all("a {label}", str(tmp_path), found) == ["a cat", "a cat", "a dog"]
    assert load_data(tmp_path, labels=[1]).ids == ["dog/a.png"]
    assert class_folders(["2/a", "10/b"]) == {"2": 2, "10": 10}
    assert class_folders(["a/x", "b/c/y"]) is None
    assert class_folders(["a/x", "y"]) is None
    assert class_folders(["a/x", "a/y"]) is None
    assert class_folders(["1/x", "01/y"]) is None


HUB = ["plain_text/train-00000-of-00001.parquet", "default/train/0000.parquet",
       "data/train-00000-of-00001-0123456789abcdef.parquet", "cifar10-train.parquet"]  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_layouts_of_the_hub(tmp_path, name, monkeypatch):
    file = table(tmp_path / "clone" / name, 1, 2, text=["one", "two"])
    table(file.parents[name.count("/")] / name.replace("train", "test"), 3, text=["three"])
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "clone", ".cache/huggingface/x.png")
    found = load_data("clone")
    assert found.ids == [f"{file.name}/0", f"{file.name}/1"]
    assert read_captions("clone", found) == ["one", "two"]
    held_out = load_data("clone", split="validation")
    assert len(held_out) == 1
    assert read_captions("clone", held_out) == ["three"]
    assert "1 other parquet file (in another part)" in found.left_out
    # the folder of the files itself
    place = file.parent if "/" in name else tmp_path / "clone"
    assert len(load_data(place)) == 2


def test_several_data_sets_in_one_folder(tmp_path):
    for config in ("small", "large"):
        table(tmp_path / config / "train-00000-of-00001.parquet", 1)
    with pytest.raises(DataError, match="must hold one data set, got large, small: name"):
        load_data(tmp_path)
    table(tmp_path / "both" / "x" / "a.parquet", 1)
    put(tmp_path / "both", "y/b.png")
    with pytest.raises(DataError, match=r"holds images \('y/b.png'\) and tables \('x/a"):
        load_data(tmp_path / "both")


def test_a_set_that_names_its_length_is_whole(tmp_path):
    files = [table(tmp_path / f"train-{n:05d}-of-00003.parquet", n) for n in range(3)]
    assert len(silent(tmp_path)) == 3
    files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="all 3 files of 'train', got 2: number 00001 is missing"):
        load_data(tmp_path)
    # one of them may be named
    ids, rest = left_out(files[0])
    assert ids == ["train-00000-of-00003.parquet/0"]
    assert "the others of 3 files" in rest
    (tmp_path / "elsewhere").rename(files[1])
    table(tmp_path / "train-00000-of-00004.parquet", 1)
    with pytest.raises(DataError, match="files of one set, got some of 00003 and some of 00004"):
        load_data(tmp_path)
    for number in (0, 2):
        table(tmp_path / "default" / "train" / f"{number:04d}.parquet", 1)
    with pytest.raises(DataError, match=r"up to 0002\.parquet, got no 0001\.parquet"):
        load_data(tmp_path / "default")


def test_a_part_that_the_hub_converted_in_part(tmp_path):
    table(tmp_path / "default" / "partial-train" / "0000.parquet", 1)
    table(tmp_path / "default" / "test" / "0000.parquet", 1, 2)
    ids, rest = left_out(tmp_path)
    assert ids == ["0000.parquet/0"]
    assert "the rest of the data set (the hub converts no more than 'default/partial-train" in rest


def test_a_table_beside_images(tmp_path):
    put(tmp_path, "a.png")
    table(tmp_path / "train-00000-of-00001.parquet", 1)
    ids, rest = left_out(tmp_path)
    assert (ids, rest) == (["a.png"], "1 parquet file (beside images)")


def test_images_beside_a_table(tmp_path, monkeypatch):
    put(tmp_path / "set", "src/a.png", "src/b.png")
    rows = [{"bytes": None, "path": f"src/{name}.png"} for name in "ab"]
    pq.write_table(pa.table({"image": rows}), tmp_path / "set" / "x.parquet")
    monkeypatch.chdir("/")
    for source in (tmp_path / "set" / "x.parquet", tmp_path / "set"):
        assert len(silent(source)) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [{"bytes": None, "path": "~/set/src/b.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "y.parquet")
    assert silent("~/y.parquet").fingerprints()
    assert float(silent("~/y.parquet")[0].max()) == float(load_data("~/set/src/b.png")[0].max())


def test_captions_that_lie_with_linked_and_split_images(tmp_path, monkeypatch):
    put(tmp_path / "elsewhere", "b.png")
    data = put(tmp_path / "data", "train/cat/a.png", "test/cat/c.png", ".cache/x.png")
    (data / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    rows = [{"file_name": "./a.png", "text": "a cat"}]
    (data / "train/cat/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "elsewhere/metadata.csv").write_text("file_name,text\nb.png,a dog\n")
    (data / ".cache/metadata.jsonl").write_text("nonsense")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_data("~/data")
    assert found.ids == ["train/cat/a.png", "train/dog/b.png"]
    assert read_captions("~/data", found) == ["a cat", "a dog"]
    monkeypatch.chdir(data)
    absolute = [{"file_name": str(data / "train/cat/a.png"), "text": "whole"}]
    (data / "train/cat/metadata.jsonl").write_text(json.dumps(absolute[0]))
    assert read_captions(".", load_data("."))[0] == "whole"
    (data / "train/cat/metadata.jsonl").write_text(json.dumps({"file_name": "z.png", "text": ""}))
    with pytest.raises(DataError, match=r"row 1 must name an image that is there, got 'z\.png'"):
        read_captions(".", load_data("."))


def test_names_that_are_not_utf8(tmp_path):
    put(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    found = dtrak.images(tmp_path)
    assert found.ids == ["caf\udce9.png"]
    assert found.fingerprint


def test_paths_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "x", "a.png")
    for source in ("~/x", "~/x/", "~/x/a.png"):
        assert silent(source).ids == ["a.png"]
    with pytest.raises(FileNotFoundError, match="no file or folder at '~/y'"):
        load_data("~/y")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_data("./$HOME/x")
