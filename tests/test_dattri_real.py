"""The dattri library, unmodified, on our projector: skipped where it is not installed."""

import pytest
import torch
from numerics import relative_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrak_kernels import dattri as adapter
from dtrak_kernels.dattri import DattriProjector
from dtrak_kernels.dense import reference

pytest.importorskip("dattri", reason="dattri is not installed: pip install dattri")
from dattri.algorithm.logra import LoGraAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.func import projection
from dattri.task import AttributionTask

N, M, K, SEED = 40, 6, 24, 3
MATRICES = {"rademacher": reference.rademacher_matrix, "normal": reference.normal_matrix}
each_kind = pytest.mark.parametrize("kind", MATRICES)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """dattri as it was, after each test."""
    for name in ("BasicProjector", "CudaProjector"):
        monkeypatch.setattr(projection, name, getattr(projection, name))


class MatrixProjector(projection.AbstractProjector):
    """An oracle: the matrix of the specification, stored, in float64."""

    def __init__(self, feature_dim, proj_dim, seed, proj_type, device, **ignored):
        super().__init__(feature_dim, proj_dim, seed, proj_type, device)

    def project(self, features, ensemble_id):
        if self.proj_type.value == "identity":
            return features
        seed = self.seed + (ensemble_id << 32)
        matrix = MATRICES[self.proj_type.value](self.feature_dim, self.proj_dim, seed).double()
        return (features.double() @ matrix / self.proj_dim**0.5).to(features.dtype)

    def free_memory(self):
        pass


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def problem():
    """Two checkpoints of a trained network, its training data, and queries."""
    x, y = gaussian(N, 8), torch.arange(N) % 3
    x += gaussian(3, 8, seed=1)[y]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    checkpoints = []
    for _ in range(2):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        checkpoints.append({name: value.clone() for name, value in model.state_dict().items()})
    return checkpoints, (x, y), (gaussian(M, 8, seed=2), torch.arange(M) % 3)


def loaders(problem):
    """Of training data and queries, in uneven batches."""
    _, train, query = problem
    return (
        DataLoader(TensorDataset(*train), batch_size=17),
        DataLoader(TensorDataset(*query), batch_size=M),
    )


def task_of(problem):
    model = small_model()

    def loss(parameters, sample):
        x, y = sample
        logits = torch.func.functional_call(model, parameters, x[None])
        return nn.functional.cross_entropy(logits, y[None])

    return AttributionTask(loss, model, problem[0]), model


def options(kind):
    return {
        "proj_dim": K,
        "proj_max_batch_size": 32,
        "proj_seed": SEED,
        "proj_type": kind,
        "device": "cpu",
    }


def trak_scores(problem, kind):
    task, model = task_of(problem)

    def probability(parameters, sample):
        x, y = sample
        logits = torch.func.functional_call(model, parameters, x[None])
        return torch.exp(-nn.functional.cross_entropy(logits, y[None]))

    attributor = TRAKAttributor(
        task, probability, projector_kwargs=options(kind), regularization=0.01
    )
    train, query = loaders(problem)
    attributor.cache(train)
    return attributor.attribute(query)


def true_gradients(checkpoint, x, y):
    """``[B, P]`` float64, one backward per sample, and the probability of the labels."""
    model = small_model().double()
    model.load_state_dict(checkpoint)
    rows = []
    for sample, label in zip(x.double(), y, strict=True):
        loss = nn.functional.cross_entropy(model(sample[None]), label[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    probabilities = model(x.double()).softmax(1).detach()[torch.arange(len(x)), y]
    return torch.stack(rows), probabilities


@each_kind
def test_trak_attributor_end_to_end(kind, problem):
    adapter.install()
    scores = trak_scores(problem, kind)
    checkpoints, train, query = problem
    expected, weights = 0.0, 0.0
    for member, checkpoint in enumerate(checkpoints):
        gradients, probabilities = true_gradients(checkpoint, *train)
        P = gradients.shape[1]
        matrix = MATRICES[kind](P, K, SEED + (member << 32)).double() / (P * K) ** 0.5
        phi, psi = gradients @ matrix, true_gradients(checkpoint, *query)[0] @ matrix
        inverse = torch.linalg.inv(phi.T @ phi + 0.01 * torch.eye(K, dtype=torch.float64))
        expected = expected + phi @ inverse @ psi.T / 2
        weights = weights + (1 - probabilities) / 2
    assert relative_error(scores, expected * weights[:, None]) < 1e-4


@each_kind
def test_tracin_attributor_end_to_end(kind, problem):
    adapter.install()
    task, _ = task_of(problem)
    attributor = TracInAttributor(task, torch.ones(2), False, projector_kwargs=options(kind))
    scores = attributor.attribute(*loaders(problem))
    checkpoints, train, query = problem
    expected = 0.0
    for member, checkpoint in enumerate(checkpoints):
        gradients, queries = (true_gradients(checkpoint, *x)[0] for x in (train, query))
        matrix = MATRICES[kind](gradients.shape[1], K, SEED + (member << 32)).double()
        expected = expected + (gradients @ matrix) @ (queries @ matrix).T / K
    assert relative_error(scores, expected) < 1e-5


class TokenMean(nn.Module):
    """Of logits per token."""

    def forward(self, x):
        return x.mean(-2)


def logra_scores():
    """A model of sequences: LoGra probes it with a single sample."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(small_model(), TokenMean())

    def loss(model, batch, device):
        x, y = (part.to(device) for part in batch)
        return nn.functional.cross_entropy(model(x), y)

    task = AttributionTask(loss, model, model.state_dict())
    attributor = LoGraAttributor(task, hessian="Identity", proj_dim=16)
    train, query = (
        DataLoader(TensorDataset(gaussian(n, 5, 8, seed=n), torch.arange(n) % 3), batch_size=17)
        for n in (N, M)
    )
    attributor.cache(train)
    return attributor.attribute(train, query)


def test_logra_mixes_our_kinds_with_dattri_s(monkeypatch):
    """Factors go through normal matrices of ours, its second stage through its identity."""
    used = []

    class Watched(DattriProjector):
        def project(self, features, ensemble_id):
            used.append(self.kind)
            return super().project(features, ensemble_id)

    monkeypatch.setattr(adapter, "DattriProjector", Watched)
    adapter.install()
    scores = logra_scores()
    assert set(used) == {"normal"}
    projection.BasicProjector = MatrixProjector
    assert relative_error(scores, logra_scores()) < 1e-5


@pytest.mark.parametrize("given", ["tensor", "dict"])
@each_kind
def test_random_project_gives_the_specified_matrix(given, kind):
    adapter.install()
    grads = {"a": gaussian(5, 10, 7), "b": gaussian(5, 9, seed=1)}
    flat = torch.cat([x.flatten(1) for x in grads.values()], dim=1)
    features = grads if given == "dict" else flat
    project = projection.random_project(features, 5, K, 32, SEED, kind, device="cpu")
    expected = flat.double() @ MATRICES[kind](79, K, SEED + (2 << 32)).double() / K**0.5
    assert relative_error(project(features, ensemble_id=2), expected) < 1e-6


def test_other_kinds_stay_dattri_s():
    grads = gaussian(4, 90)
    before = {
        kind: projection.random_project(grads, 4, 8, 32, SEED, kind)(grads)
        for kind in ("random_mask", "identity")
    }
    adapter.install()
    for kind, expected in before.items():
        assert torch.equal(projection.random_project(grads, 4, 8, 32, SEED, kind)(grads), expected)


def test_chunks_of_a_large_model_use_our_projector():
    """What dattri does on a GPU beyond its chunk size, with its own class around ours."""
    grads = gaussian(3, 50)
    parts = [DattriProjector(n, K, seed, "normal", "cpu") for n, seed in ((20, 5), (30, 6))]
    chunked = projection.ChunkedCudaProjector(parts, 30, [20, 30], 3, "cpu", torch.float32)
    expected = sum(
        part.double() @ reference.normal_matrix(len(part.T), K, seed) / K**0.5
        for part, seed in zip(grads.split([20, 30], dim=1), (5, 6), strict=True)
    )
    assert relative_error(chunked.project(grads, 0), expected) < 1e-6
    named = {"a": grads[:, :20], "b": grads[:, 20:]}
    assert relative_error(chunked.dict_project(named, 0), expected) < 1e-6


def test_install_twice_is_install_once_and_types_are_dattri_s():
    original = projection.BasicProjector
    adapter.install()
    installed = projection.BasicProjector
    adapter.install()
    assert projection.BasicProjector is installed
    assert issubclass(installed, original)
    made = installed(10, 8, 0, projection.ProjectionType.normal, torch.device("cpu"))
    assert isinstance(made, DattriProjector)
    assert isinstance(made, projection.AbstractProjector)
    other = installed(10, 8, 0, projection.ProjectionType.random_mask, torch.device("cpu"))
    assert type(other) is original
    assert made.proj_type is projection.ProjectionType.normal
