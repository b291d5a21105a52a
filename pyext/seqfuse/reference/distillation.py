"""Distillation: KL divergence between two softmaxes (Hinton, Vinyals, Dean 2015, arXiv:1503.02531)."""

import torch
import torch.nn.functional as F


def kl(x, weight, teacher_x, teacher_weight, mask, temperature):
    """x [N, D], weight [V, D], teacher_x [N, E], teacher_weight [V, E], mask bool [N] or None. Returns losses [N]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    log_q = F.log_softmax(F.linear(x, weight).to(dtype) / temperature, 1)
    log_p = F.log_softmax(F.linear(teacher_x, teacher_weight).to(dtype) / temperature, 1)
    loss = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)
    return loss if mask is None else loss.where(mask, 0.0)
