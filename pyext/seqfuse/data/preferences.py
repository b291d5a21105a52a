"""Preferences: which of two answers people like better. From the user's file, or from ratings of film reviews.

The ratings are of *sentiment*: some twenty people said how negative or positive a sentence of a film review is, from -4
to 4 (Hutto and Gilbert 2014). Of two sentences equally long the more positive one is called preferred. That is human
judgement, but not of how helpful, true or well written a text is.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seqfuse.data.fetch import PackageFile, fetch
from seqfuse.data.readers import read_records

RATINGS = PackageFile(
    name="vaderSentiment",
    version="3.3.2",
    member="additional_resources/hutto_ICWSM_2014.tar.gz",
    sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    licence_member="LICENSE.txt",
    licence="MIT, Copyright (c) 2016 C.J. Hutto (the ratings; the sentences belong to the reviews' authors)",
    source="Human ratings of sentiment by Hutto and Gilbert 2014, from the PyPI package vaderSentiment",
    instead=", or give your own preferences with --data FILE",
    archive="sdist",
    size=2_338_514,
)


class Preference(NamedTuple):
    """Of two answers to a prompt the one that was liked better, and the other. Without a prompt: ""."""

    prompt: str
    chosen: str
    rejected: str


class Rated(NamedTuple):
    """A sentence and its mean rating, from -4 (negative) to 4 (positive)."""

    text: str
    rating: float


def read_preferences(path: str | Path) -> tuple[list[Preference], str]:
    """(preferences, what was read): of a .jsonl file with the keys prompt, chosen and rejected in each line; of any
    other file the first three columns, separated by tabs. Raises DataError with file and line number."""
    records = read_records(path, Preference._fields)
    return [Preference(*row) for row in records.rows], records.said


def rated_reviews() -> list[Rated]:
    """10,605 sentences of film reviews with their mean ratings."""
    with tarfile.open(fileobj=io.BytesIO(fetch(RATINGS).read_bytes())) as archive:
        text = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [Rated(" ".join(sentence.split()), float(rating)) for _, rating, sentence in rows]


def length_matched_pairs(texts: Sequence[Rated], gap: float = 1.0, rounds: int = 1) -> list[Preference]:
    """Pairs of texts of equally many words whose ratings are at least `gap` apart, without a prompt.

    rounds: how often each text is put beside another one at random, always in the same way for the same texts. As both
    have one length, nothing can be learned from length alone.
    """
    by_length = defaultdict(list)
    for text in texts:
        by_length[len(text.text.split())].append(text)
    shuffle, pairs = random.Random(0), []
    for _ in range(rounds):
        for _, group in sorted(by_length.items()):
            shuffle.shuffle(group)
            for a, b in zip(group[::2], group[1::2], strict=False):
                if abs(a.rating - b.rating) >= gap:
                    worse, better = sorted((a, b), key=lambda text: text.rating)
                    pairs.append(Preference("", better.text, worse.text))
    return pairs
