"""How good a model's output is: error rates, perplexity, BLEU and chrF, F1 of classes and spans, ROUGE, answers.

BLEU and chrF are sacrebleu's (Post 2018, arXiv:1804.08771), with the signature that says how they were computed: it is
installed by `pip install seqfuse[eval]` and needed by nothing else.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def closest(output: Sequence[Any], references: Sequence[Sequence[Any]]) -> tuple[int, Sequence[Any]]:
    """(edits, reference) of the reference that `output` is closest to, the first of equally close ones."""
    return min(((edit_distance(output, r), r) for r in references), key=lambda pair: pair[0])


def token_error_rate(outputs: Sequence[Sequence[Any]], references: Sequence[Sequence[Sequence[Any]]]) -> float:
    """Percent: edits needed over all outputs / tokens in all references, each the closest to its output.

    Of phonemes it is the phoneme error rate, of words the word error rate of speech recognition. references: one or
    several for each output. Raises ValueError if there are not as many, or no token in them.
    """
    _as_many("token_error_rate", outputs, references)
    found = [closest(output, several) for output, several in zip(outputs, references, strict=True)]
    tokens = sum(len(reference) for _, reference in found)
    if tokens == 0:
        raise ValueError("token_error_rate: the references hold no tokens")
    return 100 * sum(edits for edits, _ in found) / tokens


def sequence_error_rate(outputs: Sequence[Sequence[Any]], references: Sequence[Sequence[Sequence[Any]]]) -> float:
    """Percent of outputs that equal none of their references: of spelled words the word error rate."""
    _as_many("sequence_error_rate", outputs, references)
    wrong = sum(
        all(list(output) != list(r) for r in several) for output, several in zip(outputs, references, strict=True)
    )
    return 100 * wrong / len(outputs)


def perplexity(nats_per_token: float) -> float:
    """exp of the mean cross entropy; infinite where that overflows."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """nats: the sum of the cross entropy over a text of so many bytes in UTF-8. Comparable across tokenizers."""
    if text_bytes <= 0:
        raise ValueError(f"bits_per_byte: text_bytes must be positive, got {text_bytes}")
    return nats / math.log(2) / text_bytes


class F1(NamedTuple):
    """precision, recall and f1 in [0, 1], 0 where nothing was to be found; support: how many there are in truth."""

    precision: float
    recall: float
    f1: float
    support: int

    @classmethod
    def of(cls, right: int, predicted: int, support: int) -> F1:
        precision, recall = right / max(1, predicted), right / max(1, support)
        return cls(precision, recall, 2 * precision * recall / (precision + recall) if right else 0.0, support)


def class_scores(true: Sequence[str], predicted: Sequence[str]) -> dict[str, F1]:
    """F1 of each class that stands in `true` or `predicted`, in alphabetical order. Raises ValueError if there are not
    as many."""
    _as_many("class_scores", predicted, true)
    support, found = Counter(true), Counter(predicted)
    right = Counter(a for a, b in zip(true, predicted, strict=True) if a == b)
    return {name: F1.of(right[name], found[name], support[name]) for name in sorted({*support, *found})}


def macro_f1(scores: Mapping[str, F1]) -> float:
    """The mean of the classes' F1."""
    return sum(score.f1 for score in scores.values()) / len(scores)


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, last) of the spans that tags like B-PER, I-PER, O mark; BIO and BIOES.

    As conlleval reads them (Tjong Kim Sang and De Meulder 2003): a span also begins with an I- that continues nothing.
    """
    found: list[tuple[str, int, int]] = []
    start, mark, kind = None, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        mark_before, kind_before = mark, kind
        mark, _, kind = tag.partition("-")
        begins = mark in ("B", "S") or mark_before in ("O", "E", "S") or kind != kind_before
        if start is not None and (begins or mark == "O"):
            found.append((kind_before, start, i - 1))
            start = None
        if mark != "O" and begins:
            start = i
    return found


def span_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[F1, dict[str, F1]]:
    """Of the spans of many sentences: F1 of all, and of each type. A span is right if its type and both ends are.

    Raises ValueError if there are not as many sentences.
    """
    _as_many("span_scores", predicted, true)
    theirs = {(i, *span) for i, tags in enumerate(true) for span in spans(tags)}
    ours = {(i, *span) for i, tags in enumerate(predicted) for span in spans(tags)}
    right, found, support = (Counter(span[1] for span in some) for some in (theirs & ours, ours, theirs))
    by_type = {kind: F1.of(right[kind], found[kind], support[kind]) for kind in sorted({*support, *found})}
    return F1.of(len(theirs & ours), len(ours), len(theirs)), by_type


def rouge(output: str, reference: str) -> dict[str, float]:
    """F1 in [0, 1] of the words (ROUGE-1), pairs of words (ROUGE-2) and the longest common subsequence of words
    (ROUGE-L) that a summary shares with its reference (Lin 2004). Words: runs of a-z and 0-9 in lower case, not
    stemmed."""
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (output, reference))
    found = {}
    for n in (1, 2):
        a, b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (ours, theirs))
        found[f"rouge{n}"] = F1.of((a & b).total(), a.total(), b.total()).f1
    found["rougeL"] = F1.of(_longest_common(ours, theirs), len(ours), len(theirs)).f1
    return found


def mean_rouge(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE of many summaries: the mean of each. Raises ValueError if there are not as many references."""
    _as_many("mean_rouge", outputs, references)
    each = [rouge(output, reference) for output, reference in zip(outputs, references, strict=True)]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def answer_scores(output: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 of the words) in [0, 1] with the answer that is closest, as SQuAD counts them (Rajpurkar et al.
    2016, arXiv:1606.05250): without case, punctuation and articles. No answers: right is to say nothing."""
    answers = [a for a in answers if _plain(a)] or [""]
    ours = _plain(output)
    exact = max(float(ours == _plain(answer)) for answer in answers)
    return exact, max(_shared(ours.split(), _plain(answer).split()) for answer in answers)


def _plain(answer: str) -> str:
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _shared(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return F1.of((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs)).f1


@dataclass(frozen=True)
class Score:
    """value: 0 to 100. signature: how it was computed."""

    value: float
    signature: str


def bleu(outputs: Sequence[str], references: Sequence[str]) -> Score:
    """sacreBLEU of a corpus, one reference for each output. Raises ValueError if there are not as many."""
    return _sacrebleu("BLEU", outputs, references)


def chrf(outputs: Sequence[str], references: Sequence[str]) -> Score:
    """chrF of a corpus (Popović 2015), one reference for each output. Raises ValueError if there are not as many."""
    return _sacrebleu("CHRF", outputs, references)


def bleu_by_length(
    outputs: Sequence[str], references: Sequence[str], lengths: Sequence[int], edges: Sequence[int] = (10, 20, 30, 40)
) -> list[tuple[str, int, float]]:
    """(range of lengths, how many outputs, their BLEU) for sources of up to edges[0] tokens, from there to edges[1] and
    so on, and longer ones; ranges without any are left out."""
    _as_many("bleu_by_length", outputs, references)
    _as_many("bleu_by_length", outputs, lengths)
    rows, low = [], 1
    for high in (*edges, None):
        inside = [i for i, n in enumerate(lengths) if n >= low and (high is None or n <= high)]
        if inside:
            score = bleu([outputs[i] for i in inside], [references[i] for i in inside])
            rows.append((f"{low} to {high}" if high else f"{low} and more", len(inside), score.value))
        low = (high or 0) + 1
    return rows


def has_sacrebleu() -> bool:
    """Whether bleu() and chrf() can be computed here."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        return False
    return True


def _sacrebleu(name: str, outputs: Sequence[str], references: Sequence[str]) -> Score:
    _as_many(name.lower(), outputs, references)
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError(f"{name.lower()} needs sacrebleu: pip install seqfuse[eval] ({error})") from error
    metric = getattr(metrics, name)()
    score = metric.corpus_score(list(outputs), [list(references)])
    return Score(score.score, str(metric.get_signature()))


def _as_many(who: str, outputs: Sequence, references: Sequence) -> None:
    if not outputs or len(outputs) != len(references):
        raise ValueError(
            f"{who}: {len(outputs)} outputs and {len(references)} references: as many are wanted, one at least"
        )
