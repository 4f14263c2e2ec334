import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dtrak.data.images import (
    DataError,
    decode_records,
    digits_split,
    load_data,
    save_images,
    to_uint8,
)
from dtrak.data.samples import Samples
from dtrak.data.sources import Record

CIFAR2 = Path(__file__).parents[2] / "shared" / "data" / "cifar2-train.parquet"


def pixels(height=6, width=6, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def expected(array):
    """[H, W] or [H, W, C] uint8 -> [C, H, W] float64 in [-1, 1]."""
    values = torch.from_numpy(array.astype(np.float64)) / 255 * 2 - 1
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def assert_pixels(image, array, levels=0.0):
    error = (image.double() - expected(array)).abs().max().item()
    assert error <= levels * 2 / 255 + 1e-6, f"off by {error * 255 / 2:.3f} of 255 levels"


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def parquet_of(path, arrays, name="img", **columns):
    rows = [{"bytes": png(a), "path": f"{i}.png"} for i, a in enumerate(arrays)]
    return write_parquet(path, {name: pa.array(rows), **columns})


def test_digits_are_exact():
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = load_data("digits")
    assert data.images.shape == (1000, 1, 8, 8)
    for row in (0, 1, 999):
        position = int(data.ids[row].removeprefix("digits/"))
        exact = torch.from_numpy(digits.images[position]) * 2 / 16 - 1
        assert torch.equal(data.images[row, 0].double(), exact)
        assert data.labels[row] == digits.target[position]
    assert (data.images.min(), data.images.max()) == (-1, 1)


def test_digits_split_is_fixed_disjoint_and_stratified():
    from sklearn.datasets import load_digits

    target = load_digits().target
    train, validation = digits_split()
    assert (len(set(train)), len(set(validation))) == (1000, 200)
    assert not set(train) & set(validation)
    for chosen in (train, validation):
        share = np.bincount(target[chosen], minlength=10) / len(chosen)
        assert np.abs(share - np.bincount(target) / len(target)).max() < 0.005
    # stores and scores are keyed by these: a silent change of the draw must not pass
    assert train[:4] == [155, 1456, 576, 1146]
    assert validation[:4] == [905, 544, 768, 103]
    assert digits_split(seed=1)[0] != train
    assert load_data("digits", split="validation").ids[0] == "digits/0905"
    assert load_data("digits", split="all", limit=2).ids == ["digits/0000", "digits/0001"]


def test_digits_in_rgb_repeat_and_resize_to_the_model():
    grey = load_data("digits", limit=3, size=8)
    rgb = load_data("digits", limit=3, channels=3, size=8)
    assert torch.equal(rgb.images, grey.images.expand(3, 3, 8, 8))
    resized = load_data("digits", limit=3, size=16, resize=True)
    assert resized.images.shape == (3, 1, 16, 16)
    assert resized.ids == grey.ids
    oracle = F.interpolate(grey.images.double(), size=16, mode="bilinear", antialias=True)
    assert (resized.images - oracle).abs().max() < 1.5 * 2 / 255


def test_folder_is_walked_in_the_order_of_paths(tmp_path):
    arrays = {name: pixels(seed=i) for i, name in enumerate(["b.PNG", "a/z.bmp", "a/b/c.png"])}
    for name, array in arrays.items():
        write(tmp_path / name, array)
    write(tmp_path / "._resource.png", pixels(2, 2))
    (tmp_path / "notes.txt").write_text("no image")
    data = load_data(tmp_path, size=6, channels=3)
    assert data.ids == ["a/b/c.png", "a/z.bmp", "b.PNG"]
    assert data.labels is None
    for image, name in zip(data.images, data.ids, strict=True):
        assert_pixels(image, arrays[name])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "gif"])
def test_lossy_formats_load(tmp_path, suffix):
    flat = np.full((16, 16, 3), (250, 40, 90), dtype=np.uint8)
    write(tmp_path / f"x.{suffix}", flat)
    assert_pixels(load_data(tmp_path, channels=3).images[0], flat, levels=3)


def test_channels_follow_the_model_or_the_first_image(tmp_path):
    grey, rgb = pixels(channels=1), pixels(seed=1)
    write(tmp_path / "a.png", grey)
    write(tmp_path / "b.png", rgb)
    assert load_data(tmp_path).images.shape[1] == 1
    as_rgb = load_data(tmp_path, channels=3).images
    assert_pixels(as_rgb[0], np.repeat(grey[..., None], 3, axis=2))
    luma = np.round(rgb.astype(np.float64) @ [0.299, 0.587, 0.114]).astype(np.uint8)
    assert_pixels(load_data(tmp_path, channels=1).images[1], luma, levels=1)


def test_transparency_is_laid_over_white(tmp_path):
    layer = np.zeros((4, 4, 4), dtype=np.uint8)
    layer[..., 0], layer[:2, :, 3], layer[2, :, 3] = 200, 255, 51
    write(tmp_path / "a.png", layer)
    over_white = np.full((4, 4, 3), 255, dtype=np.uint8)
    over_white[:2] = (200, 0, 0)
    over_white[2] = (244, 204, 204)
    assert_pixels(load_data(tmp_path, channels=3).images[0], over_white)


def test_rotation_in_exif_is_applied(tmp_path):
    array = pixels(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "a.png", array, exif=exif)
    assert_pixels(load_data(tmp_path).images[0], np.rot90(array, k=-1).copy())


@pytest.mark.parametrize("height, width", [(20, 33), (33, 20), (24, 24), (8, 13), (5, 8)])
def test_resize_is_shortest_side_bilinear_and_centre_crop(tmp_path, height, width):
    array = pixels(height, width)
    write(tmp_path / "a.png", array)
    image = load_data(tmp_path, size=8, resize=True).images[0]
    short = min(height, width)
    scaled = (8 * height // short, 8 * width // short)
    oracle = F.interpolate(
        torch.from_numpy(array).double().permute(2, 0, 1)[None],
        size=scaled,
        mode="bilinear",
        antialias=True,
    )[0]
    top, left = round((scaled[0] - 8) / 2), round((scaled[1] - 8) / 2)
    oracle = oracle[:, top : top + 8, left : left + 8]
    assert (to_uint8(image).double() - oracle).abs().max() <= 1.5


def test_resize_fills_a_rectangle(tmp_path):
    write(tmp_path / "a.png", pixels(9, 30))
    assert load_data(tmp_path, size=(7, 5), resize=True).images.shape == (1, 3, 7, 5)
    assert load_data(tmp_path, size=(5, 21), resize=True).images.shape == (1, 3, 5, 21)


def test_size_that_does_not_fit_is_named(tmp_path):
    write(tmp_path / "a.png", pixels(6, 6))
    write(tmp_path / "b.png", pixels(4, 9))
    with pytest.raises(DataError, match=r"'b.png'.* is 9x4 pixels, the model takes 6x6"):
        load_data(tmp_path, size=6)
    with pytest.raises(DataError, match=r"'b.png'.* is 9x4 pixels, the first \('a.png'\) is 6x6"):
        load_data(tmp_path)


def truncated(array):
    return png(array)[:-40]


def broken_header(array):
    return b"not a picture at all"


@pytest.mark.parametrize("damage", [truncated, broken_header, lambda array: b""])
def test_corrupt_image_is_named_or_left_out(tmp_path, damage):
    good = pixels(12, 12)
    write(tmp_path / "a.png", good)
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(damage(good))
    with pytest.raises(DataError, match=r"corrupt image 'b\.png'") as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"left out 2 images; the first: .*'b.png'") as warned:
        data = load_data(tmp_path, skip_corrupt=True)
    assert len(warned) == 1
    assert data.ids == ["a.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"all 2 images are corrupt; the first: .*'b\.png'"):
        load_data(tmp_path, skip_corrupt=True)


def test_sixteen_bit_image_is_refused_not_clipped(tmp_path):
    write(tmp_path / "a.png", np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(DataError, match=r"'a.png'.* must have 8-bit pixels, got mode I;16"):
        load_data(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("empty")
    with pytest.raises(DataError, match=r"no images \(png, jpg.*\) in the folder"):
        load_data(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/train.parquet", "a/b/c", "~/nowhere-xyz"])
def test_missing_path_is_one_line(name):
    with pytest.raises(FileNotFoundError, match=r"no file or folder at .*; data must be 'digits'"):
        load_data(name)
    with pytest.raises(FileNotFoundError, match=r"no file or folder at 'nowhere'"):
        load_data(Path("nowhere"))


def test_other_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    expected = r"a.txt' is a file but neither an image nor a .parquet file; data must be"
    with pytest.raises(DataError, match=expected):
        load_data(tmp_path / "a.txt")


def test_one_image_is_a_source(tmp_path):
    write(tmp_path / "a.png", pixels())
    data = load_data(tmp_path / "a.png")
    assert data.ids == ["a.png"]
    assert torch.equal(data.images, load_data(tmp_path).images)
    with pytest.raises(ValueError, match="split must be 'train' for an image"):
        load_data(tmp_path / "a.png", split="validation")


@pytest.mark.parametrize("name", ["image", "img"])
def test_parquet_in_the_hub_schema(tmp_path, name):
    arrays = [pixels(seed=i) for i in range(600)]
    labels = [i % 3 for i in range(600)]
    path = parquet_of(tmp_path / "x.parquet", arrays, name, label=pa.array(labels))
    data = load_data(path, channels=3, size=6)
    assert (data.ids[0], data.ids[599]) == ("x.parquet/0", "x.parquet/599")
    assert data.labels == labels
    for row in (0, 255, 256, 599):
        assert_pixels(data.images[row], arrays[row])


def test_labels_and_limit_keep_the_first_of_the_classes(tmp_path):
    arrays = [pixels(seed=i) for i in range(9)]
    path = parquet_of(tmp_path / "x.parquet", arrays, label=pa.array([0, 1, 2] * 3))
    data = load_data(path, labels=[1, 2], limit=3)
    assert data.ids == ["x.parquet/1", "x.parquet/2", "x.parquet/4"]
    assert data.labels == [1, 2, 1]
    assert load_data("digits", labels=[3], limit=5).labels == [3] * 5
    with pytest.raises(DataError, match=r"has no image with a label in \[7\]"):
        load_data(path, labels=[7])
    with pytest.raises(DataError, match=r"'digits' has no image with a label in \[11\]"):
        load_data("digits", labels=[11])


def test_labels_asked_for_where_there_are_none(tmp_path):
    path = parquet_of(tmp_path / "x.parquet", [pixels()], label=pa.array(["cat"]))
    assert load_data(path).labels is None
    with pytest.raises(DataError, match=r"labels were asked for, but .* has none"):
        load_data(path, labels=[1])


def test_limit_counts_the_images_that_decode(tmp_path):
    rows = [{"bytes": b"broken", "path": None}, *({"bytes": png(pixels()), "path": None},) * 3]
    path = write_parquet(tmp_path / "x.parquet", {"image": pa.array(rows)})
    with pytest.warns(UserWarning, match="left out 1 image;"):
        data = load_data(path, limit=2, skip_corrupt=True)
    assert data.ids == ["x.parquet/1", "x.parquet/2"]


def test_parquet_without_images_names_its_columns(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"image": ["a"], "text": ["b"]})
    with pytest.raises(DataError, match=r"no column 'image' or 'img'.*image \(string\), text"):
        load_data(path)


def test_parquet_that_is_empty_or_unreadable(tmp_path):
    empty = parquet_of(tmp_path / "empty.parquet", [pixels()])
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    with pytest.raises(DataError, match=r"empty.parquet' has no rows"):
        load_data(empty)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"broken.parquet' is not a readable parquet file"):
        load_data(broken)


def test_parquet_row_without_an_image_is_named(tmp_path):
    rows = pa.array([{"bytes": png(pixels()), "path": "a"}, {"bytes": None, "path": None}])
    path = write_parquet(tmp_path / "x.parquet", {"image": rows})
    with pytest.raises(DataError, match=r"corrupt image 'x.parquet/1' .* it holds no bytes"):
        load_data(path)


def test_real_parquet():
    if not CIFAR2.is_file():
        pytest.skip(f"no {CIFAR2.name} beside the repository")
    data = load_data(CIFAR2, channels=3, size=32, limit=300)
    first = pq.ParquetFile(CIFAR2).read_row_group(0, columns=["img"]).slice(0, 1).to_pylist()
    oracle = np.asarray(Image.open(io.BytesIO(first[0]["img"]["bytes"])))
    assert data.images.shape == (300, 3, 32, 32)
    assert_pixels(data.images[0], oracle)


def hub_data(arrays, labels):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)}
    )
    rows = {"img": [{"bytes": png(a), "path": None} for a in arrays], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def test_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    arrays = [pixels(seed=i) for i in range(4)]
    saved = hub_data(arrays, [3, 2, 1, 0])
    saved.save_to_disk(tmp_path / "one")
    data = load_data(tmp_path / "one", channels=3, size=6)
    assert data.ids == [f"one/{row}" for row in range(4)]
    assert data.labels == [3, 2, 1, 0]
    for image, array in zip(data.images, arrays, strict=True):
        assert_pixels(image, array)
    parts = datasets.DatasetDict(train=saved, test=saved.select([2]))
    parts.save_to_disk(tmp_path / "parts")
    assert load_data(tmp_path / "parts", split="test").ids == ["parts/test/0"]
    with pytest.raises(ValueError, match=r"split of .*parts' must be one of train, test, got 'de"):
        load_data(tmp_path / "parts", split="dev")
    # the held-out part goes by several names
    assert load_data(tmp_path / "parts", split="validation").ids == ["parts/test/0"]
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"datasets cannot load '.*one'"):
        load_data(tmp_path / "one")


def test_hub_name_goes_through_load_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    arrays = [pixels(seed=i) for i in range(3)]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return hub_data(arrays, [0, 1, 2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("someone/pictures", split="test", channels=3)
    assert asked == [("someone/pictures", "test")]
    assert data.ids == [f"someone/pictures/test/{row}" for row in range(3)]
    assert data.labels == [0, 1, 2]
    assert data.source == "someone/pictures (test)"
    assert_pixels(data.images[2], arrays[2])
    columns = datasets.Dataset.from_dict({"text": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: columns)
    with pytest.raises(DataError, match="/train' has no image column; its columns: text"):
        load_data("someone/pictures")
    nothing = hub_data(arrays, [0, 1, 2]).select([])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: nothing)
    with pytest.raises(DataError, match="'someone/pictures/train' has no rows"):
        load_data("someone/pictures")


def test_data_set_whose_images_are_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    array = pixels()
    path = write(tmp_path / "a.png", array)
    on_disk = datasets.Dataset.from_dict({"photo": [str(path)]}).cast_column(
        "photo", datasets.Image()
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: on_disk)
    data = load_data("someone/pictures")
    assert data.labels is None
    assert_pixels(data.images[0], array)


def test_unknown_name_says_what_was_tried(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(name, split):
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'cifr10' is no existing.*no network.*'digits'") as caught:
        load_data("cifr10")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"size": 0}, "size must be positive, got 0"),
        ({"limit": 0}, "limit must be positive, got 0"),
        ({"split": "dev"}, "split of 'digits' must be one of train, validation, all, got 'dev'"),
        ({"split": "dev", "size": 9}, "split of 'digits' must be one of train, validation, all"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        load_data("digits", **options)


def test_split_of_what_has_no_splits(tmp_path):
    write(tmp_path / "a.png", pixels())
    path = parquet_of(tmp_path / "x.parquet", [pixels()])
    hub_data([pixels()], [0]).save_to_disk(tmp_path / "saved")
    for source, kind in (
        (tmp_path, "a folder of images"),
        (path, "a parquet file"),
        (tmp_path / "saved", "a single saved data set"),
    ):
        with pytest.raises(ValueError, match=f"split must be 'train' for {kind}"):
            load_data(source, split="validation")


def some_images(ids=("a", "b", "c"), labels=(1, 2, 3), shift=0.0):
    torch.manual_seed(0)
    images = torch.rand(3, 1, 4, 4) * 2 - 1
    images[1, 0, 2, 3] += shift
    return Samples(images, ids=list(ids), labels=list(labels), source="test")


def test_fingerprint_tells_content_and_order():
    data = some_images()
    assert data.fingerprint == some_images(labels=(0, 0, 0)).fingerprint
    different = {
        data.fingerprint,
        some_images(shift=1e-6).fingerprint,
        some_images(ids=("a", "b", "d")).fingerprint,
        some_images(ids=("ab", "", "c")).fingerprint,
        data.select([1, 0, 2]).fingerprint,
        data.select([0, 1]).fingerprint,
        Samples(data.images.reshape(3, 1, 2, 8), data.ids, None, "test").fingerprint,
    }
    assert len(different) == 7
    assert all(len(fingerprint) == 64 for fingerprint in different)


def test_fingerprint_keeps_ids_and_pixels_apart():
    # the bytes of the pixels continue those of the id: only its length tells where it ends
    zeros = torch.zeros(2, 1, 1, 1)
    one, other = (Samples(zeros, ids, None, "x") for ids in (["a", "\0b"], ["a\0", "b"]))
    assert one.fingerprint != other.fingerprint


def test_fingerprint_does_not_depend_on_memory_layout():
    data = some_images()
    strided = data.images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert Samples(strided, data.ids, None, "x").fingerprint == data.fingerprint


def test_select_keeps_rows_together():
    data = some_images()
    for indices in ([2, 0, 2], torch.tensor([2, 0, 2])):
        chosen = data.select(indices)
        assert len(chosen) == 3
        assert (chosen.ids, chosen.labels) == (["c", "a", "c"], [3, 1, 3])
        assert torch.equal(chosen.images, torch.stack([data.images[i] for i in (2, 0, 2)]))
    masked = data.select(torch.tensor([False, True, True]))
    assert masked.ids == ["b", "c"]
    assert len(data.select([])) == 0
    for bad in ([3], [-1]):
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\), got"):
            data.select(bad)
    with pytest.raises(ValueError, match=r"mask must be \[3\], got \[2\]"):
        data.select(torch.tensor([True, False]))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"images": torch.zeros(3)},
            r"\[N, C, H, W\] float32, got \[3\]",
        ),
        ({"images": torch.zeros(3, 1, 4, 4).double()}, "got .* torch.float64"),
        ({"ids": ["a"]}, "ids must be 3 long, got 1"),
        ({"labels": [1, 2]}, "labels must be 3 long, got 2"),
    ],
)
def test_value_that_does_not_hold_together(change, message):
    fields = {"images": torch.zeros(3, 1, 4, 4), "ids": list("abc"), "labels": None, "source": "x"}
    with pytest.raises(ValueError, match=message):
        Samples(**(fields | change))


def test_quantisation_is_to_the_nearest_level():
    levels = torch.arange(256, dtype=torch.float64)
    for nudge in (-0.49, 0.0, 0.49):
        images = ((levels + nudge) / 127.5 - 1).float().reshape(1, 1, 16, 16)
        assert torch.equal(to_uint8(images).flatten(), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([[[-3.0, 3.0]]])).tolist() == [[[0, 255]]]
    with pytest.raises(ValueError, match="images must be finite"):
        to_uint8(torch.tensor([[[float("nan")]]]))


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_come_back_quantised(tmp_path, channels):
    torch.manual_seed(0)
    images = torch.rand(12, channels, 5, 7) * 2.2 - 1.1
    paths = save_images(images, tmp_path / "deep" / "folder", prefix="query-")
    assert paths[11].name == "query-00011.png"
    assert sorted(paths) == paths == sorted((tmp_path / "deep" / "folder").iterdir())
    colour_type = {1: 0, 3: 2}[channels]
    assert struct.unpack(">IIBB", paths[0].read_bytes()[16:26]) == (7, 5, 8, colour_type)
    back = load_data(tmp_path / "deep" / "folder", channels=channels, size=(5, 7))
    oracle = ((images.double().clamp(-1, 1) + 1) / 2 * 255).round() / 255 * 2 - 1
    assert (back.images.double() - oracle).abs().max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = save_images(back.images, tmp_path / "again")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_only_pictures_are_saved(tmp_path):
    with pytest.raises(ValueError, match=r"images must be \[M, 1 or 3, H, W\], got \[2, 4, 8, 8\]"):
        save_images(torch.zeros(2, 4, 8, 8), tmp_path)


@pytest.mark.parametrize("height, width", [(9, 7), (6, 6), (7, 12), (5, 9)])
def test_the_centre_is_cut_out_of_what_is_large_enough(height, width):
    array = pixels(height, width)
    records = [Record("a", 3, png(array))]
    data = decode_records(records, "x", crop=6)
    if height < 6:
        assert_pixels(data.images[0], array)
    else:
        # half a pixel goes to the even side, as torchvision rounds
        top, left = round((height - 6) / 2), round((width - 6) / 2)
        assert_pixels(data.images[0], array[top : top + 6, left : left + 6])
    assert (data.ids, data.labels, data.source) == (["a"], [3], "x")


def test_cropping_comes_before_resizing():
    array = np.full((20, 20, 3), 255, np.uint8)
    array[4:16, 4:16] = 0
    data = decode_records([Record("a", None, array)], "x", crop=12, size=6, resize=True)
    assert torch.equal(data.images, torch.full((1, 3, 6, 6), -1.0))
