"""The Triton attention kernels in the interpreter, against the float64 reference by the error rule.

As tests/test_triton_interpret.py: needs TRITON_INTERPRET=1 in a process of its own, and never uses bf16.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import attention_checks as checks
from seqfuse import reference
from seqfuse.kernels import attention, common
from seqfuse.kernels.attention_plan import Tiles

pytestmark = pytest.mark.interpret

FP16, FP32 = torch.float16, torch.float32
PAIRS = [pair for pair in itertools.combinations(checks.OPTIONS, 2) if checks.composes(pair)]


def test_interpreting():
    assert common.interpreting()


@pytest.mark.parametrize("deterministic", (True, False), ids=("two-kernels", "atomics"))
@pytest.mark.parametrize("option", ("plain", *checks.OPTIONS))
def test_option(option, deterministic):
    checks.attend(() if option == "plain" else (option,), dtype=FP16, deterministic=deterministic)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair_of_options(pair):
    B = 2 if {"bias", "key_lengths", "query_start"} & set(pair) else 1
    checks.attend(pair, B=B, H=1, Tq=19, Tk=21, seed=len("-".join(pair)))


@pytest.mark.parametrize("deterministic", (True, False), ids=("two-kernels", "atomics"))
@pytest.mark.parametrize("packed", (True, False), ids=("packed", "padded"))
def test_all_options(packed, deterministic):
    names = [n for n in checks.OPTIONS if (n != "packed" if not packed else n not in checks.NOT_PACKED)]
    checks.attend(names, H=4, Hkv=2, Tq=33, Tk=20, D=24, DV=9, deterministic=deterministic, heads_inside=True)


@pytest.mark.parametrize(
    "B,H,Hkv,Tq,Tk,D,DV",
    [(1, 1, 1, 1, 1, 1, 1), (1, 3, 3, 5, 40, 7, 20), (1, 2, 1, 40, 3, 33, 33), (1, 1, 1, 17, 17, 256, 200)],
    ids=str,
)
def test_shape(B, H, Hkv, Tq, Tk, D, DV):
    checks.attend(("causal",), B, H, Hkv, Tq, Tk, D, DV, dtype=FP16, dlse=False)


def test_forward_of_the_widest_head():
    q, k, v = (torch.randn(1, 1, n, 500) for n in (3, 18, 18))
    o = reference.AttentionOptions(scale=0.04)
    out, _ = attention.attention_fwd(q, k, v, *o, tiles=checks.SMALL)
    truth, _ = reference.attention(q.double(), k.double(), v.double(), o)
    checks.assert_accurate(out, truth, reference.attention(q, k, v, o)[0], dims=(2,))


@pytest.mark.parametrize("scale", (0.0, -0.3), ids=str)
def test_scale(scale):
    checks.attend(("causal",), B=1, scale=scale)
