"""A character language model: text in, the next character out, by a plain RNN, an LSTM or a GRU.

Text is cut into pieces of `length` characters; the last twentieth of it is held out. Without --data it is the source
code of the running Python's standard library.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import torch

from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.recurrent import RNNLanguageModel, RNNLanguageModelConfig
from seqfuse.recipes.base import Optim, Recipe, RunConfig, Task, fingerprint
from seqfuse.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharLMConfig(RunConfig):
    """length: characters of one example. limit: characters of text that are used."""

    length: int = 128
    limit: int = 1_000_000

    def __post_init__(self):
        super().__post_init__()
        self.positive("length", "limit")


def charlm(cell: str = "lstm") -> CharLMConfig:
    return CharLMConfig(
        recipe="charlm",
        max_steps=1000,
        optim=Optim(lr=2e-3),
        model=RNNLanguageModelConfig(vocab=1, cell=cell, embed=128, hidden=256, tied=False),
    )


class CharLM(Task):
    unit = "characters"

    def prepare(self) -> None:
        config = self.config
        text = read_text(Path(config.data)) if config.data else standard_library()
        text = text[: config.limit]
        self.fingerprint = fingerprint(text)
        self.text_tokenizer = self.tokenizer(lambda: Tokenizer.train([text], "characters"))
        ids = torch.tensor(self.text_tokenizer.encode(text))
        pieces = (len(ids) - 1) // config.length
        held = max(1, pieces // 20)
        if pieces < 2:
            raise DataError(f"{config.data}: {len(ids)} characters are too few for pieces of {config.length}")
        x = ids[: pieces * config.length].view(pieces, -1)
        y = ids[1 : pieces * config.length + 1].view(pieces, -1)
        self.train, self.valid = (x[:-held], y[:-held]), (x[-held:], y[-held:])
        self.examples = pieces - held

    def build(self) -> Model:
        model = RNNLanguageModel(dataclasses.replace(self.config.model, **self.text_tokenizer.config()))
        model.tokenizer = self.text_tokenizer
        return model

    def batch(self, indices):
        return tuple(t[indices] for t in self.train)

    def loss(self, model, ids, targets):
        return model.loss(ids, targets, **self.loss_options(model)), targets.numel()

    def held_out(self):
        return zip(*(t.split(64) for t in self.valid), strict=True)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def standard_library() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


RECIPE = Recipe("charlm", "a character language model; gated cells beat the plain RNN", charlm, CharLM)
