"""What recipes that predict labels show: F1 of each class, and which classes are taken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from seqfuse import report
from seqfuse.metrics import F1

SHOWN = 24  # classes of a confusion matrix, the most frequent ones


def f1_table(title: str, scores: Mapping[str, F1]) -> str:
    """A section: precision, recall and F1 of each class in percent, the most frequent class first."""
    ordered = sorted(scores.items(), key=lambda item: -item[1].support)
    rows = [(name, *(f"{100 * value:.1f}" for value in score[:3]), f"{score.support:,}") for name, score in ordered]
    return report.section(title, report.table(["", "precision", "recall", "F1", "how many"], rows, range(1, 5)))


def confusion(true: Sequence[str], predicted: Sequence[str]) -> str:
    """A section: the confusion matrix, each row the shares of what one class was taken for."""
    support = Counter(true)
    names = sorted(name for name, _ in support.most_common(SHOWN))
    pairs = Counter(zip(true, predicted, strict=True))
    shares = [[pairs[row, column] / support[row] for column in names] for row in names]
    caption = "The share of each class (row) that was taken for another (column)."
    if len(support) > SHOWN:
        caption += f" The {SHOWN} most frequent of {len(support)} classes."
    chart = report.heat_map(names, names, shares, "predicted", "true")
    return report.section("Confusion matrix", report.figure(chart, caption))
