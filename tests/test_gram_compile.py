"""The one-pass product compiles for every target, without a device and within its shared memory."""

import pytest
from test_compile import SHARED_LIMITS


# slow: of the fast lane test_compile.py has a tuned one for every target
@pytest.mark.full
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_kernel_compiles(target, compiled):
    shared = compiled["gram"][target]
    assert len(shared) == 3
    assert max(shared.values()) <= SHARED_LIMITS[target], shared
