"""torch.nn.TransformerEncoderLayer and TransformerDecoderLayer on seqfuse's attention and fused residual norms."""

import torch

from seqfuse import explanation
from seqfuse.nn.attention import MultiheadAttention
from seqfuse.nn.layer_norm import LayerNorm


def _add_norm(norm, x, residual):
    """(norm(x + residual), x + residual); in one pass over memory where the norm is ours."""
    if isinstance(norm, LayerNorm):
        return norm(x, residual)
    s = x + residual
    return norm(s), s


def _use_ours(layer, attentions, norms):
    """Classes of the parts of a layer that torch's constructor made: the same objects, parameters and keys."""
    for name in attentions:
        getattr(layer, name).__class__ = MultiheadAttention
    for name in norms:
        getattr(layer, name).__class__ = LayerNorm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: its constructor, parameters, arguments and outputs; also inside
    torch.nn.TransformerEncoder. Nested tensors (its padded input in inference) go to PyTorch's own op."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _use_ours(self, ("self_attn",), ("norm1", "norm2"))

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if src.is_nested:
            explanation.handed_over(self, "the input is nested: PyTorch's own op")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if not self.norm_first:
            x, _ = _add_norm(self.norm1, self._sa_block(src, src_mask, src_key_padding_mask, is_causal), src)
            return _add_norm(self.norm2, self._ff_block(x), x)[0]
        x = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
        y, x = _add_norm(self.norm2, x, src)
        return x + self._ff_block(y)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: its constructor, parameters, arguments and outputs; also inside
    torch.nn.TransformerDecoder."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _use_ours(self, ("self_attn", "multihead_attn"), ("norm1", "norm2", "norm3"))

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=False,
        memory_is_causal=False,
    ):
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        cross = memory, memory_mask, memory_key_padding_mask, memory_is_causal
        if not self.norm_first:
            x, _ = _add_norm(self.norm1, self._sa_block(tgt, *own), tgt)
            x, _ = _add_norm(self.norm2, self._mha_block(x, *cross), x)
            return _add_norm(self.norm3, self._ff_block(x), x)[0]
        y, x = _add_norm(self.norm2, self._sa_block(self.norm1(tgt), *own), tgt)
        y, x = _add_norm(self.norm3, self._mha_block(y, *cross), x)
        return x + self._ff_block(y)
