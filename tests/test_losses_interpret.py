"""The Triton row kernels under cross_entropy, linear_cross_entropy and kl_loss, interpreted, by the CPU's checks."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import test_distillation as distillation
import test_losses as losses

import seqfuse
from seqfuse.kernels import cross_entropy
from seqfuse.testing import assert_accurate

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", losses.OPTIONS, ids=losses.ids)
@pytest.mark.parametrize("block", [16, 4096], ids=["several-blocks", "one-block"])
def test_keeps_the_error_rule(options, reduction, block, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_BLOCK", block)
    options = dict(options)
    tensors, target, cw = losses.sample(5, 37, 6, torch.float32, class_weight=options.pop("class_weight", False))
    losses.check(tensors, target, cw, reduction, backend="triton", **options)
    logits = (torch.randn(5, 37).mul(2).half(),)
    losses.check(logits, target, cw, reduction, given_logits=True, backend="triton", **options)


def test_a_target_out_of_range_gives_nan():
    target = torch.tensor([1, 9, -100])
    loss, _ = cross_entropy.cross_entropy_rows(torch.randn(3, 5), target, None, None, None, None, -100, 0.0, 0.0, 0.0)
    assert loss.isnan().tolist() == [False, True, False] and loss[2] == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("block", [16, 4096], ids=["several-blocks", "one-block"])
def test_kl_keeps_the_error_rule(dtype, block, masked, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_BLOCK", block)
    tensors, mask = distillation.sample(dtype)
    mask = mask if masked else None

    def ours(*tensors):
        with seqfuse.backend("triton"):
            return seqfuse.ops.kl_loss(*tensors, mask=mask, temperature=2.0)

    call = distillation.plain(mask, 2.0, "mean")
    exact, theirs = (distillation.run(call, tensors, d) for d in (torch.float64, None))
    for a, b, c in zip(distillation.run(ours, tensors), exact, theirs, strict=True):
        assert_accurate(a, b, c, dims=(0,) if a.dim() == 2 else (), dtype=dtype)


def test_kl_where_the_teacher_excludes_words():
    student, teacher = torch.randn(3, 40), torch.randn(3, 40)
    teacher[:, 5:9] = float("-inf")
    gradient = torch.empty_like(student)
    loss = cross_entropy.kl_rows(student, teacher, None, torch.ones(1), gradient, 1.0)
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    assert_accurate(loss, torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(1))
    assert_accurate(gradient, q - p, dims=(0,))


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_all_logits_have_in_common_does_not_round(offset, smoothing):
    logits, target = torch.randn(5, 77) + offset, torch.randint(0, 77, (5,))
    got, _ = cross_entropy.cross_entropy_rows(logits, target, None, None, None, None, -100, smoothing, 0.0, 0.0)
    options = dict(label_smoothing=smoothing, reduction="none")
    assert_accurate(got, torch.nn.functional.cross_entropy(logits.double(), target, **options))


@pytest.mark.parametrize("op", ["linear_cross_entropy", "kl_loss"])
def test_a_loss_scale_reaches_the_gradients_of_fp16_before_they_vanish(op):
    """1024 tokens and 600 words: a probability's share of the mean is about 1.6e-6, where fp16 has steps of 6e-8."""
    (x, weight, _), target, _ = losses.sample(1024, 600, 16, torch.float16)
    x, scale = x / 8, 2.0**14
    teacher = x.detach().flip(0)

    def run(x, weight, ours):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with seqfuse.backend("triton" if ours else "reference"):
            if op == "kl_loss":
                loss = seqfuse.ops.kl_loss(*leaves, teacher.to(x.dtype), weight)
            else:
                loss = seqfuse.ops.linear_cross_entropy(*leaves, target)
        return torch.autograd.grad(loss * scale, leaves)

    exact = run(x.double(), weight.double(), False)
    for got, wide in zip(run(x, weight, True), exact, strict=True):
        assert (got.double() - wide).norm() <= 1e-3 * wide.norm()


def test_smoothing_beside_words_that_are_ruled_out():
    """Finite logits that stand for none, with a class weight of zero or as a target's own."""
    logits, target = torch.randn(3, 37), torch.tensor([1, 2, 36])
    logits[0, 1] = torch.finfo(torch.float32).min
    logits[1, 2] = -1e30
    logits[2, :20] = -1e30
    weight = torch.ones(37)
    weight[2] = 0.0
    weight[:20] = 0.0
    for cw in (None, weight):
        got, _ = cross_entropy.cross_entropy_rows(logits, target, cw, None, None, None, -100, 0.1, 0.0, 0.0)
        wide = None if cw is None else cw.double()
        options = dict(weight=wide, label_smoothing=0.1, reduction="none")
        exact = torch.nn.functional.cross_entropy(logits.double(), target, **options)
        for a, b in zip(got.double(), exact, strict=True):
            assert (a - b).abs() <= 1e-6 * b.abs().clamp(min=1.0), (a, b)
