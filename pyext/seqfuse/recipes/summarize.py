"""Summaries: a long text in, a short one out.

seqfuse train summarize                                # Debian's package descriptions -> their one-line titles
seqfuse train summarize --set arch=decoder             # a decoder alone; rnn: GRU layers with attention
seqfuse train summarize --set overfit=true             # 50 pairs by heart
seqfuse train summarize --data mine.tsv                # text<TAB>summary; .jsonl: keys "text" and "summary"
"""

from __future__ import annotations

from seqfuse import data, metrics
from seqfuse.recipes.base import Recipe
from seqfuse.recipes.text_to_text import TextToText, TextToTextConfig, text_to_text


def summarize(arch: str = "transformer", overfit: bool = False) -> TextToTextConfig:
    """arch: transformer, rnn or decoder. overfit: learn few pairs by heart."""
    return text_to_text("summarize", arch, overfit)


class Summarize(TextToText):
    def pairs(self):
        if self.config.data:
            records = data.read_records(self.config.data, ("text", "summary"))
            return [(text, summary, text) for text, summary in records.rows], records.said
        records = data.summaries()
        pairs = [(text, title, package.partition("-")[0]) for text, title, package in records.rows]
        return pairs, records.said

    def scores(self, sources, references, outputs):
        return {name: 100 * value for name, value in metrics.mean_rouge(outputs, references).items()}


RECIPE = Recipe("summarize", "summaries, by an encoder-decoder or a decoder alone", summarize, Summarize)
