"""Small made-up files for recipes of tasks, and settings with which those train in seconds."""

import json
import random

import torch

from seqfuse import models
from seqfuse.tokenizer import Tokenizer

RNN = {"model.embed": 16, "model.hidden": 16, "vocab": 280}
TRANSFORMER = {"model.width": 16, "model.layers": 1, "model.heads": 2, "vocab": 280}
BILSTM = {"model.body.embed": 16, "model.body.hidden": 16, "vocab": 280}
ENCODER = {"arch": "transformer", "model.body.width": 16, "model.body.layers": 1, "model.body.heads": 2, "vocab": 280}
ULMFIT = RNN | {"limit": 20_000, "length": 10, "text": "stdlib", "general_steps": 2, "target_steps": 2, "labelled": 40}
ALIGN = TRANSFORMER | {"model.mlp_width": 32, "longest": 24, "answer": 8, "samples": 3, "measured": 4, "sft_steps": 2,
                       "reward_steps": 2}  # fmt: skip


def write_tagged(folder):
    """Sentences in which a word's first letter is its tag."""
    path, lines = folder / "tagged.conll", []
    for i in range(200):
        words = [f"{'abc'[(i * j) % 3]}{(7 * i + j) % 10}" for j in range(1 + i % 7)]
        lines += [f"{word}\tB-{word[0].upper()}" for word in words] + [""]
    path.write_text("\n".join(lines))
    return path


def write_pairs(folder):
    """Texts and their last word: summaries.tsv; the same as questions, passages and answers: questions.tsv."""
    texts = [" ".join(f"{'abcd'[(i * j) % 4]}{(3 * i + j) % 7}" for j in range(1, 5 + i % 3)) for i in range(120)]
    (folder / "summaries.tsv").write_text("\n".join(f"{text}\t{text.split()[-1]}" for text in texts))
    (folder / "questions.tsv").write_text("\n".join(f"last?\t{text}\t{text.split()[-1]}" for text in texts))
    return folder


def write_labelled(folder):
    """Texts with a good or a bad word in them."""
    path = folder / "labelled.tsv"
    rows = [(f"w{i % 9} {['bad', 'good'][i % 2]} v{i % 7} u{i}", ["neg", "pos"][i % 2]) for i in range(300)]
    path.write_text("\n".join("\t".join(row) for row in rows))
    return path


def write_classes(folder):
    """Texts of two classes, of other letters each."""
    path, draw = folder / "classes.tsv", random.Random(0)
    letters = {"early": "abc", "late": "xyz"}
    rows = [(name, "".join(draw.choices(letters[name], k=draw.randint(3, 9)))) for name in letters for _ in range(150)]
    path.write_text("\n".join("\t".join(row) for row in rows))
    return path


def write_preferences(folder):
    """Answers in capitals are liked better."""
    path, draw = folder / "preferences.jsonl", random.Random(0)
    lines = []
    for i in range(60):
        word = "".join(draw.choices("abcd", k=4))
        lines.append(json.dumps({"prompt": f"say {i}", "chosen": word.upper(), "rejected": word}))
    path.write_text("\n".join(lines))
    return path


def write_body(folder, text: str, make=models.Encoder, config=models.EncoderConfig, **options):
    """The folder of a small transformer whose tokenizer knows a text."""
    tokenizer = Tokenizer.train([text], "bpe", vocab=300)
    torch.manual_seed(1)  # not that of a run
    model = make(config(**{"width": 16, "layers": 1, "heads": 2} | options, **tokenizer.config()))
    model.tokenizer = tokenizer
    model.save(folder)
    return folder
