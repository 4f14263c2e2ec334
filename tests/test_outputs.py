import math
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from numerics import assert_as_good_as, relative_error
from torch.func import grad, vmap

from dtrak.features import output_names
from dtrak.features.output_names import check_output_function, describe_output_function
from dtrak.features.outputs import OUTPUT_FUNCTIONS, evaluate_output
from dtrak.features.timesteps import Timesteps, select_timesteps
from dtrak.models.process import DiscreteProcess, linear_process
from dtrak.runs.choices import check_choice

TIMESTEPS = [0, 1, 100, 999]
BETAS = np.linspace(1e-4, 0.02, 1000)


def oracle_weights(timesteps, betas=BETAS):
    alphas = 1 - betas
    bars = np.array([np.prod(alphas[: t + 1]) for t in timesteps])
    return betas[timesteps] / (2 * alphas[timesteps] * (1 - bars))


# float64 numpy, one row at a time: u the prediction, e the target, w the weight
ORACLES = {
    "loss": lambda u, e, w: np.sum((u - e) ** 2) / u.size,
    "mean_squared_l2_norm": lambda u, e, w: np.sum(u**2) / u.size,
    "mean": lambda u, e, w: np.sum(u) / u.size,
    "l1_norm": lambda u, e, w: np.sum(np.abs(u)),
    "l2_norm": lambda u, e, w: math.sqrt(np.sum(u**2)),
    "linf_norm": lambda u, e, w: max(abs(v) for v in u.ravel()),
    "weighted_mse": lambda u, e, w: w * np.sum((u - e) ** 2) / u.size,
}


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (len(TIMESTEPS), 3, 5, 7)
    prediction = torch.randn(shape, generator=generator, dtype=torch.float64) - 0.3
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    return prediction.to(dtype), target.to(dtype), torch.tensor(TIMESTEPS)


def oracle_output(name, prediction, target):
    weights = oracle_weights(TIMESTEPS)
    values = [
        ORACLES[name](u, e, w)
        for u, e, w in zip(
            prediction.double().numpy(), target.double().numpy(), weights, strict=True
        )
    ]
    return torch.tensor(values, dtype=torch.float64)


def test_every_output_function_has_an_oracle():
    assert OUTPUT_FUNCTIONS.keys() == ORACLES.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_matches_oracle(name, dtype):
    prediction, target, timesteps = rows(dtype)
    values = evaluate_output(name, prediction, target, linear_process().weight(timesteps))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the oracle sees what the 16-bit model returned: the reduction itself is never 16-bit;
    # the weights come from the scheduler's float32 betas
    tight = dtype == torch.float64 and name != "weighted_mse"
    expected = oracle_output(name, prediction, target)
    assert relative_error(values, expected) < (1e-14 if tight else 3e-7)


@pytest.mark.parametrize("name", ORACLES)
def test_is_the_same_under_vmap(name):
    prediction, target, timesteps = rows()
    weight = linear_process().weight(timesteps)
    together = evaluate_output(name, prediction, target, weight)
    apart = vmap(lambda u, e, w: evaluate_output(name, u[None], e[None], w[None])[0])(
        prediction, target, weight
    )
    assert relative_error(apart, together) < 1e-14


@pytest.mark.parametrize("name", ORACLES)
def test_gradient_at_an_output_of_zero_is_finite(name):
    prediction = torch.zeros(2, 1, 2, 2, requires_grad=True)
    target, timesteps = torch.ones(2, 1, 2, 2), torch.tensor([0, 5])
    evaluate_output(name, prediction, target, linear_process().weight(timesteps)).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_weights_are_right_at_every_timestep():
    timesteps = list(range(1000))
    weights = linear_process().weight(torch.tensor(timesteps))
    oracle = torch.from_numpy(oracle_weights(timesteps))
    # the scheduler's betas are float32; a float32 1 - ᾱ would be off by 4e-4 at t = 0
    assert (weights.double() / oracle - 1).abs().max() < 1e-6
    assert weights[0].item() == pytest.approx(0.5 / (1 - 1e-4), rel=1e-6)


def test_weight_of_a_first_step_without_noise_is_its_limit():
    scheduler = DDPMScheduler(num_train_timesteps=4, trained_betas=[0.0, 0.1, 0.2, 0.5])
    weights = DiscreteProcess(scheduler).weight(torch.tensor([0, 1, 3]))
    bar = 0.9 * 0.8 * 0.5
    expected = [0.5, 0.1 / (2 * 0.9 * 0.1), 0.5 / (2 * 0.5 * (1 - bar))]
    assert relative_error(weights, torch.tensor(expected)) < 1e-6


def test_weight_of_a_last_step_without_signal_is_infinite():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    weights = DiscreteProcess(scheduler).weight(torch.tensor([998, 999]))
    assert weights[0].isfinite()
    assert weights[1] == math.inf
    # and does not reach output functions that take no weight
    prediction, target, timesteps = rows()
    loss = evaluate_output("loss", prediction, target, torch.full((len(target),), math.inf))
    weight = linear_process().weight(timesteps)
    assert torch.equal(loss, evaluate_output("loss", prediction, target, weight))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_training_target(kind):
    images, noise, timesteps = rows()
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    target = DiscreteProcess(scheduler).target(images.float(), noise.float(), timesteps)
    bars = np.array([np.prod(1 - BETAS[: t + 1]) for t in TIMESTEPS])
    bars = torch.from_numpy(bars)[:, None, None, None]
    oracle = {
        "epsilon": noise,
        "sample": images,
        "v_prediction": bars.sqrt() * noise - (1 - bars).sqrt() * images,
    }[kind]
    # the scheduler keeps its products in float32
    eager = (bars.float().sqrt() * noise.float()) - (1 - bars.float()).sqrt() * images.float()
    assert_as_good_as(target, eager if kind == "v_prediction" else oracle.float(), oracle)


def test_unknown_prediction_type_is_refused():
    images, noise, timesteps = rows()
    scheduler = DDPMScheduler(prediction_type="flow")
    with pytest.raises(ValueError, match=r"must be epsilon, sample or v_prediction, got 'flow'"):
        DiscreteProcess(scheduler).target(images, noise, timesteps)


def test_uniform_timesteps():
    assert select_timesteps(10, "uniform") == list(range(0, 1000, 100))
    assert select_timesteps(3, "uniform") == [0, 333, 666]
    assert select_timesteps(600, "uniform") == list(range(600))
    assert select_timesteps(1, "uniform") == [0]
    assert select_timesteps(1000, "uniform") == list(range(1000))
    assert select_timesteps(7, "uniform", 50) == [0, 7, 14, 21, 28, 35, 42]


def test_cumulative_timesteps():
    assert select_timesteps(4, "cumulative") == [0, 1, 2, 3]
    assert select_timesteps(50, "cumulative", 50) == list(range(50))


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_number_of_timesteps_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=rf"timesteps must be in \[1, 1000\].*got {count}"):
        select_timesteps(count, "uniform")
    with pytest.raises(ValueError, match=r"timesteps must be in \[1, 20\].*got 21"):
        select_timesteps(21, "cumulative", 20)


def test_unknown_strategy_is_refused():
    with pytest.raises(
        ValueError, match=r"must be one of uniform, cumulative, explicit, got 'unform'.*'uniform'"
    ):
        select_timesteps(10, "unform")


@pytest.mark.parametrize(
    "value, closest",
    [
        ("mean-squared-l2-norm", "mean_squared_l2_norm"),
        ("l2-norm", "l2_norm"),
        ("linf", "linf_norm"),
        ("weighted-mse", "weighted_mse"),
        ("LOSS", "loss"),
        ("los", "loss"),
    ],
)
def test_unknown_output_function_names_the_closest(value, closest):
    prediction, target, timesteps = rows()
    with pytest.raises(ValueError, match=f"got '{value}'; did you mean '{closest}'\\?"):
        evaluate_output(value, prediction, target, linear_process().weight(timesteps))


def test_choice_like_no_other_gets_no_suggestion():
    assert check_choice("--x", "loss", OUTPUT_FUNCTIONS) == "loss"
    with pytest.raises(ValueError, match=r"--x must be one of loss, mean_.*got '%%%'$"):
        check_choice("--x", "%%%", OUTPUT_FUNCTIONS)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Output functions of a user's own, in a module of the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "mine").mkdir()
    code = """
import torch
cubes = lambda prediction, target, weight: (prediction - target).pow(3).mean(1)
bound = lambda prediction, target, weight: weight * (prediction - target).square().mean(1)
total = lambda prediction, target, weight: prediction.square().mean()
column = lambda prediction, target, weight: prediction.square().mean(1, keepdim=True)
counts = lambda prediction, target, weight: (prediction > 0).sum(1)
constant = lambda prediction, target, weight: prediction.detach().mean(1)
mixed = lambda prediction, target, weight: (prediction - prediction.mean(0)).square().mean(1)
nothing = lambda prediction, target, weight: None
number = 3
"""
    (tmp_path / "mine" / "functions.py").write_text(code)
    (tmp_path / "mine" / "broken.py").write_text("import no_such_module")
    yield tmp_path / "mine" / "functions.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]
    output_names.import_function.cache_clear()


@pytest.mark.parametrize("name", ["mine.functions:cubes", "mine.functions.cubes"])
def test_a_function_of_ones_own(name, own):
    assert check_output_function(name) == "mine.functions:cubes"
    prediction, target, timesteps = rows()
    values = evaluate_output(name, prediction, target, linear_process().weight(timesteps))
    oracle = np.mean(((prediction - target) ** 3).flatten(1).numpy(), axis=1)
    assert relative_error(values, torch.from_numpy(oracle)) < 1e-14
    # the path is as it was
    assert str(own.parents[1]) not in sys.path


def test_a_function_of_ones_own_gets_the_weights(own):
    prediction, target, timesteps = rows()
    arguments = (prediction, target, linear_process().weight(timesteps))
    values = evaluate_output("mine.functions:bound", *arguments)
    assert relative_error(values, evaluate_output("weighted_mse", *arguments)) < 1e-14


def test_a_function_of_ones_own_differentiates_under_vmap(own):
    prediction, target, timesteps = rows()
    weight = linear_process().weight(timesteps)

    def output(u, e, w):
        values = evaluate_output("mine.functions:cubes", u[None], e[None], w[None])
        return values.sum()

    grads = vmap(grad(output))(prediction, target, weight)
    expected = 3 * (prediction - target) ** 2 / prediction[0].numel()
    assert relative_error(grads, expected) < 1e-14


@pytest.mark.parametrize(
    "name, message",
    [
        ("total", r"must return one scalar per row, \[4\], got \[\]"),
        ("column", r"must return one scalar per row, \[4\], got \[4, 1\]"),
        ("nothing", r"must return one scalar per row, \[4\], got NoneType"),
        ("counts", "must return floating numbers, got torch.int64"),
        ("constant", "must be a differentiable function of the prediction"),
        ("mixed", "must treat every row by itself, got 0 for a row alone and"),
    ],
)
def test_what_a_function_must_not_return(name, message, own):
    prediction, target, timesteps = rows()
    arguments = (prediction.requires_grad_(), target, linear_process().weight(timesteps))
    with pytest.raises(ValueError, match=rf"'mine\.functions:{name}' {message}"):
        evaluate_output(f"mine.functions:{name}", *arguments)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.at.all:f", "in a module that imports, got ModuleNotFoundError: .*'nowhere'"),
        ("mine.broken:f", "in a module that imports, got ModuleNotFoundError: .*no_such_module"),
        ("mine.functions:cube", "mine.functions has no 'cube'; did you mean 'cubes'?"),
        ("mine.functions:number", "must be callable, got a int"),
        ("mine.functions:", "must be package.module:function"),
        (":f", "must be package.module:function"),
        ("mine functions:f", "must be package.module:function"),
    ],
)
def test_names_that_lead_nowhere(name, message, own):
    with pytest.raises(ValueError, match=f"output function {name!r} .*{message}"):
        check_output_function(name)


def test_the_code_of_ones_own_function_is_recorded(own):
    assert describe_output_function("loss") == {"output_function": "loss"}
    described = describe_output_function("mine.functions.cubes")
    assert described["output_function"] == "mine.functions:cubes"
    own.write_text(own.read_text().replace("pow(3)", "pow(5)"))
    changed = describe_output_function("mine.functions.cubes")
    assert changed["output_function_code"] != described["output_function_code"]


def test_listed_timesteps():
    listed = Timesteps.parse("0,100, 500")
    assert listed == Timesteps((0, 100, 500), "explicit")
    assert (str(listed), listed.resolve(501)) == ("0,100,500 explicit", (0, 100, 500))
    assert Timesteps.parse("7", "explicit") == Timesteps((7,), "explicit")
    assert Timesteps.parse("7") == Timesteps(7, "uniform")
    few = Timesteps.parse(7, "cumulative")
    assert (str(few), few.resolve(20)) == ("7 cumulative", tuple(range(7)))
    assert select_timesteps((0, 500, 100), "explicit") == [0, 500, 100]
    assert select_timesteps([19], "explicit", 20) == [19]
    assert select_timesteps(5, "explicit", 20) == [5]


@pytest.mark.parametrize(
    "text, strategy, message",
    [
        ("a few", None, "must be a number, or indices such as 0,100,500, got 'a few'"),
        ("1.5", None, "must be a number, or indices"),
        ("0,100,", None, "must be a number, or indices"),
        ("0", None, "--timesteps must be at least 1, got 0"),
        ("0,100", "uniform", "must be a number with --timestep-strategy uniform, got '0,100'"),
        ("5", "explicitly", "must be one of uniform, cumulative, explicit.*'explicit'"),
    ],
)
def test_listed_timesteps_that_are_none(text, strategy, message):
    with pytest.raises(ValueError, match=message):
        Timesteps.parse(text, strategy)


def test_listed_timesteps_out_of_range():
    for indices in ([0, 1000], [-1]):
        with pytest.raises(ValueError, match=rf"must be in \[0, 1000\), got {indices[-1]}"):
            select_timesteps(indices, "explicit")
    with pytest.raises(ValueError, match="given once each, got 5 twice"):
        select_timesteps([5, 1, 5], "explicit")
    with pytest.raises(ValueError, match="at least one index, got none"):
        select_timesteps([], "explicit")
