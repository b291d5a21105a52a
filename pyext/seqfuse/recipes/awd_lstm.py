"""AWD-LSTM (Merity et al. 2018, arXiv:1708.02182): an LSTM language model kept from overfitting by its dropouts.

Here weight-drop does most of it. The others are settings too (model.dropout_embedding, _input, _hidden): with 0.05,
0.2, 0.1 and 0.2 at the output, so small a model learns too little for weight-drop to help (docs/recipes.md).

The text is cut into batch_size long rows which are read side by side, `length` tokens a step; the state at the end of a
step is where the next one starts (truncated backpropagation through time). At the end of an epoch it is forgotten.

    seqfuse train awd_lstm
    seqfuse train awd_lstm --set model.weight_drop=0 --out runs/plain     # without dropping recurrent weights
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.recurrent import RNNLanguageModelConfig
from seqfuse.recipes.base import Optim, Recipe
from seqfuse.recipes.texts import IGNORED, TextConfig, TextTask

HELD_ROWS = 8  # the held-out text is read in so many rows


def awd_lstm() -> TextConfig:
    return TextConfig(
        recipe="awd_lstm",
        max_steps=1000,
        batch_size=20,
        length=35,
        limit=100_000,  # little text, read often: without weight-drop it is learnt by heart
        tokens="bpe",
        vocab=1000,
        evaluate_every=100,
        checkpoint_every=100,
        optim=Optim(lr=3e-3, weight_decay=1e-5, clip=0.25),
        model=RNNLanguageModelConfig(
            vocab=1, embed=128, hidden=256, layers=2, dropout_output=0.1, weight_drop=0.5, activation=2.0, temporal=1.0,
        ),
    )  # fmt: skip


class AWDLSTM(TextTask):
    def prepare(self) -> None:
        super().prepare()
        config = self.config
        self.pieces = (len(self.train_ids) - 1) // (config.batch_size * config.length)  # steps of an epoch
        if self.pieces == 0:
            raise DataError(
                f"{config.data or config.text}: {len(self.train_ids)} tokens are too few for "
                f"{config.batch_size} rows of {config.length} tokens"
            )
        self.examples = self.pieces * config.batch_size
        # layer i's state behind the last step: h and c, [batch_size, H]
        sizes = [config.model.hidden] * (config.model.layers - 1)
        sizes.append(config.model.embed if config.model.tied else config.model.hidden)
        names = ("h", "c") if config.model.cell == "lstm" else ("h",)
        self.state = {
            f"{name}{i}": torch.zeros(config.batch_size, size, device=self.device)
            for i, size in enumerate(sizes)
            for name in names
        }

    def carried(self) -> dict[str, Tensor]:
        return self.state

    def order(self, epoch: int) -> list[list[int]]:
        """Piece after piece, the rows in order; example row * pieces + piece."""
        rows = range(self.config.batch_size)
        return [[row * self.pieces + piece for row in rows] for piece in range(self.pieces)]

    def batch(self, indices):
        """ids and targets, [B, length]; the rows [B] they belong to; whether they are the first of an epoch."""
        ids, targets = super().batch(indices)
        return ids, targets, torch.tensor(indices) // self.pieces, indices[0] % self.pieces == 0

    def loss(self, model, ids, targets, rows=None, first=True):
        """rows: where the state is carried from and to, or None for text that stands alone."""
        state = None if first else self.layers({name: t[rows] for name, t in self.state.items()})
        mean, after = model.loss(ids, targets, state=state, return_state=True, label_smoothing=self.smoothing(model))
        if rows is not None:
            for tensor, new in zip(self.state.values(), (t for layer in after for t in layer), strict=True):
                tensor[rows] = new.to(tensor.dtype)
        tokens = (targets != IGNORED).sum()
        return mean * tokens, tokens  # a mean, as the regularisations in it are

    def smoothing(self, model: Model) -> float:
        return self.config.label_smoothing if model.training else 0.0

    def layers(self, tensors: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
        values, size = list(tensors.values()), 2 if self.config.model.cell == "lstm" else 1
        return [tuple(values[i : i + size]) for i in range(0, len(values), size)]

    def held_out(self):
        """The held-out text in HELD_ROWS rows, piece after piece."""
        x, y = self.split_rows(min(HELD_ROWS, len(self.held_ids) - 1))
        return zip(x.split(self.config.length, 1), y.split(self.config.length, 1), strict=True)

    def evaluate(self, model: Model) -> dict[str, float]:
        """The state goes on from piece to piece here too, and leaves that of training alone."""
        total, count, state = 0.0, 0, None
        for ids, targets in map(self.to_device, self.held_out()):
            loss, state = model.loss(ids, targets, state=state, return_state=True, reduction="sum")
            total, count = total + float(loss.detach()), count + int((targets != IGNORED).sum())
        return self.named(total / max(1, count))


RECIPE = Recipe(
    "awd_lstm", "an LSTM language model with weight-drop and the other dropouts of AWD-LSTM", awd_lstm, AWDLSTM
)
