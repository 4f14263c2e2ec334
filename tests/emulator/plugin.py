"""pytest plugin: every kernel a test launches runs as compiled code of a card, in the emulator.

``pytest -p emulator.plugin --emulate sm_80,sm_90 tests/test_sketch_kernel.py`` with ``tests`` on
the Python path. A process of its own is needed: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"
# tests that need compiled code run; conftest.py reads it
os.environ["DTRAK_EMULATED"] = "1"
# kernels are arrays of NumPy here: threads of torch would only wait for one another
os.environ["OMP_NUM_THREADS"] = "1"

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from triton.runtime.jit import JITFunction

from .launch import Emulated

CARDS = ("sm_80", "sm_90")


def kernels_of(module: ModuleType, arch: int) -> dict[str, Emulated]:
    """Stand-ins of a module's kernels by name."""
    return {
        name: Emulated(kernel, arch)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, JITFunction)
    }


class Card:
    """Stand-ins of every kernel of dtrak_kernels, and launches as on that card."""

    def __init__(self, name: str) -> None:
        from dtrak_kernels.dense import triton as dense
        from dtrak_kernels.ridge import gram_triton as gram
        from dtrak_kernels.sjlt import config, triton

        self.name, self.arch = name, int(name.removeprefix("sm_"))
        self.kernels = {m: kernels_of(m, self.arch) for m in (dense, triton, gram)}

        @lru_cache(maxsize=4096)
        def config_on(device: Any, form: config.Form, reduction: int) -> config.SketchConfig:
            return config.find_config(form, self.arch, reduction)

        # tensors of the CPU are what the emulator reads and writes
        self.others = [(dense, "IS_INTERPRETED", True), (triton, "config_on", config_on)]

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        variants = [
            v for part in self.kernels.values() for k in part.values() for v in k.variants.values()
        ]
        return sum(variant.launches for variant in variants)

    def inside(self) -> ExitStack:
        """A context in which the stand-ins are in place."""
        stack = ExitStack()
        for module, part in self.kernels.items():
            for name, stand_in in part.items():
                stack.enter_context(mock.patch.object(module, name, stand_in))
        for module, name, value in self.others:
            stack.enter_context(mock.patch.object(module, name, value))
        return stack


@cache
def card_named(name: str) -> Card:
    """The one card of a name, which keeps what it compiled."""
    return Card(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", default=",".join(CARDS), help="cards, separated by commas")
    parser.addoption("--emulate-report", help="a file for one line of JSON per test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "emulated_card" in metafunc.fixturenames:
        cards = metafunc.config.getoption("--emulate").split(",")
        metafunc.parametrize("emulated_card", cards, indirect=True)


@pytest.fixture(autouse=True)
def emulated_card(request: pytest.FixtureRequest) -> Iterator[Card]:
    card = card_named(request.param)
    before, start = card.launches, time.process_time()
    with card.inside():
        yield card
    request.node.user_properties.append(("launches", card.launches - before))
    request.node.user_properties.append(("seconds", time.process_time() - start))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    path = item.config.getoption("--emulate-report")
    if path and (report.when == "teardown" or report.outcome != "passed"):
        row = {"test": item.nodeid, "outcome": report.outcome, **dict(item.user_properties)}
        if report.failed:
            row["why"] = str(report.longrepr)[-2000:]
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return report
