"""Llama (Touvron et al. 2023, arXiv:2302.13971): rotary positions, RMSNorm, SwiGLU, grouped keys and values."""

from seqfuse.interop.hf_table import (
    Family,
    Row,
    end_tokens,
    joined,
    layers,
    refuse,
    require,
    their_end_tokens,
    without_tied_head,
)
from seqfuse.models.decoder import DecoderConfig
from seqfuse.models.positions import RopeSettings

_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
}  # fmt: skip
_GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
}
_THEIR_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}
# their names of RopeSettings' fields, by kind of scaling
_ROPE = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high",
               "original_max_position_embeddings": "original_positions"},
    "yarn": {"factor": "factor", "beta_slow": "low", "beta_fast": "high", "attention_factor": "attention_factor",
             "original_max_position_embeddings": "original_positions"},
}  # fmt: skip


def read_rope(values) -> RopeSettings:
    """From rope_parameters, or rope_theta and rope_scaling as they were before transformers 5."""
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in _ROPE:
        raise ValueError(f"the rope_type {kind!r} is none of {', '.join(_ROPE)}")
    if kind == "yarn":
        given = {"beta_slow": 1.0, "beta_fast": 32.0} | given
    if "original_max_position_embeddings" in _ROPE[kind]:
        first = values.get("original_max_position_embeddings")  # above what stands inside, as in transformers
        inside = given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = first or inside or values["max_position_embeddings"]
    given = {key: value for key, value in given.items() if value is not None}
    unknown = [key for key in given if key not in _ROPE[kind] and key != "partial_rotary_factor"]
    if unknown or given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope of type {kind!r} with {unknown[0] if unknown else 'partial_rotary_factor'} is not supported"
        )
    fields = {_ROPE[kind][key]: value for key, value in given.items()}
    return RopeSettings(theta=theta, scaling=None if kind == "default" else kind, **fields)


def read_config(values, names):
    v = _DEFAULTS | values
    refuse(v, pretraining_tp=1)
    if v["hidden_act"] not in _GATED:
        raise ValueError(f"the activation {v['hidden_act']!r} is none of {', '.join(_GATED)}")
    return DecoderConfig(
        vocab=v["vocab_size"],
        bos_id=v["bos_token_id"],
        **end_tokens(v["eos_token_id"]),
        pad_id=None if v["pad_token_id"] == -1 else v["pad_token_id"],
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        kv_heads=v["num_key_value_heads"],
        head_width=v["head_dim"],
        mlp_width=v["intermediate_size"],
        activation=_GATED[v["hidden_act"]],
        norm="rms",
        eps=v["rms_norm_eps"],
        attention_bias=v["attention_bias"],
        mlp_bias=v["mlp_bias"],
        positions="rope",
        max_positions=v["max_position_embeddings"],
        rope=read_rope(v),
        attention_dropout=v["attention_dropout"],
        tied=v["tie_word_embeddings"],
    )


def write_config(c):
    require(c, "Llama", positions="rope", norm="rms", norm_first=True, scale_embeddings=False, embedding_norm=False)
    if c.activation not in _THEIR_GATED:
        raise ValueError(f"Llama has no counterpart of activation={c.activation!r}, only {', '.join(_THEIR_GATED)}")
    if c.width % c.heads:
        raise ValueError(f"Llama wants a width that its heads divide, got width={c.width} and heads={c.heads}")
    kind = c.rope.scaling or "default"
    rope = {theirs: getattr(c.rope, ours) for theirs, ours in _ROPE[kind].items()}
    rope = {key: value for key, value in rope.items() if value is not None}
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab,
        "bos_token_id": c.bos_id,
        "eos_token_id": their_end_tokens(c),
        "pad_token_id": c.pad_id,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.Hkv,
        "head_dim": c.D,
        "intermediate_size": c.F,
        "hidden_act": _THEIR_GATED[c.activation],
        "rms_norm_eps": c.eps,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "max_position_embeddings": c.max_positions,
        "rope_parameters": {"rope_type": kind, "rope_theta": c.rope.theta} | rope,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tied,
    }


def rows(c):
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    heads = tuple(n * c.D for n in (c.heads, c.Hkv, c.Hkv))
    return [
        Row("stack.embedding.weight", ("model.embed_tokens.weight",)),
        *layers(
            c.layers,
            Row("stack.blocks.{i}.norm1.weight", ("model.layers.{i}.input_layernorm.weight",)),
            *joined("stack.blocks.{i}.attention.qkv", tuple(f"{attention}{x}_proj" for x in "qkv"), heads,
                    c.attention_bias),
            *joined("stack.blocks.{i}.attention.out", (f"{attention}o_proj",), (), c.attention_bias),
            Row("stack.blocks.{i}.norm2.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
            *joined("stack.blocks.{i}.mlp.up", (f"{mlp}gate_proj", f"{mlp}up_proj"), (c.F, c.F), c.mlp_bias),
            *joined("stack.blocks.{i}.mlp.down", (f"{mlp}down_proj",), (), c.mlp_bias),
        ),
        Row("stack.norm.weight", ("model.norm.weight",)),
        *([] if c.tied else [Row("output.weight", ("lm_head.weight",))]),
    ]  # fmt: skip


# frequencies, which early versions of transformers saved
FAMILY = Family(
    (DecoderConfig,),
    read_config,
    write_config,
    rows,
    "",
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    without_tied_head,
)
