"""GPT-2 (Radford et al. 2019): Conv1D weights stored (in, out), one matrix for q, k and v, tied output."""

from seqfuse.interop.hf_table import (
    THEIR_ACTIVATIONS,
    Family,
    Row,
    activation,
    end_tokens,
    layers,
    pair,
    refuse,
    require,
    their_end_tokens,
    without_tied_head,
)
from seqfuse.models.decoder import DecoderConfig

_DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip


def read_config(values, names):
    refuse(values, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    v = _DEFAULTS | values
    return DecoderConfig(
        vocab=v["vocab_size"],
        bos_id=v["bos_token_id"],
        **end_tokens(v["eos_token_id"]),
        pad_id=v["pad_token_id"],
        width=v["n_embd"],
        layers=v["n_layer"],
        heads=v["n_head"],
        mlp_width=v["n_inner"],
        activation=activation(v["activation_function"]),
        eps=v["layer_norm_epsilon"],
        max_positions=v["n_positions"],
        dropout=v["resid_pdrop"],
        attention_dropout=v["attn_pdrop"],
        tied=v["tie_word_embeddings"],
    )


def write_config(c):
    require(c, "GPT-2", positions="learned", norm="layer", norm_first=True, attention_bias=True, mlp_bias=True,
            Hkv=c.heads, scale_embeddings=False, embedding_norm=False)  # fmt: skip
    if c.activation not in THEIR_ACTIVATIONS or c.D * c.heads != c.width:
        raise ValueError(f"GPT-2 has no counterpart of activation {c.activation!r} with heads of {c.D}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": c.vocab,
        "bos_token_id": c.bos_id,
        "eos_token_id": their_end_tokens(c),
        "pad_token_id": c.pad_id,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.F,
        "activation_function": THEIR_ACTIVATIONS[c.activation],
        "layer_norm_epsilon": c.eps,
        "n_positions": c.max_positions,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
        "tie_word_embeddings": c.tied,
    }


def rows(c):
    return [
        Row("stack.embedding.weight", ("wte.weight",)),
        Row("stack.position.weight", ("wpe.weight",)),
        *layers(
            c.layers,
            *pair("stack.blocks.{i}.norm1", "h.{i}.ln_1"),
            *pair("stack.blocks.{i}.attention.qkv", "h.{i}.attn.c_attn", transposed=True),
            *pair("stack.blocks.{i}.attention.out", "h.{i}.attn.c_proj", transposed=True),
            *pair("stack.blocks.{i}.norm2", "h.{i}.ln_2"),
            *pair("stack.blocks.{i}.mlp.up", "h.{i}.mlp.c_fc", transposed=True),
            *pair("stack.blocks.{i}.mlp.down", "h.{i}.mlp.c_proj", transposed=True),
        ),
        *pair("stack.norm", "ln_f"),
        *([] if c.tied else [Row("output.weight", ("lm_head.weight",))]),
    ]


def restore(tensors, c):
    return {name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in tensors.items()}


# the causal mask, which early versions of transformers saved
FAMILY = Family(
    (DecoderConfig,),
    read_config,
    write_config,
    rows,
    "transformer.",
    r"h\.\d+\.attn\.(masked_)?bias",
    without_tied_head,
    restore,
)
