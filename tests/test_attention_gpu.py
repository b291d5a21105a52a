"""The Triton attention kernels on a real GPU: the interpreter's checks, bf16 too, planned tiles, identical repeats.

Not yet run: no GPU was there when this was written.
"""

import itertools
import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import attention_checks as checks

from seqfuse.kernels import common

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(common.interpreting(), reason="the interpreter replaces the compiler in this process"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [pair for pair in itertools.combinations(checks.OPTIONS, 2) if checks.composes(pair)]
GPU = {"device": "cuda", "tiles": None}


@pytest.mark.parametrize("deterministic", (True, False), ids=("two-kernels", "atomics"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ("plain", *checks.OPTIONS))
def test_option(option, dtype, deterministic):
    names = () if option == "plain" else (option,)
    checks.attend(names, 2, 4, 2, 300, 413, 64, dtype=dtype, deterministic=deterministic, repeat=deterministic, **GPU)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair_of_options(pair):
    checks.attend(pair, 2, 4, 1, 257, 300, 128, dtype=torch.bfloat16, repeat=True, **GPU)


@pytest.mark.parametrize("D,DV", [(1, 1), (33, 80), (96, 96), (128, 64), (200, 256), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimension(dtype, D, DV):
    checks.attend(("causal",), 2, 4, 4, 511, 640, D, DV, dtype=dtype, heads_inside=True, repeat=True, **GPU)


@pytest.mark.parametrize("seed", range(40))
def test_random_configuration(seed):
    r = random.Random(seed)
    names = tuple(n for n in checks.OPTIONS if r.random() < 0.4)
    names = names if checks.composes(names) else tuple(n for n in names if n != "packed")
    Hkv = r.choice((1, 2, 3))
    checks.attend(
        names, r.randint(1, 3), Hkv * r.choice((1, 2, 5)), Hkv, r.randint(1, 600), r.randint(8, 700), r.randint(1, 256),
        r.randint(1, 256), dtype=r.choice(DTYPES), deterministic=r.random() < 0.5, seed=seed, **GPU,
    )  # fmt: skip


@pytest.mark.parametrize("page", (0, 16, 256), ids=("dense", "page16", "page256"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype, page):
    checks.decode((4096, 1, 333), H=16, T=4096, D=128, dtype=dtype, page=page, append=1, repeat=True, **GPU)
    checks.decode((2048, 77), Tq=5, H=8, T=2048, D=80, dtype=dtype, page=page, alibi=True, window=(500, 0), **GPU)
