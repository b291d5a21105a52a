"""Question answering: a passage and a question in, the answer out.

    seqfuse train qa                                       # cloze questions made of books
    seqfuse train qa --set arch=decoder                    # a decoder alone; rnn: GRU layers with attention
    seqfuse train qa --set overfit=true                    # 50 questions by heart
    seqfuse train qa --data train-v1.1.json                # in SQuAD's format
    seqfuse train qa --data mine.tsv                       # question<TAB>passage<TAB>answer; .jsonl: keys of that name

A cloze question is a sentence of a book in which a name is blank that stands in the sentences before it (as in the
Children's Book Test, Hill et al. 2016, arXiv:1511.02301).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from seqfuse import data, metrics
from seqfuse.data import DataError
from seqfuse.data.readers import is_broken
from seqfuse.recipes.base import Recipe
from seqfuse.recipes.text_to_text import TextToText, TextToTextConfig, text_to_text

BLANK = "_____"
BEFORE = 3  # sentences of a passage
LONGEST = 90  # words of passage and question
BLOCK = 200  # sentences that are in one split: passages overlap, but none reaches over a block's border
BOOKS = ("austen", "bryant", "burgess", "carroll", "chesterton", "edgeworth", "melville")  # prose
TITLES = {"Mr", "Mrs", "Miss", "Dr", "Sir", "Lady", "Lord", "Colonel", "Captain", "I", "Chapter"}

Question = tuple[str, str, tuple[str, ...], str]  # question, passage, answers, what decides the split


def qa(arch: str = "transformer", overfit: bool = False) -> TextToTextConfig:
    """arch: transformer, rnn or decoder. overfit: learn few questions by heart."""
    return text_to_text("qa", arch, overfit, written=12, longest=160)


class Answers(TextToText):
    percent = 10.0, 10.0

    def pairs(self):
        questions, what = self.questions()
        self.answers = defaultdict(tuple)
        rows = []
        for question, passage, answers, group in questions:
            source = f"{passage} {question}"
            self.answers[source] += answers
            if answers:
                rows.append((source, answers[0], group))
        return rows, f"{what}; {len(rows):,} questions with an answer"

    def questions(self) -> tuple[list[Question], str]:
        path = self.config.data
        if not path:
            item = data.SETS["gutenberg"]
            books = "".join(map(data.gutenberg, BOOKS))
            what = f"cloze questions from {item.source}, those called {', '.join(BOOKS)}; licence: {item.licence}"
            return cloze(books), what
        if Path(path).suffix.lower() == ".json":
            return read_squad(path), f"{path}, in SQuAD's format"
        records = data.read_records(path, ("question", "passage", "answer"))
        return [(question, passage, (answer,), passage) for question, passage, answer in records.rows], records.said

    def scores(self, sources, references, outputs):
        found = [metrics.answer_scores(o, self.answers[s]) for s, o in zip(sources, outputs, strict=True)]
        exact, f1 = (100 * sum(side) / len(found) for side in zip(*found, strict=True))
        return {"exact_match": exact, "f1": f1}


def cloze(text: str) -> list[Question]:
    """Of each sentence the last name in it that also stands in the sentences before. Split by blocks of sentences."""
    sentences = re.split(r'(?<=[a-z][.!?"])\s+(?=[A-Z"])', " ".join(text.split()))
    found = []
    for i in range(len(sentences)):
        if i % BLOCK < BEFORE:
            continue
        passage, words = " ".join(sentences[i - BEFORE : i]), sentences[i].split()
        known = set(re.findall(r"\b[A-Z][a-z]+\b", passage)) - TITLES
        for place in range(len(words) - 1, 0, -1):
            name = re.match(r"[A-Z][a-z]+", words[place])
            if name and name[0] in known and words[place - 1][-1].isalpha():
                if len(passage.split()) + len(words) <= LONGEST:
                    words[place] = BLANK + words[place][name.end() :]
                    found.append((" ".join(words), passage, (name[0],), f"block {i // BLOCK}"))
                break
    return found


def read_squad(path: str | Path) -> list[Question]:
    """A file in SQuAD's format; a question may have several answers, or none. Raises DataError with file and place."""
    try:
        everything = json.loads(data.read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: no JSON: {error.msg}") from None
    found = []
    for i, article in enumerate(_key(everything, "data", f"{path}: no SQuAD file", list)):
        for j, paragraph in enumerate(_key(article, "paragraphs", f"{path}: data[{i}]", list)):
            where = f"{path}: data[{i}].paragraphs[{j}]"
            passage = _key(paragraph, "context", where)
            for k, asked in enumerate(_key(paragraph, "qas", where, list)):
                there = f"{where}.qas[{k}]"
                answers = tuple(_key(a, "text", there) for a in _key(asked, "answers", there, list))
                found.append((_key(asked, "question", there), passage, answers, passage))
    return found


def _key(values, name: str, where: str, kind: type = str):
    """The value of a key that must be there; kind: str or list."""
    if not isinstance(values, dict) or name not in values:
        raise DataError(f"{where}: the key {name!r} is missing")
    if not isinstance(values[name], kind):
        raise DataError(f"{where}: the key {name!r} must be a {'list' if kind is list else 'text'}")
    if kind is str and is_broken(values[name]):
        raise DataError(f"{where}: the key {name!r} holds half of a character (a lone surrogate)")
    return values[name]


RECIPE = Recipe("qa", "question answering, by an encoder-decoder or a decoder alone", qa, Answers)
