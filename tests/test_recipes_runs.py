"""Recipes of tasks killed, resumed and evaluated: the same bits. And on two processes: what one trains."""

import json

import pytest
import task_files
import torch
from rich.console import Console
from task_files import ALIGN, BILSTM, ENCODER, RNN, TRANSFORMER, ULMFIT
from training import run_recipe, together
from typer.testing import CliRunner

from seqfuse import comparison, recipes, testing
from seqfuse.cli import app
from seqfuse.run_report import show
from seqfuse.runlog import read_log
from seqfuse.trainer import Trainer

STEPS = {"max_steps": 5, "checkpoint_every": 2, "evaluate_every": 3, "log_every": 1, "batch_size": 8, "optim.warmup": 2}
LORA = {"start": "encoder", "lora": 2}
TAGGED, LABELLED = {"data": "tagged.conll", "limit": 20}, {"data": "labelled.tsv", "labelled": 20}
SUMMARIES, QUESTIONS = {"data": "summaries.tsv", "written": 4}, {"data": "questions.tsv", "written": 4}
RECIPES = {
    "pos": TAGGED | BILSTM,
    "pos lora": TAGGED | LORA,
    "ner": TAGGED | ENCODER,
    "sentiment": LABELLED | {"start": "encoder"},
    "sentiment lora": LABELLED | LORA,
    "ulmfit": LABELLED | ULMFIT | {"unfreeze": 2},
    "summarize": SUMMARIES | TRANSFORMER,
    "summarize rnn": SUMMARIES | RNN | {"arch": "rnn"},
    "qa": QUESTIONS | TRANSFORMER | {"arch": "decoder"},
    "class_to_text": RNN | {"data": "classes.tsv", "longest": 24, "shown": 2},
    "align": ALIGN | {"data": "preferences.jsonl"},
    "align lora": ALIGN | {"data": "preferences.jsonl", "stage": "ppo", "lora": 2},
}
# the steps before which they die, in the folders of their stages; the checkpoint before is of an earlier step
DEATHS = {
    "ulmfit": [("general", 1), ("target", 1), ("run", 3)],
    "align": [("sft", 1), ("reward", 1), ("run", 3)],
    "align lora": [("run", 1), ("run", 3)],
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for write in (task_files.write_tagged, task_files.write_pairs, task_files.write_classes,
                  task_files.write_preferences):  # fmt: skip
        write(folder)
    task_files.write_body(folder / "encoder", task_files.write_labelled(folder).read_text())
    return folder


def settings(case, files) -> dict:
    named = {name: str(files / value) for name, value in RECIPES[case].items() if name in ("data", "start")}
    return STEPS | RECIPES[case] | named


def losses(folder):
    """All logs of a run, also those of its stages, without what no two runs have in common."""
    times = ("seconds", "tokens_per_second")
    return {
        path.parent.relative_to(folder): [{k: v for k, v in r.items() if k not in times} for r in read_log(path)]
        for path in folder.rglob("log.jsonl")
    }


@pytest.mark.parametrize("case", RECIPES)
def test_killed_and_resumed_it_ends_with_the_same_bits(case, files, tmp_path, monkeypatch):
    """Dropout and all: step 3 is done twice, what was evaluated after it too, in the second run from the checkpoint."""
    recipe, changes = case.split()[0], settings(case, files)
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert run_recipe(whole, recipe, changes)
    deaths, step = list(DEATHS.get(case, [("run", 3)])), Trainer.step

    def dying(self, indices):
        place = (self.folder.path.name, self.progress.step)
        if place in deaths:
            deaths.remove(place)
            raise SystemExit
        step(self, indices)

    monkeypatch.setattr(Trainer, "step", dying)
    while deaths:
        with pytest.raises(SystemExit):
            run_recipe(parts, recipe, changes)
    assert run_recipe(parts, recipe, changes)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert losses(parts) == losses(whole)
    metrics = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (whole, parts)]
    assert metrics[0] == metrics[1]
    shown = CliRunner().invoke(app, ["eval", str(parts), "--device", "cpu"])
    assert shown.exit_code == 0 and all(f"{name}: {show(value)}" in shown.output for name, value in metrics[0].items())


PLAIN = {
    "pos": {"model.dropout": 0.0, "model.body.dropout_input": 0.0, "model.body.dropout_hidden": 0.0},
    "ner": {"model.dropout": 0.0, "model.body.dropout": 0.0},
    "sentiment": {"model.dropout": 0.0},
    "ulmfit": dict.fromkeys(
        ("model.weight_drop", *(f"model.dropout_{place}" for place in ("embedding", "input", "hidden", "output"))), 0.0
    ),
    "summarize": {"model.dropout": 0.0},
    "qa": {"model.dropout": 0.0},
    "class_to_text": {"model.dropout_input": 0.0, "model.dropout_output": 0.0},
    "align": {"stage": "dpo"},
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_two_processes_train_what_one_trains(case, files, tmp_path):
    """All stages of a recipe. Without dropout, whose masks depend on the processes; of 7 examples, so shares differ."""
    recipe, changes = case.split()[0], settings(case, files) | {"batch_size": 7, "max_steps": 2} | PLAIN[case]
    assert run_recipe(tmp_path / "one", recipe, changes)
    assert together(2, run_recipe, tmp_path / "two", recipe, changes) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for stage, log in one.items():
        if (recipe, str(stage)) == ("ulmfit", "."):  # its head has a dropout that is no setting
            continue
        for truth, found in zip(log, two[stage], strict=True):
            assert found.get("tokens") == truth.get("tokens")
            truth, found = (record.get("evaluation", record).get("loss", 0.0) for record in (truth, found))
            testing.assert_accurate(
                torch.tensor(found), torch.tensor(truth, dtype=torch.float64), what=f"{stage}: loss"
            )


@pytest.mark.parametrize("case", [case for case in PLAIN if case != "align"])  # which test_align.py compares
def test_compared_with_plain_pytorch(case, files):
    config = recipes.RECIPES[case.split()[0]].configure(settings(case, files) | {"max_steps": 2} | PLAIN[case])
    found = comparison.compare(config, device="cpu", console=Console(quiet=True))
    assert found.ratio > 0 and found.fused_loss == pytest.approx(found.plain_loss, rel=1e-3)
