"""Training a diffusion model of any kind, or an adapter in it, resumable bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..data.rows import InMemory
from ..data.samples import Samples, as_samples
from ..models.denoiser import Condition, Denoiser
from ..models.hashing import hash_tensors
from ..runs.files import write_atomically
from ..runs.ranks import by_itself
from ..runs.workers import one_thread
from .recipe import Recipe

Progress = Callable[[int, int], None]
# parameters of a model whose layers a second thread does not make faster
_SMALL = 500_000


def derive_seed(*key: int | str) -> int:
    """A seed that depends on the key alone, so that no random state need be saved to resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the key alone."""
    return torch.Generator().manual_seed(derive_seed(*key))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state of the CPU and ``device`` seeded within, restored after (dropout)."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def batch_indices(step: int, size: int, recipe: Recipe) -> Tensor:
    """Which images a step sees: epochs are permutations laid end to end, and no batch is short.

    With ``recipe.partial_batches`` every epoch starts a batch of its own and ends with a short one.

    Args:
        step: index of the step, from 0.
        size: ``N``, images in the data set.
        recipe: gives the batch size and the seed.

    Returns:
        ``[batch_size]`` int64; a batch across the end of an epoch may hold an image twice. With
        ``partial_batches``, fewer at the end of an epoch.
    """
    if recipe.partial_batches:
        epoch, position = divmod(step, math.ceil(size / recipe.batch_size))
        order = torch.randperm(size, generator=keyed_generator(recipe.seed, "order", epoch))
        return order[position * recipe.batch_size :][: recipe.batch_size]
    first = step * recipe.batch_size
    last = first + recipe.batch_size
    epochs = range(first // size, (last - 1) // size + 1)
    order = torch.cat(
        [torch.randperm(size, generator=keyed_generator(recipe.seed, "order", e)) for e in epochs]
    )
    return order[first - epochs[0] * size :][: recipe.batch_size]


def learning_rate_factor(
    step: int, steps: int, from_zero: bool = False, schedule: str = "cosine"
) -> float:
    """Linear warm-up over a tenth of the steps, then the course of the schedule.

    Args:
        step: index of the step, from 0.
        steps: of the whole training.
        from_zero: the first step has factor 0 and the warm-up reaches 1 a step later, as Diffusers'
            schedules do it; otherwise no step is wasted.
        schedule: one of `recipe.SCHEDULES`: half a cosine to 0, a line to 0, or 1.
    """
    warm_up = math.ceil(steps / 10)
    if step < warm_up:
        return (step + (not from_zero)) / warm_up
    done = (step - warm_up) / max(steps - warm_up, 1)
    if schedule == "constant":
        return 1.0
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def dropout_of(
    module: nn.Module, probability: float, chosen: Callable[[str], bool]
) -> Iterator[None]:
    """Give dropout layers another probability within.

    Args:
        module: its dropout layers are meant.
        probability: of dropping an activation.
        chosen: whether the layer of this name is meant.
    """
    layers = [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Dropout) and chosen(name)
    ]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = probability
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def _dropout_layers(model: Denoiser) -> Callable[[str], bool]:
    """Whether a recipe's dropout goes to the layer of this name, as published.

    A whole model has it outside attention, which had none in the Diffusers it was published with
    (0.16); an adapter inside, where it lies.
    """
    if model.has_adapter:
        return lambda name: "attn" in name
    return lambda name: "attentions." not in name


def save_atomically(state: Any, path: Path) -> None:
    """``torch.save`` through `write_atomically`."""
    # serialised in memory first: torch's own writer hides a full disk behind another error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def _identity(model: Denoiser, data: Samples, recipe: Recipe, precision: str) -> dict[str, Any]:
    """Everything that decides the trained weights."""
    items = None if data.conditions is None else model.identify_items(data.conditions)
    return (
        recipe.to_dict()
        | {
            "images": data.fingerprint,
            "initial weights": model.identity(),
            "noise schedule": json.dumps(model.process.describe()),
        }
        | ({} if items is None else {str(model.reads): items})
        | ({} if model.encoding is None else {"encoding": json.dumps(model.encoding)})
        | ({} if not data.is_encoded else {"latents": _hash_rows(data)})
        | ({} if precision == "no" else {"mixed precision": precision})
    )


def _hash_rows(data: Samples) -> str:
    return hash_tensors({"latents": data.batch(slice(None))})


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of an interrupted training.

    Args:
        path: where it was saved.
        identity: everything that decides the trained weights; the checkpoint holds its own.

    Raises:
        ValueError: the file is damaged, or of another training (what differs).
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    # a damaged pickle raises whatever its bytes happen to ask for
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} is damaged, or not of this version: delete it to train anew"
        ) from error
    named = {*asdict(Recipe()), "mixed precision"}
    differing = [
        f"{key} ({found.get(key)} there, {identity.get(key)} here)" if key in named else key
        for key in [*identity, *(key for key in found if key not in identity)]
        if found.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path} is of another training, which differs in {', '.join(differing)}: "
            "delete it to train anew"
        )
    return state


class Trainer:
    """The parameters of a model that are trained, their optimiser, and the processes that share it.

    Args:
        model: whose `Denoiser.parameters` are trained: all of them, or an adapter's.
        recipe: how.
        accelerator: of several processes or mixed precision, or None.
    """

    def __init__(self, model: Denoiser, recipe: Recipe, accelerator: Accelerator | None) -> None:
        self.model, self.module = model, model.module
        self.recipe, self.accelerator = recipe, accelerator
        if accelerator is not None:
            self.module.to(accelerator.device)
        chosen, named = set(model.parameters()), dict(self.module.named_parameters())
        self.frozen = named.keys() - chosen
        self.parameters = [p for name, p in named.items() if name in chosen]
        self.device = self.parameters[0].device
        self.optimiser: Any = torch.optim.AdamW(
            self.parameters, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.forward: Any = self.module
        self.ema: EMAModel | None = None
        if recipe.ema_decay is not None:
            # the course of the decay is that of the published scripts' defaults
            self.ema = EMAModel(
                self.parameters, decay=recipe.ema_decay, use_ema_warmup=True, power=0.75
            )
            self.ema.to(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def prepare(self) -> None:
        """Hand the model and the optimiser to Accelerate."""
        if self.accelerator is not None:
            self.forward, self.optimiser = self.accelerator.prepare(self.module, self.optimiser)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside its identity and its step."""
        weights = {k: v for k, v in self.module.state_dict().items() if k not in self.frozen}
        state = {"model": weights, "optimiser": self.optimiser.state_dict()}
        if self.accelerator is not None and self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state if self.ema is None else {**state, "ema": self.ema.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, after `prepare`."""
        self.module.load_state_dict(state["model"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)

    def dropout_seed(self, step: int) -> int:
        """Of the dropout masks of a step: another in every process."""
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        return derive_seed(self.recipe.seed, "dropout", step, *([rank] if rank else []))

    def share(self, size: int) -> tuple[slice, float]:
        """Which rows of a batch this process takes, and their weight in the mean of processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return slice(None), 1.0
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        first, last = rank * size // world, (rank + 1) * size // world
        if first == last:
            # every process must take part in every backward pass
            return slice(0, 1), 0.0
        return slice(first, last), (last - first) * world / size

    def draw(self, data: Samples, step: int) -> tuple[Tensor, Tensor, Tensor, list[Any] | None]:
        """The whole batch of a step: what noise is added to, timesteps, noise, captions or labels.

        Every kind of draw has a stream of its own, so that one more changes none of the others.
        """
        recipe, seed = self.recipe, self.recipe.seed
        chosen = batch_indices(step, len(data), recipe).tolist()
        batch, items = data.batch(chosen), data.conditions_of(chosen)
        size, mirrored = len(chosen), torch.zeros(len(chosen), dtype=torch.bool)
        if recipe.flip:
            mirrored = torch.rand(size, generator=keyed_generator(seed, "flip", step)) < 0.5
        if _has_posteriors(self.model, data):
            mean, deviation = batch[torch.arange(size), mirrored.long()].unbind(1)
            spread = torch.randn(mean.shape, generator=keyed_generator(seed, "posterior", step))
            batch = mean + deviation * spread
        elif recipe.flip:
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        if not data.is_encoded:
            # as features do: a model of latents is trained on them
            batch = self.model.inputs(batch, self.device)
        generator = keyed_generator(seed, "noise", step)
        timesteps = self.model.process.draw_timesteps(size, generator)
        noise = torch.randn(batch.shape, generator=generator)
        if recipe.caption_dropout and items is not None:
            dropped = torch.rand(size, generator=keyed_generator(seed, "caption", step))
            kept = (dropped >= recipe.caption_dropout).tolist()
            items = [item if keep else "" for item, keep in zip(items, kept, strict=True)]
        return batch, timesteps, noise, items

    def take_step(self, data: Samples, step: int, steps: int) -> None:
        """One optimiser step on a part of a batch of ``data``."""
        process = self.model.process
        batch, timesteps, noise, items = self.draw(data, step)
        # all processes draw the whole batch, so that their number does not change the training
        rows, weight = self.share(len(batch))
        batch, timesteps, noise = (
            tensor[rows].to(self.device) for tensor in (batch, timesteps, noise)
        )
        condition = {} if items is None else _condition(self.model, items[rows], self.device)
        noisy = process.add(batch, noise, timesteps)
        with seeded(self.device, self.dropout_seed(step)):
            prediction = self.model.predict(noisy, timesteps, condition, self.forward)
        target = process.target(batch, noise, timesteps)
        self.descend(process.loss(prediction, target, timesteps) * weight, step, steps)
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, if it has any, within."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def descend(self, loss: Tensor, step: int, steps: int) -> None:
        """Differentiate the loss, clip, and let the optimiser step.

        Raises:
            ValueError: the loss or the gradient is not finite.
        """
        recipe = self.recipe
        self.optimiser.zero_grad()
        if self.accelerator is None:
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
            scaled = False
        else:
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
            # otherwise a process that fails alone leaves the others waiting
            loss = self.accelerator.reduce(loss.detach(), "mean")
            # a scale that is too large overflows: the step is left out and the scale halved
            scaled = self.accelerator.scaler is not None
        if not torch.isfinite(loss) or not (scaled or torch.isfinite(norm)):
            raise ValueError(
                f"the training loss must stay finite, got {loss.item()} with gradient norm "
                f"{norm.item()} at step {step + 1} of {steps}: try a learning rate "
                f"below {recipe.learning_rate}"
            )
        factor = learning_rate_factor(step, steps, recipe.warm_up_from_zero, recipe.schedule)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate * factor
        self.optimiser.step()

    def release(self) -> None:
        """Take the model back from Accelerate, in evaluation mode and without gradients."""
        self.optimiser.zero_grad()
        if self.accelerator is not None:
            # for mixed precision it changes the model's own forward method
            self.accelerator.unwrap_model(self.forward, keep_fp32_wrapper=False)
            # left behind, that mark keeps a second training of the model from mixed precision
            vars(self.module).pop("_is_accelerate_prepared", None)
        self.module.eval()


def _condition(model: Denoiser, items: Sequence[Any], device: torch.device) -> Condition:
    """`Denoiser.condition` of each item by itself, so that its bits do not depend on the others.

    Resumed, a step sees other captions for the first time than it did in one run.
    """
    alone = [model.condition([item], device) for item in items]
    return {name: torch.cat([one[name] for one in alone]) for name in alone[0]}


def _has_posteriors(model: Denoiser, data: Samples) -> bool:
    """Whether `Samples.inputs` are posteriors of which every step draws latents anew."""
    if not data.is_encoded:
        return False
    return data.inputs.shape[1:] == (2, 2, *model.input_shape(data.shape))


def make_accelerator(device: str, mixed_precision: str) -> Accelerator:
    """What ``--device`` of the training commands means: ``"cpu"``, or what accelerate finds.

    Apple's GPU, which accelerate would take, is left alone: nothing was ever trained there.
    """
    on_cpu = device == "cpu" or torch.backends.mps.is_available()
    return Accelerator(mixed_precision=mixed_precision, cpu=on_cpu or None)


def one_process_accelerator(mixed_precision: str, device: torch.device) -> Accelerator | None:
    """For a training of one process; None where that changes nothing."""
    if mixed_precision == "no":
        return None
    if device.type == "cuda":
        # an accelerator of one process takes the current device
        torch.cuda.set_device(device)
    with by_itself():
        return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")


def _threads(model: Denoiser) -> AbstractContextManager[None]:
    """One thread for a small model on a CPU, so that its bits are the same in every command."""
    size = sum(parameter.numel() for parameter in model.module.parameters())
    return one_thread() if model.device.type == "cpu" and size < _SMALL else nullcontext()


def train(
    model: Denoiser,
    data: Samples | Tensor,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
    accelerator: Accelerator | None = None,
    keep_at: Collection[int] = (),
    keep: Callable[[int], None] | None = None,
) -> Denoiser:
    """Train what of ``model`` is trained, in place, on the plain denoising loss.

    That is every parameter that `Denoiser.parameters` names: the whole model, or its adapter. A
    recipe's dropout goes to the layers outside attention of a whole model, and to those inside
    (whose names contain ``attn``) where an adapter is trained. The global random state is neither
    used nor changed. A checkpoint of another training (recipe, images, captions, initial weights,
    noise schedule or precision) is refused rather than continued or overwritten.

    Args:
        model: freshly initialised or not, already on its device.
        data: N samples, with what the model reads beside them; or a tensor ``[N, ...]`` float32.
            For a model of latents they may hold posteriors ``[N, 2, 2, ...]`` in the place of
            pixels (see `dtrak.features.latents.read_posteriors`), of which every step draws anew.
        recipe: how.
        checkpoint: where the state is kept while training, so that an interrupted run, called again
            with the same arguments, goes on where it stopped, with the same bits; the caller
            removes it when the model is saved.
        checkpoint_every: steps between checkpoints.
        progress: called with (steps done, steps) after every step.
        accelerator: mixed precision and several processes, which share each batch; it moves the
            model to its device. None trains in this process, in the model's precision.
        keep_at: numbers of finished steps after which ``keep`` is called.
        keep: called with that number by the process that writes files, while ``model`` has the
            weights (averaged ones, if any) of that moment.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: the model has nothing to train; there are no images or they are not finite, or
            they do not fit the model or the recipe; the loss or its gradient is not finite (at
            which step); the checkpoint is damaged or of another training (what differs).

    Source:
        Ho et al. 2020 (arXiv:2006.11239), algorithm 1; schedule and optimiser as D-TRAK trains
        (arXiv:2311.00500, train_unconditional.py and train_text_to_image_lora.py at e2a0c2e).
    """
    data = as_samples(data)
    _check(model, data, recipe)
    steps = recipe.num_steps(len(data))
    start, identity = 0, {}
    trainer = Trainer(model, recipe, accelerator)
    if checkpoint is not None:
        precision = "no" if accelerator is None else str(accelerator.mixed_precision)
        identity = _identity(model, data, recipe, precision)
    trainer.prepare()
    if checkpoint is not None and checkpoint.is_file():
        state = read_checkpoint(checkpoint, identity)
        trainer.load_state(state)
        start = state["step"]
    model.module.train()
    dropout = (
        nullcontext()
        if recipe.dropout is None
        else dropout_of(model.module, recipe.dropout, _dropout_layers(model))
    )
    try:
        with dropout, _threads(model):
            for done in range(start + 1, steps + 1):
                trainer.take_step(data, done - 1, steps)
                if keep is not None and done in keep_at and trainer.is_main:
                    with trainer.averaged():
                        keep(done)
                due = done % checkpoint_every == 0 and done < steps
                if checkpoint is not None and due and trainer.is_main:
                    state = {"identity": identity, "step": done, **trainer.state()}
                    save_atomically(state, checkpoint)
                if progress is not None:
                    progress(done, steps)
        if trainer.ema is not None:
            trainer.ema.copy_to(trainer.parameters)
    finally:
        trainer.release()
    return model


def check_trainable(model: Denoiser, recipe: Recipe) -> None:
    """Refuse what can be refused before there is data.

    Raises:
        ValueError: the model has nothing to train, or the recipe asks for what it does not read.
    """
    if not model.parameters():
        raise ValueError("the model must have parameters to train, got none")
    if recipe.caption_dropout and model.reads != "captions":
        raise ValueError(
            "caption_dropout must be 0 for a model that reads no captions, got "
            f"{recipe.caption_dropout}"
        )


def _check(model: Denoiser, data: Samples, recipe: Recipe) -> None:
    check_trainable(model, recipe)
    if not len(data):
        raise ValueError("images must hold at least one image to train on, got 0")
    if isinstance(data.inputs, InMemory) and not torch.isfinite(data.inputs.tensor).all():
        raise ValueError("images must be finite, got NaN or infinity")
    model.input_shape(data.shape)
    if recipe.flip and len(data.shape) != 3:
        raise ValueError(
            f"samples must be pictures [C, H, W] to be mirrored (flip), got {list(data.shape)}"
        )
    if data.is_encoded and not _has_posteriors(model, data):
        shape = model.input_shape(data.shape)
        if recipe.flip or data.inputs.shape[1:] != shape:
            raise ValueError(
                f"what the model is given must be posteriors [N, 2, 2, {_sizes(shape)}], or, "
                f"without flips, [N, {_sizes(shape)}], got {list(data.inputs.shape)}"
            )
    if model.reads is not None and data.conditions is None:
        raise ValueError(f"data must have {model.reads} for a model that reads them, got none")


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
