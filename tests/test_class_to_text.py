"""Recipe class_to_text: texts of a class, and the class of a text by Bayes' rule."""

import json

import pytest
import task_files
import torch
from rich.console import Console

from seqfuse import models, trainer
from seqfuse.data import DataError
from seqfuse.recipes import RECIPES
from seqfuse.recipes.texts import IGNORED

RECIPE = RECIPES["class_to_text"]
SMALL = {"model.embed": 16, "model.hidden": 24, "vocab": 280, "longest": 24, "batch_size": 16, "optim.warmup": 2,
         "optim.lr": 2e-2, "log_every": 1, "shown": 2}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return task_files.write_classes(tmp_path_factory.mktemp("data"))


def task_of(file, **changes):
    return RECIPE.task(RECIPE.configure(SMALL | {"data": str(file)} | changes))


def test_the_class_decides_the_text(file, tmp_path):
    config = RECIPE.configure(
        SMALL | {"data": str(file), "max_steps": 60, "evaluate_every": 60, "checkpoint_every": 60}
    )
    assert trainer.train(config, tmp_path, device="cpu", console=Console(quiet=True))
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert found["class_accuracy"] > 0.9 > found["majority_class"]
    task, model = task_of(file), models.load(tmp_path)
    assert model.config.attribute_names == ("early", "late")
    for number, letters in enumerate(("abc", "xyz")):
        written = "".join(task.samples(model, number))
        assert sum(c in letters for c in written) > 0.8 * len(written) > 0


def test_accuracy_is_bayes_rule(file):
    """Against the probabilities of whole logits, added up text by text."""
    task = task_of(file)
    model = task.model.eval()
    counts = [sum(label == i for label, _ in task.train) for i in (0, 1)]
    right = 0
    with torch.no_grad():
        for label, ids in task.held:
            scores = []
            for number, count in enumerate(counts):
                logits = model(torch.tensor([[number]]), torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
                scores.append(
                    sum(float(logits[t, token]) for t, token in enumerate(ids[1:])) + torch.tensor(count).log()
                )
            right += max(range(2), key=scores.__getitem__) == label
        assert task.accuracy(model) == pytest.approx(right / len(task.held))


def test_batches_hold_texts_with_both_ends(file):
    task = task_of(file)
    classes, inputs, targets = task.batch([0, 1, 2])
    for row, (label, ids) in enumerate(task.train[:3]):
        assert classes[row].tolist() == [label]
        assert inputs[row, : len(ids) - 1].tolist() == ids[:-1] and ids[0] == task.pieces.bos_id
        assert targets[row][targets[row] != IGNORED].tolist() == ids[1:] and ids[-1] == task.pieces.eos_id


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("good\tfine\nbad\n")
    with pytest.raises(DataError, match="mine.tsv, line 2: expected label<TAB>text"):
        task_of(path)
    path.write_text("\n".join(f"good\ttext {i}" for i in range(40)))
    with pytest.raises(DataError, match="of 1 classes"):
        task_of(path)
