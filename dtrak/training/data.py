"""Where the images that a model is trained on lie, and which of them it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.files import expand_path
from .presets import get_preset

if TYPE_CHECKING:
    from ..data.samples import Samples
    from ..models.denoiser import Denoiser


@dataclass(frozen=True)
class DataSource:
    """Training images, as a model reads them, with their captions or labels.

    Attributes:
        source: as `dtrak.data.images.load_data` takes it; None is the preset's own.
        preset: whose draw of the images it is; None for all that lie there.
        caption: of every image instead of those that lie with them; see `captions.caption_all`.
        resolution: side in pixels; None is the model's.
        resize: bring images of another size to that size.
        skip_corrupt: leave out images that do not decode.
        subset: which published subset of the preset's images; None for all.
        family: of the subset.
        without: ids that are left out.
    """

    source: str | None = None
    preset: str | None = None
    caption: str | None = None
    resolution: int | None = None
    resize: bool = False
    skip_corrupt: bool = False
    subset: int | None = None
    family: str = "lds-val"
    without: tuple[str, ...] = ()

    @classmethod
    def asked_for(cls, options: Any, **more: Any) -> DataSource:
        """What the options of a command say, and more."""
        names = ("preset", "caption", "resolution", "resize", "skip_corrupt")
        return cls(options.data, **{name: getattr(options, name) for name in names}, **more)

    def to_dict(self) -> dict[str, Any]:
        """What decides the images, wherever they lie; JSON-serialisable, without defaults."""
        values = asdict(self) | {"without": list(self.without)}
        if self.subset is not None:
            # said even where it is the default: it goes with the number
            return _not_default(values) | {"family": self.family}
        return _not_default(values)

    def load(self, model: Denoiser, split: str = "train", *, limit: int | None = None) -> Samples:
        """The images of a part of the source, all of them: `select` chooses.

        Args:
            model: says their size, and what goes with each.
            split: ``"train"`` or ``"validation"``.
            limit: at most so many, the first ones.

        Raises:
            FileNotFoundError, ValueError, DataError: as `load_data` and `Preset.load_data`, or
                there are no captions or labels for a model that reads them.
        """
        from ..data.images import load_data

        if self.preset is not None:
            preset, skip = get_preset(self.preset), self.skip_corrupt
            data = preset.load_data(split, self.source, limit=limit, skip_corrupt=skip)
        else:
            data = load_data(
                str(self.source),
                channels=model.channels,
                size=self.resolution or model.size,
                split=split,
                limit=limit,
                skip_corrupt=self.skip_corrupt,
                resize=self.resize,
            )
        return data.conditioned(self._items(model, data))

    def select(self, data: Samples) -> list[int]:
        """Positions in ``data`` of the images that are trained on.

        Raises:
            ValueError: an id to be left out is of no image, or no image is left.
        """
        if self.subset is not None:
            preset = get_preset(str(self.preset))
            return sorted(preset.subset_indices(data, self.subset, self.family))
        return positions_without(data, self.without)

    def _items(self, model: Denoiser, data: Samples) -> list[Any] | None:
        if model.reads == "captions":
            from ..data.captions import load_captions

            if self.preset is not None and self.caption is None:
                return get_preset(self.preset).captions(data.labels or [])
            return list(load_captions(str(self.source), data, self.caption))
        if model.reads != "labels":
            return None
        name, count = self.source or self.preset, model.num_classes
        if data.labels is None:
            raise ValueError(
                f"'{name}' must have labels for a model that reads classes, got none: folders "
                "<class>/<image>, or a parquet file or data set with a column 'label'"
            )
        for label in data.labels:
            if count is not None and not 0 <= label < count:
                raise ValueError(
                    f"labels of '{name}' must be in [0, {count}), the classes of the model, got "
                    f"{label}"
                )
        return list(data.labels)


def _not_default(values: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {field.name: field.default for field in fields(DataSource)}
    defaults["without"] = []
    return {
        name: value
        for name, value in values.items()
        # moved images are the same images
        if name not in ("source", "skip_corrupt") and value != defaults[name]
    }


def positions_without(data: Samples, ids: Sequence[str]) -> list[int]:
    """Positions of the images whose ids are not among ``ids``, in their order.

    Raises:
        ValueError: an id is of no image, or no image is left.
    """
    removed = set(ids)
    unknown = removed - set(data.ids)
    if unknown:
        raise ValueError(
            f"ids must be of the training images, got {len(unknown)} others, such as "
            f"{min(unknown)!r}; theirs are like {data.ids[0]!r}"
        )
    kept = [position for position, name in enumerate(data.ids) if name not in removed]
    if not kept:
        raise ValueError(f"ids must leave at least one image, got all {len(data)}")
    return kept


def read_ids(file: str | Path) -> list[str]:
    """The ids in a text file, one a line; empty lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        # names of files may be no UTF-8
        text = expand_path(file).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file of ids at {file}") from None
    lines = text.splitlines()
    return [line.strip() for line in lines if line.strip()]
