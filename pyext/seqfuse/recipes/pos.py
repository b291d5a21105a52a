"""Parts of speech: each word's universal tag (NOUN, VERB ...) from a BiLSTM, a Transformer, or a pretrained body.

seqfuse train pos                                              # the Brown corpus, split by its texts
seqfuse train pos --data en_ewt-ud-train.conllu --set test=en_ewt-ud-test.conllu
seqfuse train pos --set start=minilm                           # fine-tunes MiniLM
"""

from __future__ import annotations

from seqfuse import data, metrics
from seqfuse.models.base import Model
from seqfuse.recipes.base import Findings, Recipe
from seqfuse.recipes.labels import confusion, f1_table
from seqfuse.recipes.tagging import Tagging, TaggingConfig, flat, tagging


def pos(arch: str = "bilstm", start: str | None = None, lora: int = 0) -> TaggingConfig:
    """arch: bilstm or transformer. start: a pretrained body instead of both, "minilm" or a folder. lora: rank of its
    adapters."""
    return tagging("pos", arch, start, lora, max_steps=3000, batch_size=32, evaluate_every=500, checkpoint_every=500)


class PartsOfSpeech(Tagging):
    objective = "accuracy"

    source = data.SETS["brown"]

    def sentences(self):
        return data.brown()

    def scores(self, true, predicted):
        right = [a == b for a, b in zip(flat(true), flat(predicted), strict=True)]
        return {"accuracy": sum(right) / len(right)}

    def report(self, model: Model) -> Findings:
        """Accuracy on the test split, of words that training has and of those it has not; F1 and confusions."""
        found, loss = self.tag(model, self.test)
        tags = [s.tags for s in self.test]
        true, predicted = flat(tags), flat(found)
        unseen = [word not in self.known for s in self.test for word in s.words]
        right = sum(a == b and u for a, b, u in zip(true, predicted, unseen, strict=True))
        scores = metrics.class_scores(true, predicted)
        values = self.scores(tags, found) | {
            "accuracy_of_unseen_words": right / max(1, sum(unseen)),
            "macro_f1": metrics.macro_f1(scores),
            "loss": loss,
            "words": len(true),
            "unseen_words": sum(unseen),
        }
        sections = [f1_table("Parts of speech", scores), confusion(true, predicted), self.samples(found)]
        return Findings(values, sections)


RECIPE = Recipe("pos", "parts of speech: a BiLSTM that tags every word", pos, PartsOfSpeech)
