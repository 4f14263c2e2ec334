"""The TRAK library, unmodified, on our projector, our gradient computer and our `fast_jl`."""

import json
import sys

import numpy as np
import pytest
import torch
from numerics import relative_error
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from dtrak_kernels import fast_jl
from dtrak_kernels import trak as adapter
from dtrak_kernels.dense import reference
from dtrak_kernels.fast_jl import reference as reference_fast_jl
from dtrak_kernels.trak import FusedGradientComputer, TritonProjector

trak = pytest.importorskip("trak", reason="traker is not installed")
from trak.gradient_computers import (  # noqa: E402
    AbstractGradientComputer,
    FunctionalGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import (  # noqa: E402
    AbstractModelOutput,
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.projectors import AbstractProjector, ChunkedCudaProjector, CudaProjector  # noqa: E402
from trak.projectors import ProjectionType as TheirType  # noqa: E402

N, M, SEED = 60, 5, 3
# name: what the projector is made with, K, and the oracle's unscaled matrix for (P, K, model_id)
PROJECTORS = {
    "rademacher": (
        {},
        20,
        lambda P, K, i: reference.rademacher_matrix(P, K, SEED + (i << 32)).double(),
    ),
    "normal": ({}, 20, lambda P, K, i: reference.normal_matrix(P, K, SEED + (i << 32))),
    "fast_jl": (
        {"generator": "fast_jl", "num_sms": 4},
        32,
        lambda P, K, i: reference_fast_jl.matrix("rademacher", P, K, SEED + 10_000 * i, 4),
    ),
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.fixture(scope="module")
def problem():
    """A trained network's two checkpoints, and the images it was trained on."""
    images, labels = gaussian(N, 1, 6, 6), torch.arange(N) % 3
    images += 0.5 * gaussian(3, 1, 6, 6, seed=1)[labels]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoints = []
    for _ in range(2):
        for _ in range(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        checkpoints.append({name: value.clone() for name, value in model.state_dict().items()})
    query = gaussian(M, 1, 6, 6, seed=2), torch.arange(M) % 3
    return checkpoints, (images, labels), query


def grad_dim():
    return sum(parameter.numel() for parameter in small_model().parameters())


def projector(name, **changes):
    fields, K, _ = PROJECTORS[name]
    kind = "normal" if name == "normal" else "rademacher"
    arguments = {
        "grad_dim": grad_dim(),
        "proj_dim": K,
        "seed": SEED,
        "proj_type": kind,
        "device": "cpu",
        "max_batch_size": 32,
    }
    return TritonProjector(**(arguments | fields | changes))


def run_traker(problem, folder, **changes):
    """Scores ``[N, M]`` by the library: two checkpoints, uneven batches."""
    checkpoints, train, query = problem
    arguments = {
        "model": small_model(),
        "task": "image_classification",
        "train_set_size": N,
        "save_dir": str(folder),
        "device": "cpu",
        "use_half_precision": False,
        "lambda_reg": 0.5,
        "logging_level": "ERROR",
    }
    traker = trak.TRAKer(**(arguments | changes))
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for rows in (slice(0, 37), slice(37, N)):
            batch = tuple(x[rows] for x in train)
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("q", checkpoint, model_id=model_id, num_targets=M)
        traker.score(batch=query, num_samples=M)
    return torch.as_tensor(np.array(traker.finalize_scores("q")))


def margins(model, images, labels):
    logits = model(images)
    chosen = nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits[chosen] - logits.masked_fill(chosen, -torch.inf).logsumexp(1)


def true_gradients(checkpoint, images, labels, names=None):
    """``[B, P]`` float64, one backward per sample."""
    model = small_model().double()
    model.load_state_dict(checkpoint)
    chosen = [p for name, p in model.named_parameters() if names is None or name in names]
    rows = []
    for image, label in zip(images.double(), labels, strict=True):
        grads = torch.autograd.grad(margins(model, image[None], label[None])[0], chosen)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def true_scores(problem, matrix_of, K):
    """TRAK's definition, with the library's rescaling of the inverse."""
    checkpoints, train, query = problem
    P, scores, weights = grad_dim(), 0.0, 0.0
    for model_id, checkpoint in enumerate(checkpoints):
        matrix = matrix_of(P, K, model_id) / P**0.5
        x = true_gradients(checkpoint, *train) @ matrix
        inverse = torch.linalg.inv(x.T @ x + 0.5 * torch.eye(K, dtype=torch.float64))
        inverse /= inverse.abs().mean()
        scores = scores + x @ inverse @ (true_gradients(checkpoint, *query) @ matrix).T
        model = small_model().double()
        model.load_state_dict(checkpoint)
        probabilities = model(train[0].double()).softmax(1)
        weights = weights + 1 - probabilities[torch.arange(N), train[1]]
    return scores / 2 * (weights / 2)[:, None]


@pytest.mark.sweep
@pytest.mark.parametrize("computer", [FunctionalGradientComputer, FusedGradientComputer])
@pytest.mark.parametrize("name", PROJECTORS)
def test_traker_end_to_end(name, computer, problem, tmp_path):
    _, K, matrix_of = PROJECTORS[name]
    scores = run_traker(problem, tmp_path, projector=projector(name), gradient_computer=computer)
    assert relative_error(scores, true_scores(problem, matrix_of, K)) < 1e-4


def test_traker_reopens_its_folder(problem, tmp_path):
    first = run_traker(problem, tmp_path, projector=projector("rademacher"))
    saved = json.loads((tmp_path / "metadata.json").read_text())
    assert saved["JL matrix type"] == "rademacher"
    again = trak.TRAKer(
        small_model(),
        "image_classification",
        N,
        save_dir=str(tmp_path),
        device="cpu",
        use_half_precision=False,
        projector=projector("rademacher"),
        logging_level="ERROR",
    )
    assert relative_error(torch.as_tensor(np.array(again.finalize_scores("q"))), first) < 1e-6


def test_types_survive_json_and_are_the_library_s():
    for kind in ("rademacher", "normal"):
        made = projector("rademacher", proj_type=kind).proj_type
        assert json.loads(json.dumps(made)) == made
        assert made == getattr(TheirType, kind)
        assert made.value == kind
        assert projector("rademacher", proj_type=getattr(TheirType, kind)).proj_type is made
    assert isinstance(projector("normal"), AbstractProjector)
    assert issubclass(FusedGradientComputer, AbstractGradientComputer)


@pytest.mark.parametrize("name", PROJECTORS)
def test_dict_and_tensor_give_the_same(name, problem, monkeypatch):
    monkeypatch.setattr("dtrak_kernels.adapters.gradients._COLUMNS", 50)
    shapes = {key: value.shape for key, value in small_model().named_parameters()}
    grads = {key: torch.round(9 * gaussian(7, *shape)) for key, shape in shapes.items()}
    flat = torch.cat([value.flatten(1) for value in grads.values()], dim=1)
    made = projector(name)
    expected = flat.double() @ PROJECTORS[name][2](grad_dim(), made.proj_dim, 5)
    for given in (grads, flat):
        before = flat.clone()
        features = made.project(given, model_id=5)
        if name == "normal":
            assert relative_error(features, expected) < 1e-6
        else:
            # unscaled sums of whole numbers are exact
            assert torch.equal(features.double(), expected)
        features += 1
        assert torch.equal(flat, before)
    made.free_memory()
    assert made.project(flat, 5).shape == (7, made.proj_dim)


def test_a_vector_is_one_scalar_parameter():
    made = TritonProjector(3, 16, 0, "rademacher", "cpu")
    grads = {"scale": torch.tensor([1.0, 2.0]), "rest": torch.tensor([[3.0, 4.0], [5.0, 6.0]])}
    expected = made.project(torch.tensor([[1.0, 3.0, 4.0], [2.0, 5.0, 6.0]]), 0)
    assert torch.equal(made.project(grads, 0), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_batch(dtype):
    made = projector("rademacher", proj_dim=77)
    grads = torch.round(4 * gaussian(41, grad_dim())).to(dtype)
    features = made.project(grads, 0)
    assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    matrix = reference.rademacher_matrix(grad_dim(), 77, SEED).double()
    assert torch.equal(features.double(), grads.double() @ matrix)
    assert made.project(grads[:0], 0).shape == (0, 77)


def test_a_dict_may_mix_dtypes():
    made = TritonProjector(5, 16, 0, "rademacher", "cpu")
    grads = {"a": torch.ones(2, 3), "b": 2 * torch.ones(2, 2).double()}
    flat = torch.cat([x.double() for x in grads.values()], dim=1)
    assert torch.equal(made.project(grads, 0), made.project(flat, 0))


def test_every_checkpoint_has_its_own_matrix():
    P = 4000
    grads = gaussian(1, P)
    made = {
        (seed, model_id): TritonProjector(P, 512, seed, "rademacher", "cpu").project(
            grads, model_id
        )
        for seed in (0, 10_000, 100_000)
        for model_id in (0, 1, 10)
    }
    features = torch.cat(list(made.values()))
    correlation = torch.corrcoef(features) - torch.eye(len(features))
    # TRAK's sums of seed and model id repeat here: seed 10,000 of model 0 is seed 0 of model 1
    assert correlation.abs().max() < 5 / 512**0.5


def test_sparse_kind(problem, tmp_path):
    made = TritonProjector(grad_dim(), 256, 0, "sjlt", "cpu", 32)
    deferred = FusedGradientComputer(small_model(), ImageClassificationModelOutput())
    checkpoints, train, _ = problem
    deferred.model.load_state_dict(checkpoints[0])
    fused = made.project(deferred.compute_per_sample_grad(train), 1)
    computer = FunctionalGradientComputer(
        deferred.model, ImageClassificationModelOutput(), grad_dim(), torch.float32, "cpu"
    )
    stored = made.project(computer.compute_per_sample_grad(train), 1)
    assert relative_error(fused, stored) < 1e-5
    with pytest.raises(ValueError, match="grads must be a dict of parameters for kind 'sjlt'"):
        made.project(torch.ones(1, grad_dim()), 0)


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"proj_type": "sparse"}, ValueError, "proj_type must be one of rademacher, normal, sjlt"),
        ({"seed": 2**32}, ValueError, r"seed must be in \[0, 2\*\*32\), got 4294967296"),
        ({"proj_dim": 0}, ValueError, "proj_dim must be at least 1, got 0"),
        (
            {"generator": "fast_jl", "proj_dim": 32},
            ValueError,
            "num_sms must be a positive int or one of",
        ),
        ({"block_size": 100}, TypeError, "block_size"),
    ],
)
def test_projector_refuses(changes, error, match):
    with pytest.raises(error, match=match):
        projector("rademacher", **changes)


@pytest.mark.parametrize(
    "grads, match",
    [
        (torch.ones(2, 9), "grads must have grad_dim = 10 columns, got 9"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 8)}, "grad_dim = 10 columns, got 11"),
        ({}, "grads must hold at least one parameter, got an empty dict"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1, 7)}, r"one batch size, got \[1, 2\]"),
        (torch.zeros(3, 10), r"projected gradients must be .* row 0 all zero \(3 of 3"),
        (
            torch.ones(3, 10).index_put(
                (torch.tensor(1), torch.tensor(4)), torch.tensor(torch.inf)
            ),
            r"projected gradients must be finite .* row 1 not finite \(1 of 3",
        ),
    ],
)
def test_project_refuses(grads, match):
    made = TritonProjector(10, 16, 0, "rademacher", "cpu", 8)
    with pytest.raises(ValueError, match=match):
        made.project(grads, model_id=0)


def test_project_refuses_ids_and_integers():
    made = TritonProjector(10, 16, 0, "rademacher", "cpu", 8)
    with pytest.raises(ValueError, match=r"model_id must be in \[0, 2\*\*31\), got -1"):
        made.project(torch.ones(2, 10), model_id=-1)
    with pytest.raises(TypeError, match=r"grads must be float32.*int64"):
        made.project(torch.ones(2, 10).long(), model_id=0)
    deferred = FusedGradientComputer(nn.Linear(2, 2), None).compute_per_sample_grad([])
    with pytest.raises(ValueError, match="grads must have grad_dim = 10 columns, got 6"):
        made.project(deferred, model_id=0)


# ---- the fused computer and its tasks


class Embedder(nn.Module):
    """Takes keywords, and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)

    def forward(self, *, x, mask=None, gain=1.0, unused=None):
        return {"embedding": torch.tanh(self.body(x)) * mask, "gain": gain}


class EmbedderTask(AbstractModelOutput):
    def __init__(self):
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, x, mask, target):
        answer = functional_call(
            model,
            (weights, buffers),
            (),
            {"x": x[None], "mask": mask[None], "gain": 3.0, "unused": None},
        )
        return answer["gain"] * (answer["embedding"][0] * target).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


def test_keywords_dictionaries_and_constants():
    torch.manual_seed(0)
    model, task = Embedder(), EmbedderTask()
    batch = gaussian(4, 5), gaussian(4, 4).abs(), gaussian(4, 4, seed=1)
    made = TritonProjector(24, 16, 0, "normal", "cpu")
    stored = FunctionalGradientComputer(model, task, 24, torch.float32, "cpu")
    fused = FusedGradientComputer(model, task, 24)
    expected = made.project(stored.compute_per_sample_grad(batch), 0)
    assert relative_error(made.project(fused.compute_per_sample_grad(batch), 0), expected) < 1e-5
    assert torch.equal(fused.compute_loss_grad(batch), torch.ones(4, 1))
    # weights given later are the ones used
    other = Embedder()
    fused.load_model_params(other)
    stored.load_model_params(other)
    stored.model = other
    expected = made.project(stored.compute_per_sample_grad(batch), 0)
    assert relative_error(made.project(fused.compute_per_sample_grad(batch), 0), expected) < 1e-5


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, input_ids, token_type_ids, attention_mask):
        x = self.words(input_ids + token_type_ids) * attention_mask[..., None]
        return self.head(x.mean(1))


def test_the_text_task():
    torch.manual_seed(0)
    model, task = Tokens(), TextClassificationModelOutput()
    batch = (
        torch.arange(12).view(3, 4) % 9,
        torch.zeros(3, 4).long(),
        torch.ones(3, 4).long(),
        torch.tensor([0, 2, 1]),
    )
    P = sum(p.numel() for p in model.parameters())
    made = TritonProjector(P, 64, 0, "rademacher", "cpu")
    stored = FunctionalGradientComputer(model, task, P, torch.float32, "cpu")
    fused = FusedGradientComputer(model, task, P)
    expected = made.project(stored.compute_per_sample_grad(batch), 2)
    assert relative_error(made.project(fused.compute_per_sample_grad(batch), 2), expected) < 1e-5
    assert relative_error(fused.compute_loss_grad(batch), stored.compute_loss_grad(batch)) < 1e-6


def test_grad_wrt_chooses_parameters(problem, tmp_path):
    names = ["4.bias", "0.weight"]
    P = 3 + 36
    made = TritonProjector(P, 16, SEED, "rademacher", "cpu")
    checkpoints, train, _ = problem
    model = small_model()
    model.load_state_dict(checkpoints[0])
    fused = FusedGradientComputer(model, ImageClassificationModelOutput(), P, grad_wrt=names)
    with torch.no_grad():
        features = made.project(fused.compute_per_sample_grad(train), 0)
    expected = (
        true_gradients(checkpoints[0], *train, names)
        @ reference.rademacher_matrix(P, 16, SEED).double()
    )
    assert relative_error(features, expected) < 1e-5


def test_the_iterative_computer_s_tensor(problem):
    class Batched(ImageClassificationModelOutput):
        @staticmethod
        def get_output(model, weights, buffers, images, labels):
            return margins(model, images, labels)

    checkpoints, train, _ = problem
    model = small_model()
    model.load_state_dict(checkpoints[0])
    computer = IterativeGradientComputer(model, Batched(), grad_dim(), torch.float32, "cpu")
    features = projector("rademacher").project(computer.compute_per_sample_grad(train), 0)
    matrix = PROJECTORS["rademacher"][2](grad_dim(), 20, 0)
    assert relative_error(features, true_gradients(checkpoints[0], *train) @ matrix) < 1e-5


class Silent(EmbedderTask):
    @staticmethod
    def get_output(model, weights, buffers, x, mask, target):
        return x.sum()


class Twice(EmbedderTask):
    @staticmethod
    def get_output(model, weights, buffers, x, mask, target):
        call = ((weights, buffers), (), {"x": x[None], "mask": mask[None]})
        first = functional_call(model, *call)["embedding"]
        return (first * functional_call(model, *call)["embedding"]).sum()


class Flat(EmbedderTask):
    @staticmethod
    def get_output(model, weights, buffers, x, mask, target):
        return functional_call(model, (weights, buffers), (), {"x": x, "mask": mask})[
            "embedding"
        ].sum()


class OfBatches(Twice):
    @staticmethod
    def get_batch_output(model, x, mask, target):
        return model(x=x, mask=mask)["embedding"].square().sum(1)


@pytest.mark.parametrize(
    "task, match",
    [
        (Silent, "Silent.get_output must call the model, it did not"),
        (Twice, "Twice.get_output must call the model once, it calls it twice"),
        (Flat, r"must call the model on tensors with a leading dimension of 1, got \[\(5,\), \(4"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(task, match):
    batch = gaussian(4, 5), torch.ones(4, 4), gaussian(4, 4)
    fused = FusedGradientComputer(Embedder(), task())
    made = TritonProjector(24, 16, 0, "normal", "cpu")
    with pytest.raises(RuntimeError, match=match):
        made.project(fused.compute_per_sample_grad(batch), 0)


def test_a_task_may_bring_its_batched_output():
    model = Embedder()
    batch = gaussian(4, 5), torch.ones(4, 4), gaussian(4, 4)
    made = TritonProjector(24, 16, 0, "normal", "cpu")
    fused = FusedGradientComputer(model, OfBatches())
    stored = FunctionalGradientComputer(model, Twice(), 24, torch.float32, "cpu")
    expected = made.project(stored.compute_per_sample_grad(batch), 0)
    assert relative_error(made.project(fused.compute_per_sample_grad(batch), 0), expected) < 1e-5


# ---- fast_jl: the library's own CUDA path


class CudaIsCpu(TorchFunctionMode):
    """Whatever is asked of a CUDA device is done on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            # the library looks at the type of the device it is given
            return func(*args, **(kwargs or {}))
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        args = tuple(self._moved(value) for value in args)
        kwargs = {name: self._moved(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)

    @staticmethod
    def _moved(value):
        is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return torch.device("cpu") if is_cuda else value


@pytest.fixture
def cuda_path(monkeypatch):
    """TRAK's CUDA code on a CPU: a card of four multiprocessors, and our extension."""

    class Card:
        multi_processor_count = 4

    monkeypatch.setitem(sys.modules, "fast_jl", None)
    assert adapter.install() is fast_jl
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card)
    with CudaIsCpu():
        yield


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("B", [3, 11, 40])
def test_their_cuda_projector_runs_on_ours(kind, B, cuda_path):
    P, K = 70, 512
    made = CudaProjector(P, K, 42, getattr(TheirType, kind), "cuda:0", max_batch_size=32)
    grads = torch.round(4 * gaussian(B, P))
    features = made.project({"a": grads[:, :50], "b": grads[:, 50:]}, model_id=2)
    # a part of the columns: the reference takes its time
    matrix = reference_fast_jl.matrix(kind, P, 64, 42 + 20_000, 4)
    assert features.shape == (B, K)
    assert relative_error(features[:, :64], grads.double() @ matrix) < (
        1e-12 if kind == "rademacher" else 1e-6
    )


def test_traker_chooses_its_cuda_path(cuda_path, problem, tmp_path):
    scores = run_traker(problem, tmp_path, device="cuda", proj_dim=32, projector_seed=SEED)
    _, K, matrix_of = PROJECTORS["fast_jl"]
    assert relative_error(scores, true_scores(problem, matrix_of, K)) < 1e-4
    assert (
        type(
            trak.TRAKer(
                small_model(),
                "image_classification",
                N,
                save_dir=str(tmp_path / "other"),
                device="cuda",
                proj_dim=32,
                logging_level="ERROR",
            ).projector
        )
        is CudaProjector
    )


FUNCTIONS = [
    getattr(fast_jl, f"project_{kind}_{size}")
    for kind in ("rademacher", "normal")
    for size in (8, 16, 32)
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_of_the_extension(function):
    kind = function.__name__.split("_")[1]
    grads = torch.round(4 * gaussian(9, 100))
    features = function(grads, 64, np.int64(5), 7)
    assert features.dtype == torch.float32
    matrix = reference_fast_jl.matrix(kind, 100, 64, 5, 7)
    assert relative_error(features, grads.double() @ matrix) < 1e-6
    # seeds wrap, as the extension's unsigned argument does
    assert torch.equal(function(grads, 64, 5 + 2**32, 7), features)
    rounded = function(0.1 * grads, 64, 5, 7, half_inputs=True)
    matrix = matrix.half().double()
    # a normal entry halfway between two float16 numbers may go either way
    assert relative_error(rounded, (0.1 * grads).half().double() @ matrix) < 1e-5


def test_the_trial_call_of_the_library():
    zeros = fast_jl.project_rademacher_8(torch.zeros(8, 1000), 512, 0, 108)
    assert torch.equal(zeros, torch.zeros(8, 512))


@pytest.mark.sweep
@pytest.mark.parametrize("make", ["extension", "projector"])
@pytest.mark.parametrize("P", [1, 999, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_of_signs_have_the_parity_of_their_number(P, dtype, make):
    ones = torch.ones(5, P, dtype=dtype)
    if make == "extension":
        sums = fast_jl.project_rademacher_8(ones, 512, 1, 132)
    else:
        # signs of one parameter never cancel, but those of more may: zero rows are not the point
        sums = TritonProjector(P, 512, 1, "rademacher", "cpu").project(ones, 0)
    assert torch.equal(sums % 2, torch.full_like(sums, P % 2))
    assert sums.abs().max() <= P
    assert (sums == sums[0]).all()


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("generator", ["philox", "fast_jl"])
@pytest.mark.parametrize("P, K", [(5000, 512), pytest.param(50_000, 1024, marks=pytest.mark.full)])
def test_norms_distances_and_products_survive(P, K, generator, kind):
    num_sms = "a100" if generator == "fast_jl" else None
    made = TritonProjector(P, K, 0, kind, "cpu", 32, generator=generator, num_sms=num_sms)
    grads = gaussian(12, P)
    if generator == "philox":
        # a common mean is what fast_jl cannot do: see test_statistics
        grads[4:] += torch.arange(8)[:, None] / 4
    features = made.project(grads, model_id=0)
    exact, found = grads.double() @ grads.double().T, features.double() @ features.double().T / K
    norms = exact.diagonal().sqrt()
    error = (found - exact) / (norms[:, None] * norms)
    # at most √(2/K) in theory; fast_jl's signs are several times worse at a small P
    allowed = 25 if (generator, kind) == ("fast_jl", "rademacher") else 5
    assert error.abs().max() < allowed * (2 / K) ** 0.5
    assert torch.equal(made.project(grads, model_id=0), features)
    other = made.project(grads, model_id=1)
    assert relative_error(other, features) > 0.5


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("generator", ["philox", "fast_jl"])
def test_every_parameter_reaches_every_feature(generator, dtype, kind):
    """One parameter at a time: the first, the last, and some between, in rows that may repeat."""
    P, K = 1049, 512
    num_sms = 7 if generator == "fast_jl" else None
    places = [0, P - 1, 1, 500, 1024, 1025, P - 2, 500, 0]
    grads = torch.zeros(len(places), P, dtype=dtype)
    grads[range(len(places)), places] = 1.5
    first, again = (
        TritonProjector(P, K, 3, kind, "cpu", generator=generator, num_sms=num_sms).project(
            {"all": grads}, model_id=0
        )
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert (first != 0).all()
    same = torch.tensor(places)[:, None] == torch.tensor(places)
    for i, j in torch.cartesian_prod(torch.arange(len(places)), torch.arange(len(places))):
        # rows of fast_jl's signs may repeat: see test_statistics
        if same[i, j] or generator == "philox" or kind == "normal":
            assert torch.equal(first[i], first[j]) == bool(same[i, j])


def test_orthogonal_gradients_stay_nearly_orthogonal():
    """As often positive as negative, and within five standard errors of zero."""
    P, K = 3000, 256
    grads = torch.linalg.qr(gaussian(P, 40))[0].T.contiguous()
    features = TritonProjector(P, K, 3, "rademacher", "cpu").project(grads, 0).double()
    products = (features @ features.T / K)[*torch.triu_indices(40, 40, 1)]
    assert products.abs().max() < 5 / K**0.5
    assert abs((products > 0).double().mean() - 0.5) < 5 * 0.5 / len(products) ** 0.5


def test_their_chunks_run_on_our_projectors():
    """What TRAK does beyond 2**32 entries of a batch: parts have projectors of their own."""
    sizes = [40, 25]
    parts = [
        TritonProjector(n, 64, np.int64(seed), TheirType.normal, "cpu", 32)
        for n, seed in zip(sizes, (17, 400), strict=True)
    ]
    chunked = ChunkedCudaProjector(parts, 40, sizes, 6, "cpu", torch.float32)
    grads = {"a": gaussian(6, 40), "b": gaussian(6, 5, 3, seed=1), "c": gaussian(6, 10, seed=2)}
    expected = sum(
        part.double() @ reference.normal_matrix(n, 64, seed + (2 << 32))
        for part, n, seed in zip(
            torch.cat([x.flatten(1) for x in grads.values()], 1).split(sizes, 1),
            sizes,
            (17, 400),
            strict=True,
        )
    )
    assert relative_error(chunked.project(grads, model_id=2), expected) < 1e-6
