"""The Hopper attention kernels, executed on the CPU by the host side of the device layer under AddressSanitizer and
UBSan (tests/host_device: TMA writes the swizzled bytes, wgmma reads them by their descriptors, both late), against the
float64 truth. What this cannot show: docs/cuda.md."""

import math
import shutil
import sys

import pytest
import torch
from host_device.runner import DTYPES, Failed, host_device

from seqfuse import reference
from seqfuse.testing import assert_accurate

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="needs Linux and a C++ compiler on the PATH",
)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    return host_device(tmp_path_factory.mktemp)


class Heads:
    """A tensor [B, H, T, D] in one of the layouts that the contract allows, its gaps full of NaN."""

    def __init__(self, layout, B, H, T, D):
        self.shape = (B, H, T, D)
        if layout == "bthd":  # as a projection leaves it
            self.strides = (T * H * D, D, H * D)
        elif layout == "padded":  # a slice of wider rows, heads and batches
            self.strides = (H * (T + 1) * (D + 8) + 24, (T + 1) * (D + 8), D + 8)
        else:
            self.strides = (H * T * D, T * D, D)
        self.count = (
            0 if 0 in self.shape else sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=False)) + D
        )

    def numbers(self, name):
        return {f"{name}_{d}": s for d, s in zip("bht", self.strides, strict=True)}

    def view(self, flat):
        return flat.as_strided(self.shape, (*self.strides, 1))

    def store(self, x):
        flat = torch.full((self.count,), float("nan"), dtype=x.dtype)
        self.view(flat).copy_(x)
        return flat


def sample(B, Hq, Hkv, Tq, Tk, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def forward(host, q, k, v, causal, scale, layout="dense", **numbers):
    (B, Hq, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    layouts = {n: Heads(layout, *t.shape) for n, t in (("q", q), ("k", k), ("v", v), ("out", q))}
    numbers |= {"B": B, "Hq": Hq, "Hkv": Hkv, "Tq": Tq, "Tk": Tk, "D": D, "causal": causal, "scale": float(scale)}
    numbers["dtype"] = DTYPES[q.dtype]
    for name, here in layouts.items():
        numbers |= here.numbers(name)
    inputs = {n: layouts[n].store(t) for n, t in (("q", q), ("k", k), ("v", v))}
    outputs = {"out": (layouts["out"].count, q.dtype), "lse": (B * Hq * Tq, torch.float32)}
    found = host("attention_forward", numbers, inputs, outputs)
    gaps = torch.ones(layouts["out"].count, dtype=torch.bool)
    layouts["out"].view(gaps).fill_(False)
    assert found["out"][gaps].isnan().all(), "written between the rows of out"
    return layouts["out"].view(found["out"]), found["lse"].view(B, Hq, Tq)


def truth(q, k, v, causal, scale, dtype=torch.float64):
    options = reference.AttentionOptions(scale=scale, window_right=0 if causal else -1)
    return reference.attention(q.to(dtype), k.to(dtype), v.to(dtype), options)


def check(host, B, Hq, Hkv, Tq, Tk, D, dtype, causal, scale=None, seed=0, **options):
    q, k, v = sample(B, Hq, Hkv, Tq, Tk, D, dtype, seed)
    scale = D**-0.5 if scale is None else scale
    out, lse = forward(host, q, k, v, causal, scale, seed=seed + 1, **options)
    true, theirs = truth(q, k, v, causal, scale), truth(q, k, v, causal, scale, dtype)
    assert_accurate(out, true[0], theirs[0], dims=(0, 1, 2), what="out")
    assert_accurate(lse, true[1], theirs[1], dims=(0, 1, 2), what="lse")
    return out, lse


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_forward(host, dtype, D, causal):
    check(host, 1, 2, 1, 300, 300, D, HALVES[dtype], causal)
