"""The code paths that multiply pairs of bf16 (AVX512-BF16) and tiles of them (AMX), with emulated products, on any
machine."""

import ctypes
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seqfuse import reference
from seqfuse.reference import AttentionOptions
from seqfuse.testing import assert_accurate

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*(f"csrc/cpu/{name}.cpp" for name in ("attention_forward", "attention_backward", "linear")),
           "tests/cpu_dots/driver.cpp"]  # fmt: skip
EMULATED = {"dots": ["-DSEQFUSE_EMULATE_DOTS"], "tiles": ["-DSEQFUSE_EMULATE_DOTS", "-DSEQFUSE_EMULATE_TILES"]}
FLAGS = "-std=c++20 -O1 -fPIC -w -ffp-contract=fast -fno-math-errno -fno-trapping-math -Icsrc/include -Icsrc"


@pytest.fixture(scope="module", params=EMULATED)
def kernels(request, tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler on the PATH")
    folder = tmp_path_factory.mktemp("cpu_dots")
    flags = [*shlex.split(FLAGS), *EMULATED[request.param], "-DSEQFUSE_ISA=emulated"]
    objects = [str(folder / f"{Path(source).name}.o") for source in SOURCES]

    def run(*command):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s, o: run(compiler, *flags, "-c", s, "-o", o), SOURCES, objects))
    library = folder / "kernels.so"
    run(compiler, "-shared", *objects, "-o", str(library))
    return ctypes.CDLL(str(library))


def pointers(*tensors):
    assert all(t.is_contiguous() for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def attention(kernels, size, options, q, k, v, dout):
    """out, lse, dq, dk, dv of the emulated kernels. Results and what lies around them begin as NaN."""
    out, lse = (torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.empty(q.shape[:3]))
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    sizes = numbers(*size, options.window_left, options.window_right)
    seed = numbers(int(options.seed)) if options.dropout_p else None
    rest = (ctypes.c_float(options.scale), ctypes.c_float(options.softcap), seed, ctypes.c_double(options.dropout_p))
    kernels.attention_forward(sizes, *rest, pointers(q, k, v, out, lse))
    kernels.attention_backward(sizes, *rest, pointers(q, k, v, out, lse, dout, dq, dk, dv))
    return out, lse, dq, dk, dv


def by_reference(q, k, v, dout, options, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out, lse = reference.attention(*leaves, options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


OPTIONS = {
    "dense": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 37, "window_right": 3},
    "softcap": {"softcap": 2.0, "window_right": 0},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "size",  # B, Hq, Hkv, Tq, Tk, D, Dv
    [(1, 2, 1, 49, 97, 16, 8), (2, 3, 3, 5, 3, 7, 9), (1, 4, 2, 101, 193, 65, 34)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_attention(kernels, size, name):
    B, Hq, Hkv, Tq, Tk, D, Dv = size
    shapes = (B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv), (B, Hq, Tq, Dv)
    tensors = [torch.randn(s).bfloat16() for s in shapes]
    options = AttentionOptions(scale=D**-0.5, **OPTIONS[name])
    if options.dropout_p:
        options = options._replace(seed=torch.tensor([12345]))
    got = attention(kernels, size, options, *tensors)
    exact = by_reference(*tensors, options, torch.float64)
    theirs = by_reference(*tensors, options, torch.bfloat16)
    names = "out", "lse", "dq", "dk", "dv"
    for what, a, b, c in zip(names, got, exact, theirs, strict=True):
        assert_accurate(a, b, c, dims=(1,), what=what, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("inputs,outputs", [(1, 1), (33, 7), (130, 70)], ids=str)
def test_linear(kernels, rows, inputs, outputs):
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    y = torch.empty(rows, outputs, dtype=torch.bfloat16)
    kernels.linear_forward(numbers(rows, inputs, outputs), pointers(x, weight, bias, y))
    assert_accurate(
        y, reference.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias), dims=(0,)
    )
