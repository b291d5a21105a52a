"""losses.py against values that were computed by hand; the arithmetic stands in the comments."""

import math

import pytest
import torch

from seqfuse import losses
from seqfuse.testing import assert_accurate

D = torch.float64
OLD = torch.tensor([[-1.0, -2.0, -7.0]], dtype=D)  # log-probabilities of three tokens, the last of them padding
RATIO = torch.tensor([[1.5, 0.5, 9.0]], dtype=D)
NEW = OLD + RATIO.log()
MASK = torch.tensor([[True, True, False]])


def number(value, truth):
    assert_accurate(torch.as_tensor(value, dtype=D), torch.tensor(truth, dtype=D))


def test_bradley_terry():
    """Rewards 2 and 1: -log(1 / (1 + e^-1)) = log(1 + e^-1) = 0.3133; 0 and 3: log(1 + e^3) = 3.0486."""
    chosen, rejected = torch.tensor([2.0, 0.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)
    both = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    number(losses.bradley_terry_loss(chosen, rejected, reduction="none"), both)
    number(losses.bradley_terry_loss(chosen, rejected, reduction="sum"), sum(both))
    number(losses.bradley_terry_loss(chosen, rejected), sum(both) / 2)


def test_bradley_terry_gradient():
    """d/d chosen of -log sigmoid(c - r) = -sigmoid(r - c): at 2 and 1 it is -1 / (1 + e)."""
    chosen = torch.tensor([2.0], dtype=D, requires_grad=True)
    losses.bradley_terry_loss(chosen, torch.tensor([1.0], dtype=D)).backward()
    number(chosen.grad, [-1 / (1 + math.e)])


def test_kl_estimates():
    """d = log 2: k1 is log 2 and k3 is 1/2 - 1 + log 2; d = -log 3: k1 is -log 3 and k3 is 3 - 1 - log 3."""
    policy = torch.tensor([0.5, 0.2], dtype=D).log()
    reference = torch.tensor([0.25, 0.6], dtype=D).log()
    number(losses.kl_estimate(policy, reference, "k1"), [math.log(2), -math.log(3)])
    number(losses.kl_estimate(policy, reference, "k3"), [-0.5 + math.log(2), 2 - math.log(3)])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_have_no_bias(kind):
    """Over all tokens of a vocabulary, each as often as the policy says it, their mean is the divergence."""
    p, q = torch.randn(2, 7, dtype=D).softmax(-1)
    truth = (p * (p / q).log()).sum()
    assert_accurate((p * losses.kl_estimate(p.log(), q.log(), kind)).sum(), truth)


def test_group_advantages():
    """Rewards 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5. Equal rewards teach nothing."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=D)
    deviation = math.sqrt(3.5) + 1e-6
    truth = [[-2 / deviation, -1 / deviation, 0.0, 3 / deviation], [0.0, 0.0, 0.0, 0.0]]
    number(losses.group_advantages(rewards), truth)


@pytest.mark.parametrize(
    "advantage, surrogate",
    [
        (2.0, (-1.2 * 2.0, -0.5 * 2.0)),  # good: the gain ends at 1.2, a loss of probability counts as it is
        (-2.0, (1.5 * 2.0, 0.8 * 2.0)),  # bad: the other way round
    ],
)
def test_grpo(advantage, surrogate):
    """Ratios 1.5 and 0.5, clip 0.2, one advantage; the reference is the old policy, so d = log 1.5 and log 0.5:
    k3 = 2/3 - 1 + log 1.5 and 2 - 1 + log 0.5. The third token is padding."""
    k3 = [2 / 3 - 1 + math.log(1.5), 1 + math.log(0.5)]
    truth = sum(s + 0.1 * k for s, k in zip(surrogate, k3, strict=True)) / 2
    loss = losses.grpo_loss(NEW, OLD, OLD, torch.tensor([advantage], dtype=D), MASK, clip=0.2, beta=0.1)
    number(loss, truth)


def test_grpo_weighs_answers_alike():
    """An answer of one token counts as much as one of three: each is a mean of its own."""
    zeros = torch.zeros(2, 3, dtype=D)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([1.0, -3.0], dtype=D)
    number(losses.grpo_loss(zeros, zeros, zeros, advantages, mask, reduction="none"), [-1.0, 3.0])
    number(losses.grpo_loss(zeros, zeros, zeros, advantages, mask), 1.0)


def test_penalised_rewards():
    """Every token pays 0.5 * (log p - log q), the last one of the answer also earns the reward 4; padding nothing."""
    policy = torch.tensor([[-9.0, -1.0, -2.0, -9.0]], dtype=D)
    reference = torch.tensor([[-1.0, -3.0, -1.5, -1.0]], dtype=D)
    mask = torch.tensor([[False, True, True, False]])
    each = losses.penalised_rewards(torch.tensor([4.0], dtype=D), policy, reference, mask, 0.5)
    number(each, [[0.0, -1.0, 4.25, 0.0]])


def test_gae():
    """gamma 0.5, lam 0.5, rewards 1 and 2, values 3 and 4 at the two tokens of an answer:
    delta = 2 - 4 = -2 at the last, 1 + 0.5 * 4 - 3 = 0 before it; advantages -2 and 0 + 0.25 * -2 = -0.5."""
    rewards = torch.tensor([[7.0, 1.0, 2.0, 7.0]], dtype=D)
    values = torch.tensor([[7.0, 3.0, 4.0, 7.0]], dtype=D)
    mask = torch.tensor([[False, True, True, False]])
    advantages, returns = losses.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    number(advantages, [[0.0, -0.5, -2.0, 0.0]])
    number(returns, [[0.0, 2.5, 2.0, 0.0]])


def test_ppo():
    """Ratios 1.5 and 0.5 with advantages 2 and -2: -1.2 * 2 and 0.8 * 2; the critic is 1 and 2 off: 0.1 * (1 + 4)."""
    advantages = torch.tensor([[2.0, -2.0, 5.0]], dtype=D)
    values = torch.tensor([[1.0, 1.0, 5.0]], dtype=D)
    returns = torch.tensor([[2.0, 3.0, 0.0]], dtype=D)
    truth = -2.4 + 1.6 + 0.1 * 5
    args = (NEW, OLD, advantages, values, returns, MASK)
    number(losses.ppo_loss(*args, clip=0.2, value_weight=0.1, reduction="sum"), truth)
    number(losses.ppo_loss(*args, clip=0.2, value_weight=0.1), truth / 2)


def test_nothing_flows_beyond_the_clip():
    """The first token has gained its 1.2 and the advantage is good: no gradient is left; the second has -r A."""
    new = NEW.clone().requires_grad_()
    zeros = torch.zeros_like(new)
    advantages = torch.full_like(new, 2.0)
    losses.ppo_loss(new, OLD, advantages, zeros, zeros, MASK, reduction="sum").backward()
    number(new.grad, [[0.0, -0.5 * 2.0, 0.0]])


@pytest.mark.parametrize("loss", ["grpo", "ppo", "penalised", "gae"])
def test_padding_is_not_read(loss):
    """NaN in the padding changes nothing, gradients included."""
    found = []
    for filling in (0.0, float("nan")):
        new, old, other = (t.masked_fill(~MASK, filling) for t in (NEW, OLD, OLD - 1))
        new.requires_grad_()
        one = torch.ones(1, dtype=D)
        out = {
            "grpo": lambda new, old, other, one=one: losses.grpo_loss(new, old, other, one, MASK),
            "ppo": lambda new, old, other: losses.ppo_loss(new, old, other, new * 2, other, MASK),
            "penalised": lambda new, old, other, one=one: losses.penalised_rewards(one, new, other, MASK, 0.5).sum(),
            "gae": lambda new, old, other: losses.gae(new, old, MASK)[1].sum(),
        }[loss](new, old, other)
        out.backward()
        found.append((out.detach(), new.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match=r"rejected must have shape \[2\]"):
        losses.bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="kind must be k1 or k3, got 'k2'"):
        losses.kl_estimate(NEW, OLD, "k2")
    with pytest.raises(ValueError, match="two answers at least"):
        losses.group_advantages(torch.zeros(3, 1))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        losses.grpo_loss(NEW, OLD, OLD, torch.zeros(1), MASK.long())
    with pytest.raises(ValueError, match=r"advantages must have shape \[1\]"):
        losses.grpo_loss(NEW, OLD, OLD, torch.zeros(2), MASK)
    with pytest.raises(ValueError, match=r"returns must have shape \[1, 3\]"):
        losses.ppo_loss(NEW, OLD, OLD, OLD, OLD[:, :2], MASK)
    with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'max'"):
        losses.bradley_terry_loss(torch.zeros(2), torch.zeros(2), reduction="max")
