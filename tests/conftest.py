"""What every test stands on: poisoned memory, a fixed seed, and reasons for what cannot run here."""

import os

import pytest
import torch

from seqfuse import native

# torch.empty then holds NaN (integers: the largest value), in C++ too: a kernel that reads what nobody wrote is caught
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
        if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1; make test runs it in its own process"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=native.LEVELS)
def isa(request):
    """Every instruction-set level that this machine has, one after another."""
    if native.missing():
        pytest.skip(native.missing())
    if request.param not in native.LEVELS[: native.LEVELS.index(native.build_facts()["isa_detected"]) + 1]:
        pytest.skip(f"this processor has no {request.param}")
    with native.isa_limit(request.param):
        yield request.param
