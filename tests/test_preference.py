"""dpo_loss and orpo_loss against their equations on whole logits in float64."""

import pytest
import torch
import torch.nn.functional as F

import seqfuse
from seqfuse.testing import assert_accurate


def sample():
    x, weight = torch.randn(6, 5, 8), torch.randn(20, 8) / 3
    target = torch.randint(0, 20, (6, 5))
    target[:, 0] = target[2, 3:] = -100
    return x, weight, target, -torch.rand(6) * 10


def log_probs(x, weight, target):
    return -F.cross_entropy(F.linear(x, weight).flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def plain_dpo(x, weight, target, reference, beta=0.2, smoothing=0.1):
    ratio = log_probs(x, weight, target).sum(1) - reference.to(x.dtype)
    margin = beta * (ratio[:3] - ratio[3:])
    return (-(1 - smoothing) * margin.sigmoid().log() - smoothing * (-margin).sigmoid().log()).mean()


def plain_orpo(x, weight, target, lam=0.3):
    every = log_probs(x, weight, target)
    p = (every.sum(1) / (target != -100).sum(1)).exp()
    odds = p / (1 - p)
    nll = -every[:3].sum() / (target[:3] != -100).sum()
    return nll - lam * (odds[:3] / odds[3:]).log().sigmoid().log().mean()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("which", ["dpo", "orpo"])
def test_losses_and_gradients(which, backend):
    x, weight, target, reference = sample()

    def ours(x, weight):
        with seqfuse.backend(backend):
            if which == "dpo":
                return seqfuse.ops.dpo_loss(x, weight, target, reference, beta=0.2, label_smoothing=0.1)
            return seqfuse.ops.orpo_loss(x, weight, target, lam=0.3)

    def plain(x, weight):
        return plain_dpo(x, weight, target, reference) if which == "dpo" else plain_orpo(x, weight, target)

    def run(call, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        loss = call(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    every = zip(run(ours, torch.float32), run(plain, torch.float64), run(plain, torch.float32), strict=True)
    for a, b, c in every:
        assert_accurate(a, b, c)


def test_bad_input_gets_one_sentence():
    x, weight, target, reference = sample()
    with pytest.raises(ValueError, match="as many rejected ones"):
        seqfuse.ops.orpo_loss(x[:5], weight, target[:5])
    with pytest.raises(ValueError, match=r"reference_log_probs must have shape \[6\]"):
        seqfuse.ops.dpo_loss(x, weight, target, reference[:3])
    with pytest.raises(TypeError, match="target must be an int64 tensor"):
        seqfuse.ops.orpo_loss(x, weight, target.float())
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1, got 5"):
        seqfuse.ops.dpo_loss(x, weight, target, reference, label_smoothing=5)
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        seqfuse.ops.dpo_loss(x, weight, target, reference, beta=-1)
    with pytest.raises(TypeError, match="beta must be a number, got 'a'"):
        seqfuse.ops.dpo_loss(x, weight, target, reference, beta="a")


def test_orpo_of_an_answer_that_is_certain():
    target = torch.randint(0, 8, (2, 5))
    x = torch.eye(8)[target].requires_grad_()
    loss = seqfuse.ops.orpo_loss(x, 200 * torch.eye(8), target)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
