"""Tasks as text to text: an encoder-decoder, or a decoder alone that reads the source first and then writes.

encoder-decoder   source <eos>  ->  <bos> target            as in translate.py, which this is made of
decoder           source <eos> <bos> target <eos>           the loss counts the target only
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.utils.rnn import pad_sequence

from seqfuse import report
from seqfuse.data import DataError
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.decoder import DecoderConfig
from seqfuse.models.seq2seq import RNNSeq2SeqConfig
from seqfuse.models.transformer import TransformerConfig
from seqfuse.recipes.base import Findings, Optim
from seqfuse.recipes.texts import IGNORED
from seqfuse.recipes.translate import DECODED_ROWS, SHOWN, Translate, TranslateConfig

SMALL = {"width": 192, "heads": 4, "mlp_width": 512, "dropout": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToTextConfig(TranslateConfig):
    """limit: pairs that are read, 0: all; with overfit=true the model is to learn these by heart. written: tokens of a
    new text at most."""

    longest: int = 120
    beams: int = 1
    limit: int = 0
    written: int = 40

    def __post_init__(self):
        super().__post_init__()
        self.positive("written")

    @property
    def positions(self) -> int:
        if self.model.encoder_decoder:
            return max(self.longest, self.written + 1)
        return self.longest + max(self.longest, self.written + 1)  # of the source and what stands behind it


def text_to_text(recipe: str, arch: str, overfit: bool, **options) -> TextToTextConfig:
    """arch: transformer, rnn (GRU layers with Luong's attention) or decoder. overfit: what suits a few pairs."""
    models = {
        "transformer": lambda: TransformerConfig(vocab=4, bos_id=1, layers=3, max_positions=256, norm_first=True,
                                                 **SMALL),
        "rnn": lambda: RNNSeq2SeqConfig(vocab=4, bos_id=1, cell="gru", embed=192, hidden=256, dropout_input=0.1,
                                        dropout_output=0.1),
        "decoder": lambda: DecoderConfig(vocab=4, layers=4, max_positions=384, **SMALL),
    }  # fmt: skip
    if arch not in models:
        raise ValueError(f"{recipe}: arch must be {', '.join(models)}, got {arch!r}")
    if overfit:
        steps = 500 if arch == "transformer" else 300  # it learns two embeddings and the way between them
        options |= {"limit": 50, "max_steps": steps, "batch_size": 25, "vocab": 1000, "evaluate_every": 100,
                    "optim": Optim(lr=2e-3, warmup=30, beta2=0.98)}  # fmt: skip
    else:
        options |= {"max_steps": 3000, "evaluate_every": 500, "checkpoint_every": 500, "label_smoothing": 0.1,
                    "optim": Optim(lr=1e-3, warmup=300, beta2=0.98)}  # fmt: skip
    return TextToTextConfig(recipe=recipe, overfit=overfit, model=models[arch](), **options)


class TextToText(Translate):
    """A subclass gives pairs() and scores()."""

    config: TextToTextConfig

    def pairs(self) -> tuple[list[tuple[str, str, str]], str]:
        """(source, target, what decides the split) of each pair; what was read."""
        raise NotImplementedError

    def scores(self, sources: list[str], references: list[str], outputs: list[str]) -> dict[str, float]:
        """Percent."""
        raise NotImplementedError

    def read(self):
        pairs, what = self.pairs()
        return pairs[: self.config.limit or None], what

    def prepare(self) -> None:
        super().prepare()
        self.test = [pair for pair in self.test if self.encode([pair])]
        if not self.test:
            raise DataError(f"{self.config.data or self.config.recipe}: no pair of the test split is at most "
                            f"{self.config.longest} tokens long (longest)")  # fmt: skip

    def build(self) -> Model:
        model = super().build()
        if self.alone:  # who gives the finished model a text means a source
            model.tokenizer = self.pieces.with_template("$A <eos> <bos>")
        return model

    @property
    def alone(self) -> bool:
        """Whether the model is a decoder without an encoder."""
        return not self.config.model.encoder_decoder

    def collate(self, pairs):
        if not self.alone:
            return super().collate(pairs)
        bos, inputs, targets = [self.pieces.bos_id], [], []
        for source, target in pairs:
            inputs.append(torch.tensor(source + bos + target[:-1]))
            targets.append(torch.tensor([IGNORED] * len(source) + target))
        return pad_sequence(inputs, True, self.pieces.pad_id), pad_sequence(targets, True, IGNORED)

    def loss(self, model, *batch):
        if not self.alone:
            return super().loss(model, *batch)
        ids, targets = batch
        return model.loss(ids, targets, **self.loss_options(model)), (targets != IGNORED).sum()

    def write(self, model: Model, sources: list[str]) -> list[str]:
        """What the model writes for each source."""
        prompts = [ids + [self.pieces.bos_id] * self.alone for ids in self.encode_side(sources)]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = [""] * len(prompts)
        for start in range(0, len(order), DECODED_ROWS):
            some = order[start : start + DECODED_ROWS]
            rows = generate(model, [prompts[i] for i in some], num_beams=self.config.beams,
                            max_new_tokens=self.config.written)  # fmt: skip
            for i, row in zip(some, rows, strict=True):
                found[i] = self.pieces.decode(row[len(prompts[i]) if self.alone else 0 :]).strip()
        return found

    def report(self, model: Model) -> Findings:
        """The scores of the test split, and samples."""
        sources, references = map(list, zip(*self.test, strict=True))
        outputs = self.write(model, sources)
        rows = list(zip(sources, references, outputs, strict=True))[:SHOWN]
        values = self.scores(sources, references, outputs) | {"tested": len(outputs)} | self.evaluate(model)
        table = report.table(["source", "reference", "model"], rows)
        text = "\n".join(f"{s}\n  {o}" for s, _, o in rows[:3])
        return Findings(values, [report.section("Samples", table)], text)
