"""A linear datamodelling experiment small enough that a test can run all of it."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from dtrak.data.images import load_data
from dtrak.data.samples import Samples
from dtrak.evaluation.lds.experiment import Experiment, load_experiment, prepare, train_one
from dtrak.training import presets
from dtrak.training.presets import Draw, Preset
from dtrak.training.trainer import Recipe

NAME = "tiny"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TinyPreset(Preset):
    def load_data(self, split="train", source=None, *, limit=None, skip_corrupt=False) -> Samples:
        size = 40 if split == "train" else 6
        data = load_data("digits", channels=1, size=8, split=split, limit=size)
        # ten classes of four: what a stratified half needs
        if split == "train":
            data = Samples(data.images, data.ids, [i % 10 for i in range(40)], "digits")
        return data if limit is None else data.select(range(min(limit, len(data))))

    def make_model(self, seed=0):
        return tiny_model(seed)


PRESET = TinyPreset(
    NAME,
    "tiny",
    Recipe(steps=8, batch_size=4),
    Draw(40, 40),
    Draw(6, 6),
    channels=1,
    size=8,
    num_inference_steps=3,
    num_generated=5,
    num_subsets=6,
    num_model_seeds=1,
)


def register() -> None:
    """Make the preset known in this process."""
    presets.PRESETS[NAME] = PRESET


@dataclass(frozen=True)
class TrainJob:
    """As the command's, in a process that has to be told of the preset."""

    folder: Path

    def __call__(self, worker: int):
        register()
        experiment = load_experiment(self.folder)
        return lambda name, progress: train_one(experiment, name, CPU, progress)


def trained(folder: Path, **options) -> Experiment:
    """A prepared run with every model trained."""
    register()
    experiment = prepare(folder, PRESET, **options)
    for name in ("full", *experiment.names()):
        train_one(experiment, name, CPU)
    return experiment


@contextmanager
def quiet(label):
    """A progress bar that shows nothing."""
    yield lambda done, total: None


def interrupt(experiment, step: int) -> None:
    """Kill the training of the full model after ``step`` steps."""

    def stop(done, total):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_one(experiment, "full", CPU, stop)
    assert not experiment.is_trained("full")


def first_step(experiment) -> int:
    """Train the full model to its end; the first step that was taken."""
    steps = []
    train_one(experiment, "full", CPU, lambda done, total: steps.append(done))
    return steps[0]
