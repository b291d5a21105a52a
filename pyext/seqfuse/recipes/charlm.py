"""A character language model with recurrent layers: text in, the next character out. Gated cells beat the plain RNN.

seqfuse train charlm --set cell=rnn --out runs/rnn        # and lstm, gru: the default widths give each about as
seqfuse plot runs/rnn runs/lstm runs/gru                  # many parameters
"""

from __future__ import annotations

from seqfuse.models.recurrent import RNNLanguageModelConfig
from seqfuse.recipes.base import Optim, Recipe
from seqfuse.recipes.texts import TextConfig, TextTask

HIDDEN = {"rnn": 288, "lstm": 128, "gru": 152}  # about 100,000 parameters each in the recurrent layer


def charlm(cell: str = "lstm") -> TextConfig:
    """cell: rnn, lstm or gru."""
    return TextConfig(
        recipe="charlm",
        max_steps=1000,
        evaluate_every=250,
        checkpoint_every=250,
        optim=Optim(lr=6e-3),
        model=RNNLanguageModelConfig(vocab=1, cell=cell, embed=64, hidden=HIDDEN.get(cell, 128), tied=False),
    )


RECIPE = Recipe("charlm", "a character language model; gated cells beat the plain RNN", charlm, TextTask)
