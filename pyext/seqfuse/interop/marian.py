"""Marian (Junczys-Dowmunt et al. 2018) and BART (Lewis et al. 2019, arXiv:1910.13461): encoder-decoders.

Marian has sinusoidal positions and may have a vocabulary for each side; BART has learned positions, two rows late in
its table, and a norm after the embeddings.
"""

import torch

from seqfuse.interop.hf_table import (
    THEIR_ACTIVATIONS,
    Family,
    Row,
    activation,
    end_tokens,
    joined,
    layers,
    pair,
    refuse,
    require,
    their_end_tokens,
)
from seqfuse.models.transformer import TransformerConfig

_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_LATE = 2  # rows of BART's table of positions that no token has
_DEFAULTS = {
    "max_position_embeddings": 1024, "encoder_layers": 12, "encoder_ffn_dim": 4096, "encoder_attention_heads": 16,
    "decoder_layers": 12, "decoder_ffn_dim": 4096, "decoder_attention_heads": 16, "activation_function": "gelu",
    "d_model": 1024, "dropout": 0.1, "attention_dropout": 0.0, "scale_embedding": False, "tie_word_embeddings": True,
    "share_encoder_decoder_embeddings": True, "decoder_vocab_size": None,
}  # fmt: skip
_MARIAN = {"vocab_size": 58101, "decoder_start_token_id": 58100, "pad_token_id": 58100, "eos_token_id": 0,
           "bos_token_id": None}  # fmt: skip
_BART = {"vocab_size": 50265, "decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}


def _shared(v, names) -> bool:
    """One embedding for both sides? transformers 5 unties them together with the output."""
    both = all(any(n.endswith(f"{side}.embed_tokens.weight") for n in names) for side in ("encoder", "decoder"))
    return v["share_encoder_decoder_embeddings"] and (v["tie_word_embeddings"] or not both)


def _read(v, names, **family):
    refuse(v, normalize_before=False, add_final_layer_norm=False, normalize_embedding=family["embedding_norm"],
           static_position_embeddings=family["positions"] == "sinusoidal",
           decoder_attention_heads=v["encoder_attention_heads"], decoder_ffn_dim=v["encoder_ffn_dim"])  # fmt: skip
    vocab = v["vocab_size"] if v["share_encoder_decoder_embeddings"] else v["decoder_vocab_size"] or v["vocab_size"]
    return TransformerConfig(
        vocab=vocab,
        source_vocab=None if _shared(v, names) else v["vocab_size"],
        start_id=v["decoder_start_token_id"],
        bos_id=v["bos_token_id"],
        **end_tokens(v["eos_token_id"]),
        pad_id=v["pad_token_id"],
        width=v["d_model"],
        layers=v["encoder_layers"],
        decoder_layers=v["decoder_layers"],
        heads=v["encoder_attention_heads"],
        mlp_width=v["encoder_ffn_dim"],
        activation=activation(v["activation_function"]),
        max_positions=v["max_position_embeddings"],
        scale_embeddings=v["scale_embedding"],
        dropout=v["dropout"],
        attention_dropout=v["attention_dropout"],
        tied=v["tie_word_embeddings"],
        output_bias=True,
        **family,
    )


def read_marian(values, names):
    return _read(_DEFAULTS | _MARIAN | values, names, positions="sinusoidal", embedding_norm=False)


def read_bart(values, names):
    return _read(_DEFAULTS | _BART | values, names, positions="learned", embedding_norm=True)


def _write(c, name, **family):
    require(c, name, norm="layer", norm_first=False, attention_bias=True, mlp_bias=True, Hkv=c.heads, eps=1e-5,
            output_bias=True, **family)  # fmt: skip
    if c.activation not in THEIR_ACTIVATIONS or c.D * c.heads != c.width:
        raise ValueError(f"{name} has no counterpart of activation {c.activation!r} with heads of {c.D}")
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("attention_heads", c.heads), ("ffn_dim", c.F), ("layerdrop", 0.0))
    }
    return sides | {
        "architectures": [f"{name}MTModel" if name == "Marian" else "BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": c.source_vocab or c.vocab,
        "decoder_vocab_size": c.vocab,
        "share_encoder_decoder_embeddings": c.source_vocab is None or not (c.tied or c.source_vocab != c.vocab),
        "decoder_start_token_id": c.start,
        "bos_token_id": c.bos_id,
        "eos_token_id": their_end_tokens(c),
        "forced_eos_token_id": c.eos_id,
        "pad_token_id": c.pad_id,
        "d_model": c.width,
        "encoder_layers": c.layers,
        "decoder_layers": c.decoder_layers or c.layers,
        "activation_function": THEIR_ACTIVATIONS[c.activation],
        "max_position_embeddings": c.max_positions,
        "scale_embedding": c.scale_embeddings,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tied,
    }


def write_marian(c):
    return _write(c, "Marian", positions="sinusoidal", embedding_norm=False)


def write_bart(c):
    if c.source_vocab is not None and (c.tied or c.source_vocab != c.vocab):
        raise ValueError(f"Bart has no counterpart of a source_vocab ({c.source_vocab}) of its own")
    return _write(c, "Bart", positions="learned", embedding_norm=True)


def rows(c):
    both = [] if c.source_vocab is None else [Row("decoder.embedding.weight", ("decoder.embed_tokens.weight",))]
    one = "shared.weight" if c.source_vocab is None else "encoder.embed_tokens.weight"
    return [
        Row("encoder.embedding.weight", (one,)),
        *both,
        *_side("encoder", c, c.layers),
        *_side("decoder", c, c.decoder_layers or c.layers),
        Row("output_bias", ("final_logits_bias",)),
        *([] if c.tied else [Row("output.weight", ("lm_head.weight",))]),
    ]


def _side(side, c, count):
    ours, theirs = side + ".blocks.{i}.", side + ".layers.{i}."
    parts = [
        *joined(ours + "attention.qkv", tuple(f"{theirs}self_attn.{x}_proj" for x in "qkv"), (c.width,) * 3),
        *pair(ours + "attention.out", theirs + "self_attn.out_proj"),
        *pair(ours + "norm1", theirs + "self_attn_layer_norm"),
        *pair(ours + "mlp.up", theirs + "fc1"),
        *pair(ours + "mlp.down", theirs + "fc2"),
        *pair(ours + "norm2", theirs + "final_layer_norm"),
    ]
    if side == "decoder":
        parts += [
            *pair(ours + "cross.q", theirs + "encoder_attn.q_proj"),
            *joined(ours + "cross.kv", tuple(f"{theirs}encoder_attn.{x}_proj" for x in "kv"), (c.width,) * 2),
            *pair(ours + "cross.out", theirs + "encoder_attn.out_proj"),
            *pair(ours + "norm_cross", theirs + "encoder_attn_layer_norm"),
        ]
    learned = [Row(f"{side}.position.weight", (f"{side}.embed_positions.weight",))] if c.positions == "learned" else []
    norm = pair(f"{side}.embedding_norm", f"{side}.layernorm_embedding") if c.embedding_norm else []
    return [*layers(count, *parts), *learned, *norm]


def adapt(tensors, c):
    """Copies of tied embeddings dropped, the bias as a vector, BART's positions from the first that a token has."""
    tensors = dict(tensors)
    if c.source_vocab is None:
        copies = [tensors.pop(name, None) for name in _EMBEDDINGS]
        if copies[0] is not None:
            tensors.setdefault("shared.weight", copies[0])
    else:
        tensors.pop("shared.weight", None)  # nobody reads it
    if c.tied:
        tensors.pop("lm_head.weight", None)
    bias = tensors.get("final_logits_bias")
    tensors["final_logits_bias"] = torch.zeros(c.vocab) if bias is None else bias.squeeze(0)
    if c.positions == "learned":
        tensors |= {name: t[_LATE:] for name, t in tensors.items() if name.endswith("embed_positions.weight")}
    return tensors


def restore(tensors, c):
    if not c.tied and c.source_vocab in (None, c.vocab):  # transformers 5 then has three of its own
        one = tensors.get("shared.weight", tensors.get(_EMBEDDINGS[0]))
        tensors = {name: one.clone() for name in ("shared.weight", *_EMBEDDINGS)} | tensors
    tensors["final_logits_bias"] = tensors["final_logits_bias"][None]
    for name in ("encoder.embed_positions.weight", "decoder.embed_positions.weight"):
        if name in tensors:
            table = tensors[name]
            tensors[name] = torch.cat([table.new_zeros(_LATE, table.shape[1]), table])
    head = ("final_logits_bias", "lm_head.weight")
    return {name if name in head else f"model.{name}": t for name, t in tensors.items()}


_TABLES = r"(en|de)coder\.embed_positions\.weight"  # sinusoids
MARIAN = Family((TransformerConfig,), read_marian, write_marian, rows, "model.", _TABLES, adapt, restore)
BART = Family((TransformerConfig,), read_bart, write_bart, rows, "model.", adapt=adapt, restore=restore)
