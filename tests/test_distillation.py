"""kl_loss against torch's log_softmax on whole logits in float64."""

import pytest
import torch

import seqfuse
from seqfuse import reference
from seqfuse.ops import loss_blocks
from seqfuse.testing import assert_accurate


def sample(dtype):
    shapes = (13, 8), (37, 8), (13, 6), (37, 6)
    return [torch.randn(s).to(dtype) for s in shapes], torch.rand(13) < 0.7


def run(call, tensors, dtype=None):
    leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_(i < 2) for i, t in enumerate(tensors)]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, leaves[:2])]


def plain(mask, temperature, reduction):
    def call(*tensors):
        losses = reference.kl(*tensors, mask, temperature)
        count = len(losses) if mask is None else mask.sum()
        return losses.sum() / (count if reduction == "mean" else 1)

    return call


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernel_keeps_the_error_rule(isa, dtype, reduction, masked, monkeypatch):
    monkeypatch.setattr(loss_blocks, "_BLOCK", 5 * 74)  # several blocks
    monkeypatch.setitem(loss_blocks._LEAST_TOKENS, "cpu", 1)
    tensors, mask = sample(dtype)
    mask = mask if masked else None

    def ours(*tensors):
        with seqfuse.backend("cpu"):
            return seqfuse.ops.kl_loss(*tensors, mask=mask, temperature=2.0, reduction=reduction)

    call = plain(mask, 2.0, reduction)
    for a, b, c in zip(run(ours, tensors), run(call, tensors, torch.float64), run(call, tensors), strict=True):
        assert_accurate(a, b, c, dims=(0,) if a.dim() == 2 else ())


def test_bf16_logits_in_the_kernel(isa):
    """Where ATen has fast bf16 products, the kernel sees bf16 logits."""
    student, teacher = (torch.randn(5, 70).mul(2).bfloat16() for _ in range(2))

    def call(s, t):
        q, p = (v.to(torch.promote_types(v.dtype, torch.float32)).log_softmax(1) for v in (s, t))
        return (p.exp() * (p - q)).sum(1)

    gradient = torch.empty_like(student)
    loss = torch.ops.seqfuse.kl_rows(student, teacher, None, torch.ones(1), gradient, 1.0)
    assert_accurate(loss, call(student.double(), teacher.double()), call(student, teacher))
    exact = student.double().softmax(1) - teacher.double().softmax(1)
    assert_accurate(gradient, exact, (student.float().softmax(1) - teacher.float().softmax(1)).bfloat16(), dims=(0,))


def test_double_backward_compile_and_opcheck():
    tensors, mask = sample(torch.float32)

    def ours(*tensors):
        with seqfuse.backend("cpu"):
            return seqfuse.ops.kl_loss(*tensors, mask=mask)

    def second(call, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_(i < 2) for i, t in enumerate(tensors)]
        first = torch.autograd.grad(call(*leaves), leaves[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:2])

    call = plain(mask, 1.0, "mean")
    got, exact, theirs = second(ours, torch.float32), second(call, torch.float64), second(call, torch.float32)
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c)
    compiled = torch.compile(lambda *t: seqfuse.ops.kl_loss(*t, mask=mask), fullgraph=True)
    for a, b, c in zip(run(compiled, tensors), run(call, tensors, torch.float64), run(call, tensors), strict=True):
        assert_accurate(a, b, c)
    op = torch.ops.seqfuse_composed.kl.default
    for scale in (None, torch.ones(1)):
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(op, (*tensors, mask, scale, 1.0, wanted, "cpu"))


def test_bad_input_gets_one_sentence():
    tensors, mask = sample(torch.float32)
    with pytest.raises(ValueError, match="temperature must be positive"):
        seqfuse.ops.kl_loss(*tensors, temperature=0.0)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        seqfuse.ops.kl_loss(*tensors, mask=mask.float())
    with pytest.raises(ValueError, match="reduction must be mean or sum"):
        seqfuse.ops.kl_loss(*tensors, reduction="none")
    with pytest.raises(TypeError, match="temperature must be a number, got '1'"):
        seqfuse.ops.kl_loss(*tensors, temperature="1")


def test_autocast_converts_all_four():
    tensors, _ = sample(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = seqfuse.ops.kl_loss(*(t.bfloat16() if i % 2 else t for i, t in enumerate(tensors)))
    torch.testing.assert_close(mixed, seqfuse.ops.kl_loss(*(t.bfloat16() for t in tensors)))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors, _ = sample(torch.float32)
    leaves = [t.clone().requires_grad_(i in (0, 1) and i != frozen) for i, t in enumerate(tensors)]
    whole = [t.clone().requires_grad_(i in (0, 1)) for i, t in enumerate(tensors)]
    for each in (leaves, whole):
        seqfuse.ops.kl_loss(*each).backward()
    assert leaves[frozen].grad is None and torch.equal(leaves[1 - frozen].grad, whole[1 - frozen].grad)
