"""Text to token ids and back: one class over the `tokenizers` library, trained here or read from a tokenizer.json.

kind          tokens                                                     text outside of what it was trained on (1)
"bpe"         byte pairs, merged by frequency (Sennrich et al. 2016)      always comes back as it was
"unigram"     pieces of a unigram model (Kudo 2018)                       <unk> for unknown characters
"wordpiece"   words in pieces (Schuster and Nakajima 2012), as in BERT    <unk> for unknown characters
"bytes"       the 256 bytes of UTF-8                                      always comes back as it was
"characters"  characters                                                  <unk>
"words"       what stands between spaces                                  <unk>

(1) The name of a special token, "<eos>" in a text, is that token in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from seqfuse.files import save_atomically
from seqfuse.models.files import CheckpointError

KINDS = ("bpe", "unigram", "wordpiece", "bytes", "characters", "words")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
# what checkpoints of different families call the tokens with a meaning
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "bos": ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
}


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; Tokenizer.train(texts), Tokenizer.load("tokenizer.json")."""

    def __init__(self, inner: tokenizers.Tokenizer):
        """inner: of the `tokenizers` library."""
        self.inner = inner

    # ------------------------------------------------------------------------------------------------ where it is from

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        kind: str = "bpe",
        *,
        vocab: int = 8000,
        specials: Sequence[str] = SPECIALS,
        lowercase: bool = False,
        add_eos: bool = False,
    ) -> Tokenizer:
        """A tokenizer of at most `vocab` tokens, the specials (ids from 0) among them.

        lowercase: all text is lower case to it. add_eos: encode puts <eos> behind each text, as sources of an
        encoder-decoder want it. The same texts give the same tokenizer, but for "unigram" and "wordpiece", whose ties
        the library breaks by chance. Raises ValueError or TypeError on bad arguments.
        """
        specials = list(specials)
        if kind not in KINDS:
            raise ValueError(f"Tokenizer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        unk = next((name for name in NAMES["unk"] if name in specials), None)
        if unk is None and kind not in ("bpe", "bytes"):
            raise ValueError(f"Tokenizer: kind {kind!r} needs <unk> among the specials, got {specials}")
        least = len(specials) + {"bpe": 256, "bytes": 256}.get(kind, 1)
        if isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < least:
            raise ValueError(f"Tokenizer: vocab must be a whole number of at least {least} for {kind!r}, got {vocab!r}")
        if isinstance(texts, str):
            raise TypeError("Tokenizer: texts must be several strings, got one: put it into a list")
        inner = tokenizers.Tokenizer(_model(kind, unk))
        _dress(inner, kind, lowercase)
        common = dict(special_tokens=specials, show_progress=False)
        if kind == "bytes":
            inner = _bytes(specials, lowercase)
        else:
            trainer = {
                "bpe": lambda: trainers.BpeTrainer(
                    vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **common
                ),
                "unigram": lambda: trainers.UnigramTrainer(vocab_size=vocab, unk_token=unk, **common),
                "wordpiece": lambda: trainers.WordPieceTrainer(vocab_size=vocab, **common),
                "characters": lambda: trainers.WordLevelTrainer(vocab_size=vocab, **common),
                "words": lambda: trainers.WordLevelTrainer(vocab_size=vocab, **common),
            }[kind]()
            inner.train_from_iterator(texts, trainer)
        return cls(inner)._ending(add_eos)

    @classmethod
    def of(cls, tokens: Sequence[str], kind: str, *, specials: Sequence[str] = (), add_eos: bool = False) -> Tokenizer:
        """A "characters" or "words" tokenizer of just these tokens: the id of each is its place. specials: which of
        them are no text."""
        if kind not in ("characters", "words"):
            raise ValueError(f"Tokenizer: a list of tokens makes kind 'characters' or 'words', got {kind!r}")
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            raise ValueError("Tokenizer: a token stands twice in the list")
        unk = next((name for name in NAMES["unk"] if name in ids), None)
        inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=unk or "<unk>"))
        _dress(inner, kind, False)
        inner.add_special_tokens([token for token in tokens if token in specials])
        return cls(inner)._ending(add_eos)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, of this library or of Hugging Face's. Raises CheckpointError if it is none."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(f"{path}: is damaged or no tokenizer.json: {error}") from error
        inner.no_padding()  # a file may ask for rows of one length, whose padding would be taken for text
        inner.no_truncation()
        return cls(inner)

    def with_template(self, template: str) -> Tokenizer:
        """The same tokenizer, from now on with tokens around each text: "<bos> $A", where $A is the text.

        Raises ValueError for a token that there is not.
        """
        names = [name for name in template.split() if name != "$A"]
        ids = [(name, self.id_of(name)) for name in dict.fromkeys(names)]
        for name, i in ids:
            if i is None:
                raise ValueError(f"Tokenizer: the template {template!r} has {name!r}, which is none of the tokens")
        self.inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
        return self

    def save(self, path: str | Path) -> None:
        text = self.inner.to_str(pretty=True)
        save_atomically(Path(path), lambda part: part.write_text(text, encoding="utf-8"))

    def _ending(self, add_eos: bool) -> Tokenizer:
        if add_eos:
            eos = self.eos_id
            if eos is None:
                raise ValueError("Tokenizer: add_eos needs <eos> among the tokens")
            self.with_template(f"$A {self.inner.id_to_token(eos)}")
        return self

    # ---------------------------------------------------------------------------------------------------- what it does

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """specials: with the tokens that the tokenizer puts around a text, such as <bos> and <eos>."""
        return self.inner.encode(text, add_special_tokens=specials).ids

    def encode_batch(self, texts: Sequence[str], *, specials: bool = True) -> list[list[int]]:
        return [e.ids for e in self.inner.encode_batch(list(texts), add_special_tokens=specials)]

    def batch(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [B, T] int64, padded on the right; lengths [B] int64)."""
        rows = [torch.tensor(row, dtype=torch.int64) for row in self.encode_batch(texts)]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id or 0)
        return ids.to(device), lengths.to(device)

    def decode(self, ids: Sequence[int] | torch.Tensor, *, specials: bool = False) -> str:
        """The text of ids; without the special tokens, unless they are asked for."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.inner.decode(ids, skip_special_tokens=not specials)

    def decode_batch(self, rows: Sequence[Sequence[int]] | torch.Tensor, *, specials: bool = False) -> list[str]:
        return [self.decode(row, specials=specials) for row in rows]

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ids = self.inner.get_vocab(with_added_tokens=True).values()
        return max(ids) + 1 if ids else 0

    def id_of(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def token_of(self, index: int) -> str | None:
        return self.inner.id_to_token(index)

    @property
    def pad_id(self) -> int | None:
        return self._named("pad")

    @property
    def bos_id(self) -> int | None:
        return self._named("bos")

    @property
    def eos_id(self) -> int | None:
        return self._named("eos")

    @property
    def unk_id(self) -> int | None:
        return self._named("unk")

    def config(self) -> dict[str, int | None]:
        """What a model's config says of tokens: vocab, bos_id, eos_id, pad_id."""
        return {"vocab": self.vocab_size, "bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}

    def _named(self, meaning: str) -> int | None:
        return next((i for i in map(self.id_of, NAMES[meaning]) if i is not None), None)


def _model(kind: str, unk: str | None):
    if kind in ("bpe", "bytes"):
        return models.BPE()
    if kind == "unigram":
        return models.Unigram()
    return models.WordPiece(unk_token=unk) if kind == "wordpiece" else models.WordLevel(unk_token=unk)


def _dress(inner: tokenizers.Tokenizer, kind: str, lowercase: bool) -> None:
    """What happens to text before the model sees it, and to tokens on their way back."""
    steps = [normalizers.Lowercase()] if lowercase else []
    if kind in ("bpe", "bytes"):
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        inner.decoder = decoders.ByteLevel()
    elif kind == "unigram":
        steps.append(normalizers.NFKC())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "wordpiece":
        steps = [normalizers.BertNormalizer(lowercase=lowercase)]
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    elif kind == "characters":
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
    else:
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if steps:
        inner.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def _bytes(specials: list[str], lowercase: bool) -> tokenizers.Tokenizer:
    """The specials, then the 256 bytes, in the library's spelling of them; there is nothing to train."""
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    _dress(inner, "bytes", lowercase)
    inner.add_special_tokens(specials)
    return inner
