"""Preference losses on log-probabilities of given tokens, which linear_cross_entropy makes without logits in memory."""

import torch
import torch.nn.functional as F

from seqfuse.ops import checks
from seqfuse.ops.cross_entropy import linear_cross_entropy


def linear_log_probs(x, weight, target, *, bias=None, ignore_index=-100, softcap=None):
    """log softmax(x @ weight^T + bias)[target], 0 where the target is ignored: x [..., D], weight [V, D], target [...].

    Returns [...] (float32 for 16-bit x). The backward pass makes the logits once more, a block at a time.
    """
    return -linear_cross_entropy(
        x, weight, target, bias=bias, ignore_index=ignore_index, softcap=softcap, reduction="none"
    )


def _pairs(op, x, target):
    checks.tensor(op, "x", x, (3,))
    if x.shape[0] % 2:
        raise ValueError(f"{op}: x must hold chosen answers, then as many rejected ones, got {checks.describe(x)}")
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be an int64 tensor of class indices, got {checks.describe(target)}")
    checks.shape(op, "target", target, x.shape[:2])


def _log_of_other(log_p):
    """log(1 - p). An answer that is certain counts as one that is as good as certain: its odds have no end."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(log_p > -0.7, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


def dpo_loss(
    x, weight, target, reference_log_probs, *, bias=None, beta=0.1, label_smoothing=0.0, ignore_index=-100, softcap=None
):
    """Direct preference optimisation: -log sigmoid(beta ((log p_c - log r_c) - (log p_r - log r_r))), mean over pairs.

    x: hidden states [2B, T, D], B chosen answers and then the B rejected ones; weight [V, D], bias [V]; target [2B, T],
    ignored where a token is no part of an answer. reference_log_probs: [2B], the sums of the reference model's
    log-probabilities of each answer (linear_log_probs(...).sum(1), without gradients). label_smoothing: the probability
    that a preference is the wrong way round. Returns a scalar.
    Raises TypeError or ValueError on bad arguments.
    Source: Rafailov et al. 2023, equation 7 (arXiv:2305.18290); label smoothing: Mitchell 2023 (conservative DPO).
    """
    _pairs("dpo_loss", x, target)
    checks.number("dpo_loss", "beta", beta, 0.0)
    checks.number("dpo_loss", "label_smoothing", label_smoothing, 0.0, 1.0)
    checks.tensor("dpo_loss", "reference_log_probs", reference_log_probs)
    checks.shape("dpo_loss", "reference_log_probs", reference_log_probs, x.shape[:1])
    checks.same_device("dpo_loss", "reference_log_probs", reference_log_probs, "x", x)
    log_probs = linear_log_probs(x, weight, target, bias=bias, ignore_index=ignore_index, softcap=softcap)
    chosen, rejected = (log_probs.sum(1) - reference_log_probs).chunk(2)
    margin = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses.mean()


def orpo_loss(x, weight, target, *, bias=None, lam=0.1, ignore_index=-100, softcap=None):
    """Odds-ratio preference optimisation: NLL of the chosen tokens - lam * mean log sigmoid(log odds_c - log odds_r).

    odds = p / (1 - p) of an answer's mean log-probability a token, log p. x, weight, bias and target as in dpo_loss; no
    reference model. Every answer must have a token that is not ignored. Returns a scalar.
    Raises TypeError or ValueError on bad arguments.
    Source: Hong, Lee, Thorne 2024, equations 6 and 7 (arXiv:2403.07691).
    """
    _pairs("orpo_loss", x, target)
    checks.number("orpo_loss", "lam", lam)
    log_probs = linear_log_probs(x, weight, target, bias=bias, ignore_index=ignore_index, softcap=softcap)
    counts = (target != ignore_index).sum(1)
    chosen, rejected = (log_probs.sum(1) / counts).chunk(2)
    log_odds = (chosen - rejected) - (_log_of_other(chosen) - _log_of_other(rejected))
    half = x.shape[0] // 2
    nll = -log_probs[:half].sum() / counts[:half].sum()
    return nll - lam * F.logsigmoid(log_odds).mean()
