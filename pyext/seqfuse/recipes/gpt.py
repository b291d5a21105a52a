"""Pretraining of a decoder language model: GPT's task, small. By default on a million characters of English novels.

    seqfuse train gpt
    seqfuse train gpt --data mine.txt --set tokens=bpe --set vocab=8000 --set model.layers=12 --set model.width=768

The blocks are Llama's: RMSNorm, rotary positions, SwiGLU. GPT-2's are --set model.norm=layer
--set model.positions=learned --set model.activation=gelu_tanh.
"""

from __future__ import annotations

from seqfuse.models.decoder import DecoderConfig
from seqfuse.recipes.base import Optim, Recipe
from seqfuse.recipes.texts import TextConfig, TextTask


def gpt() -> TextConfig:
    return TextConfig(
        recipe="gpt",
        max_steps=900,
        batch_size=16,
        evaluate_every=150,
        checkpoint_every=150,
        optim=Optim(lr=3e-3, weight_decay=0.1, beta2=0.95),
        model=DecoderConfig(
            vocab=1, width=128, layers=4, heads=4, mlp_width=352, max_positions=512, norm="rms", activation="swiglu",
            positions="rope", attention_bias=False, mlp_bias=False,
        ),
    )  # fmt: skip


RECIPE = Recipe("gpt", "pretrain a decoder language model, GPT's task", gpt, TextTask)
