"""torch.nn.MultiheadAttention on seqfuse.ops.scaled_dot_product_attention's kernels."""

import torch
import torch.nn.functional as F

from seqfuse import explanation
from seqfuse.ops.attention import attend_masked
from seqfuse.ops.attention_rules import AttentionCase


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its constructor, parameters, arguments and outputs.

    Padding and masks stay apart (torch adds them up into a float mask for every head), and nothing is transposed in
    memory on the way in. `need_weights=True` (torch's default) wants the matrix of weights, and nested tensors torch's
    own layout: those calls go to PyTorch's own op.
    """

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        if need_weights or query.is_nested or key.is_nested or value.is_nested:
            why = "need_weights=True returns the matrix of weights" if need_weights else "the input is nested"
            explanation.handed_over(self, f"{why}: PyTorch's own op")
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                                   is_causal)  # fmt: skip
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal=True is a hint about attn_mask, but attn_mask is None")
        if not batched:
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[None]
            if attn_mask is not None and attn_mask.dim() == 3:
                attn_mask = attn_mask[None]
        q, k, v = self._project(query, key, value)
        time = 1 if self.batch_first and batched else 0
        if not batched:
            q, k, v = (t[:, None] for t in (q, k, v))
        q, k, v = (self._heads(t, time) for t in (q, k, v))  # [B, H, T, D], views
        k, v, extra = self._extend(k, v)
        keys = k.shape[2] - extra
        hide, bias = self._masks(q, keys, key_padding_mask, None if is_causal else attn_mask)
        if extra:  # the keys that bias_k and add_zero_attn put at the end are seen by all
            hide, bias = (None if m is None else F.pad(m.expand(*m.shape[:-1], keys), (0, extra)) for m in (hide, bias))
            if is_causal and key_padding_mask is not None:  # without padding torch lets causal hide them too
                future = torch.ones(q.shape[2], keys, dtype=torch.bool, device=q.device).triu(1)
                hide = F.pad(future, (0, extra)) if hide is None else hide | F.pad(future, (0, extra))
                is_causal = False
        explanation.entering(self)
        out = attend_masked(
            q, k, v, None if hide is None else ~hide, bias, is_causal, self.dropout if self.training else 0.0
        )
        out = out.transpose(1, 2) if time == 1 else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (out if batched else out[:, 0]), None

    def _project(self, query, key, value):
        """What the three projections make of the inputs, in the inputs' layout."""
        bias, E = self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        elif key is value:
            (w_q, w_kv), (b_q, b_kv) = (
                self.in_proj_weight.split([E, 2 * E]),
                (None, None) if bias is None else bias.split([E, 2 * E]),
            )
            return F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x, time):
        """[B, T, E] (time 1) or [T, B, E] (time 0) as [B, H, T, D]."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if time == 1 else x.permute(1, 2, 0, 3)

    def _extend(self, k, v):
        """k and v with bias_k, bias_v and a key of zeros behind them, if there are such; and how many."""
        more = []
        if self.bias_k is not None:
            more.append([self._heads(b.to(k.dtype).expand(1, k.shape[0], -1), 0) for b in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            more.append([k.new_zeros(*k.shape[:2], 1, k.shape[3])] * 2)
        if not more:
            return k, v, 0
        return torch.cat([k, *(m[0] for m in more)], 2), torch.cat([v, *(m[1] for m in more)], 2), len(more)

    def _masks(self, q, keys, padding, mask):
        """(bool: hidden, float: added), each None or broadcasting to [B, H, Tq, keys]."""
        shaped = []
        if padding is not None:
            if padding.shape != (q.shape[0], keys):
                raise ValueError(f"MultiheadAttention: key_padding_mask must have shape {[q.shape[0], keys]}, got "
                                 f"{list(padding.shape)}")  # fmt: skip
            shaped.append(padding[:, None, None])
        if mask is not None:
            wanted = (q.shape[2], keys)
            if mask.dim() == 3:
                mask, wanted = mask.view(-1, self.num_heads, *mask.shape[1:]), (q.shape[0], self.num_heads, *wanted)
            elif mask.dim() == 4:  # unbatched, one for each head
                wanted = (1, self.num_heads, *wanted)
            if mask.shape != wanted:
                raise ValueError(
                    f"MultiheadAttention: attn_mask must have shape {list(wanted)}, got {list(mask.shape)}"
                )
            shaped.append(mask)
        hidden, added = [m for m in shaped if m.dtype == torch.bool], [m for m in shaped if m.dtype != torch.bool]
        hide = None if not hidden else hidden[0] if len(hidden) == 1 else hidden[0] | hidden[1]
        return hide, None if not added else sum(added[1:], added[0])

    called_op = "attention"  # what explain() may hear of it

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        weight, H = self.out_proj.weight, self.num_heads
        return self.called_op, AttentionCase(weight.device.type, weight.dtype, 8, H, H, 512, 512, self.head_dim,
                                          self.head_dim, self.training)  # fmt: skip
