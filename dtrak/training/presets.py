"""The experiments of the paper: data, draws, model and recipes, as published.

Every draw depends on the order of the images where they lie. The published one is that of the
authors' files: CIFAR-10's batches (or its data set on the hub), CelebA's partition list,
ArtBench-10's table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.layouts import ARTBENCH_CLASSES, CIFAR10_CLASSES
from ..data.sources import DataError, Record, missing_path, open_records
from ..runs.choices import LORA_TARGETS, NUM_INFERENCE_STEPS, check_choice
from .recipe import Recipe

# presets are read by every command's --help: what loads or makes something imports it itself
if TYPE_CHECKING:
    from torch import Tensor

    from ..data.samples import Samples
    from ..models.denoiser import Denoiser
    from .start import Start

# the first seed of each published family of subsets; from one subset to the next it goes up by two
SUBSET_FAMILIES = {"lds-val": 42, "lds-test": 298, "retrain": 554}
SPLITS = ("train", "validation")
_DRAW_SEED = 42


@dataclass(frozen=True)
class Draw:
    """How the images of a split are chosen.

    Attributes:
        pool: images the split must hold, of the classes that count.
        size: how many are drawn, with seed 42; None takes all, in their order.
    """

    pool: int
    size: int | None = None


@dataclass(frozen=True)
class LoraRecipe:
    """What the fine-tuning of a text-to-image model needs beyond a `Recipe`.

    Attributes:
        base_model: Hugging Face name of the frozen pipeline.
        rank: of the two matrices.
        target_modules: layers that get them; all attention layers of the U-Net.
        alpha: their product is scaled by alpha / rank.
        init_std: standard deviation of the first matrix; the second starts at zero.
        dropout: probability of the dropouts in the attention layers (whose module name contains
            ``dropout_modules``), while training.
        dropout_modules: see ``dropout``.
        guidance_scale: of classifier-free guidance, when images are drawn.
        mixed_precision: the frozen networks' dtype.
        num_parameters: trained ones.
    """

    base_model: str = "lambdalabs/miniSD-diffusers"
    rank: int = 128
    target_modules: tuple[str, ...] = LORA_TARGETS
    alpha: int = 128
    init_std: float = 1 / 128
    dropout: float = 0.1
    dropout_modules: str = "attn"
    guidance_scale: float = 7.5
    mixed_precision: str = "fp16"
    num_parameters: int = 25_509_888


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Attributes:
        name: what it is called on the command line.
        title: of the data set.
        recipe: training of the full model; subsets take the same with another seed.
        train: how training images are drawn.
        validation: how validation images are drawn.
        channels: of an image.
        size: of an image, in pixels.
        num_inference_steps: DDIM steps (η = 0) of a generated image.
        num_generated: generated queries; image i is drawn from seed i.
        subset_fraction: α, the part of the training set a subset model sees.
        num_subsets: M, subset models of the linear datamodelling score.
        num_model_seeds: trainings of each subset, with seeds 0, 1, ….
        num_retrain: subset models of the ``retrain`` family, one training each.
        stratified: whether draws keep the proportions of the classes.
        classes: names of all classes of the data set, in the order of their labels.
        labels: the classes that count; None for all.
        hub_name: where `datasets` finds the images when no source is given; None: nowhere.
        stems: how parquet files of the data set are called.
        crop: pixels cut out of the centre before images are resized.
        unet: configuration of the model; None for the digits' and for text-to-image models.
        num_parameters: that are trained.
        lora: of the presets that fine-tune a text-to-image model.
        prompt_classes: classes of the generated images, in equal blocks.
    """

    name: str
    title: str
    recipe: Recipe
    train: Draw
    validation: Draw
    channels: int = 3
    size: int = 32
    num_inference_steps: int = NUM_INFERENCE_STEPS
    num_generated: int = 1000
    subset_fraction: float = 0.5
    num_subsets: int = 64
    num_model_seeds: int = 3
    num_retrain: int = 0
    stratified: bool = True
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None
    hub_name: str | None = None
    stems: tuple[str, ...] = ()
    crop: int | None = None
    unet: dict[str, Any] | None = field(default=None, hash=False)
    num_parameters: int = 0
    lora: LoraRecipe | None = None
    prompt_classes: tuple[str, ...] = ()

    @property
    def reads(self) -> str | None:
        """What its model reads beside an image, as `Denoiser.reads`."""
        return None if self.lora is None else "captions"

    def load_data(
        self,
        split: str = "train",
        source: str | Path | None = None,
        *,
        limit: int | None = None,
        skip_corrupt: bool = False,
    ) -> Samples:
        """The published images of ``split``, in the published order.

        Only the images that are drawn are decoded, as `dtrak.data.images.load_data` does.

        Args:
            split: ``"train"`` or ``"validation"``.
            source: where the data set lies: its authors' files (see `dtrak.data.layouts`), a folder
                ``<split>/<class>/<image>``, parquet files, a folder written by
                ``Dataset.save_to_disk``, or a hub name. None: the hub name of the preset.
            limit: keep at most this many, the first ones; None keeps all.
            skip_corrupt: leave out images that do not decode, with one warning.

        Raises:
            FileNotFoundError: nothing lies at ``source``.
            ValueError: the split is unknown, or a source is needed and there is none.
            DataError: the source does not hold the published number of images of these classes
                (any other would give other draws), or as in `dtrak.data.images.load_data`.
        """
        from ..data.images import decode_records, load_data

        check_choice("split", split, SPLITS)
        if self.name == "digits" and source in (None, "digits"):
            return load_data("digits", channels=1, size=self.size, split=split, limit=limit)
        name = str(self.hub_name if source is None else source)
        if source is None and self.hub_name is None:
            raise ValueError(
                f"the data of {self.name!r} must be given (--data), it lies on no hub: "
                f"a folder with {self.title} as its authors hand it out"
            )
        if isinstance(source, Path) and not source.exists():
            raise missing_path(name)
        draw = self.train if split == "train" else self.validation
        # twice over the records: their labels decide which are decoded, and few are kept
        chosen = self._draw(draw, self._pool(name, split), name, split)[:limit]
        places = {position: place for place, position in enumerate(chosen)}
        kept: list[Record | None] = [None] * len(chosen)
        for position, record in enumerate(self._pool(name, split)):
            if position in places:
                kept[places[position]] = record
        return decode_records(
            (record for record in kept if record is not None),
            name,
            channels=self.channels,
            size=self.size,
            crop=self.crop,
            skip_corrupt=skip_corrupt,
            resize=True,
            description=f"{self.title} ({split})",
        )

    def _pool(self, name: str, split: str) -> Any:
        """Records of ``split`` of the classes that count."""
        for record in open_records(name, split, classes=self.classes, stems=self.stems):
            if self.stratified and record.label is None:
                raise DataError(
                    f"images of {self.name!r} must have labels, '{record.id}' in '{name}' has none"
                )
            if self.labels is None or record.label in self.labels:
                yield record

    def _draw(self, draw: Draw, pool: Any, name: str, split: str) -> list[int]:
        labels = [record.label for record in pool]
        if len(labels) != draw.pool:
            of = ", ".join(self.classes[label] for label in self.labels or ())
            raise DataError(
                f"'{name}' must hold {draw.pool:,} images for {split}{f' of {of}' if of else ''}, "
                f"got {len(labels):,}: the published draws would be other ones"
            )
        if draw.size is None:
            return list(range(len(labels)))
        return draw_positions(
            len(labels), draw.size, _DRAW_SEED, labels if self.stratified else None
        )

    def make_model(self, seed: int = 0) -> Denoiser:
        """The model, freshly initialised.

        Args:
            seed: of the initial weights; the global random state is left as it was.

        Raises:
            ValueError: the preset fine-tunes a text-to-image model.
        """
        from ..models.process import linear_process
        from ..models.unet import UNet, digits_model, make_unet

        if self.lora is not None:
            raise ValueError(
                f"{self.name!r} fine-tunes the text-to-image model {self.lora.base_model}, "
                "it has no model of its own"
            )
        if self.unet is None:
            return digits_model(seed)
        return UNet(make_unet(seed, **self.unet), linear_process())

    def start(self, base: str | None = None) -> Start:
        """What its training begins with.

        Args:
            base: folder or hub name of the model it fine-tunes, if it does; None is its own.
        """
        from .start import Start

        if self.lora is None:
            return Start(preset=self.name)
        targets = self.lora.target_modules
        return Start(model=base or self.lora.base_model, rank=self.lora.rank, targets=targets)

    def captions(self, labels: Sequence[int]) -> list[str]:
        """The captions of images of these classes.

        Raises:
            ValueError: the preset has no captions.
        """
        if self.lora is None:
            raise ValueError(f"{self.name!r} is unconditional, its images have no captions")
        return [caption(self.classes[label]) for label in labels]

    def prompts(self) -> list[str]:
        """The prompts of the ``num_generated`` images, in the order of their seeds.

        Raises:
            ValueError: the preset has none.
        """
        if not self.prompt_classes:
            raise ValueError(f"{self.name!r} is unconditional, its images have no prompts")
        block = self.num_generated // len(self.prompt_classes)
        return [caption(name) for name in self.prompt_classes for _ in range(block)]

    def subset_indices(
        self, data: Samples | Sequence[int], index: int, family: str = "lds-val"
    ) -> list[int]:
        """Positions in the training set of subset ``index``, in the order of the draw.

        The published seeds of the families overlap: ``lds-test`` begins with the second half of
        256 ``lds-val`` subsets, ``retrain`` with the second half of 256 ``lds-test`` subsets.

        Args:
            data: the training set, or its N labels.
            index: which subset, from 0.
            family: ``"lds-val"``, ``"lds-test"`` or ``"retrain"``.

        Raises:
            ValueError: the family is unknown, the index is negative, or the draw is stratified and
                the data has no labels.
        """
        from ..data.samples import Samples

        check_choice("family", family, SUBSET_FAMILIES)
        if index < 0:
            raise ValueError(f"index of a subset must be at least 0, got {index}")
        labels = data.labels if isinstance(data, Samples) else list(data)
        if self.stratified and labels is None:
            raise ValueError(f"subsets of {self.name!r} are stratified: data must have labels")
        seed = SUBSET_FAMILIES[family] + 2 * index
        return draw_positions(
            len(data), self.subset_fraction, seed, labels if self.stratified else None
        )

    def subsets(
        self,
        data: Samples | Sequence[int],
        num_subsets: int | None = None,
        family: str = "lds-val",
    ) -> Tensor:
        """Which training images each subset holds.

        Args:
            data: the training set, or its N labels.
            num_subsets: M; None takes the published number.
            family: as in `subset_indices`.

        Returns:
            bool ``[M, N]``.

        Raises:
            ValueError: as in `subset_indices`.
        """
        return draw_subsets(
            self.num_subsets if num_subsets is None else num_subsets,
            partial(self.subset_indices, data, family=family),
            len(data),
        )


def draw_subsets(count: int, draw: Callable[[int], Sequence[int]], size: int) -> Tensor:
    """Which of ``size`` images each of ``count`` subsets holds, as ``draw`` gives their positions.

    Returns:
        bool ``[count, size]``.
    """
    import torch

    masks = torch.zeros(count, size, dtype=torch.bool)
    for index in range(count):
        masks[index, draw(index)] = True
    return masks


def draw_positions(
    population: int, size: int | float, seed: int, labels: Sequence[int | None] | None
) -> list[int]:
    """Draw positions without replacement, as every published draw is made.

    Args:
        population: draw from ``range(population)``.
        size: how many, or which fraction.
        seed: of the draw.
        labels: of the population, whose proportions the draw keeps; None: it does not.

    Returns:
        The positions in the order of the draw, which is the order of every score matrix.

    Raises:
        ValueError: scikit-learn cannot make such a draw.
    """
    from sklearn.model_selection import train_test_split

    chosen, _ = train_test_split(
        np.arange(population), train_size=size, random_state=seed, stratify=labels
    )
    return [int(position) for position in chosen]


def caption(class_name: str) -> str:
    """What an image of ArtBench is described as."""
    return f"a {class_name.replace('_', ' ').lower()} painting"


_CIFAR_UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    # set by the published scripts, and absent from the published configuration
    "resnet_time_scale_shift": "scale_shift",
    # with scale_shift, later versions of Diffusers leave this norm out of the middle block
    "attn_norm_num_groups": 32,
}
_CELEBA_UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}
_PIXEL_RECIPE = Recipe(
    epochs=200,
    batch_size=128,
    learning_rate=1e-4,
    seed=42,
    partial_batches=True,
    flip=True,
    dropout=0.1,
    warm_up_from_zero=True,
)
_CIFAR16_UNET = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 24, 48),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "add_attention": False,
}
_LORA_RECIPE = Recipe(
    epochs=100,
    batch_size=64,
    learning_rate=3e-4,
    betas=(0.9, 0.999),
    seed=42,
    partial_batches=True,
    flip=True,
    dropout=0.1,
    warm_up_from_zero=True,
    caption_dropout=0.1,
)
_LORA = LoraRecipe()
_CIFAR2_LABELS = (CIFAR10_CLASSES.index("automobile"), CIFAR10_CLASSES.index("horse"))
_cifar = partial(
    Preset,
    classes=CIFAR10_CLASSES,
    hub_name="uoft-cs/cifar10",
    unet=_CIFAR_UNET,
    num_parameters=38_307_203,
)
_artbench = partial(
    Preset,
    recipe=_LORA_RECIPE,
    size=256,
    classes=ARTBENCH_CLASSES,
    num_parameters=_LORA.num_parameters,
    lora=_LORA,
)
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "digits",
            "digits",
            Recipe(),
            Draw(1797, 1000),
            Draw(1797, 200),
            channels=1,
            size=8,
            num_parameters=186_081,
        ),
        _cifar(
            "cifar2",
            "CIFAR-2",
            _PIXEL_RECIPE,
            train=Draw(10_000, 5_000),
            validation=Draw(2_000, 1_000),
            labels=_CIFAR2_LABELS,
            num_retrain=512,
            stems=("cifar2", "cifar10"),
        ),
        # not a published one: natural images at a laptop's scale, minutes a model on one core
        _cifar(
            "cifar2-16",
            "CIFAR-2 at 16 x 16",
            Recipe(steps=1000, learning_rate=3e-3),
            Draw(10_000, 1_000),
            Draw(2_000, 100),
            size=16,
            num_generated=64,
            num_subsets=48,
            num_model_seeds=1,
            labels=_CIFAR2_LABELS,
            stems=("cifar2", "cifar10"),
            unet=_CIFAR16_UNET,
            num_parameters=400_843,
        ),
        _cifar(
            "cifar10",
            "CIFAR-10",
            _PIXEL_RECIPE,
            train=Draw(50_000),
            validation=Draw(10_000, 1_000),
            stems=("cifar10",),
        ),
        Preset(
            "celeba",
            "CelebA",
            _PIXEL_RECIPE,
            Draw(162_770, 5_000),
            Draw(19_867, 1_000),
            size=64,
            num_retrain=512,
            stratified=False,
            crop=140,
            unet=_CELEBA_UNET,
            num_parameters=118_795_011,
        ),
        _artbench(
            "artbench2",
            "ArtBench-2",
            train=Draw(10_000, 5_000),
            validation=Draw(2_000, 1_000),
            labels=tuple(map(ARTBENCH_CLASSES.index, ("post_impressionism", "ukiyo_e"))),
            num_retrain=512,
            prompt_classes=("ukiyo_e", "post_impressionism"),
        ),
        _artbench(
            "artbench5",
            "ArtBench-5",
            train=Draw(25_000, 12_500),
            validation=Draw(5_000, 1_000),
            labels=tuple(
                map(
                    ARTBENCH_CLASSES.index,
                    ("baroque", "post_impressionism", "renaissance", "romanticism", "ukiyo_e"),
                )
            ),
            prompt_classes=(
                "ukiyo_e",
                "post_impressionism",
                "romanticism",
                "renaissance",
                "baroque",
            ),
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ValueError: there is none; the message names the closest.
    """
    return PRESETS[check_choice("preset", name, PRESETS)]
