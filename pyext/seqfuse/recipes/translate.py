"""Translation by a Transformer or a recurrent encoder-decoder with attention, from any file of pairs.

    seqfuse train translate                                   # English to Italian: Debian's package descriptions
    seqfuse train translate --set arch=rnn --set language=de
    seqfuse train translate --data mine.tsv                   # source<TAB>target; .jsonl: keys "source" and "target"

Source and target share one byte-pair vocabulary. The data is split by the package a text describes, or what its name
starts with up to the first "-", so that texts of one program are in one split; pairs of a file by the third column
("group") if there is one, else by the source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from seqfuse import attention_pictures, data, metrics, report
from seqfuse.data import DataError
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.config import MODELS
from seqfuse.models.seq2seq import RNNSeq2SeqConfig
from seqfuse.models.transformer import TransformerConfig
from seqfuse.recipes.base import Findings, Optim, Recipe, RunConfig, Task, fingerprint
from seqfuse.recipes.texts import IGNORED, sorted_batches
from seqfuse.tokenizer import Tokenizer

TOKENIZED, EVALUATED = 20_000, 1_000  # pairs that the tokenizer is trained on; of the held-out ones, at most
SHOWN = 8  # translations in the report
DECODED_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateConfig(RunConfig):
    """language: of Debian's translations from English, without a file of your own. vocab: tokens of both sides.
    longest: tokens of a source or target; longer pairs are left out of training. tested: pairs of the test split that
    are translated for the report, at most. beams: of that translation. overfit: evaluate on the training pairs, to see
    whether a model can learn a small set by heart.
    """

    language: str = "it"
    vocab: int = 4000
    longest: int = 64
    tested: int = 500
    beams: int = 4
    overfit: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.positive("vocab", "longest", "tested", "beams")
        most, needed = getattr(self.model, "max_positions", None), self.positions
        self.require(
            most is None or needed <= most,
            f"model.max_positions must be at least {needed} for longest={self.longest}, got {most}",
        )

    @property
    def positions(self) -> int:
        """That the model needs: a translation may have twice the tokens of the longest source, and <bos>."""
        return 2 * self.longest + 1


def translate(arch: Literal["transformer", "rnn"] = "transformer") -> TranslateConfig:
    """arch: transformer or rnn (GRU layers with Luong's attention)."""
    if arch not in ("transformer", "rnn"):
        raise ValueError(f"translate: arch must be transformer or rnn, got {arch!r}")
    if arch == "rnn":
        model = RNNSeq2SeqConfig(vocab=4, bos_id=1, cell="gru", embed=192, hidden=256, dropout_input=0.1,
                                 dropout_output=0.1)  # fmt: skip
    else:
        model = TransformerConfig(vocab=4, bos_id=1, width=192, layers=3, heads=4, mlp_width=512, max_positions=256,
                                  norm_first=True, positions="rope", scale_embeddings=False, dropout=0.1)  # fmt: skip
    return TranslateConfig(
        recipe="translate",
        max_steps=3000,
        batch_size=48,
        evaluate_every=500,
        checkpoint_every=500,
        label_smoothing=0.1,
        optim=Optim(lr=1e-3, warmup=300, beta2=0.98),
        model=model,
    )


class Translate(Task):
    percent = 5.0, 1.0  # of the groups, to test and to validate on

    def prepare(self) -> None:
        config = self.config
        splits: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
        pairs, what = self.read()
        for source, target, group in pairs:
            splits["train" if config.overfit else data.split_of(group, *self.percent)].append((source, target))
        if config.overfit:
            splits["valid"] = splits["test"] = splits["train"]
        for name, part in splits.items():
            if not part:
                raise DataError(
                    f"{config.data or config.language}: the {name} split is empty, {len(pairs)} pairs are too few; "
                    "overfit=true trains and evaluates on the same ones"
                )
        counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
        self.said = f"{what}\nsplit: {counts}"
        self.fingerprint = fingerprint("\n".join("\t".join(pair) for pair in pairs))
        texts = [text for pair in splits["train"][:TOKENIZED] for text in pair]
        self.pieces = self.tokenizer(lambda: Tokenizer.train(texts, "bpe", vocab=config.vocab, add_eos=True))
        self.test = splits["test"][: config.tested]
        self.train, self.valid = self.encode(splits["train"]), self.encode(splits["valid"][:EVALUATED])
        self.examples = len(self.train)
        if not self.train or not self.valid:
            raise DataError(
                f"{config.data or config.language}: no pair is at most {config.longest} tokens long (longest)"
            )

    def read(self) -> tuple[list[tuple[str, str, str]], str]:
        """(source, target, what decides the split) of each pair; what was read."""
        if self.config.data:
            records = data.read_records(self.config.data, ("source", "target"), ("group",))
            return [(source, target, group or source) for source, target, group in records.rows], records.said
        item = data.translation_set(self.config.language)
        rows = data.translations(self.config.language).rows
        pairs = [(source, target, package.partition("-")[0]) for source, target, package in rows]
        return pairs, f"{item.source}: {len(pairs):,} pairs; licence: {item.licence}"

    def encode(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Token ids, <eos> at the end of both; pairs that are too long left out."""
        sides = [self.encode_side(side) for side in zip(*pairs, strict=True)]
        return [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= self.config.longest]

    def encode_side(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, self.pieces.eos_id] for ids in self.pieces.encode_batch(texts, specials=False)]

    def build(self) -> Model:
        config = dataclasses.replace(self.config.model, **self.pieces.config())
        model = MODELS[config.model](config)
        model.tokenizer = self.pieces
        return model

    def order(self, epoch: int) -> list[list[int]]:
        return sorted_batches(
            [tuple(map(len, pair)) for pair in self.train], self.config.batch_size, self.config.seed, epoch
        )

    def batch(self, indices):
        return self.collate([self.train[i] for i in indices])

    def collate(self, pairs):
        """source [B, T] and its lengths [B]; what goes into the decoder and what should come out, [B, U] each."""
        sources, targets = ([torch.tensor(row) for row in side] for side in zip(*pairs, strict=True))
        lengths = torch.tensor([len(row) for row in sources])
        source = pad_sequence(sources, True, self.pieces.pad_id)
        inputs = pad_sequence([torch.cat([row.new_tensor([self.pieces.bos_id]), row[:-1]]) for row in targets], True,
                              self.pieces.pad_id)  # fmt: skip
        return source, lengths, inputs, pad_sequence(targets, True, IGNORED)

    def loss(self, model, source, lengths, inputs, targets):
        loss = model.loss(source, inputs, targets, src_lengths=lengths, **self.loss_options(model))
        return loss, (targets != IGNORED).sum()

    def held_out(self):
        rows = sorted(self.valid, key=lambda pair: tuple(map(len, pair)))
        for start in range(0, len(rows), DECODED_ROWS):
            yield self.collate(rows[start : start + DECODED_ROWS])

    def translations(self, model: Model, sources: list[str]) -> list[str]:
        """Sources for which the model has no positions are cut."""
        most = getattr(model.config, "max_positions", None)
        read = [ids if most is None or len(ids) <= most else [*ids[: most - 1], ids[-1]]
                for ids in self.encode_side(sources)]  # fmt: skip
        order = sorted(range(len(read)), key=lambda i: len(read[i]))
        found = [""] * len(read)
        for start in range(0, len(order), DECODED_ROWS):
            some = order[start : start + DECODED_ROWS]
            rows = generate(model, [read[i] for i in some], num_beams=self.config.beams,
                            max_new_tokens=2 * self.config.longest)  # fmt: skip
            for i, row in zip(some, rows, strict=True):
                found[i] = self.pieces.decode(row)
        return found

    def report(self, model: Model) -> Findings:
        """BLEU and chrF of the test split where sacrebleu is installed, by length too; samples, and an alignment."""
        sources, references = map(list, zip(*self.test, strict=True))
        outputs = self.translations(model, sources)
        values: dict[str, float | str] = dict(self.evaluate(model))
        rows = list(zip(sources, references, outputs, strict=True))[:SHOWN]
        sections = [report.section("Translations", report.table(["source", "reference", "model"], rows))]
        text = "\n".join(f"{s}\n  {o}" for s, _, o in rows)
        if metrics.has_sacrebleu():
            bleu, chrf = metrics.bleu(outputs, references), metrics.chrf(outputs, references)
            values |= {"BLEU": bleu.value, "chrF": chrf.value, "pairs": len(outputs)}
            values |= {"BLEU signature": bleu.signature, "chrF signature": chrf.signature}
            lengths = [len(source.split()) for source in sources]
            by_length = metrics.bleu_by_length(outputs, references, lengths)
            table = report.table(["words of the source", "pairs", "BLEU"],
                                 [(name, str(n), f"{b:.1f}") for name, n, b in by_length], (1, 2))  # fmt: skip
            sections.append(report.section("BLEU by length", report.figure(length_chart(by_length)), table))
            lines = (f"{name}: {b:.1f} ({n:,} pairs)" for name, n, b in by_length)
            text = "\n".join([text, "", "BLEU by words of the source", *lines])
        else:
            values |= {"BLEU": "not computed: sacrebleu is not installed (pip install seqfuse[eval])"}
        sides = list(zip(*map(self.pieces.encode_batch, (sources, outputs)), strict=True))
        sections += attention_pictures.to_the_source(model, *next(filter(is_drawn, sides), sides[0]))
        return Findings(values, sections, text)


def is_drawn(sides: tuple[list[int], list[int]]) -> bool:
    """Whether a source and what was written for it fit into a picture, and make one."""
    return all(3 < len(side) <= attention_pictures.MOST for side in sides)


def length_chart(by_length: list[tuple[str, int, float]]) -> str:
    ends = [int(name.split()[-1]) if "to" in name else int(name.split()[0]) + 10 for name, _, _ in by_length]
    series = [report.Series("BLEU", ends, [value for _, _, value in by_length], marks=True)]
    return report.line_chart(series, "words of the source, up to", "BLEU", "BLEU by length of the source")


RECIPE = Recipe(
    "translate", "translation, by a Transformer or an RNN with attention, from any file of pairs", translate, Translate
)
