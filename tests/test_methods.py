"""The registry of methods: names, needs, functions, and the table in the docs."""

import re
from pathlib import Path

import pytest

from dtrak.features.output_names import OUTPUT_NAMES
from dtrak.methods import METHODS, Method, get_method

PAGE = Path(__file__).parents[1] / "docs" / "explain.md"


def table() -> str:
    lines = ["| name | method | needs | gradients of |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        of = method.output_function
        lines.append(
            f"| `{name}` | {method.title} | {method.needs} | {'' if of is None else f'`{of}`'} |"
        )
    return "\n".join(lines)


def test_the_page_lists_every_method():
    text = PAGE.read_text()
    found = re.search(r"<!-- methods: begin -->\n(.*?)\n?<!-- methods: end -->", text, re.DOTALL)
    assert found.group(1) == table(), "docs/explain.md must hold:\n" + table()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_what_it_says(name):
    method = METHODS[name]
    assert method.name == name
    assert re.fullmatch(r"[a-z0-9_-]+", name)
    assert callable(method.score)
    assert method.output_function is None or method.output_function in OUTPUT_NAMES
    assert method.needs in {"features", "checkpoints", "trajectory", "models", "clip", "nothing"}
    gradients = method.needs in {"features", "checkpoints", "trajectory"}
    assert (method.output_function is not None) == gradients


def test_a_name_is_looked_up_and_ones_own_is_taken():
    own = Method("Mine, too", "nothing", len)
    assert own.name == "mine-too"
    assert get_method(own) is own
    with pytest.raises(ValueError, match=r"--methods must be one of .* mean 'gradient-dot'"):
        get_method("gradient_dots", "--methods")
