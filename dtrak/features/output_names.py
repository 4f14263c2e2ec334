"""What output functions are called: our own names, and those of functions of one's own."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runs.choices import check_choice

# `outputs.OUTPUT_FUNCTIONS` has the functions
OUTPUT_NAMES = (
    "loss",
    "mean_squared_l2_norm",
    "mean",
    "l1_norm",
    "l2_norm",
    "linf_norm",
    "weighted_mse",
)


def check_output_function(name: str) -> str:
    """The name under which an output function is recorded, once it is there.

    Args:
        name: one of `OUTPUT_NAMES`; or a Python function of your own, as
            ``package.module:function`` or ``package.module.function``, importable from where the
            command runs. It is called with ``(prediction, target, weight)``: what the model
            returned and what it was trained to return, flattened, ``[R, D]`` float32 (float64 for a
            float64 model), and the weights of `outputs.elbo_weights`, ``[R]``; it returns one
            scalar per row, ``[R]``, each a differentiable function of its own row.

    Returns:
        The key, or ``package.module:function``.

    Raises:
        ValueError: the name is unknown (it does not quietly become ``loss``), the module cannot be
            imported, or has no such function.
    """
    if name in OUTPUT_NAMES or not (":" in name or "." in name):
        return check_choice("output function", name, OUTPUT_NAMES)
    module, _, function = name.rpartition(":" if ":" in name else ".")
    import_function(f"{module}:{function}")
    return f"{module}:{function}"


def describe_output_function(name: str) -> dict[str, str]:
    """What identifies an output function in a manifest: its name, and the code of one's own.

    Raises:
        ValueError: as in `check_output_function`.
    """
    name = check_output_function(name)
    if name in OUTPUT_NAMES:
        return {"output_function": name}
    # the whole module: the function may call others in it
    file = getattr(sys.modules[name.split(":", 1)[0]], "__file__", None)
    code = Path(file).read_bytes() if file else b""
    return {"output_function": name, "output_function_code": hashlib.sha256(code).hexdigest()}


@functools.cache
def import_function(name: str) -> Callable[..., Any]:
    """The function of one's own called ``package.module:function``.

    Raises:
        ValueError: as in `check_output_function`.
    """
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
