"""The one-pass product compiles for every target, without a device and within its shared memory."""

import pytest
from test_compile import SHARED_LIMITS


@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_kernel_compiles(target, compiled):
    shared = compiled["gram"][target]
    assert len(shared) == 3
    assert max(shared.values()) <= SHARED_LIMITS[target], shared
