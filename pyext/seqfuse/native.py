"""The compiled extension, if there is one: loading it, and what it was built with. Nothing else imports seqfuse._C."""

import contextlib
import functools
import importlib
import types
from collections.abc import Iterator

import torch

try:
    import seqfuse._C as _C
except ImportError as error:
    _C = None
    _why_not = f"the compiled extension is missing ({error}); reinstall where there is a C++ compiler"
else:
    _why_not = None
    _C.set_openmp(torch.backends.openmp.is_available())

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def missing() -> str | None:
    """None if the compiled kernels are there, else a sentence that says why not."""
    return _why_not


def has_cuda() -> bool:
    return _C is not None and _C.build_facts()["cuda"]


def isa() -> str:
    """The instruction-set level that the CPU kernels run at: one of LEVELS, or "none" without the extension."""
    return "none" if _C is None else _C.isa_active()


def isa_has(level: str) -> bool:
    """Whether the CPU kernels run at this level or one above it."""
    return _C is not None and LEVELS.index(isa()) >= LEVELS.index(level)


def bf16_dots() -> bool:
    """Whether kernels multiply bfloat16 by the processor's own instructions: it has them, and they are not slow."""
    return _C is not None and LEVELS.index(_C.isa_for_bf16_products()) >= LEVELS.index("avx512_bf16")


@functools.cache  # a rule of auto asks, and the facts are looked up anew each time
def bf16_dots_are_slow() -> bool:
    """Whether products of widened bfloat16 are twice as fast as the processor's own instructions: on Intel's without
    a tile unit that may be used. isa_limit("avx512_bf16") makes our kernels use them all the same."""
    return build_facts().get("bf16_dots_are_slow", False)


def build_facts() -> dict:
    return {} if _C is None else dict(_C.build_facts(), isa_detected=_C.isa_detected())


def mkl_is_narrow() -> bool:
    """Whether PyTorch's float32 products use vectors of half the width that this processor computes with."""
    return torch.backends.mkl.is_available() and build_facts().get("mkl_is_narrow", False)


@functools.cache
def nodes_missing() -> str | None:
    """None if seqfuse._autograd is there, else why not: ops whose autograd is a C++ node
    (torch.ops.seqfuse.layer_norm), and the door for small calls.

    It needs the very torch that it was built with. Without it both go through Python: slower, the same.
    """
    if _C is None:
        return _why_not
    built = _C.build_facts()["torch"]
    if built != torch.__version__:
        return f"the autograd nodes were built with torch {built}, this is {torch.__version__}"
    try:
        importlib.import_module("seqfuse._autograd")
    except ImportError as error:
        return f"the autograd nodes are missing: they could not be built ({error})"
    return None


def _door():
    """pyext/autograd/door.cpp, or one through which no call goes."""
    if nodes_missing() is None:
        return importlib.import_module("seqfuse._autograd")
    names = (
        "open",
        "shut",
        "awaited",
        "attention",
        "attention_with_kv_cache",
        "gated",
        "layer_norm",
        "linear_cross_entropy",
    )
    return types.SimpleNamespace(opened=lambda: 1, **dict.fromkeys(names, lambda *args: None))


door = _door()


def rnn_cluster_plan_here(cell, dtype, batch, hidden, scans, tf32, backward) -> dict:
    """The launch plan of the CUDA cluster kernel on the current device; needs a build with CUDA (has_cuda).

    cell, dtype: numbers of csrc/include/seqfuse. scans: 2 for both directions at once. tf32: whether float32 may be
    multiplied in it. backward: which of the two passes.
    """
    return _C.rnn_cluster_plan_here(cell, dtype, batch, hidden, scans, tf32, backward)


@contextlib.contextmanager
def isa_limit(level: str) -> Iterator[None]:
    """Never use an instruction-set level above `level` inside the block (for tests and benchmarks)."""
    if _C is None:
        raise RuntimeError(_why_not)
    from seqfuse import dispatch

    before = _C.isa_limit(level)
    dispatch.forget()
    try:
        yield
    finally:
        _C.isa_limit(before)
        dispatch.forget()


@contextlib.contextmanager
def cached_bytes(limit: int) -> Iterator[None]:
    """Inside the block, results of calls whose tensors exceed `limit` bytes together are stored past the caches (for
    tests and benchmarks). Otherwise the limit follows from this machine's last-level cache."""
    if _C is None:
        raise RuntimeError(_why_not)
    _C.set_cached_bytes(limit)
    try:
        yield
    finally:
        _C.set_cached_bytes(-1)
