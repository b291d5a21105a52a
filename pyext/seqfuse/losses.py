"""What learning from preferences adds to the fused losses: a reward model's loss, advantages, and clipped updates.

    reward model    bradley_terry_loss of the rewards of two answers
    on the policy   group_advantages (GRPO) or penalised_rewards and gae (PPO), then grpo_loss or ppo_loss
    how far away    kl_estimate of the policy from its reference

Everything here reads log-probabilities of tokens that were said, which ops.linear_log_probs makes without logits in
memory; ops.dpo_loss and ops.orpo_loss need no samples. B answers, T tokens; mask: bool [B, T], the tokens that the
policy chose (a prompt and padding are none), in one piece in each row. What stands where mask is False is not read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqfuse.ops import checks


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, reduction: str = "mean") -> Tensor:
    """-log sigmoid(chosen - rejected), the negative log-likelihood of a preference: rewards [B] of both answers.

    reduction: mean, sum or none ([B]). Raises TypeError or ValueError on bad arguments.
    Source: Bradley and Terry 1952; as a reward model's loss: Ouyang et al. 2022, equation 1 (arXiv:2203.02155), for
    pairs.
    """
    checks.tensor("bradley_terry_loss", "chosen", chosen, (1,))
    checks.tensor("bradley_terry_loss", "rejected", rejected, (1,))
    checks.shape("bradley_terry_loss", "rejected", rejected, chosen.shape)
    return _reduced("bradley_terry_loss", -F.logsigmoid(chosen - rejected), reduction)


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, kind: str = "k3") -> Tensor:
    """KL(policy || reference) from tokens that the policy drew, an estimate for each: both [...] -> [...].

    With d = log_probs - reference_log_probs: "k1" is d, unbiased, of either sign; "k3" is exp(-d) - 1 + d, unbiased,
    never negative and of less variance. Raises TypeError or ValueError on bad arguments.
    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    for name, tensor in (("log_probs", log_probs), ("reference_log_probs", reference_log_probs)):
        checks.tensor("kl_estimate", name, tensor)
    checks.shape("kl_estimate", "reference_log_probs", reference_log_probs, log_probs.shape)
    if kind not in ("k1", "k3"):
        raise ValueError(f"kl_estimate: kind must be k1 or k3, got {kind!r}")
    d = log_probs - reference_log_probs
    return d if kind == "k1" else torch.expm1(-d) + d


def clipped_surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """-min(r A, clamp(r, 1 - clip, 1 + clip) A) of each token, r = exp(log_probs - old_log_probs): [B, T].

    old_log_probs [B, T]: of the policy that drew the tokens; advantages: A, [B, T] or [B, 1].
    Source: Schulman et al. 2017, equation 7 (arXiv:1707.06347).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


# ---------------------------------------------------------------------------------------------------------------- GRPO


def group_advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / standard deviation within each group of answers to one prompt: [groups, answers] -> the same.

    The deviation is that of the group itself (divided by its size); answers of equal reward have the advantage 0.
    Raises TypeError or ValueError on bad arguments. Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300).
    """
    checks.tensor("group_advantages", "rewards", rewards, (2,))
    if rewards.shape[1] < 2:
        raise ValueError(f"group_advantages: a group must have two answers at least, got {checks.describe(rewards)}")
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, correction=0, keepdim=True)
    return centred / (deviation + 1e-6)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
    reduction: str = "mean",
) -> Tensor:
    """Group relative policy optimisation: the clipped surrogate and beta * k3, meaned over the tokens of each answer.

    log_probs (with gradient), old_log_probs, reference_log_probs: [B, T] of the policy, of the one that drew the
    tokens, of the reference; advantages: [B], group_advantages(...).flatten(). reduction: over answers.
    Raises TypeError or ValueError on bad arguments. Source: Shao et al. 2024, equation 3 (arXiv:2402.03300).
    """
    _tokens("grpo_loss", mask, log_probs=log_probs, old_log_probs=old_log_probs,
            reference_log_probs=reference_log_probs)  # fmt: skip
    checks.tensor("grpo_loss", "advantages", advantages)
    checks.shape("grpo_loss", "advantages", advantages, log_probs.shape[:1])
    log_probs, old, reference = (_where(mask, t) for t in (log_probs, old_log_probs, reference_log_probs))
    losses = clipped_surrogate(log_probs, old, advantages[:, None], clip)
    losses = losses + beta * kl_estimate(log_probs, reference)
    of_answers = _where(mask, losses).sum(1) / mask.sum(1).clamp_min(1)
    return _reduced("grpo_loss", of_answers, reduction)


# ----------------------------------------------------------------------------------------------------------------- PPO


def penalised_rewards(
    rewards: Tensor, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """The reward of each token: -beta * k1, and at an answer's last token also the reward [B] of it all. -> [B, T].

    log_probs, reference_log_probs: [B, T]. Raises TypeError or ValueError on bad arguments.
    Source: Ziegler et al. 2019, equation 2 (arXiv:1909.08593); Ouyang et al. 2022, equation 2 (arXiv:2203.02155).
    """
    _tokens("penalised_rewards", mask, log_probs=log_probs, reference_log_probs=reference_log_probs)
    checks.tensor("penalised_rewards", "rewards", rewards)
    checks.shape("penalised_rewards", "rewards", rewards, log_probs.shape[:1])
    penalties = _where(mask, -beta * kl_estimate(log_probs, reference_log_probs, "k1"))
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return penalties + _where(last, rewards[:, None].expand_as(penalties))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), [B, T] each, 0 where mask is False.

    rewards: [B, T] that each token brought; values: [B, T], what the critic expected before it. Behind an answer's last
    token nothing comes. returns = advantages + values, what the critic is to learn. Raises TypeError or ValueError.
    Source: Schulman et al. 2016, equation 16 (arXiv:1506.02438).
    """
    _tokens("gae", mask, rewards=rewards, values=values)
    rewards, values = _where(mask, rewards), _where(mask, values)
    advantages = torch.zeros_like(values)
    later = later_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        later = _where(mask[:, t], delta + gamma * lam * later)
        later_value, advantages[:, t] = values[:, t], later
    return advantages, advantages + values


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    value_weight: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Proximal policy optimisation: the clipped surrogate and value_weight * (values - returns)^2, over all tokens.

    All [B, T]; log_probs and values have gradients, advantages and returns are gae's. No bonus for entropy: what keeps
    the policy near its reference is the penalty in the rewards. reduction: mean or sum over tokens, or none ([B, T]).
    Raises TypeError or ValueError on bad arguments. Source: Schulman et al. 2017, equation 9 (arXiv:1707.06347).
    """
    every = dict(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, values=values,
                 returns=returns)  # fmt: skip
    _tokens("ppo_loss", mask, **every)
    log_probs, old, advantages, values, returns = (_where(mask, t) for t in every.values())
    losses = clipped_surrogate(log_probs, old, advantages, clip) + value_weight * (values - returns).square()
    return _reduced("ppo_loss", losses, reduction, mask.sum())  # they are 0 where mask is False


# ------------------------------------------------------------------------------------------------------------- helpers


def _where(mask: Tensor, tensor: Tensor) -> Tensor:
    return torch.where(mask, tensor, 0.0)


def _tokens(op: str, mask: Tensor, **tensors: Tensor) -> None:
    """Floating-point tensors of one shape [B, T], and a mask of it."""
    (first, like), *_ = tensors.items()
    for name, tensor in tensors.items():
        checks.tensor(op, name, tensor, (2,))
        checks.shape(op, name, tensor, like.shape)
        checks.same_device(op, name, tensor, first, like)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be a bool tensor, got {checks.describe(mask)}")
    checks.shape(op, "mask", mask, like.shape)


def _reduced(op: str, losses: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be mean, sum or none, got {reduction!r}")
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (losses.numel() if count is None else count)
