import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDPMScheduler
from numerics import relative_error
from tiny import tiny_model

from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.training.presets import get_preset
from dtrak.training.trainer import (
    Recipe,
    batch_indices,
    dropout_of,
    learning_rate_factor,
    save_atomically,
    train,
)

IMAGES = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
RECIPE = Recipe(steps=7, batch_size=4, seed=3)


class StopError(Exception):
    pass


def stop_after(steps):
    def progress(done, total):
        if done == steps:
            raise StopError

    return progress


def train_tiny(recipe=RECIPE, images=IMAGES, model=None, **options):
    return train(model or tiny_model(), images, recipe, **options)


@pytest.fixture(scope="module")
def unbroken():
    return hash_model(train_tiny().module)


def test_default_recipe():
    recipe = Recipe()
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (1200, 64, 4e-3)
    assert recipe.to_dict() == {
        "steps": 1200,
        "batch_size": 64,
        "learning_rate": 4e-3,
        "betas": [0.95, 0.999],
        "weight_decay": 1e-6,
        "max_grad_norm": 1.0,
        "seed": 0,
    }


@pytest.mark.sweep
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("stop", range(1, 8))
def test_resumes_bit_for_bit(tmp_path, unbroken, stop, every):
    checkpoint = tmp_path / "training.pt"
    options = {"checkpoint": checkpoint, "checkpoint_every": every}
    with pytest.raises(StopError):
        train_tiny(progress=stop_after(stop), **options)
    # a checkpoint is written before the step is reported, and none after the last step
    saved = min(stop, RECIPE.steps - 1) // every * every
    assert checkpoint.is_file() == (saved > 0)
    steps = []
    model = train_tiny(progress=lambda done, total: steps.append((done, total)), **options)
    assert steps == [(done, 7) for done in range(saved + 1, 8)]
    assert hash_model(model.module) == unbroken
    assert [f.name for f in tmp_path.iterdir()] == ["training.pt"]


def test_resumes_bit_for_bit_after_many_interruptions(tmp_path, unbroken):
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": 1}
    for stop in range(1, 8):
        with pytest.raises(StopError):
            train_tiny(progress=stop_after(stop), **options)
    assert hash_model(train_tiny(**options).module) == unbroken


def test_resumes_bit_for_bit_with_dropout(tmp_path):
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": 2}
    whole = train_tiny(model=tiny_model(dropout=0.5))
    with pytest.raises(StopError):
        train_tiny(model=tiny_model(dropout=0.5), progress=stop_after(3), **options)
    torch.manual_seed(99)
    resumed = train_tiny(model=tiny_model(dropout=0.5), **options)
    assert hash_model(resumed.module) == hash_model(whole.module)


def test_dropout_differs_from_step_to_step():
    masks = []

    def note(module, args, output):
        masks.append((output == 0).detach().clone())

    model = tiny_model(dropout=0.5)
    dropouts = [m for m in model.module.modules() if isinstance(m, torch.nn.Dropout)]
    dropouts[0].register_forward_hook(note)
    train_tiny(model=model)
    assert len(masks) == RECIPE.steps
    rates = torch.stack([mask.double().mean() for mask in masks])
    assert (rates - 0.5).abs().max() < 0.1
    for previous, current in itertools.pairwise(masks):
        assert (previous != current).double().mean() > 0.4


def test_global_random_state_is_neither_used_nor_changed(unbroken):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = train_tiny(model=tiny_model(dropout=0.1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = train_tiny(model=tiny_model(dropout=0.1))
    assert hash_model(model.module) == hash_model(again.module)


def test_checkpointing_does_not_change_the_result(tmp_path, unbroken):
    model = train_tiny(checkpoint=tmp_path / "training.pt", checkpoint_every=2)
    assert hash_model(model.module) == unbroken


def test_every_field_of_the_recipe_matters(unbroken):
    changes = {
        "steps": 8,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
        "weight_decay": 0.5,
        "max_grad_norm": 0.1,
        "seed": 4,
    }
    assert changes.keys() == RECIPE.to_dict().keys()
    hashes = {
        hash_model(train_tiny(replace(RECIPE, **{name: value})).module)
        for name, value in changes.items()
    }
    assert len(hashes | {unbroken}) == len(changes) + 1


PUBLISHED = {
    "epochs": 2,
    "partial_batches": True,
    "flip": True,
    "dropout": 0.3,
    "warm_up_from_zero": True,
    "ema_decay": 0.9,
}


def test_later_fields_change_the_training_and_are_named():
    base = replace(RECIPE, epochs=3, partial_batches=True)
    hashes = {hash_model(train_tiny(base).module)}
    for name, value in PUBLISHED.items():
        changed = replace(base, **{name: value if name != "partial_batches" else False})
        hashes.add(hash_model(train_tiny(changed).module))
    assert len(hashes) == len(PUBLISHED) + 1
    recipe = replace(RECIPE, **PUBLISHED)
    # epochs decide the steps
    assert recipe.to_dict() | {"steps": 7} == RECIPE.to_dict() | PUBLISHED
    assert "steps" not in recipe.to_dict()


def test_a_recipe_says_every_later_field_that_is_not_the_default():
    assert Recipe(epochs=None, ema_decay=None).to_dict() == Recipe().to_dict()
    assert Recipe(dropout=0.0, ema_decay=0.0).to_dict() == Recipe().to_dict() | {
        "dropout": 0.0,
        "ema_decay": 0.0,
    }


@pytest.mark.sweep
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_published_recipe_resumes_bit_for_bit(tmp_path, stop, every):
    recipe = replace(RECIPE, **PUBLISHED)
    whole = hash_model(train_tiny(recipe).module)
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": every}
    with pytest.raises(StopError):
        train_tiny(recipe, progress=stop_after(stop), **options)
    assert hash_model(train_tiny(recipe, **options).module) == whole


@pytest.mark.parametrize("size, batch_size", [(10, 4), (10, 5), (3, 7), (1, 1)])
def test_partial_batches_keep_what_is_left(size, batch_size):
    recipe = Recipe(batch_size=batch_size, seed=1, epochs=3, partial_batches=True)
    per_epoch = math.ceil(size / batch_size)
    assert recipe.num_steps(size) == 3 * per_epoch
    orders = []
    for epoch in range(3):
        batches = [batch_indices(epoch * per_epoch + i, size, recipe) for i in range(per_epoch)]
        sizes = [len(batch) for batch in batches]
        assert (
            sizes == [batch_size] * (size // batch_size) + [size % batch_size][: size % batch_size]
        )
        orders.append(torch.cat(batches).tolist())
        assert sorted(orders[-1]) == list(range(size))
    if size == 10:
        assert orders[0] != orders[1] != orders[2]


def test_epochs_without_partial_batches():
    assert Recipe(epochs=3, batch_size=4).num_steps(10) == 8
    assert Recipe(steps=17, batch_size=4).num_steps(10) == 17


def test_flips_mirror_about_half_of_the_images(monkeypatch):
    model = tiny_model()
    clean = []
    add_noise = model.process.scheduler.add_noise

    def spy(batch, noise, steps):
        clean.append(batch)
        return add_noise(batch, noise, steps)

    monkeypatch.setattr(model.process.scheduler, "add_noise", spy)
    recipe = replace(RECIPE, steps=20, flip=True, batch_size=10)
    train_tiny(recipe, model=model)
    mirrored = []
    for step, batch in enumerate(clean):
        for image, index in zip(batch, batch_indices(step, len(IMAGES), recipe), strict=True):
            original = IMAGES[index]
            mirror = torch.from_numpy(original.numpy()[..., ::-1].copy())
            assert torch.equal(image, original) or torch.equal(image, mirror)
            mirrored.append(torch.equal(image, mirror))
    assert scipy.stats.binomtest(sum(mirrored), len(mirrored)).pvalue > 1e-3
    # every image has a coin of its own
    rows = torch.tensor(mirrored).reshape(20, 10)
    assert (rows.sum(1) % 10 != 0).sum() > 15


def test_dropout_is_set_while_training_and_only_then():
    """As in the published models: in the residual blocks, not in attention."""
    seen = {}
    model = tiny_model(down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",))
    layers = {n: m for n, m in model.module.named_modules() if isinstance(m, torch.nn.Dropout)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, *_, name=name: seen.update({name: m.p}))
    train_tiny(replace(RECIPE, dropout=0.3), model=model)
    assert seen.keys() == layers.keys()
    assert any("attentions." in name for name in seen)
    for name, p in seen.items():
        assert p == (0.0 if "attentions." in name else 0.3), name
    assert all(layer.p == 0.0 for layer in layers.values())


def test_published_dropout_counts():
    for name, count in (("cifar2", 22), ("celeba", 32)):
        with torch.device("meta"):
            unet = get_preset(name).make_model().module
        layers = [m for m in unet.modules() if isinstance(m, torch.nn.Dropout)]
        with dropout_of(unet, 0.1, lambda name: "attentions." not in name):
            assert sum(layer.p == 0.1 for layer in layers) == count
        assert all(layer.p == 0.0 for layer in layers)


def test_dropout_comes_back_after_an_error():
    model = poison(tiny_model(dropout=0.5), 2)
    with pytest.raises(ValueError, match="at step 2 of 7"):
        train_tiny(replace(RECIPE, dropout=0.1), model=model)
    dropouts = [m.p for m in model.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(dropouts) == {0.5}


def test_learning_rate_from_zero_is_that_of_diffusers():
    from diffusers.optimization import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    steps = 47
    schedule = get_scheduler(
        "cosine", optimiser, num_warmup_steps=math.ceil(0.1 * steps), num_training_steps=steps
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    ours = [learning_rate_factor(step, steps, from_zero=True) for step in range(steps)]
    assert rates[0] == ours[0] == 0
    assert relative_error(torch.tensor(ours), torch.tensor(rates).double()) < 1e-6


def test_averaged_weights():
    """The moving average in float64, with the decay's published course."""
    recipe = replace(RECIPE, ema_decay=0.5)
    snapshots = []

    def note(done, total):
        snapshots.append(model.module.conv_in.weight.detach().double().clone())

    model = tiny_model()
    average = model.module.conv_in.weight.detach().double().clone()
    kept = {}
    train(
        model,
        IMAGES,
        recipe,
        progress=note,
        keep_at={3, 7},
        keep=lambda step: kept.update({step: model.module.conv_in.weight.detach().clone()}),
    )
    for step, weights in enumerate(snapshots):
        # the first step has decay 0; then 1 - (1 + n) ** -3/4, at most the largest
        decay = 0.0 if step == 0 else min(0.5, 1 - (1 + step) ** -0.75)
        average = decay * average + (1 - decay) * weights
        if step + 1 in kept:
            assert relative_error(kept[step + 1], average) < 1e-6
    assert kept.keys() == {3, 7}
    assert relative_error(model.module.conv_in.weight, average) < 1e-6
    assert relative_error(average, snapshots[-1]) > 1e-4


def test_kept_models_are_those_of_their_step():
    kept = {}
    model = tiny_model()
    train(
        model,
        IMAGES,
        RECIPE,
        keep_at=[2, 7],
        keep=lambda step: kept.update({step: hash_model(model.module)}),
    )
    other = tiny_model()
    with pytest.raises(StopError):
        train_tiny(model=other, progress=stop_after(2))
    assert kept == {2: hash_model(other.module), 7: hash_model(model.module)}


class Alone:
    """One of several processes, run here one at a time; their gradients are averaged by hand."""

    scaler, mixed_precision, device = None, "no", torch.device("cpu")

    def __init__(self, rank, world, gradients):
        self.process_index, self.num_processes, self.gradients = rank, world, gradients
        self.is_main_process = rank == 0

    def prepare(self, *objects):
        return objects

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, norm):
        self.gradients.append([p.grad.double().clone() for p in parameters])
        raise StopError

    def unwrap_model(self, model, **options):
        return model


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_a_batch(world):
    """The mean of their gradients is the gradient of the whole batch, in unequal shares too."""
    recipe = replace(RECIPE, flip=True)
    gradients = []
    for rank in range(world):
        with pytest.raises(StopError):
            train_tiny(recipe, accelerator=Alone(rank, world, gradients))
    whole = []
    with pytest.raises(StopError):
        train_tiny(recipe, accelerator=Alone(0, 1, whole))
    mean = [sum(parts) / world for parts in zip(*gradients, strict=True)]
    flat = [torch.cat([g.flatten() for g in gs]) for gs in (mean, whole[0])]
    assert relative_error(*flat) < 1e-5
    shares = [g[0].norm().item() for g in gradients]
    assert sum(share == 0 for share in shares) == max(0, world - RECIPE.batch_size)


@pytest.fixture
def accelerate():
    """Accelerators made in one process share their state."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(True)


def test_accelerate_in_full_precision_changes_no_bit(tmp_path, unbroken, accelerate):
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": 2}
    with pytest.raises(StopError):
        train_tiny(accelerator=accelerate(), progress=stop_after(5), **options)
    model = train_tiny(accelerator=accelerate(), **options)
    assert hash_model(model.module) == unbroken


def test_mixed_precision(tmp_path, unbroken, accelerate):
    """bfloat16 layers, float32 weights; near the full training and never taken for it."""
    dtypes = []
    model = tiny_model()
    model.module.conv_out.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": 2}
    bfloat = accelerate(mixed_precision="bf16")
    trained = train_tiny(model=model, accelerator=bfloat, **options)
    assert set(dtypes) == {torch.bfloat16}
    full, start = train_tiny(), tiny_model()
    weights, target, before = (
        torch.cat([p.detach().flatten() for p in m.module.parameters()])
        for m in (trained, full, start)
    )
    assert weights.dtype == torch.float32
    assert 1e-6 < relative_error(weights - before, target - before) < 0.3
    # the model is handed back as it was: float32 in, float32 out
    output = trained.module(IMAGES[:1], 5).sample
    assert output.dtype == torch.float32
    assert dtypes.pop() == torch.float32
    with pytest.raises(ValueError, match=r"differs in mixed precision \(bf16 there, None here\)"):
        train_tiny(**options)


@pytest.fixture
def interrupted(tmp_path):
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(StopError):
        train_tiny(progress=stop_after(3), checkpoint=checkpoint, checkpoint_every=1)
    return checkpoint


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"recipe": replace(RECIPE, flip=True)},
            r"differs in flip \(None there, True here\): delete",
        ),
        (
            {"recipe": replace(RECIPE, steps=9, learning_rate=1e-3)},
            r"differs in steps \(7 there, 9 here\), learning_rate \(0.004 there, 0.001 here\): del",
        ),
        ({"images": IMAGES.flip(0)}, "differs in images: delete it"),
        ({"model": tiny_model(1)}, "differs in initial weights: delete it"),
        (
            {"model": tiny_model(scheduler=DDPMScheduler(beta_end=0.1))},
            "differs in noise schedule: delete it",
        ),
        (
            {"model": tiny_model(scheduler=DDPMScheduler(prediction_type="sample"))},
            "differs in noise schedule: delete it",
        ),
        ({"model": tiny_model(layers_per_block=2)}, "differs in initial weights: delete it"),
    ],
)
def test_checkpoint_of_another_training_is_refused_and_kept(interrupted, change, message):
    content = interrupted.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint .*training.pt is of another.*" + message):
        train_tiny(checkpoint=interrupted, **change)
    assert interrupted.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-500], lambda b: b[:10], lambda b: b"", lambda b: b"no checkpoint at all"],
)
def test_damaged_checkpoint_is_refused(interrupted, damage):
    interrupted.write_bytes(damage(interrupted.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint .*training.pt is damaged.*delete it"):
        train_tiny(checkpoint=interrupted)


def test_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match=r"is damaged, or not of this version"):
        train_tiny(checkpoint=tmp_path / "training.pt")


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    save_atomically({"step": 1}, path)

    class Unpicklable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomically({"step": torch.zeros(1000), "x": Unpicklable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


# slow: 150 steps; test_kinds.py has losses that go down in the fast lane
@pytest.mark.full
def test_loss_goes_down():
    """One image to learn by heart: the denoising loss on fresh noise must fall far below 1."""
    images = IMAGES[:1].sign().expand(4, -1, -1, -1)
    noise = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.arange(256) * 999 // 255
    model = tiny_model()

    def loss():
        noisy = model.process.scheduler.add_noise(images[:1].expand_as(noise), noise, timesteps)
        with torch.no_grad():
            return (model.module(noisy, timesteps).sample - noise).square().mean().item()

    before = loss()
    train(model, images, Recipe(steps=150, batch_size=32, learning_rate=1e-2))
    assert before > 0.9
    assert loss() < 0.35 * before


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_trains_on_what_the_scheduler_predicts(monkeypatch, kind):
    """Loss, inputs and targets of every step against float64 formulas on the spied tensors."""
    model = tiny_model(
        scheduler=DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    )
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    clean, inputs, losses = [], [], []
    add_noise = model.process.scheduler.add_noise
    mse_loss = torch.nn.functional.mse_loss

    def spy_noise(batch, noise, timesteps):
        clean.append((batch, noise, timesteps))
        return add_noise(batch, noise, timesteps)

    def spy_loss(prediction, target):
        losses.append((prediction.detach(), target))
        return mse_loss(prediction, target)

    monkeypatch.setattr(model.process.scheduler, "add_noise", spy_noise)
    monkeypatch.setattr("dtrak.models.process.F.mse_loss", spy_loss)
    model.module.register_forward_pre_hook(lambda module, args: inputs.append(args))
    train_tiny(model=model)
    for step, ((batch, noise, timesteps), (noisy, given), (_, target)) in enumerate(
        zip(clean, inputs, losses, strict=True)
    ):
        assert torch.equal(batch, IMAGES[batch_indices(step, len(IMAGES), RECIPE)])
        assert torch.equal(given, timesteps)
        bar = torch.from_numpy(bars[timesteps.numpy()])[:, None, None, None]
        x, e = batch.double(), noise.double()
        assert relative_error(noisy, bar.sqrt() * x + (1 - bar).sqrt() * e) < 1e-6
        oracle = {
            "epsilon": e,
            "sample": x,
            "v_prediction": bar.sqrt() * e - (1 - bar).sqrt() * x,
        }[kind]
        assert relative_error(target, oracle) < 1e-6


def test_noise_and_timesteps_are_fresh_at_every_step(monkeypatch):
    model = tiny_model()
    noises, timesteps = [], []
    add_noise = model.process.scheduler.add_noise

    def spy(batch, noise, steps):
        noises.append(noise)
        timesteps.append(steps)
        return add_noise(batch, noise, steps)

    monkeypatch.setattr(model.process.scheduler, "add_noise", spy)
    train_tiny(replace(RECIPE, steps=20, batch_size=32), model=model)
    noise, steps = torch.stack(noises).double(), torch.cat(timesteps).double()
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(steps.numpy(), "randint", args=(0, 1000)).pvalue > 1e-3
    correlations = torch.corrcoef(noise.flatten(1)) - torch.eye(20)
    assert correlations.abs().max() < 5 / math.sqrt(noise[0].numel())


def test_first_steps_match_adamw_by_hand():
    """Two steps of AdamW in float64 numpy from the gradients it was given."""
    recipe = replace(RECIPE, steps=2, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.05)
    model = tiny_model()
    name = "conv_in.weight"
    parameter = model.module.get_parameter(name)
    start = parameter.detach().double().numpy().copy()
    values = []
    model.module.register_forward_pre_hook(
        lambda *_: values.append(parameter.detach().double().numpy().copy())
    )
    accumulated = {}

    def keep(key):
        def hook(p):
            accumulated.setdefault(key, []).append(p.grad.double().clone())

        return hook

    for key, p in model.module.named_parameters():
        p.register_post_accumulate_grad_hook(keep(key))
    train_tiny(recipe, model=model)
    values.append(parameter.detach().double().numpy())
    w, m, v = start, 0.0, 0.0
    # a tenth of two steps, rounded up, warms up: factors 1 and 1
    for step, rate in ((1, 1e-2), (2, 1e-2)):
        raw = {key: grads[step - 1] for key, grads in accumulated.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in raw.values()))
        assert norm > 0.05
        g = raw[name].numpy() * 0.05 / norm
        m = 0.95 * m + 0.05 * g
        v = 0.999 * v + 0.001 * g**2
        w = w * (1 - rate * 0.1)
        w = w - rate * (m / (1 - 0.95**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        moved = torch.from_numpy(values[step] - start)
        assert relative_error(moved, torch.from_numpy(w - start)) < 1e-4


@pytest.mark.parametrize("size, batch_size", [(10, 4), (10, 10), (3, 7), (1, 2), (7, 7)])
def test_epochs_are_permutations(size, batch_size):
    recipe = Recipe(batch_size=batch_size, seed=1)
    epochs = 6
    steps = epochs * size // math.gcd(size, batch_size)
    stream = torch.cat([batch_indices(step, size, recipe) for step in range(steps)])
    assert len(stream) == steps * batch_size
    orders = stream[: epochs * size].reshape(epochs, size)
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size >= 7:
        assert len({tuple(order.tolist()) for order in orders}) == epochs


def test_order_depends_on_the_seed():
    orders = {tuple(batch_indices(0, 50, Recipe(seed=s)).tolist()) for s in (0, 1, 2**31, -1)}
    assert len(orders) == 4


def test_learning_rate_factor():
    factors = [learning_rate_factor(step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    oracle = 0.5 + 0.5 * np.cos(np.pi * np.arange(18) / 18)
    assert relative_error(torch.tensor(factors[2:]).double(), torch.from_numpy(oracle)) < 1e-6
    assert 0 < factors[-1] < 0.01
    assert learning_rate_factor(0, 1) == 1.0
    assert learning_rate_factor(119, 1200) == 1.0
    assert learning_rate_factor(660, 1200) == pytest.approx(0.5)


def test_learning_rate_follows_the_factor(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train_tiny(replace(RECIPE, steps=12))
    assert rates == [RECIPE.learning_rate * learning_rate_factor(s, 12) for s in range(12)]


def poison(model, call):
    """NaN comes out of the ``call``-th forward pass, counted from 1."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == call:
            output.sample = output.sample * float("nan")
        return output

    model.module.register_forward_hook(hook)
    return model


def test_loss_that_is_not_finite_names_the_step():
    model = poison(tiny_model(), 5)
    with pytest.raises(
        ValueError, match=r"must stay finite, got nan .* at step 5 of 7: try .*0.004"
    ):
        train_tiny(model=model)
    # what was trained before is left as it was
    assert all(p.isfinite().all() for p in model.module.parameters())
    assert not model.module.training


def test_gradient_that_is_not_finite_names_the_step():
    model = tiny_model()
    with torch.no_grad():
        model.module.conv_out.weight.fill_(1e15)
    # the squared error fits float32, the squared gradient does not
    with pytest.raises(ValueError, match=r"got \d.*e\+3\d with gradient norm inf at step 1 of 7"):
        train_tiny(model=model)


def test_failed_step_is_not_checkpointed(tmp_path, unbroken):
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": 1}
    with pytest.raises(ValueError, match="at step 4 of 7"):
        train_tiny(model=poison(tiny_model(), 4), **options)
    assert hash_model(train_tiny(**options).module) == unbroken


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_images_that_are_not_finite_are_refused(bad):
    images = IMAGES.clone()
    images[7, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity"):
        train_tiny(images=images)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="images must hold at least one image to train on, got 0"):
        train_tiny(images=IMAGES[:0])


def test_trained_model_is_ready_to_use(tmp_path, unbroken):
    model = tiny_model()
    assert train_tiny(model=model) is model
    assert not model.module.training
    assert all(p.grad is None for p in model.module.parameters())
    model.save(tmp_path)
    assert hash_model(load(tmp_path).module) == unbroken


@pytest.mark.gpu
def test_resumes_bit_for_bit_on_a_gpu(tmp_path):
    def model():
        fresh = tiny_model(dropout=0.1)
        fresh.module.cuda()
        return fresh

    state = torch.cuda.get_rng_state()
    options = {"checkpoint": tmp_path / "training.pt", "checkpoint_every": 2}
    whole = hash_model(train_tiny(model=model()).module)
    with pytest.raises(StopError):
        train_tiny(model=model(), progress=stop_after(5), **options)
    assert hash_model(train_tiny(model=model(), **options).module) == whole
    assert torch.equal(torch.cuda.get_rng_state(), state)
