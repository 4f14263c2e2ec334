"""Model output functions f: what a feature is the gradient of, one scalar per row."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor

# (prediction, target, weight) -> [R]; prediction and target are flattened, [R, D] float, the weight
# of the variational bound is [R]
OutputFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def _loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (prediction - target).square().mean(1)


def _weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return weight * _loss(prediction, target, weight)


# formulas: arXiv:2311.00500, table 1; definitions as in D-TRAK's grad_unconditional.py at e2a0c2e
OUTPUT_FUNCTIONS: dict[str, OutputFunction] = {
    "loss": _loss,
    "mean_squared_l2_norm": lambda u, target, weight: u.square().mean(1),
    "mean": lambda u, target, weight: u.mean(1),
    "l1_norm": lambda u, target, weight: u.abs().sum(1),
    # not sqrt of a sum: its gradient at an output of zero is zero, not NaN
    "l2_norm": lambda u, target, weight: torch.linalg.vector_norm(u, dim=1),
    "linf_norm": lambda u, target, weight: u.abs().amax(1),
    "weighted_mse": _weighted_mse,
}

TIMESTEP_STRATEGIES = ("uniform", "cumulative", "explicit")


def check_choice(option: str, value: str, valid: Iterable[str]) -> str:
    """``value`` if it is one of ``valid``.

    Raises:
        ValueError: it is not; the message names the closest valid value.
    """
    valid = list(valid)
    if value in valid:
        return value
    close = difflib.get_close_matches(value.lower().replace("-", "_"), valid, n=1, cutoff=0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{option} must be one of {', '.join(valid)}, got {value!r}{hint}")


def check_output_function(name: str) -> str:
    """The name under which an output function is recorded, once it is there.

    Args:
        name: a key of `OUTPUT_FUNCTIONS`; or a Python function of your own, as
            ``package.module:function`` or ``package.module.function``, importable from where the
            command runs. It is called with ``(prediction, target, weight)``: what the model
            returned and what it was trained to return, flattened, ``[R, D]`` float32 (float64 for a
            float64 model), and the weights of `elbo_weights`, ``[R]``; it returns one scalar per
            row, ``[R]``, each a differentiable function of its own row.

    Returns:
        The key, or ``package.module:function``.

    Raises:
        ValueError: the name is unknown (it does not quietly become ``loss``), the module cannot be
            imported, or has no such function.
    """
    if name in OUTPUT_FUNCTIONS or not (":" in name or "." in name):
        return check_choice("output function", name, OUTPUT_FUNCTIONS)
    module, _, function = name.rpartition(":" if ":" in name else ".")
    _import_function(f"{module}:{function}")
    return f"{module}:{function}"


def describe_output_function(name: str) -> dict[str, str]:
    """What identifies an output function in a manifest: its name, and the code of one's own.

    Raises:
        ValueError: as in `check_output_function`.
    """
    name = check_output_function(name)
    if name in OUTPUT_FUNCTIONS:
        return {"output_function": name}
    # the whole module: the function may call others in it
    file = getattr(sys.modules[name.split(":", 1)[0]], "__file__", None)
    code = Path(file).read_bytes() if file else b""
    return {"output_function": name, "output_function_code": hashlib.sha256(code).hexdigest()}


@functools.cache
def _import_function(name: str) -> OutputFunction:
    module_name, function_name = name.split(":", 1)
    what = f"output function {name!r}"
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise ValueError(f"{what} must be package.module:function")
    try:
        with _working_folder_importable():
            module = importlib.import_module(module_name)
    # whatever the module raises while it is imported
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what} must lie in a module that imports, got {reason}") from error
    function = getattr(module, function_name, None)
    if function is None:
        close = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what} is not there: {module_name} has no {function_name!r}{hint}")
    if not callable(function):
        raise ValueError(f"{what} must be callable, got a {type(function).__name__}")
    return function


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Find modules in the working folder, as ``python -m`` does and an installed command not."""
    folder = str(Path.cwd())
    added = folder not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def parse_timesteps(
    text: int | str, strategy: str | None = None
) -> tuple[int | tuple[int, ...], str]:
    """What ``--timesteps`` and ``--timestep-strategy`` ask for.

    Args:
        text: a number of timesteps, or timestep indices separated by commas.
        strategy: one of `TIMESTEP_STRATEGIES`; None is ``"explicit"`` for indices separated by
            commas and ``"uniform"`` for a number.

    Returns:
        The first two arguments of `select_timesteps`.

    Raises:
        ValueError: the text is neither, a number is below 1, the strategy is unknown, or it chooses
            timesteps although they are listed.
    """
    parts = [part.strip() for part in str(text).split(",")]
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError as error:
        raise ValueError(
            f"--timesteps must be a number, or indices such as 0,100,500, got {text!r}"
        ) from error
    if strategy is None:
        strategy = "explicit" if len(numbers) > 1 else "uniform"
    check_choice("--timestep-strategy", strategy, TIMESTEP_STRATEGIES)
    if strategy == "explicit":
        return numbers, strategy
    if len(numbers) > 1:
        raise ValueError(
            f"--timesteps must be a number with --timestep-strategy {strategy}, got {text!r}"
        )
    if numbers[0] < 1:
        raise ValueError(f"--timesteps must be at least 1, got {numbers[0]}")
    return numbers[0], strategy


def select_timesteps(
    num_timesteps: int | Sequence[int], strategy: str, num_train_timesteps: int = 1000
) -> list[int]:
    """The S timestep indices a feature averages over.

    Args:
        num_timesteps: ``S``, in ``[1, num_train_timesteps]``; for ``"explicit"`` the indices
            themselves.
        strategy: ``"uniform"``: 0, ⌊T/S⌋, 2⌊T/S⌋, …; ``"cumulative"``: 0 to S - 1, the least noisy;
            ``"explicit"``: those given.
        num_train_timesteps: ``T``.

    Raises:
        ValueError: the strategy is unknown, S is out of range, or an index is out of range or given
            twice.

    Source:
        D-TRAK's grad_unconditional.py at e2a0c2e.
    """
    check_choice("timestep strategy", strategy, TIMESTEP_STRATEGIES)
    if not isinstance(num_timesteps, int):
        return _check_indices([int(index) for index in num_timesteps], num_train_timesteps)
    if strategy == "explicit":
        return _check_indices([num_timesteps], num_train_timesteps)
    if not 1 <= num_timesteps <= num_train_timesteps:
        raise ValueError(
            f"timesteps must be in [1, {num_train_timesteps}], the model's number of training "
            f"timesteps, got {num_timesteps}"
        )
    stride = num_train_timesteps // num_timesteps if strategy == "uniform" else 1
    return [step * stride for step in range(num_timesteps)]


def _check_indices(indices: list[int], num_train_timesteps: int) -> list[int]:
    if not indices:
        raise ValueError("timesteps must hold at least one index, got none")
    for position, index in enumerate(indices):
        if not 0 <= index < num_train_timesteps:
            raise ValueError(f"timesteps must be in [0, {num_train_timesteps}), got {index}")
        if index in indices[:position]:
            raise ValueError(f"timesteps must be given once each, got {index} twice")
    return indices


def training_target(
    scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the model was trained to predict, by the scheduler's ``prediction_type``.

    Args:
        scheduler: the training schedule.
        images: ``[R, C, H, W]`` clean.
        noise: ``[R, C, H, W]``.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R, C, H, W]``: the noise ε, the image x, or the velocity ``√ᾱ_t ε - √(1 - ᾱ_t) x``.

    Raises:
        ValueError: the prediction type is not epsilon, sample or v_prediction.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return images
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(images, noise, timesteps)
        return velocity
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {kind!r}")


def elbo_weights(scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """Weights of the variational bound, ``w_t = β_t / (2 α_t (1 - ᾱ_t))``.

    At t = 0 the factor ``β_0 / (1 - ᾱ_0)`` is 1 whatever β_0, so the weight is ``1 / (2 α_0)`` even
    for a schedule that starts at β_0 = 0. Infinite where α_t = 0 (the last timestep of a schedule
    with zero terminal SNR).

    Args:
        scheduler: the training schedule.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R]`` float32.
    """
    # in float32, 1 - ᾱ_t keeps only three digits at the least noisy steps
    betas = scheduler.betas.double().cpu()
    alphas = 1 - betas
    ratio = betas / (1 - alphas.cumprod(0))
    ratio[0] = 1
    table = (ratio / (2 * alphas)).float()
    return table.to(timesteps.device)[timesteps]


def evaluate_output(
    name: str, prediction: Tensor, target: Tensor, scheduler: DDPMScheduler, timesteps: Tensor
) -> Tensor:
    """The output function ``name``, one scalar per row.

    Args:
        name: as in `check_output_function`.
        prediction: ``[R, C, H, W]`` what the model returned.
        target: ``[R, C, H, W]`` what it was trained to return.
        scheduler: gives the weights of ``weighted_mse``.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R]``, float32 (float64 for a float64 model).

    Raises:
        ValueError: the name is unknown (it does not quietly become ``loss``), or a function of
            one's own does not return ``[R]`` floating numbers, each of its own row alone.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    arguments = (
        prediction.to(dtype).flatten(1),
        target.to(dtype).flatten(1),
        elbo_weights(scheduler, timesteps).to(dtype),
    )
    name = check_output_function(name)
    if name in OUTPUT_FUNCTIONS:
        return OUTPUT_FUNCTIONS[name](*arguments)
    return _evaluate_own(name, *arguments)


def _evaluate_own(name: str, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """A user's function, its result checked."""
    function = _import_function(name)
    values = function(prediction, target, weight)
    rows = len(prediction)
    if not isinstance(values, Tensor) or values.shape != (rows,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"output function {name!r} must return one scalar per row, [{rows}], got {got}"
        )
    if not values.is_floating_point():
        raise ValueError(
            f"output function {name!r} must return floating numbers, got {values.dtype}"
        )
    if prediction.requires_grad and not values.requires_grad:
        raise ValueError(
            f"output function {name!r} must be a differentiable function of the prediction, got "
            "values without a gradient"
        )
    if rows > 1:
        with torch.no_grad():
            alone = float(function(prediction[:1], target[:1], weight[:1]))
            among, scale = float(values[0]), float(values.abs().max())
        # one row among many may be reduced in another order
        if alone != among and not abs(alone - among) <= 1e-3 * scale:
            raise ValueError(
                f"output function {name!r} must treat every row by itself, got {alone:.6g} for a "
                f"row alone and {among:.6g} among {rows}"
            )
    return values
