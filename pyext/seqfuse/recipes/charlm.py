"""A character language model with recurrent layers: text in, the next character out. Gated cells beat the plain RNN.

seqfuse train charlm --set cell=rnn --out runs/rnn        # and lstm, gru: of one width, so a gate costs parameters
seqfuse plot runs/rnn runs/lstm runs/gru
"""

from __future__ import annotations

from seqfuse.models.recurrent import RNNLanguageModelConfig
from seqfuse.recipes.base import Optim, Recipe
from seqfuse.recipes.texts import TextConfig, TextTask


def charlm(cell: str = "lstm") -> TextConfig:
    """cell: rnn, lstm or gru."""
    return TextConfig(
        recipe="charlm",
        max_steps=1000,
        evaluate_every=250,
        checkpoint_every=250,
        optim=Optim(lr=4e-3),
        model=RNNLanguageModelConfig(vocab=1, cell=cell, embed=64, hidden=256, tied=False),
    )


RECIPE = Recipe("charlm", "a character language model; gated cells beat the plain RNN", charlm, TextTask)
