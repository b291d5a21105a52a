"""Luong's attention with its readout (Luong et al. 2015, arXiv:1508.04025, section 3.1), several queries a source."""

import torch


def luong_readout(query, keys, values, added, lengths=None):
    """tanh(added + softmax(query . keys) values): see csrc/include/seqfuse/luong.h. Any floating-point dtype."""
    scores = torch.bmm(query.unflatten(0, (keys.shape[0], -1)), keys.transpose(1, 2))  # (S, n, T)
    if lengths is not None:
        padding = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]  # (S, T)
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    return torch.tanh(added + torch.bmm(scores.softmax(-1), values).flatten(0, 1))
