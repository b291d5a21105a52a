"""Hugging Face transformers: seqfuse as an attention implementation, which fuse() switches a model to.

transformers is looked for among what is already imported: a model of its cannot be there without it.
"""

import sys

from seqfuse import explanation
from seqfuse.ops.attention import attend_masked

NAME = "seqfuse"
_CHANGES_THE_RESULT = ("sinks", "indices", "block_indices")  # of what some models hand over besides
_BEFORE = "_attention_before_seqfuse"  # in a model's __dict__: what unfuse goes back to


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    position_bias=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """transformers' attention interface: query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D] -> ([B, Tq, Hq, D], None).

    attention_mask: bool (True: seen) or added to the scores, or None: then causal modules are causal, top-left, as in
    transformers' own sdpa. position_bias: added too, with its gradient (T5). s_aux: [Hq], each head's attention sink, a
    key without a value (gpt-oss).
    """
    for name in _CHANGES_THE_RESULT:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"seqfuse's attention has no {name!r}, which {type(module).__name__} asks for: keep the model's own "
                "attention by fuse(model, exclude=[its class])"
            )
    Tq, Tk = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and Tq > 1
    bias = position_bias
    if attention_mask is not None and attention_mask.dtype.is_floating_point:
        bias = attention_mask if bias is None else bias + attention_mask
        attention_mask = None
    if attention_mask is not None:
        attention_mask = attention_mask[..., :Tk]
    explanation.entering(module)
    out = attend_masked(query, key, value, attention_mask, bias, causal, dropout, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _register(transformers):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _models(model):
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return []
    return [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]


def fuse(model, wanted) -> None:
    """Switch the Hugging Face models in `model` for which wanted(module) holds."""
    for part in _models(model):
        can = getattr(part, "_can_set_attn_implementation", lambda: False)()
        if not can or part.config._attn_implementation == NAME or not wanted(part):
            continue
        _register(sys.modules["transformers"])
        part.__dict__[_BEFORE] = part.config._attn_implementation
        part.set_attn_implementation(NAME)


def unfuse(model) -> None:
    for part in _models(model):
        before = part.__dict__.pop(_BEFORE, None)
        if before is not None:
            part.set_attn_implementation(before)
            for module in part.modules():
                explanation.forget(module)
