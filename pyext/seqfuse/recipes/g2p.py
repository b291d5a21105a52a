"""Grapheme-to-phoneme conversion: spelled words in, phonemes out (`thought` -> `TH AO1 T`).

    seqfuse train g2p                       # the CMU Pronouncing Dictionary
    seqfuse train g2p --data words.tsv      # word<TAB>phonemes, phonemes separated by spaces

A GRU encoder-decoder with Luong's "general" attention (models/seq2seq.py). The attention comes after the decoder's GRU
and is not fed back into it, so in training the decoder runs over all phonemes in one call.

Words of one batch all have the same number of letters: the encoder sees no padding at all, in either direction, and the
attention needs no mask. Only the target side is padded, at its end, where a causal decoder cannot see it.
"""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from seqfuse import data, metrics, report
from seqfuse.data import DataError
from seqfuse.generate import generate
from seqfuse.models.base import Model
from seqfuse.models.seq2seq import RNNSeq2Seq, RNNSeq2SeqConfig
from seqfuse.recipes.base import Findings, Optim, Recipe, RunConfig, Task, fingerprint, generator
from seqfuse.recipes.texts import IGNORED
from seqfuse.tokenizer import SPECIALS, Tokenizer

POOL = 8  # batches that are sorted by length together, before they are shuffled
HELD_OUT = 1000  # words of the validation split that are evaluated in training
SHOWN = 40  # words in the report, a third of them in the terminal
DECODED_ROWS = 512


def g2p() -> RunConfig:
    return RunConfig(
        recipe="g2p",
        max_steps=5000,
        batch_size=64,  # words
        checkpoint_every=400,
        evaluate_every=200,
        log_every=20,
        keep="last",  # the rate falls to zero: the last weights are good ones, and the same at any evaluate_every
        optim=Optim(lr=2e-3, warmup=200),
        model=RNNSeq2SeqConfig(vocab=4, bos_id=1, cell="gru", embed=128, hidden=384, norm=True),
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """One decoded word; `truth` is the reading of the dictionary that is closest to it."""

    word: str
    decoded: tuple[str, ...]
    truth: tuple[str, ...]
    errors: int


class G2P(Task):
    unit = "phonemes"

    def prepare(self) -> None:
        own, item = self.config.data, data.CMUDICT
        self.lexicon = data.read_lexicon(own) if own else data.cmudict()
        self.fingerprint = fingerprint(Path(own) if own else data.fetch(item))
        self.said = f"{own}: word and phonemes, the first two columns"
        if not own:
            self.said = f"{item.source} {item.version}; licence: {item.licence}"
        self.words: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for word in self.lexicon:
            self.words[data.split_of(word)].append(word)
        for split, words in self.words.items():
            if not words:
                count = len(self.lexicon)
                raise DataError(f"the {split} split is empty: {count} words are too few, give some hundreds")
        train = self.words["train"]
        letters = sorted({letter for word in train for letter in word})
        phonemes = sorted({p for word in train for reading in self.lexicon[word] for p in reading})
        self.letters = self.tokenizer(lambda: tokens(letters, "characters"), "source_tokenizer.json")
        self.phonemes = self.tokenizer(lambda: tokens(phonemes, "words"))
        self.train, self.valid = self.pairs(train), self.pairs(self.words["valid"][:HELD_OUT])
        self.examples = len(self.train)

    def pairs(self, words: list[str]) -> list[tuple[list[int], list[int]]]:
        """The letters of each pronunciation, and its phonemes with <eos>."""
        rows = [(word, " ".join(reading)) for word in words for reading in self.lexicon[word]]
        spelled, spoken = zip(*rows, strict=True)
        spoken = ([*ids, self.phonemes.eos_id] for ids in self.phonemes.encode_batch(spoken))
        return list(zip(self.letters.encode_batch(spelled), spoken, strict=True))

    def build(self) -> Model:
        sizes = {"source_vocab": self.letters.vocab_size} | self.phonemes.config()
        model = RNNSeq2Seq(dataclasses.replace(self.config.model, **sizes))
        model.source_tokenizer, model.tokenizer = self.letters, self.phonemes
        return model

    # -------------------------------------------------------------------------------------------------------- batches

    def order(self, epoch: int) -> list[list[int]]:
        """Shuffled words of one length are cut into pools, and each pool is sorted by the target's length before it is
        cut into batches: that leaves little padding on the target side as well."""
        draw, size = generator(self.config.seed, epoch), self.config.batch_size
        batches = []
        for group in by_letters(range(self.examples), lambda i: self.train[i][0]):
            shuffled = [group[i] for i in torch.randperm(len(group), generator=draw).tolist()]
            for start in range(0, len(shuffled), POOL * size):
                pool = sorted(shuffled[start : start + POOL * size], key=lambda i: len(self.train[i][1]))
                batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]

    def batch(self, indices):
        return self.collate([self.train[i] for i in indices])

    def collate(self, pairs):
        """source [B, T]; what goes into the decoder and what should come out, [B, U] each."""
        rows = [torch.tensor(phonemes) for _, phonemes in pairs]
        inputs = [torch.cat([row.new_tensor([self.phonemes.bos_id]), row[:-1]]) for row in rows]
        source = torch.tensor([letters for letters, _ in pairs])
        return source, pad_sequence(inputs, True, self.phonemes.pad_id), pad_sequence(rows, True, IGNORED)

    def loss(self, model, source, inputs, targets):
        return model.loss(source, inputs, targets, **self.loss_options(model)), (targets != IGNORED).sum()

    def held_out(self):
        return map(self.collate, by_letters(self.valid, lambda pair: pair[0]))

    # --------------------------------------------------------------------------------------------------------- results

    def transcribe(self, model: Model, words: list[str]) -> dict[str, tuple[str, ...]]:
        """Greedy decoding of any words."""
        decoded = {}
        for group in by_letters(words, lambda word: word):
            for start in range(0, len(group), DECODED_ROWS):
                some = group[start : start + DECODED_ROWS]
                ids = torch.tensor(self.letters.encode_batch(some), device=self.device)
                rows = generate(model, ids, **self.decoding(ids.shape[1]))
                spoken = (tuple(text.split()) for text in self.phonemes.decode_batch(rows.tolist()))
                decoded |= dict(zip(some, spoken, strict=True))
        return decoded

    def decoding(self, letters: int) -> dict:
        """Options of generate. No word of the dictionary has more phonemes."""
        specials = (i for i in map(self.phonemes.id_of, SPECIALS) if i != self.phonemes.eos_id)
        return {"max_new_tokens": 2 * letters + 10, "forbidden": tuple(specials)}

    def report(self, model: Model) -> Findings:
        """Error rates of the test split, against the closest of each word's readings; samples, an attention map."""
        start = time.perf_counter()
        decoded = self.transcribe(model, self.words["test"])
        seconds = time.perf_counter() - start
        readings = [self.lexicon[word] for word in decoded]
        phonemes = metrics.token_error_rate(list(decoded.values()), readings)
        words = metrics.sequence_error_rate(list(decoded.values()), readings)
        drawn = random.Random(self.config.seed).sample(list(decoded), min(SHOWN, len(decoded)))
        samples = [self.sample(word, decoded[word]) for word in drawn]
        text = (
            f"{lines(samples[: SHOWN // 3])}\n\nphoneme error rate: {phonemes:.1f}%\nword error rate: {words:.1f}%\n"
            f"({len(decoded):,} held-out words decoded in {seconds:.1f} s)"
        )
        sections = [held_out_words(samples, len(decoded))]
        if model.config.attention is not None:
            sections.insert(0, self.attention(model, samples))
        rates = {"phoneme_error_rate": phonemes, "word_error_rate": words}
        return Findings(rates | self.evaluate(model), sections, text)

    def sample(self, word: str, decoded: tuple[str, ...]) -> Sample:
        errors, truth = metrics.closest(decoded, self.lexicon[word])
        return Sample(word, decoded, tuple(truth), errors)

    def attention(self, model: RNNSeq2Seq, samples: list[Sample]) -> str:
        """A picture of the letters that were read for each phoneme. A right answer with silent letters or digraphs
        shows more than a diagonal."""
        right = [s for s in samples if s.errors == 0 and len(s.word) <= 14] or samples
        word = max(right, key=lambda s: (len(s.word) - len(s.truth), len(s.word))).word
        source = torch.tensor([self.letters.encode(word)], device=self.device)
        (written,) = generate(model, source, **self.decoding(len(word))).tolist()
        begin = source.new_tensor([[self.phonemes.bos_id, *written[:-1]]])
        weights = model.alignment(source, begin)[0].float().tolist()  # (U, T)
        spoken = ["end" if i == self.phonemes.eos_id else self.phonemes.token_of(i) for i in written]
        return report.section(
            "Attention",
            report.paragraph(f"Where the model looks in “{word}”, a held-out word, for each phoneme it writes."),
            report.figure(report.heat_map(list(word), spoken, weights, "letters read", "phonemes written")),
        )


def tokens(found: list[str], kind: str) -> Tokenizer:
    return Tokenizer.of([*SPECIALS, *found], kind, specials=SPECIALS)


def by_letters(items, spelling) -> list[list]:
    """Items whose spelling(item) has as many letters, in groups, the shortest first."""
    groups: dict[int, list] = {}
    for item in items:
        groups.setdefault(len(spelling(item)), []).append(item)
    return [groups[length] for length in sorted(groups)]


def lines(samples: list[Sample]) -> str:
    rows = [("word", "dictionary", "decoded", ""), *map(cells, samples)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def cells(s: Sample) -> tuple[str, str, str, str]:
    return s.word, " ".join(s.truth), " ".join(s.decoded), "ok" if s.errors == 0 else f"{s.errors} wrong"


def held_out_words(samples: list[Sample], of: int) -> str:
    rows = []
    for s in samples:
        word, truth, decoded, verdict = map(report.escape, cells(s))
        mark = f'<span class="{"bad" if s.errors else "good"}">{verdict}</span>'
        rows.append((word, f'<span class="mono">{truth}</span>', f'<span class="mono">{decoded}</span>', mark))
    return report.section(
        "Held-out words",
        report.paragraph(f"{len(samples)} words drawn at random from the {of:,} held-out ones."),
        report.table(["word", "dictionary", "decoded", ""], rows, raw=True),
    )


RECIPE = Recipe("g2p", "words to phonemes, by an encoder-decoder with attention: the demo's model", g2p, G2P)
