"""The published facts: draws, counts and recipes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import StratifiedShuffleSplit

from dtrak.data.images import DataError, digits_split
from dtrak.data.layouts import ARTBENCH_CLASSES, CIFAR10_CLASSES
from dtrak.data.sources import Record
from dtrak.models.hashing import hash_model
from dtrak.training import presets
from dtrak.training.presets import Draw, LoraRecipe, get_preset

SHARED = Path(__file__).parents[2] / "shared" / "data"
# before tests of this process register theirs
PRESETS = dict(presets.PRESETS)
NAMES = ["digits", "cifar2", "cifar10", "celeba", "artbench2", "artbench5"]


def write_image(path, level, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def small(name, **changes):
    """A preset whose data set is small enough to be made here."""
    return replace(get_preset(name), **changes)


def test_names():
    assert list(PRESETS) == ["digits", "cifar2", "cifar2-16", *NAMES[2:]]
    assert all(PRESETS[name].name == name for name in NAMES)
    with pytest.raises(ValueError, match=r"preset must be one of digits, .* did you mean 'cifar10"):
        get_preset("cifar-10")


@pytest.mark.parametrize(
    "name, parameters, dropouts",
    [("cifar2", 38_307_203, 22), ("cifar10", 38_307_203, 22), ("celeba", 118_795_011, 32)],
)
def test_published_parameter_counts(name, parameters, dropouts):
    preset = get_preset(name)
    with torch.device("meta"):
        unet = preset.make_model().module
    assert sum(p.numel() for p in unet.parameters()) == parameters == preset.num_parameters
    residual = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert sum("resnets" in n for n in residual) == dropouts
    assert sum("attentions." not in n for n in residual) == dropouts


def test_counts_without_what_the_published_scripts_set():
    with torch.device("meta"):
        plain = replace(get_preset("cifar2"), unet=get_preset("cifar2").unet.copy())
        plain.unet["resnet_time_scale_shift"] = "default"
        count = sum(p.numel() for p in plain.make_model().module.parameters())
        assert count == 35_746_307
        plain.unet.update(get_preset("celeba").unet, resnet_time_scale_shift="default")
        assert sum(p.numel() for p in plain.make_model().module.parameters()) == 113_673_219


def test_digits_model_and_initial_weights():
    preset = get_preset("digits")
    hashes = [hash_model(preset.make_model(seed).module) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    model = preset.make_model()
    assert sum(p.numel() for p in model.module.parameters()) == preset.num_parameters == 186_081
    assert (model.process.scheduler.config["beta_start"], model.process.num_timesteps) == (
        1e-4,
        1000,
    )


@pytest.mark.parametrize(
    "name, size, steps",
    [
        ("digits", 1_000, 1_200),
        ("cifar2", 5_000, 8_000),
        ("cifar2", 2_500, 4_000),
        ("cifar2", 4_000, 6_400),
        ("cifar10", 50_000, 78_200),
        ("cifar10", 25_000, 39_200),
        ("celeba", 5_000, 8_000),
        ("artbench2", 5_000, 7_900),
        ("artbench2", 2_500, 4_000),
        ("artbench2", 4_000, 6_300),
        ("artbench5", 12_500, 19_600),
        ("artbench5", 6_250, 9_800),
    ],
)
def test_published_steps(name, size, steps):
    assert get_preset(name).recipe.num_steps(size) == steps


def test_published_recipes():
    pixel = {
        "epochs": 200,
        "batch_size": 128,
        "learning_rate": 1e-4,
        "betas": [0.95, 0.999],
        "weight_decay": 1e-6,
        "max_grad_norm": 1.0,
        "seed": 42,
        "partial_batches": True,
        "flip": True,
        "dropout": 0.1,
        "warm_up_from_zero": True,
    }
    for name in ("cifar2", "cifar10", "celeba"):
        assert get_preset(name).recipe.to_dict() == pixel
    lora = pixel | {"epochs": 100, "batch_size": 64, "learning_rate": 3e-4, "betas": [0.9, 0.999]}
    lora["caption_dropout"] = 0.1
    for name in ("artbench2", "artbench5"):
        assert get_preset(name).recipe.to_dict() == lora
    for name in NAMES:
        preset = get_preset(name)
        assert (preset.num_inference_steps, preset.num_generated) == (50, 1000)
        assert (preset.subset_fraction, preset.num_subsets, preset.num_model_seeds) == (0.5, 64, 3)
        has_more = preset.name in ("cifar2", "celeba", "artbench2")
        assert preset.num_retrain == (512 if has_more else 0)


def test_natural_images_at_a_laptops_scale():
    preset, published = get_preset("cifar2-16"), get_preset("cifar2")
    model = preset.make_model()
    assert sum(p.numel() for p in model.module.parameters()) == preset.num_parameters == 400_843
    assert (model.channels, model.size) == (3, 16)
    assert (preset.num_generated, preset.num_subsets, preset.num_model_seeds) == (64, 48, 1)
    assert preset.labels == published.labels
    assert preset.classes == published.classes


def test_published_sizes():
    sizes = {
        name: (p.train.pool, p.train.size, p.validation.pool, p.validation.size, p.size, p.crop)
        for name, p in PRESETS.items()
    }
    assert sizes == {
        "digits": (1797, 1000, 1797, 200, 8, None),
        "cifar2": (10_000, 5_000, 2_000, 1_000, 32, None),
        "cifar2-16": (10_000, 1_000, 2_000, 100, 16, None),
        "cifar10": (50_000, None, 10_000, 1_000, 32, None),
        "celeba": (162_770, 5_000, 19_867, 1_000, 64, 140),
        "artbench2": (10_000, 5_000, 2_000, 1_000, 256, None),
        "artbench5": (25_000, 12_500, 5_000, 1_000, 256, None),
    }
    assert [CIFAR10_CLASSES[label] for label in get_preset("cifar2").labels] == [
        "automobile",
        "horse",
    ]
    assert get_preset("cifar2").labels == (1, 7)


def test_lora_facts():
    lora = get_preset("artbench2").lora
    assert lora == get_preset("artbench5").lora == LoraRecipe()
    assert (lora.base_model, lora.rank, lora.alpha) == ("lambdalabs/miniSD-diffusers", 128, 128)
    assert lora.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert (lora.init_std, lora.num_parameters) == (1 / 128, 25_509_888)
    assert (lora.dropout, lora.guidance_scale) == (0.1, 7.5)
    with pytest.raises(ValueError, match="'artbench2' fine-tunes the text-to-image model lambda"):
        get_preset("artbench2").make_model()


def test_captions_and_prompts():
    two, five = get_preset("artbench2"), get_preset("artbench5")
    labels = [ARTBENCH_CLASSES.index(name) for name in ("ukiyo_e", "post_impressionism")]
    assert two.captions(labels) == ["a ukiyo e painting", "a post impressionism painting"]
    prompts = two.prompts()
    assert prompts == ["a ukiyo e painting"] * 500 + ["a post impressionism painting"] * 500
    names = ["ukiyo e", "post impressionism", "romanticism", "renaissance", "baroque"]
    assert five.prompts() == [f"a {name} painting" for name in names for _ in range(200)]
    with pytest.raises(ValueError, match="'cifar2' is unconditional, its images have no captions"):
        get_preset("cifar2").captions([1])
    with pytest.raises(ValueError, match="'digits' is unconditional, its images have no prompts"):
        get_preset("digits").prompts()


def test_digits_data():
    preset = get_preset("digits")
    train, validation = (preset.load_data(split) for split in ("train", "validation"))
    oracle = digits_split()
    for data, positions in zip((train, validation), oracle, strict=True):
        assert data.ids == [f"digits/{position:04d}" for position in positions]
    assert preset.load_data("train", limit=3).ids == train.ids[:3]
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        preset.load_data("test")


# slow: draws of 162,770 images; test_artbench_draw has one of the same code
@pytest.mark.full
def test_celeba_draws_are_the_published_ones(tmp_path):
    """Row numbers printed by the authors' notebook, from a partition list of the real sizes."""
    published = {
        "train": [48803, 28992, 118843, 86803, 153263],
        "validation": [167013, 179842, 176165, 167714, 180120],
    }
    sizes = (162_770, 19_867, 3)
    parts = [part for part, size in enumerate(sizes) for _ in range(size)]
    lines = [f"{row + 1:06d}.jpg {part}" for row, part in enumerate(parts)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    images = tmp_path / "img_align_celeba"
    for row in (0, 162_770, *published["train"], *published["validation"]):
        write_image(images / f"{row + 1:06d}.jpg", 100, (178, 218))
    for split, rows in published.items():
        data = get_preset("celeba").load_data(split, tmp_path, limit=5)
        assert data.ids == [f"{row + 1:06d}.jpg" for row in rows]
        assert data.images.shape == (5, 3, 64, 64)
        assert data.labels is None


def test_celeba_is_cropped_before_it_is_resized(tmp_path):
    # white outside the central 140 x 140 pixels, which are black
    array = np.full((218, 178, 3), 255, np.uint8)
    array[39:179, 19:159] = 0
    (tmp_path / "img").mkdir()
    for row in range(6):
        Image.fromarray(array).save(tmp_path / "img" / f"{row}.png")
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(f"{r}.png 0" for r in range(6)))
    data = small("celeba", train=Draw(6, 3)).load_data("train", tmp_path)
    assert torch.equal(data.images, torch.full((3, 3, 64, 64), -1.0))


def test_artbench_draw(tmp_path):
    """Rows of the table in its order, other classes and parts left out, stratified."""
    classes = ("ukiyo_e", "surrealism", "post_impressionism")
    rows = [(classes[i % 3], "test" if i % 7 == 0 else "train", f"{i}.jpg") for i in range(90)]
    lines = [f"{name},someone,{label},{split}" for label, split, name in rows]
    (tmp_path / "ArtBench-10.csv").write_text("\n".join(["name,artist,label,split", *lines]))
    for label, _, name in rows:
        write_image(tmp_path / "artbench-10-imagefolder" / label / name, 50, (16, 16))
    for split, part in (("train", "train"), ("validation", "test")):
        pool = [(n, label) for label, s, n in rows if s == part and label != "surrealism"]
        preset = small(
            "artbench2", train=Draw(len(pool), 20), validation=Draw(len(pool), 4), size=16
        )
        data = preset.load_data(split, tmp_path)
        size = 20 if split == "train" else 4
        splitter = StratifiedShuffleSplit(1, train_size=size, random_state=42)
        chosen = next(splitter.split(pool, [label for _, label in pool]))[0]
        assert data.ids == [f"{pool[p][1]}/{pool[p][0]}" for p in chosen]
        assert data.labels == [ARTBENCH_CLASSES.index(pool[p][1]) for p in chosen]
        assert (
            preset.captions(data.labels)[0] == f"a {pool[chosen[0]][1].replace('_', ' ')} painting"
        )


def test_class_folders(tmp_path):
    for part, size in (("train", 12), ("test", 6)):
        for name in ("horse", "automobile", "cat"):
            for index in range(size // 2):
                write_image(tmp_path / part / name / f"{index}.png", index, (32, 32))
    preset = small("cifar2", train=Draw(12, 6), validation=Draw(6, 2))
    train, validation = (preset.load_data(split, tmp_path) for split in ("train", "validation"))
    assert Counter(train.labels) == {1: 3, 7: 3}
    assert Counter(validation.labels) == {1: 1, 7: 1}
    assert all(name.startswith("train/") for name in train.ids)
    with pytest.raises(
        DataError, match=r"must hold 13 images for train of automobile, horse, got "
    ):
        replace(preset, train=Draw(13, 6)).load_data("train", tmp_path)


def test_images_without_labels_are_refused(tmp_path, monkeypatch):
    records = [Record("a", None, b""), Record("b", 1, b"")]
    monkeypatch.setattr(
        "dtrak.training.presets.open_records", lambda *args, **options: iter(records)
    )
    with pytest.raises(DataError, match="images of 'cifar2' must have labels, 'a' in 'x' has none"):
        get_preset("cifar2").load_data("train", "x")


def test_sources_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"the data of 'celeba' must be given \(--data\)"):
        get_preset("celeba").load_data()
    with pytest.raises(FileNotFoundError, match="no file or folder at"):
        get_preset("cifar2").load_data("train", tmp_path / "nothing")


def test_the_hub_is_asked_where_no_source_is_given(monkeypatch):
    asked = []

    def open_records(name, split, **options):
        asked.append((name, split, options["stems"]))
        return iter(())

    monkeypatch.setattr("dtrak.training.presets.open_records", open_records)
    with pytest.raises(DataError, match="'uoft-cs/cifar10' must hold 2,000 images for validation"):
        get_preset("cifar2").load_data("validation")
    assert asked == [("uoft-cs/cifar10", "validation", ("cifar2", "cifar10"))]


@pytest.mark.parametrize("family, first", [("lds-val", 42), ("lds-test", 298), ("retrain", 554)])
def test_subset_seeds(family, first):
    labels = [0, 1] * 50
    preset = get_preset("cifar2")
    for index in (0, 1, 5):
        splitter = StratifiedShuffleSplit(1, train_size=0.5, random_state=first + 2 * index)
        chosen = next(splitter.split(labels, labels))[0].tolist()
        assert preset.subset_indices(labels, index, family) == chosen
        assert sum(labels[p] for p in chosen) == 25
    masks = preset.subsets(labels, 6, family)
    assert (masks.dtype, masks.shape) == (torch.bool, (6, 100))
    assert set(masks[5].nonzero().flatten().tolist()) == set(chosen)
    assert (masks.sum(1) == 50).all()


def test_families_overlap_as_published():
    labels = [0, 1] * 50
    preset = get_preset("cifar2")
    for earlier, later in (("lds-val", "lds-test"), ("lds-test", "retrain")):
        assert preset.subset_indices(labels, 128, earlier) == preset.subset_indices(
            labels, 0, later
        )


def test_subsets_of_celeba_are_not_stratified():
    data = [None] * 11
    chosen = get_preset("celeba").subset_indices(data, 3)
    # a legacy permutation's last part is what scikit-learn's unstratified draw takes
    permutation = np.random.RandomState(48).permutation(11)
    assert chosen == permutation[6:].tolist()
    digits = get_preset("digits").load_data()
    unlabelled = type(digits)(digits.images, digits.ids, None, "x")
    with pytest.raises(ValueError, match="subsets of 'digits' are stratified: data must have lab"):
        get_preset("digits").subset_indices(unlabelled, 0)


def test_subset_arguments():
    preset = get_preset("digits")
    with pytest.raises(ValueError, match=r"family must be one of lds-val, .* mean 'lds-val'"):
        preset.subset_indices([0, 1], 0, "lds_val")
    with pytest.raises(ValueError, match="index of a subset must be at least 0, got -1"):
        preset.subset_indices([0, 1], -1)


# slow: 10,000 images
@pytest.mark.full
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_cifar2_on_the_shared_folder():
    preset = get_preset("cifar2")
    train = preset.load_data("train", SHARED)
    assert train.images.shape == (5000, 3, 32, 32)
    assert Counter(train.labels) == {1: 2500, 7: 2500}
    assert len(set(train.ids)) == 5000
    assert all(name.startswith("cifar2-train.parquet/") for name in train.ids)
    rows = [int(name.rpartition("/")[2]) for name in train.ids]
    pool = [1] * 5000 + [7] * 5000
    splitter = StratifiedShuffleSplit(1, train_size=5000, random_state=42)
    assert rows == next(splitter.split(pool, pool))[0].tolist()
    masks = preset.subsets(train, 2)
    assert masks.sum(1).tolist() == [2500, 2500]
    assert sum(train.labels[i] == 1 for i in masks[0].nonzero().flatten()) == 1250
    validation = preset.load_data("validation", SHARED)
    assert Counter(validation.labels) == {1: 500, 7: 500}
    assert validation.ids[0].startswith("cifar2-test.parquet/")
