"""Recipes of tasks for a few steps on small data: tags, classes, answers."""

import json
import re

import pytest
import torch
from rich.console import Console

from seqfuse import data, models, trainer
from seqfuse.checkpoints import RunFolder
from seqfuse.parallel import pick_device
from seqfuse.recipes import RECIPES
from seqfuse.recipes.texts import IGNORED
from seqfuse.run_report import evaluate, findings_of

STEPS = {"max_steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "log_every": 1, "batch_size": 8, "optim.warmup": 2}
SMALL = {"model.body.embed": 16, "model.body.hidden": 16, "model.body.dropout_input": 0.0, "vocab": 280}
ENCODER = {"arch": "transformer", "model.body.width": 16, "model.body.layers": 1, "model.body.heads": 2, "vocab": 280}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Sentences in which a word's first letter is its tag."""
    path = tmp_path_factory.mktemp("data") / "tagged.conll"
    lines = []
    for i in range(200):
        words = [f"{'abc'[(i * j) % 3]}{(7 * i + j) % 10}" for j in range(1 + i % 7)]
        lines += [f"{word}\tB-{word[0].upper()}" for word in words] + [""]
    path.write_text("\n".join(lines))
    return path


def configure(name, changes):
    return RECIPES[name].configure(STEPS | changes)


def run(config, folder) -> dict:
    assert trainer.train(config, folder, device="cpu", console=Console(quiet=True))
    found = json.loads((folder / "results.json").read_text())
    task = RECIPES[config.recipe].task(config, pick_device("cpu"), folder)
    assert evaluate(task, RunFolder(folder))[0].metrics == found["metrics"]  # as `seqfuse eval` says it
    assert (folder / "report.html").stat().st_size > 1000
    return found


# ---------------------------------------------------------------------------------------------------------------- tags


@pytest.mark.parametrize("name", ["pos", "ner"])
@pytest.mark.parametrize("size", [SMALL, ENCODER], ids=["bilstm", "transformer"])
def test_tags_are_learned(name, size, tagged, tmp_path):
    config = configure(name, size | {"data": str(tagged), "max_steps": 60, "evaluate_every": 30, "optim.lr": 0.02})
    found = run(config, tmp_path / "run")
    assert found["metrics"][found["objective"]] > 0.9
    assert isinstance(models.load(tmp_path / "run"), models.Tagger)


def test_a_tagger_starts_from_any_folder(tagged, tmp_path):
    first = run(configure("pos", ENCODER | {"data": str(tagged), "max_steps": 40, "optim.lr": 0.02}), tmp_path / "a")
    config = configure("pos", {"data": str(tagged), "start": str(tmp_path / "a"), "max_steps": 1})
    task = RECIPES["pos"].task(config)
    old, new = models.load(tmp_path / "a"), task.model
    for name, tensor in old.body.state_dict().items():
        assert torch.equal(new.body.state_dict()[name], tensor)
    assert first["metrics"]["accuracy"] > 0.9 and new.tokenizer.vocab_size == old.tokenizer.vocab_size
    assert task.encoded[0][0][0] == new.tokenizer.bos_id and task.encoded[0][1][0] == 1


def test_first_pieces_have_the_tags(tagged):
    task = RECIPES["pos"].task(configure("pos", SMALL | {"data": str(tagged), "longest": 3}))
    assert max(len(s.words) for s in task.train) == 3 and len(task.train) > 200
    ids, targets, lengths = task.batch([0, 1, 2])
    for row, sentence in enumerate(task.train[:3]):
        counted = targets[row] != IGNORED
        assert [task.names[i] for i in targets[row][counted]] == list(sentence.tags)
        assert task.pieces.decode(ids[row, : lengths[row]]).split() == list(sentence.words)
    sums = [task.loss(task.model.eval(), *task.batch([i])) for i in range(3)]
    together, count = task.loss(task.model, ids, targets, lengths)
    assert count == sum(int(n) for _, n in sums) and torch.allclose(together, sum(value for value, _ in sums))


def test_a_tag_that_training_has_not_counts_as_wrong(tagged, tmp_path):
    other = tmp_path / "test.conll"
    other.write_text("a1\tB-NEW\nb2\tB-B\n")
    task = RECIPES["pos"].task(configure("pos", SMALL | {"data": str(tagged), "test": str(other)}))
    findings = findings_of(task, task.model)
    assert findings.metrics["words"] == 2 and findings.metrics["accuracy"] <= 0.5


def test_a_bad_line_of_a_tagged_file_is_named(tmp_path):
    path = tmp_path / "mine.conll"
    path.write_text("EU B-ORG\nrejects\n")
    for name in ("pos", "ner"):
        with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: expected a word and its tag")):
            RECIPES[name].task(configure(name, {"data": str(path)}))
