"""Named entities, or any spans of words with a type: BIO tags from a BiLSTM, a Transformer, or a pretrained body.

    seqfuse train ner                                              # the parts of addresses in the USA
    seqfuse train ner --data eng.train --set test=eng.testb        # CoNLL-2003, WNUT-17 and the like
    seqfuse train ner --set start=minilm                           # fine-tunes MiniLM

The measure is F1 of whole spans, as conlleval and seqeval count them.
"""

from __future__ import annotations

from seqfuse import data, metrics
from seqfuse.models.base import Model
from seqfuse.recipes.base import Findings, Recipe
from seqfuse.recipes.labels import confusion, f1_table
from seqfuse.recipes.tagging import Tagging, TaggingConfig, flat, tagging


def ner(arch: str = "bilstm", start: str | None = None, lora: int = 0) -> TaggingConfig:
    """arch: bilstm or transformer. start: a pretrained body instead of both, "minilm" or a folder. lora: rank of its
    adapters."""
    return tagging("ner", arch, start, lora, max_steps=600, batch_size=32, evaluate_every=100, vocab=2000)


class Entities(Tagging):
    objective = "f1"
    spans = True

    source = data.SETS["addresses"]

    def sentences(self):
        return [(sentence, " ".join(sentence.words)) for sentence in data.addresses()]

    def scores(self, true, predicted):
        return {"f1": metrics.span_scores(true, predicted)[0].f1}

    def report(self, model: Model) -> Findings:
        """Span F1 on the test split, of each type too; which types a word is taken for."""
        found, loss = self.tag(model, self.test)
        true = [s.tags for s in self.test]
        total, by_type = metrics.span_scores(true, found)
        values = {"f1": total.f1, "precision": total.precision, "recall": total.recall, "loss": loss}
        types = ([tag.partition("-")[2] or tag for tag in flat(rows)] for rows in (true, found))
        sections = [f1_table("Types of spans", by_type), confusion(*types), self.samples(found)]
        return Findings(values | {"spans": total.support}, sections)


RECIPE = Recipe("ner", "named entities: spans of words with a type", ner, Entities)
