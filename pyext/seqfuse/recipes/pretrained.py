"""Trained bodies to start from: MiniLM's BERT weights, or the folder of any model."""

from __future__ import annotations

from pathlib import Path

import torch

from seqfuse import data, models
from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.heads import Head


def load_body(start: str) -> Model:
    """The body of a trained model in float32, its head left off. start: "minilm", or a folder that models.load takes.

    Raises DataError if it has no tokenizer, or is an encoder-decoder.
    """
    folder = data.fetch(data.SETS["minilm"]) if start == "minilm" else Path(start)
    model = models.load(folder, dtype=torch.float32)
    if model.tokenizer is None:
        raise DataError(f"{folder / 'tokenizer.json'}: there is no such file, and the model needs its own tokenizer")
    if model.config.encoder_decoder:
        raise DataError(f"{folder}: a {type(model).__name__} reads a text and writes another; start takes encoders and "
                        "decoders")  # fmt: skip
    if isinstance(model, Head):
        model.body.tokenizer = model.tokenizer
        return model.body
    return model
