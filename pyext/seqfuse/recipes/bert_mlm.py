"""Masked language modelling, BERT's task (Devlin et al. 2018, arXiv:1810.04805): guess the tokens that were hidden.

Of each example `mask` of the tokens are to be guessed: 80% of them are replaced by <mask>, 10% by another token, 10%
stay as they are. In training an example is masked anew in every epoch; what is masked depends on the seed, the epoch
and the example alone, so neither on the number of processes nor on where a run was resumed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from seqfuse import attention_pictures, report
from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.encoder import EncoderConfig
from seqfuse.models.heads import MaskedLM, MaskedLMConfig
from seqfuse.recipes.base import Findings, Optim, Recipe, generator
from seqfuse.recipes.texts import EVALUATED_ROWS, IGNORED, TextConfig, TextTask
from seqfuse.tokenizer import SPECIALS, Tokenizer

MASK = "<mask>"
SHOWN = 4  # masked examples in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLMConfig(TextConfig):
    """mask: share of the tokens that are to be guessed."""

    mask: float = 0.15

    def __post_init__(self):
        super().__post_init__()
        self.require(0 < self.mask < 1, f"mask must lie between 0 and 1, got {self.mask!r}")


def bert_mlm() -> MLMConfig:
    body = EncoderConfig(vocab=1, width=128, layers=4, heads=4, max_positions=128, token_types=0, dropout=0.1,
                         norm_first=True, embedding_norm=False)  # fmt: skip
    return MLMConfig(
        recipe="bert_mlm",
        max_steps=1000,
        length=64,
        tokens="bpe",
        vocab=2000,
        evaluate_every=200,
        checkpoint_every=200,
        optim=Optim(lr=1e-3, beta2=0.98),
        model=MaskedLMConfig(body=body),
    )


class MLM(TextTask):
    def prepare(self) -> None:
        super().prepare()
        config, held = self.config, len(self.held_ids)
        if held < config.length:
            raise DataError(
                f"{config.data or config.text}: the {held} tokens that are held out are too few for one example of "
                f"{config.length} (length)"
            )

    def train_tokenizer(self, text: str) -> Tokenizer:
        return Tokenizer.train([text], self.config.tokens, vocab=self.config.vocab, specials=[*SPECIALS, MASK])

    def build(self) -> Model:
        body = dataclasses.replace(self.config.model.body, **self.text_tokenizer.config())
        mask_id = self.text_tokenizer.id_of(MASK)
        model = MaskedLM(dataclasses.replace(self.config.model, body=body, mask_id=mask_id))
        model.tokenizer = self.text_tokenizer
        return model

    def order(self, epoch: int) -> list[list[int]]:
        """An example's number tells the epoch too."""
        return [[epoch * self.examples + i for i in batch] for batch in super().order(epoch)]

    def batch(self, indices):
        rows = super().batch([i % self.examples for i in indices])[0]
        return self.masked(rows, indices)

    def held_out(self):
        length = self.config.length
        rows = self.held_ids[: len(self.held_ids) // length * length].view(-1, length)
        for start in range(0, len(rows), EVALUATED_ROWS):
            some = rows[start : start + EVALUATED_ROWS]
            yield self.masked(some, range(-1 - start, -1 - start - len(some), -1))  # no training example's numbers

    def masked(self, rows: Tensor, numbers) -> tuple[Tensor, Tensor]:
        """rows [B, T] -> what the model sees, and the targets. numbers: of the examples, which decide the draw."""
        seen, targets = rows.clone(), torch.full_like(rows, IGNORED)
        first = len(SPECIALS) + 1  # special tokens are never put in
        for i, number in enumerate(numbers):
            draw = generator(self.config.seed, number)
            count = max(1, round(self.config.mask * rows.shape[1]))
            places = torch.randperm(rows.shape[1], generator=draw)[:count]
            how = torch.rand(count, generator=draw)
            other = torch.randint(first, self.text_tokenizer.vocab_size, (count,), generator=draw)
            mask = torch.full_like(other, self.text_tokenizer.id_of(MASK))
            targets[i, places] = rows[i, places]
            seen[i, places] = torch.where(how < 0.8, mask, torch.where(how < 0.9, other, rows[i, places]))
        return seen, targets

    def evaluate(self, model: Model) -> dict[str, float]:
        """The loss, and the percentage of hidden tokens whose likeliest guess is right."""
        total = right = count = 0.0
        for seen, targets in map(self.to_device, self.held_out()):
            loss, tokens = self.loss(model, seen, targets)
            guesses = model(seen).argmax(-1)
            total, count = total + float(loss), count + int(tokens)
            right += int((guesses == targets).sum())
        return {"loss": total / max(1, count), "accuracy": 100 * right / max(1, count)}

    def report(self, model: Model) -> Findings:
        seen, targets = next(iter(self.held_out()))
        guesses = model(seen[:SHOWN].to(self.device)).argmax(-1).cpu()
        lines = []
        for row, truth, guess in zip(seen[:SHOWN], targets, guesses, strict=False):
            where = truth != IGNORED
            pairs = zip(truth[where].tolist(), guess[where].tolist(), strict=True)
            words = [f"{self.text_tokenizer.decode([t])!r} as {self.text_tokenizer.decode([g])!r}" for t, g in pairs]
            lines.append(f"{self.text_tokenizer.decode(row, specials=True)}\n  guessed: {', '.join(words)}")
        text = "\n".join(lines)
        sections = [report.section("Hidden tokens", report.verbatim(text))]
        sections += attention_pictures.to_itself(model, self.text_tokenizer, seen[0])
        return Findings(self.evaluate(model), sections, text)


RECIPE = Recipe("bert_mlm", "pretrain an encoder as BERT: guess hidden tokens", bert_mlm, MLM)
