"""Stores of features: what is in one, what is wrong, several joined, others' taken in, scored.

``python -m dtrak.store info | check | merge | import | score``. A store is a folder with
``manifest.json``, such as ``runs/digits/features-lowrank/…/train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import typer
from rich.console import Console

from ..runs.choices import FLOAT32, STORE_DTYPES, check_choice, check_counts
from ..runs.console import run_app
from ..runs.files import expand_path
from ..runs.record import MANIFEST
from ..runs.stated import Stated, argument, option
from .options import add_command

TRAK, DTRAK = FORMATS = ("trak", "d-trak")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@dataclass(frozen=True)
class FolderOptions(Stated):
    """Which store ``info`` and ``check`` look at."""

    folder: str = argument(help="Of the store.", is_path=True)


@dataclass(frozen=True)
class MergeOptions(Stated):
    """What ``merge`` was asked for."""

    target: str = argument(help="A store, or a folder that becomes one.", is_path=True)
    sources: list[str] = argument(help="Stores made with the same settings.", is_path=True)  # noqa: RUF009


@dataclass(frozen=True)
class ImportOptions(Stated):
    """What ``import`` was asked for."""

    sources: list[str] = argument(  # noqa: RUF009
        help="The save folder of TRAK, or D-TRAK's files in the order of the samples.", is_path=True
    )
    output: str = option(help="Folder of the store.", is_path=True)
    format: str = option(help=f"Whose they are: {', '.join(FORMATS)}.")
    width: int | None = option(None, help="K of D-TRAK's files, which do not say it.")
    model: int = option(0, help="TRAK's model_id.")
    experiment: str | None = option(
        None, help="Of TRAK, whose scored samples are taken. Default: the training samples."
    )
    store_dtype: str = option(FLOAT32, help=f"Kept as: {', '.join(STORE_DTYPES)}.")

    def check(self) -> None:
        """Refuse what can be refused before anything is read.

        Raises:
            ValueError: an option is unknown, or some do not go together.
        """
        check_choice("--format", self.format, FORMATS)
        check_choice("--store-dtype", self.store_dtype, STORE_DTYPES)
        check_counts(width=self.width)
        if (self.format == DTRAK) != (self.width is not None):
            raise ValueError(
                f"--width must be given for d-trak, and for it alone, got {self.width}"
            )
        if self.format == TRAK and len(self.sources) != 1:
            raise ValueError(f"--format trak takes one folder, got {len(self.sources)}")


@dataclass(frozen=True)
class ScoreOptions(Stated):
    """What ``score`` was asked for."""

    train: str = argument(help="Store of the training samples.", is_path=True)
    queries: str = argument(help="Store of the queries, or of part of them.", is_path=True)
    output: str = option(help="Folder of the results.", is_path=True)
    damping: str = option("1x", help="λ, as in dtrak.attribute.")
    only_top: int | None = option(
        None,
        help="Only so many proponents and opponents of each query, read off without the matrix of "
        "all scores.",
    )
    data: str | None = option(
        None,
        help="Folder of the training images, in the order of the rows: writes a report, too.",
        is_path=True,
    )
    pictures: str | None = option(
        None, help="Folder of the queries' images, likewise.", is_path=True
    )

    def check(self) -> None:
        """As `ImportOptions.check`."""
        from ..methods.damping import Damping

        Damping.parse(self.damping)
        check_counts(only_top=self.only_top)
        if (self.data is None) != (self.pictures is None):
            raise ValueError("--data and --pictures must be given together, got one of them")
        if self.data is not None and self.only_top is not None:
            raise ValueError("--only-top makes no report: leave out --data and --pictures")


def _check_folder(folder: str) -> None:
    if not (expand_path(folder) / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} must hold a store of features, got no {MANIFEST}")


def info(options: FolderOptions, console: Console) -> None:
    """Say what a store holds."""
    _check_folder(options.folder)
    # torch comes with these: seconds that a mistake in the options should not cost
    from .store_stages import show

    show(options.folder)


def check(options: FolderOptions, console: Console) -> None:
    """Read a whole store, and name the shards that are missing, cut or damaged."""
    _check_folder(options.folder)
    from .store_stages import check_store

    check_store(options.folder, console)


def merge(options: MergeOptions, console: Console) -> None:
    """Bring the shards of several stores together, made apart with --shard."""
    from .store_stages import merge_stores

    merge_stores(options.target, options.sources, console)


def take_in(options: ImportOptions, console: Console) -> None:
    """Make a store of features that TRAK or D-TRAK's scripts have kept."""
    options.check()
    from .store_stages import import_store

    import_store(options, console)


def score(options: ScoreOptions, console: Console) -> None:
    """Score one store against another; processes that torchrun starts divide the rows."""
    options.check()
    from .store_stages import score_stores

    score_stores(options, console)


add_command(app, FolderOptions, info, name="info")
add_command(app, FolderOptions, check, name="check")
add_command(app, MergeOptions, merge, name="merge")
add_command(app, ImportOptions, take_in, name="import")
add_command(app, ScoreOptions, score, name="score", shares=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.store``."""
    run_app(app, "dtrak.store", arguments)


if __name__ == "__main__":
    main()
