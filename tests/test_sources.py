"""Records before decoding: parts and their names, classes, folders of parquet files."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dtrak.data.sources import DataError, class_label, open_records, split_names


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def write_png(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(level))


def write_parquet(path, levels, labels=None, names=None):
    rows = pa.array([{"bytes": png(level), "path": None} for level in levels])
    columns = {"img": rows} | ({} if labels is None else {"label": pa.array(labels)})
    table = pa.table(columns)
    if names is not None:
        listed = ", ".join(f'"{name}"' for name in names)
        info = f'{{"info": {{"features": {{"label": {{"names": [{listed}]}}}}}}}}'
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def ids(source, split="train", **options):
    return [record.id for record in open_records(str(source), split, **options)]


def test_names_of_parts():
    assert split_names("train") == ("train", "training", "trainset")
    held_out = ("validation", "valid", "val", "dev", "valset", "test", "testing", "eval", "testset")
    assert split_names("validation") == held_out
    assert split_names("test") == ("test", "testing", "eval", "testset")
    assert split_names("extra") == ("extra",)


@pytest.mark.parametrize("part", ["validation", "valid", "val", "test"])
def test_class_folders_with_parts(tmp_path, part):
    for name in ("train/cat/a", "train/dog/b", f"{part}/dog/c"):
        write_png(tmp_path / f"{name}.png")
    classes = ["cat", "dog"]
    train = list(open_records(str(tmp_path), "train", classes=classes))
    assert [(r.id, r.label) for r in train] == [("train/cat/a.png", 0), ("train/dog/b.png", 1)]
    held_out = list(open_records(str(tmp_path), "validation", classes=classes))
    assert [(r.id, r.label) for r in held_out] == [(f"{part}/dog/c.png", 1)]
    # and without given classes, as any folder of images, likewise
    assert ids(tmp_path) == ["train/cat/a.png", "train/dog/b.png"]
    assert ids(tmp_path, "validation") == [f"{part}/dog/c.png"]


def test_class_folders_without_parts(tmp_path):
    for name in ("Ukiyo-E/a", "art nouveau/b"):
        write_png(tmp_path / f"{name}.png")
    classes = ["art_nouveau", "ukiyo_e"]
    records = list(open_records(str(tmp_path), "train", classes=classes))
    assert [(r.id, r.label) for r in records] == [("Ukiyo-E/a.png", 1), ("art nouveau/b.png", 0)]
    with pytest.raises(ValueError, match=r"must have a folder validation or valid or .* got none"):
        ids(tmp_path, "validation", classes=classes)
    with pytest.raises(DataError, match=r"classes must be among art_nouveau, got 'Ukiyo-E' \(at"):
        ids(tmp_path, classes=["art_nouveau"])
    # a data set without classes takes the same folders
    records = list(open_records(str(tmp_path), "train", classes=[]))
    assert [record.label for record in records] == [None, None]


def test_parts_that_are_missing(tmp_path):
    write_png(tmp_path / "test" / "cat" / "a.png")
    with pytest.raises(
        ValueError,
        match="must have a folder train or training or trainset for the split 'train', got",
    ):
        ids(tmp_path, "train", classes=["cat"])


def test_class_label():
    assert class_label(" Post-Impressionism ", ["baroque", "post_impressionism"], "x") == 1
    with pytest.raises(DataError, match=r"classes must be among a, b, got 'c' \(at 'x'\)"):
        class_label("c", ["a", "b"], "x")


def test_folder_of_parquet_files(tmp_path):
    for stem in ("cifar2", "cifar10"):
        write_parquet(tmp_path / f"{stem}-train.parquet", [1, 2])
        write_parquet(tmp_path / f"{stem}-test.parquet", [3])
    assert ids(tmp_path, stems=("cifar2", "cifar10"))[0] == "cifar2-train.parquet/0"
    assert ids(tmp_path, stems=("cifar10",))[0] == "cifar10-train.parquet/0"
    assert ids(tmp_path, "validation", stems=("cifar2",)) == ["cifar2-test.parquet/0"]
    with pytest.raises(DataError, match=r"must hold one parquet file of the part 'train', got cif"):
        ids(tmp_path)
    with pytest.raises(DataError, match=r"of the part 'dev', got .*; name the file itself"):
        ids(tmp_path, "dev", stems=("cifar2",))


def test_folder_of_one_parquet_data_set(tmp_path):
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [3])
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [1, 2])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [4])
    assert ids(tmp_path) == [
        "train-00000-of-00002.parquet/0",
        "train-00000-of-00002.parquet/1",
        "train-00001-of-00002.parquet/0",
    ]
    assert ids(tmp_path, "validation") == ["test-00000-of-00001.parquet/0"]


def test_pictures_beside_a_parquet_file_are_what_is_meant(tmp_path):
    write_parquet(tmp_path / "x-train.parquet", [1])
    write_png(tmp_path / "a.png")
    assert ids(tmp_path) == ["a.png"]


def test_labels_that_stand_for_other_classes(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, [1, 2], [0, 1], names=["Dog", "cat"])
    assert len(ids(file, classes=["dog", "cat"])) == 2
    assert len(ids(file)) == 2
    message = r"the classes of '.*x.parquet' must be cat, dog in this order, got Dog, cat"
    with pytest.raises(DataError, match=message):
        ids(file, classes=["cat", "dog"])
    write_parquet(file, [1, 2], [0, 1])
    assert len(ids(file, classes=["cat", "dog"])) == 2


def test_labels_of_a_data_set_that_stand_for_other_classes(tmp_path):
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    )
    rows = {"img": [{"bytes": png(1), "path": None}], "label": [0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert ids(tmp_path / "saved", classes=["dog", "cat"]) == ["saved/0"]
    with pytest.raises(DataError, match="must be cat, dog in this order, got dog, cat"):
        ids(tmp_path / "saved", classes=["cat", "dog"])


def test_the_hub_is_asked_for_the_parts_in_turn(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append(split)
        if split != "test":
            raise ValueError(f'Unknown split "{split}". Should be one of [train, test].')
        rows = {"img": [{"bytes": png(1), "path": None}]}
        return datasets.Dataset.from_dict(
            rows, features=datasets.Features({"img": datasets.Image()})
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert ids("someone/pictures", "validation") == ["someone/pictures/test/0"]
    assert asked == ["validation", "valid", "val", "test"]
    with pytest.raises(DataError, match=r"split='train'\) failed \(ValueError: Unknown split"):
        ids("someone/pictures")


def test_nothing_there():
    with pytest.raises(FileNotFoundError, match=r"no file or folder at './nothing'; data must be"):
        open_records("./nothing", "train")
