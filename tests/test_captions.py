"""Captions by id, from every place they may lie in."""

import csv
import json

import pytest
import torch
from tiny_stable_diffusion import PICTURES, write_pictures

from dtrak.data.captions import caption_all, load_captions, read_captions, write_captions
from dtrak.data.images import encode_png, load_data
from dtrak.data.samples import Samples
from dtrak.data.sources import DataError
from dtrak.models.hashing import hash_captions

TEXTS = ["a wave", "", "fog over the sea"]


@pytest.fixture
def pictures(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    return str(folder), load_data(folder)


def expected(data):
    return [PICTURES[name] for name in data.ids]


def encoded(count=3):
    return [encode_png(torch.full((3, 4, 4), n, dtype=torch.uint8)) for n in range(count)]


def write_parquet(file, columns, metadata=None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": image, "path": None} for image in encoded()]
    table = pa.table({"image": images, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return str(file)


def test_metadata_lines_beside_the_images(pictures):
    source, data = pictures
    assert len(set(expected(data))) == 4
    assert read_captions(source, data) == expected(data)
    order = data.select([4, 0, 2])
    assert read_captions(source, order) == expected(order)


def test_captions_written_are_read(tmp_path):
    folder = write_pictures(tmp_path / "bare", metadata=False)
    # lines, quotes and letters beyond ASCII
    texts = {name: f'"{name}"\né' for name in PICTURES}
    write_captions(folder, texts)
    data = load_data(folder)
    assert read_captions(str(folder), data) == [texts[name] for name in data.ids]


def test_metadata_in_every_folder_and_as_a_table(pictures, tmp_path):
    source, data = pictures
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    for folder in {name.split("/")[0] for name in PICTURES}:
        rows = [f'{n.split("/")[1]},"{t}"' for n, t in PICTURES.items() if n.startswith(folder)]
        lines = "\n".join(["file_name,text", *rows])
        (tmp_path / "pictures" / folder / "metadata.csv").write_text(lines)
    assert read_captions(source, data) == expected(data)


def test_a_column_of_a_parquet_file(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    data = load_data(source)
    assert read_captions(source, data) == TEXTS
    assert read_captions(source, data.select([2, 0])) == [TEXTS[2], TEXTS[0]]
    assert read_captions(write_parquet(tmp_path / "b.parquet", {"caption": TEXTS}), _of("b")) == (
        TEXTS
    )
    assert read_captions(write_parquet(tmp_path / "c.parquet", {"label": [1, 2, 3]}), _of("c")) is (
        None
    )


def _of(name):
    ids = [f"{name}.parquet/{row}" for row in range(3)]
    return Samples(torch.zeros(3, 3, 4, 4), ids, None, "test")


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "set-train.parquet", {"text": TEXTS})
    write_parquet(tmp_path / "set" / "set-test.parquet", {"text": ["other"] * 3})
    source = str(tmp_path / "set")
    assert read_captions(source, load_data(source)) == TEXTS
    held_out = load_data(source, split="validation")
    assert read_captions(source, held_out) == ["other"] * 3


def test_a_column_of_a_saved_data_set(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["ukiyo_e", "Baroque"]),
        }
    )
    images = [{"bytes": image, "path": None} for image in encoded()]
    columns = {"image": images, "text": TEXTS, "label": [0, 1, 1]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(str(tmp_path / "one"))
    source = str(tmp_path / "one")
    data = load_data(source)
    assert read_captions(source, data) == TEXTS
    wanted = ["a ukiyo e painting", "a baroque painting", "a baroque painting"]
    assert caption_all("a {label} painting", source, data) == wanted
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "parts"))
    source = str(tmp_path / "parts")
    assert read_captions(source, load_data(source)) == TEXTS


def test_a_column_of_a_hub_data_set(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"train": table}[split])
    ids = [f"owner/name/train/{row}" for row in range(3)]
    data = Samples(torch.zeros(3, 3, 4, 4), ids, None, "test")
    assert read_captions("owner/name", data) == TEXTS


def test_the_class_in_a_template(pictures, tmp_path):
    source, data = pictures
    classes = [name.split("/")[0].replace("_", " ") for name in data.ids]
    assert caption_all("a {label} painting", source, data) == [f"a {c} painting" for c in classes]
    assert caption_all("one for all", source, data) == ["one for all"] * 5
    assert load_captions(source, data, "a {label} painting")[0] == "a baroque painting"
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["A_b", "C"]}}}})}
    file = write_parquet(tmp_path / "a.parquet", {"label": [1, 0, 1]}, names)
    assert caption_all("{label}!", file, load_data(file)) == ["c!", "a b!", "c!"]
    digits = load_data("digits", limit=2)
    assert caption_all("a {label}", "digits", digits) == [f"a {n}" for n in digits.labels]


def test_no_captions_is_an_error_that_says_what_to_do(pictures, tmp_path):
    source, data = pictures
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    assert read_captions(source, data) is None
    with pytest.raises(DataError, match=r"must have captions: metadata\.jsonl .* or --caption"):
        load_captions(source, data)
    assert read_captions("digits", load_data("digits", limit=2)) is None


@pytest.mark.parametrize(
    "line, message",
    [
        ({"file_name": "ukiyo_e/wave.png"}, r"row 1 must have a caption as 'text', got file_name"),
        ({"text": "x"}, r"row 1 must have a file_name, got {'text': 'x'}"),
        ({"file_name": "ukiyo_e/wave.png", "text": 3}, "must be text, got int"),
        ({"file_name": "ukiyo_e/wave.png", "text": "x"}, "'baroque/feast.png' .* got none"),
    ],
)
def test_broken_metadata_is_refused(line, message, pictures, tmp_path):
    source, data = pictures
    file = tmp_path / "pictures" / "metadata.jsonl"
    lines = file.read_text().splitlines()
    kept = lines[1:] if line.get("text") == 3 else []
    file.write_text("\n".join([json.dumps(line), *kept]))
    with pytest.raises(DataError, match=message):
        read_captions(source, data)
    file.write_text("{")
    with pytest.raises(DataError, match=r"metadata\.jsonl must be lines of JSON"):
        read_captions(source, data)


@pytest.mark.parametrize(
    "template, message",
    [
        ("a {class} painting", "may hold {label} and no other field, got .* with class"),
        ("a {} painting", "no other field, got .* with an empty one"),
        ("a {label painting", "must be text with {label}, got"),
    ],
)
def test_broken_templates_are_refused(template, message, pictures):
    with pytest.raises(DataError, match=message):
        caption_all(template, *pictures)


def test_images_without_a_class_are_refused(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encoded()[0])
    source = str(tmp_path / "flat")
    with pytest.raises(DataError, match="must lie in a folder named after its class"):
        caption_all("{label}", source, load_data(source))
    file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    with pytest.raises(DataError, match="must have labels for --caption"):
        caption_all("{label}", file, load_data(file))


def test_the_hash_sees_text_order_and_tokens():
    hashes = [
        hash_captions(texts, tokens)
        for texts, tokens in (
            (["a", "b"], [[1], [2]]),
            (["b", "a"], [[1], [2]]),
            (["a", "b"], [[1], [3]]),
            (["ab", ""], [[1], [2]]),
            (["a", "b"], [[1, 2], []]),
        )
    ]
    assert len(set(hashes)) == 5
    assert hash_captions(["a", "b"], [[1], [2]]) == hashes[0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_tables_of_spreadsheets_and_captions_of_any_letters(pictures, tmp_path, name):
    """A byte order mark, line breaks within a caption, and separators that are no line ends."""
    source, data = pictures
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    texts = ["two\nlines", "one\u2028line", 'a "quoted" one', "form\x0cfeed", ", comma"]
    file = tmp_path / "pictures" / name
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        if name.endswith("csv"):
            writer = csv.writer(opened)
            writer.writerows([("file_name", "text"), *zip(data.ids, texts, strict=True)])
        else:
            for id_, text in zip(data.ids, texts, strict=True):
                row = {"file_name": id_, "text": text}
                opened.write(json.dumps(row, ensure_ascii=False) + "\n")
    assert read_captions(source, data) == texts


@pytest.mark.parametrize(
    "content", [b"file_name,text\na,\xff\n", b"file_name,text\na," + b"x" * 200_000]
)
def test_damaged_tables(pictures, tmp_path, content):
    source, data = pictures
    (tmp_path / "pictures" / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"metadata\.csv must be CSV in UTF-8, got "):
        read_captions(source, data)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_class_number_without_a_name_is_no_class(tmp_path, number):
    info = {"info": {"features": {"label": {"names": ["ukiyo_e", "baroque"]}}}}
    metadata = {b"huggingface": json.dumps(info).encode()}
    source = write_parquet(tmp_path / "a.parquet", {"label": [0, 1, number]}, metadata)
    assert caption_all("a {label} one", source, _of("a").select([1, 0])) == [
        "a baroque one", "a ukiyo e one"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"must have labels for --caption with \{label\}"):
        caption_all("a {label} one", source, _of("a"))
