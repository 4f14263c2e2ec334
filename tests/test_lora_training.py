"""The adapter's training: the published step, resumed bit for bit, alone in changing."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from numerics import relative_error
from tiny_stable_diffusion import load_tiny

from dtrak.data.rows import InMemory
from dtrak.data.samples import Samples
from dtrak.models import load
from dtrak.models.lora import hash_base, hash_lora, lora_weights
from dtrak.training import trainer as training
from dtrak.training.trainer import Recipe, Trainer, batch_indices

CAPTIONS = ["a", "b c", "", "long ago", "d"]
RECIPE = Recipe(
    steps=6,
    batch_size=3,
    learning_rate=1e-2,
    betas=(0.9, 0.999),
    flip=True,
    dropout=0.3,
    seed=4,
    caption_dropout=0.1,
)


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture(scope="module")
def posteriors():
    generator = torch.Generator().manual_seed(2)
    return torch.rand(5, 2, 2, 4, 8, 8, generator=generator)


def samples(posteriors, captions=CAPTIONS):
    """Pictures that nobody looks at, with posteriors in their place."""
    count = len(posteriors)
    data = Samples(torch.zeros(count, 3, 16, 16), [str(n) for n in range(count)], None, "pictures")
    return data.conditioned(captions).encoded(InMemory(posteriors))


def train(model, posteriors, recipe=RECIPE, **options):
    return training.train(model, samples(posteriors), recipe, **options)


def interrupted(at):
    def progress(done, total):
        if done == at:
            raise KeyboardInterrupt

    return progress


def test_only_the_adapter_changes(folder, posteriors):
    model = load(folder).put_adapter(2)
    before, state = model.identity(), torch.get_rng_state()
    dropouts = [m.p for m in model.module.modules() if isinstance(m, torch.nn.Dropout)]
    train(model, posteriors)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.identity()
    assert [key for key in before if before[key] != after[key]] == ["lora"]
    assert hash_base(model.module) == before["model"]
    assert all(w.any() for w in lora_weights(model.module).values())
    assert not any(m.training for m in model.module.modules())
    assert [m.p for m in model.module.modules() if isinstance(m, torch.nn.Dropout)] == dropouts
    assert all(p.grad is None for p in model.module.parameters())


# slow: it learns; of a step the next ones show everything
@pytest.mark.full
def test_it_learns_what_the_captions_say(folder):
    """Two constant latents, told apart by their captions alone."""
    model = load_tiny(folder, rank=8)
    posteriors = torch.zeros(2, 2, 2, 4, 8, 8)
    posteriors[0, :, 0], posteriors[1, :, 0] = 1.5, -1.5
    recipe = Recipe(steps=60, batch_size=16, learning_rate=2e-2, betas=(0.9, 0.999))
    training.train(model, samples(posteriors, ["a", "b c"]), recipe)
    clean = posteriors[:, 0, 0]
    generator = torch.Generator().manual_seed(0)
    noise, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([800, 800])
    noisy = model.process.scheduler.add_noise(clean, noise, t)
    losses = {}
    with torch.no_grad():
        for name, texts in (("right", ["a", "b c"]), ("wrong", ["b c", "a"])):
            text = model.embed(texts, torch.device("cpu"))
            u = model.module(noisy, t, encoder_hidden_states=text).sample
            losses[name] = float((u - noise).square().mean())
    assert losses["right"] < losses["wrong"]


def expected_step(folder, posteriors, seen):
    """The first step, written out, given what the training drew."""
    model = load_tiny(folder)
    bars = model.process.scheduler.alphas_cumprod
    alpha = bars[seen["timesteps"]][:, None, None, None]
    noisy = alpha.sqrt() * seen["latents"] + (1 - alpha).sqrt() * seen["noise"]
    text = model.embed(seen["texts"], torch.device("cpu"))
    u = model.module(noisy, seen["timesteps"], encoder_hidden_states=text).sample
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-6)
    (u - seen["noise"]).square().mean().backward()
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    for parameter in parameters:
        parameter.grad /= max(float(norm), 1.0)
    optimiser.step()
    return model


def test_a_step_is_the_published_one(folder, posteriors, monkeypatch):
    seen, draw = {}, Trainer.draw

    def spy(self, *arguments):
        latents, timesteps, noise, texts = draw(self, *arguments)
        seen.update(latents=latents, timesteps=timesteps, noise=noise, texts=texts)
        return latents, timesteps, noise, texts

    monkeypatch.setattr(Trainer, "draw", spy)
    recipe = replace(RECIPE, steps=1, dropout=None)
    trained = train(load_tiny(folder), posteriors, recipe)
    expected = expected_step(folder, posteriors, seen)
    start = torch.cat([w.flatten() for w in lora_weights(load_tiny(folder).module).values()])
    moved, wanted = (
        torch.cat([w.flatten() for w in lora_weights(m.module).values()]) - start
        for m in (trained, expected)
    )
    assert relative_error(moved, wanted) < 1e-3


def test_what_a_step_draws(folder):
    """Posterior samples, flips, timesteps and dropped captions have the right frequencies."""
    model = load_tiny(folder)
    posteriors = torch.empty(5, 2, 2, 4, 8, 8)
    # the mean says which image and which way round, the deviation too
    ways = torch.arange(10.0).reshape(5, 2)[..., None, None, None]
    posteriors[:, :, 0], posteriors[:, :, 1] = 100 * ways, 1 + ways
    recipe = replace(RECIPE, batch_size=500)
    trainer, data = Trainer(model, recipe, None), samples(posteriors)
    latents, timesteps, noise, texts = trainer.draw(data, 7)
    chosen = batch_indices(7, 5, recipe)
    way = (latents.mean((1, 2, 3)) / 100).round()
    assert torch.equal((way // 2).long(), chosen)
    # of 500 draws a frequency is good to four standard errors
    error = 4 / 500**0.5
    assert abs(float((way % 2).mean()) - 0.5) < 0.5 * error
    spread = (latents - 100 * way[:, None, None, None]) / (1 + way)[:, None, None, None]
    assert abs(float(spread.std()) - 1) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    pair = torch.stack([spread.flatten(), noise.flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.02
    # one caption of five is empty anyway
    kept = [text for text, i in zip(texts, chosen.tolist(), strict=True) if CAPTIONS[i]]
    dropped = sum(not text for text in kept) / len(kept)
    assert abs(dropped - 0.1) < 0.3 * error
    assert {t for t in kept if t} == {c for c in CAPTIONS if c}
    assert abs(float(timesteps.double().mean()) / 999 - 0.5) < 0.29 * error
    assert 0 <= int(timesteps.min()) < 20
    assert 980 < int(timesteps.max()) < 1000
    again = trainer.draw(data, 7)
    assert torch.equal(again[0], latents)
    assert not torch.equal(trainer.draw(data, 8)[2], noise)


def test_resumes_with_the_same_bits(folder, posteriors, tmp_path):
    whole = train(load_tiny(folder), posteriors)
    for accelerator in (None, Accelerator(cpu=True)):
        file = tmp_path / f"{accelerator is None}.pt"
        options = {"checkpoint": file, "checkpoint_every": 2, "accelerator": accelerator}
        with pytest.raises(KeyboardInterrupt):
            train(load_tiny(folder), posteriors, progress=interrupted(5), **options)
        seen = []
        resumed = train(
            load_tiny(folder), posteriors, progress=lambda d, t, s=seen: s.append(d), **options
        )
        assert seen == [5, 6]
        assert hash_lora(resumed.module) == hash_lora(whole.module)
        # the frozen base is not in it
        assert file.stat().st_size < 4 * sum(p.numel() for p in whole.module.parameters())


def test_seeds_dropout_and_flips_decide(folder, posteriors):
    base = hash_lora(train(load_tiny(folder), posteriors).module)
    for changes in ({"seed": 5}, {"dropout": None}, {"flip": False}, {"caption_dropout": 1.0}):
        other = train(load_tiny(folder), posteriors, replace(RECIPE, **changes))
        assert hash_lora(other.module) != base, changes


def test_mixed_precision(folder, posteriors):
    exact = train(load_tiny(folder), posteriors, replace(RECIPE, dropout=None))
    # the state of accelerate is shared by all of a process
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        mixed = train(
            load_tiny(folder),
            posteriors,
            replace(RECIPE, dropout=None),
            accelerator=accelerator,
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    weights = lora_weights(mixed.module)
    assert {p.dtype for p in mixed.module.parameters()} == {torch.float32}
    error = max(relative_error(weights[n], w) for n, w in lora_weights(exact.module).items())
    assert 0 < error < 0.3
    # the forward is itself again
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 12)
    with torch.no_grad():
        assert mixed.module(x, t, encoder_hidden_states=text).sample.dtype == torch.float32


def test_models_on_the_way_are_kept(folder, posteriors):
    kept = {}
    model = load_tiny(folder)

    def keep(step):
        kept[step] = hash_lora(model.module)

    train(model, posteriors, keep_at=[2, 6], keep=keep)
    assert list(kept) == [2, 6]
    assert kept[6] == hash_lora(model.module) != kept[2]


# slow: trainings; test_training.py refuses them, by the same code
@pytest.mark.full
def test_a_checkpoint_of_another_training_is_refused(folder, posteriors, tmp_path):
    options = {"checkpoint": tmp_path / "state.pt", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(load_tiny(folder), posteriors, progress=interrupted(3), **options)
    others = samples(posteriors, [*CAPTIONS[:-1], "c"])
    with pytest.raises(ValueError, match=r"differs in .*captions"):
        training.train(load_tiny(folder), others, RECIPE, **options)
    with pytest.raises(ValueError, match="differs in initial weights"):
        train(load_tiny(folder, seed=3), posteriors, **options)
    with pytest.raises(ValueError, match="differs in latents"):
        train(load_tiny(folder), posteriors + 1, **options)
    with pytest.raises(ValueError, match=r"differs in learning_rate \(0.01 there, 0.5 here\)"):
        train(load_tiny(folder), posteriors, replace(RECIPE, learning_rate=0.5), **options)
    (tmp_path / "state.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        train(load_tiny(folder), posteriors, **options)


def test_what_cannot_be_trained_is_refused(folder, posteriors):
    model = load_tiny(folder)
    with pytest.raises(ValueError, match=r"\[N, 2, 2, 4, 8, 8\], .* got \[5, 2, 4, 8, 8\]"):
        train(model, posteriors[:, 0])
    # the modes alone are something to train on, but not mirrored
    with pytest.raises(ValueError, match=r"without flips, \[N, 4, 8, 8\], got \[5, 4, 8, 8\]"):
        train(model, posteriors[:, 0, 0])
    train(model, posteriors[:, 0, 0], replace(RECIPE, flip=False, steps=1))
    with pytest.raises(ValueError, match="images must be finite"):
        train(model, posteriors * float("inf"))
    with pytest.raises(ValueError, match="data must have captions for a model that reads them"):
        training.train(model, samples(posteriors).conditioned(None), RECIPE)
    with torch.no_grad():
        next(p for p in model.module.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"must stay finite, got nan .* at step 1 of 6"):
        train(model, posteriors)
