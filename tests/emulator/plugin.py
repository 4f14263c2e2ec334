"""pytest plugin: every kernel a test launches runs as compiled code of a card, in the emulator.

``pytest -p emulator.plugin --emulate sm_90 tests/test_sketch_kernel.py`` with ``tests`` on the
Python path. A process of its own is needed: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"
# tests that need compiled code run; conftest.py reads it
os.environ["DTRAK_EMULATED"] = "1"

from functools import lru_cache
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from .launch import Emulated


def install(arch: int) -> dict[str, Emulated]:
    """Put stand-ins in the place of every kernel of dtrak_kernels, and launch as on that card."""
    from dtrak_kernels.dense import triton as dense
    from dtrak_kernels.ridge import gram_triton as gram
    from dtrak_kernels.sjlt import config, triton

    kernels = {}
    for module in (dense, triton, gram):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(kernel, JITFunction):
                kernels[name] = Emulated(kernel, arch)
                setattr(module, name, kernels[name])
    # tensors of the CPU are what the emulator reads and writes
    dense.IS_INTERPRETED = True

    @lru_cache(maxsize=4096)
    def config_on(device: Any, form: config.Form, reduction: int) -> config.SketchConfig:
        return config.find_config(form, arch, reduction)

    config.config_on = triton.config_on = config_on
    return kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", default="sm_90", help="the card: sm_80 or sm_90")


def pytest_configure(config: pytest.Config) -> None:
    config.emulated = install(int(config.getoption("--emulate").removeprefix("sm_")))  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, kernel in config.emulated.items():  # type: ignore[attr-defined]
        launches = sum(v.launches for v in kernel.variants.values())
        count = sum(sum(v.executed().values()) for v in kernel.variants.values())
        terminalreporter.write_line(
            f"{name}: {len(kernel.variants)} variants, {launches} launches, "
            f"{count:,} instructions of blocks"
        )
