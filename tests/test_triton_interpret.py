"""Every Triton kernel in the interpreter, against the float64 reference by the error rule.

Needs TRITON_INTERPRET=1 before Triton is imported, hence a pytest process of its own. bf16 is never used here: the
interpreter computes it wrongly without a word (Triton 3.9); tests/test_triton_gpu.py runs the same checks on a GPU.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton_checks as checks
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfuse.kernels import common, layer_norm, rnn_plan

pytestmark = pytest.mark.interpret

DTYPES = (torch.float32, torch.float16)
CELLS = tuple(rnn_plan.GATES)


def tiles(tier: str) -> rnn_plan.LaunchPlan:
    """A plan of the smallest tiles, so that small tensors already take several of them and several trips of loops."""
    step = rnn_plan.Tiles(16, 16, 16, 1, 1)
    tile = rnn_plan.Tiles(16, 32, 0, 1, 0)
    return rnn_plan.LaunchPlan(tier, *((step, step) if tier == "step" else (tile, tile)), 0, "test")


def test_interpreting():
    assert common.interpreting()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m,n",
    [(1, 1), (70, 3), (5, 64), (33, 100), (9, 257), (3, 3000), (5, 8300)],
    ids=lambda v: str(v),
)
def test_layer_norm(m, n, dtype):
    checks.layer_norm(m, n, dtype, "cpu", residual=True, ds=True)


def test_layer_norm_very_wide():
    """Beyond the block tables in both directions."""
    assert common.blocks("layer_norm_fwd", 33000, 2, (9, 0)) is None
    checks.layer_norm(1, 33000, torch.float16, "cpu")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"residual": False, "ds": False},
        {"weight": False},
        {"bias": False},
        {"weight": False, "bias": False, "residual": True, "ds": False},
        {"param_dtype": torch.float32},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_layer_norm_options(chunked, options, monkeypatch):
    if chunked:  # the kernels for rows that do not fit in registers, on a row of several chunks
        monkeypatch.setattr(common, "blocks", lambda *_: None)
        monkeypatch.setattr(layer_norm, "_CHUNK", 64)
        monkeypatch.setattr(layer_norm, "_COLUMN_TILE", (2, 64))
    checks.layer_norm(21, 200, torch.float16, "cpu", **options)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_layer_norm_any(m, n, dtype, residual, weight, bias, seed):
    checks.layer_norm(m, n, dtype, "cpu", residual=residual, ds=residual, weight=weight, bias=bias, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", ["step", "tile"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("t,b,h", [(1, 1, 1), (4, 17, 20), (3, 2, 32)], ids=lambda v: str(v))
def test_rnn_scan(cell, tier, t, b, h, dtype):
    checks.rnn_scan(cell, t, b, h, dtype, "cpu", plan=tiles(tier))


@pytest.mark.parametrize("tier", ["step", "tile"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    [
        {"reverse": True, "batch_major": True},
        {"bias": False, "dh_n": False, "dc_n": False},
        {"dy": False, "strided_dy": False},
        {"strided_dy": True, "batch_major": True},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_rnn_scan_options(cell, tier, options):
    checks.rnn_scan(cell, 3, 5, 19, torch.float32, "cpu", plan=tiles(tier), **options)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("h", [24, 130])
def test_rnn_scan_planned(cell, h):
    """The tiles that a GPU would be given, not the test's small ones."""
    checks.rnn_scan(cell, 2, 3, h, torch.float16, "cpu", plan=None)


@pytest.mark.parametrize("tier", ["step", "tile"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_inference_saves_nothing_and_agrees(cell, tier):
    checks.rnn_inference(cell, 3, 4, 21, torch.float32, "cpu", plan=tiles(tier))


@pytest.mark.parametrize("tier", ["step", "tile"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_nan_propagates(cell, tier):
    checks.rnn_nan(cell, torch.float32, "cpu", plan=tiles(tier))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    cell=st.sampled_from(CELLS),
    tier=st.sampled_from(["step", "tile"]),
    t=st.integers(1, 4),
    b=st.integers(1, 18),
    h=st.integers(1, 32),
    dtype=st.sampled_from(DTYPES),
    reverse=st.booleans(),
    batch_major=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rnn_scan_any(cell, tier, t, b, h, dtype, reverse, batch_major, bias, seed):
    checks.rnn_scan(
        cell, t, b, h, dtype, "cpu", plan=tiles(tier), reverse=reverse, batch_major=batch_major, bias=bias, seed=seed
    )
