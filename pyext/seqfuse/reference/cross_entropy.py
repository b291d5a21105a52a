"""Cross entropy of logits, with label smoothing, class weights, a softcap and a z-loss; and of x @ weight^T."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class LossOptions(NamedTuple):
    """softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); 0: none.
    z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311). label_smoothing: arXiv:1512.00567."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0


def cross_entropy(logits, target, class_weight, options):
    """logits [N, V], target [N] int64, class_weight [V] or None. Returns the losses [N], 0 where ignored.

    (1 - eps) w (lse - u_t) + eps / V sum_j class_weight_j (lse - u_j) + z w lse^2, w = class_weight[t], in at least
    float32.
    """
    u = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap:
        u = options.softcap * torch.tanh(u / options.softcap)
    keep = target != options.ignore_index
    t = target.where(keep, 0)[:, None]
    lse = u.logsumexp(1)
    w = 1.0 if class_weight is None else class_weight.to(u.dtype)[t[:, 0]]
    eps = options.label_smoothing
    loss = (1 - eps) * w * (lse - u.gather(1, t)[:, 0])
    if eps:
        every = lse[:, None] - u
        loss = loss + eps * (every if class_weight is None else every * class_weight.to(u.dtype)).mean(1)
    if options.z_loss:
        loss = loss + options.z_loss * w * lse.square()
    return loss.where(keep, 0.0)


def linear_cross_entropy(x, weight, bias, target, class_weight, options):
    """cross_entropy of x @ weight^T + bias: x [N, D], weight [V, D], bias [V] or None. Returns the losses [N]."""
    return cross_entropy(F.linear(x, weight, bias), target, class_weight, options)


def loss_scale(target, class_weight, ignore_index, reduction, dtype):
    """What the sum of the losses is multiplied by: 1, or for "mean" one over the kept tokens' weights (infinite where
    nothing is kept: 0 * inf is then torch's NaN)."""
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=target.device)
    keep = target != ignore_index
    if class_weight is None:
        return 1.0 / keep.sum().to(dtype)
    return 1.0 / (class_weight.to(dtype)[target.where(keep, 0)] * keep).sum()
