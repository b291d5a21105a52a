"""The Triton kernels under swiglu, geglu and rope, interpreted, by the checks of test_gated_and_rope.py."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import test_gated_and_rope as checks

import seqfuse
from seqfuse.kernels import gated, rope

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("activation", range(3), ids=checks.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (4, 257)], ids=str)
def test_gated(shape, dtype, activation, monkeypatch):
    monkeypatch.setattr(gated, "_BLOCK", 64)
    tensors = [torch.randn(shape).mul(2).to(dtype) for _ in range(3)]
    checks.check_gated(activation, *tensors, backend="triton")
    halves = torch.randn(shape[0], 2 * shape[1]).to(dtype).chunk(2, -1)  # rows that do not follow each other
    checks.check_gated(activation, *halves, tensors[2], backend="triton")


def test_no_rows():
    with seqfuse.backend("triton"):
        assert seqfuse.ops.swiglu(torch.randn(0, 4), torch.randn(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dim,half", [(2, 1), (64, 32), (20, 7)], ids=str)
def test_rope(dim, half, dtype, interleaved, monkeypatch):
    monkeypatch.setattr(rope, "_TILE", 64)
    cos, sin = checks.tables(9, half)
    checks.check_rope(torch.randn(2, 3, 5, dim).to(dtype), cos, sin, "triton", interleaved=interleaved, offset=4)
    transposed = torch.randn(2, 5, 3, dim).to(dtype).transpose(1, 2)
    for shape in ((2, 5), (5,)):
        positions = torch.randint(0, 9, shape)
        checks.check_rope(transposed, cos, sin, "triton", interleaved=interleaved, positions=positions)


def test_rope_in_place_and_beyond_the_tables():
    cos, sin = checks.tables(7, 3)
    x = torch.randn(2, 4, 7, 10)
    with seqfuse.backend("triton"):
        turned, copy = seqfuse.ops.rope(x, cos, sin), x.clone()
        assert seqfuse.ops.rope(copy, cos, sin, inplace=True) is copy and torch.equal(copy, turned)
        beyond = seqfuse.ops.rope(x, cos, sin, positions=torch.tensor([0, 1, 2, 3, 4, 5, 7]))
    assert torch.equal(beyond[:, :, :6], turned[:, :, :6])
    assert beyond[:, :, 6, :6].isnan().all() and torch.equal(beyond[:, :, 6, 6:], x[:, :, 6, 6:])
