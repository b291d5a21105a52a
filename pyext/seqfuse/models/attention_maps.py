"""Where a transformer looks. Kernels never write attention's weights to memory; for a picture they are computed here.

    maps = attention_maps(model, ids)       # {"stack.blocks.0.attention": [B, H, T, T], ...}

Each attention's own queries and keys are taken again while the model runs, on plain PyTorch ops.
"""

import torch
from torch import Tensor, nn

from seqfuse.models.blocks import Attention, CrossAttention


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs, **options) -> dict[str, Tensor]:
    """The weights of every attention in model(*inputs, **options), by the module's name: float32 [B, H, T, S], of each
    of T queries over S keys. What a query does not see has 0; nothing is dropped out."""
    found: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module, arguments):
            found[name] = weights_of(module, *arguments)

        return hook

    kinds = (Attention, CrossAttention)
    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        model(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def weights_of(module: Attention | CrossAttention, x: Tensor, context, rotary=None) -> Tensor:
    """What module(x, context, rotary) weighs its values by."""
    if isinstance(module, Attention):
        q, k, _ = module.heads(x, context, rotary)
        causal, lengths = module.causal, None if module.causal else context.lengths
    else:
        q, (k, _) = module.queries(x), module.keys_and_values(context.memory)
        causal, lengths = False, context.source_lengths
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # heads that share keys
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5  # (B, H, T, S)
    T, S = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(torch.ones(T, S, device=x.device).triu(1).bool(), -torch.inf)
    if lengths is not None:
        there = torch.arange(S, device=x.device) < lengths[:, None]  # (B, S)
        scores = scores.masked_fill(~there[:, None, None], -torch.inf)
    return scores.softmax(-1)
