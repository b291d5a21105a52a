"""Pictures of where a model looks, for reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqfuse import report
from seqfuse.models.attention_maps import attention_maps
from seqfuse.models.base import Model
from seqfuse.models.transformer import Transformer
from seqfuse.tokenizer import Tokenizer

MOST = 24  # tokens of one side of a picture


def names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What to write beside a picture for each token; a dot for space."""
    return [tokenizer.decode([i], specials=True).strip() or "·" for i in ids]


def most(model: Model) -> int:
    """Tokens of a side that are drawn: as many as the model takes, at most."""
    config = getattr(model.config, "body", model.config)
    return min(MOST, getattr(config, "max_positions", MOST))


def to_itself(model: Model, tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """A section on how the tokens ids [T] look at each other, or none if the model has no such attention."""
    ids = ids[: most(model)]
    maps = attention_maps(model, ids[None].to(next(model.parameters()).device))
    if not maps:
        return []
    weights = list(maps.values())[-1][0].mean(0)  # (T, T)
    words = names(tokenizer, ids.tolist())
    chart = report.heat_map(words, words, weights.tolist(), "tokens looked at", "tokens that look")
    what = "How much each token of a held-out text looks at each other one: the last layer, the mean of its heads."
    return [report.section("Attention", report.paragraph(what), report.figure(chart))]


def to_the_source(model: Model, read: list[int], written: list[int]) -> list[str]:
    """A section on where an encoder-decoder looked for each token that it wrote, or none without attention."""
    read, written = read[: most(model)], written[: most(model)]
    if not read or not written or getattr(model.config, "attention", "") is None:
        return []
    device, start = next(model.parameters()).device, getattr(model.config, "start", model.config.bos_id)
    source = torch.tensor([read], device=device)
    inputs = torch.tensor([[start, *written[:-1]]], device=device)
    if isinstance(model, Transformer):
        weights = list(attention_maps(model, source, inputs).values())[-1][0].mean(0)  # (U, T)
        what = "Where the model looks for each token that it writes: the last layer, the mean of its heads."
    else:
        weights, what = model.alignment(source, inputs)[0], "Where the model looks for each token that it writes."
    reader = model.source_tokenizer or model.tokenizer
    sides = names(reader, read), names(model.tokenizer, written)
    chart = report.heat_map(*sides, weights.float().tolist(), "tokens read", "tokens written")
    return [report.section("Attention", report.paragraph(what), report.figure(chart))]
