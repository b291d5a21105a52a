"""BERT: the encoder alone, and with its heads for masked tokens, classes, tags and spans."""

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
from seqfuse.models.encoder import EncoderConfig
from seqfuse.models.heads import ClassifierConfig, MaskedLMConfig, SpanQAConfig, TaggerConfig

_DEFAULTS = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "classifier_dropout": None,
}  # fmt: skip
_ARCHITECTURES = {
    "BertModel": EncoderConfig,
    "BertForMaskedLM": MaskedLMConfig,
    "BertForPreTraining": MaskedLMConfig,
    "BertForSequenceClassification": ClassifierConfig,
    "BertForTokenClassification": TaggerConfig,
    "BertForQuestionAnswering": SpanQAConfig,
}


def read_config(values, names):
    refuse(values, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    v = _DEFAULTS | values
    name = (v.get("architectures") or ["BertModel"])[0]
    if name not in _ARCHITECTURES:
        raise ValueError(f"the architecture {name!r} is none of {', '.join(_ARCHITECTURES)}")
    kind = _ARCHITECTURES[name]
    if kind is MaskedLMConfig:
        refuse(v, tie_word_embeddings=True)
    body = EncoderConfig(
        vocab=v["vocab_size"],
        bos_id=v["bos_token_id"],
        **end_tokens(v["eos_token_id"]),
        pad_id=v["pad_token_id"],
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        mlp_width=v["intermediate_size"],
        activation=activation(v["hidden_act"]),
        eps=v["layer_norm_eps"],
        max_positions=v["max_position_embeddings"],
        token_types=v["type_vocab_size"],
        pooler=kind in (EncoderConfig, ClassifierConfig) and any("pooler.dense.weight" in n for n in names),
        dropout=v["hidden_dropout_prob"],
        attention_dropout=v["attention_probs_dropout_prob"],
    )
    if kind is EncoderConfig:
        return body
    if kind is MaskedLMConfig:
        return MaskedLMConfig(body=body)
    dropout = v["hidden_dropout_prob"] if v["classifier_dropout"] is None else v["classifier_dropout"]
    if kind is SpanQAConfig:
        return SpanQAConfig(body=body)
    options = {"dropout": dropout} | _labels(v)
    if kind is ClassifierConfig:
        return ClassifierConfig(body=body, pooling="pooler", **options)
    return TaggerConfig(body=body, **options)


def _labels(v):
    """id2label, in which LABEL_0, LABEL_1 ... are no names but what transformers writes without any."""
    if "id2label" not in v:
        return {"labels": v.get("num_labels", 2)}
    names = {str(i): name for i, name in v["id2label"].items()}
    if set(names) != set(map(str, range(len(names)))):
        raise ValueError(f"id2label must name 0 to {len(names) - 1}, got {', '.join(names)}")
    names = tuple(names[str(i)] for i in range(len(names)))
    return {"labels": len(names), "label_names": None if names == _numbered(len(names)) else names}


def _numbered(labels):
    return tuple(f"LABEL_{i}" for i in range(labels))


def write_config(config):
    c = config if isinstance(config, EncoderConfig) else config.body
    if not isinstance(c, EncoderConfig):
        raise ValueError(f"BERT has no counterpart of a {config.model} over a {c.model}")
    require(c, "BERT", positions="learned", norm="layer", norm_first=False, embedding_norm=True, Hkv=c.heads,
            attention_bias=True, mlp_bias=True, scale_embeddings=False)  # fmt: skip
    if c.activation not in THEIR_ACTIVATIONS or c.D * c.heads != c.width or not c.token_types:
        raise ValueError(f"BERT has no counterpart of {c.activation!r}, heads of {c.D} or {c.token_types} token types")
    if isinstance(config, ClassifierConfig):
        require(config, "BERT", pooling="pooler")
    names = getattr(config, "label_names", None) or _numbered(getattr(config, "labels", 2))
    return {
        "architectures": [next(name for name, kind in _ARCHITECTURES.items() if kind is type(config))],
        "vocab_size": c.vocab,
        "bos_token_id": c.bos_id,
        "eos_token_id": their_end_tokens(c),
        "pad_token_id": c.pad_id,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.F,
        "hidden_act": THEIR_ACTIVATIONS[c.activation],
        "layer_norm_eps": c.eps,
        "max_position_embeddings": c.max_positions,
        "type_vocab_size": c.token_types,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
        "classifier_dropout": getattr(config, "dropout", None) if config is not c else None,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "tie_word_embeddings": True,
    }


def rows(config):
    if isinstance(config, EncoderConfig):
        return _body_rows(config)
    body = [row._replace(ours=f"body.{row.ours}") for row in _body_rows(config.body)]
    if not isinstance(config, MaskedLMConfig):
        return body + pair("output", "qa_outputs" if isinstance(config, SpanQAConfig) else "classifier")
    return [
        *body,
        *pair("dense", "cls.predictions.transform.dense"),
        *pair("norm", "cls.predictions.transform.LayerNorm"),
        Row("bias", ("cls.predictions.bias",)),
    ]


def _body_rows(c):
    layer, attention = "encoder.layer.{i}.", "encoder.layer.{i}.attention.self."
    heads = tuple(f"{attention}{x}" for x in ("query", "key", "value"))
    return [
        Row("stack.embedding.weight", ("embeddings.word_embeddings.weight",)),
        Row("stack.position.weight", ("embeddings.position_embeddings.weight",)),
        Row("stack.token_type.weight", ("embeddings.token_type_embeddings.weight",)),
        *pair("stack.embedding_norm", "embeddings.LayerNorm"),
        *layers(
            c.layers,
            *joined("stack.blocks.{i}.attention.qkv", heads, (c.width,) * 3),
            *pair("stack.blocks.{i}.attention.out", layer + "attention.output.dense"),
            *pair("stack.blocks.{i}.norm1", layer + "attention.output.LayerNorm"),
            *pair("stack.blocks.{i}.mlp.up", layer + "intermediate.dense"),
            *pair("stack.blocks.{i}.mlp.down", layer + "output.dense"),
            *pair("stack.blocks.{i}.norm2", layer + "output.LayerNorm"),
        ),
        *(pair("pooler", "pooler.dense") if c.pooler else []),
    ]


def adapt(tensors, config):
    """Norms as TensorFlow named them; what a body was pretrained with, and a model with this head has no use for."""
    tensors = {n.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): t
               for n, t in tensors.items()}  # fmt: skip
    unused = ("cls.seq_relationship.", "cls.predictions.decoder.", "pooler.")
    if isinstance(config, MaskedLMConfig | TaggerConfig | SpanQAConfig):
        return {name: t for name, t in tensors.items() if not name.startswith(unused)}
    return tensors


def restore(tensors, config):
    if isinstance(config, EncoderConfig):
        return tensors
    body = ("embeddings.", "encoder.", "pooler.")
    return {f"bert.{name}" if name.startswith(body) else name: t for name, t in tensors.items()}


FAMILY = Family((EncoderConfig, MaskedLMConfig, ClassifierConfig, TaggerConfig, SpanQAConfig), read_config,
                write_config, rows, "bert.", r"embeddings\.position_ids", adapt, restore)  # fmt: skip
