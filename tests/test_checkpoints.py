"""No work is lost: killed at any moment, on a full disk, after a loss that is NaN, with damaged files."""

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import training
from training import RECIPE, make, run

from seqfuse import checkpoints, files, models
from seqfuse.checkpoints import RunFolder, TrainError, differences
from seqfuse.models import CheckpointError
from seqfuse.parallel import Group
from seqfuse.runlog import read_log
from seqfuse.trainer import Trainer, train

TIMES = ("seconds", "tokens_per_second")


def losses(folder: Path) -> list[dict]:
    """The log without what no two runs have in common."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(folder / "log.jsonl")]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------------- killed


def test_killed_ten_times_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """kill -9 of a process that trains, saves, evaluates or reports, whatever the moment brings."""
    changes = {
        "max_steps": 60, "checkpoint_every": 3, "evaluate_every": 5, "log_every": 2, "ema": 0.7, "accumulate": 2,
        "carry": True,
    }  # fmt: skip

    def start(folder):
        return training.start(run, folder, changes)

    start(tmp_path / "warm").join()
    began = time.perf_counter()
    whole = start(tmp_path / "whole")
    whole.join()
    seconds = time.perf_counter() - began
    assert whole.exitcode == 0
    moments, kills, stages = random.Random(5), 0, set()
    while kills < 10:
        process = start(tmp_path / "killed")
        process.join(moments.uniform(0.05, 0.7) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            newest = RunFolder(tmp_path / "killed").newest()
            stages.add(newest[0].name if newest else "")
        else:  # it came to its end: begin again, so that there are ten kills
            assert process.exitcode == 0 and weights(tmp_path / "killed") == weights(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")
    last = start(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0 and len(stages) > 2
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.part"))


@pytest.mark.parametrize("kind", ["rnn", "decoder"])
def test_every_step_is_a_place_to_stop(tmp_path, kind, monkeypatch):
    """Interrupted after each step in turn and begun again: the same log, the same bits."""
    changes = {"kind": kind, "max_steps": 7, "checkpoint_every": 3, "evaluate_every": 2, "log_every": 3, "carry": True}
    run(tmp_path / "whole", changes)
    stops = 0
    while True:
        trainer = Trainer(make(**changes), tmp_path / "parts")
        next_batch = trainer.next_batch

        def interrupted(trainer=trainer, next_batch=next_batch):
            trainer.interrupt.wanted = True
            return next_batch()

        monkeypatch.setattr(trainer, "next_batch", interrupted)
        if trainer.run():
            break
        stops += 1
    assert stops == 7
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_after_the_checkpoint_and_before_the_evaluation(tmp_path, monkeypatch):
    """A run that dies in an evaluation has lost nothing, and evaluates when it is resumed."""
    changes = {"checkpoint_every": 6, "evaluate_every": 6}
    run(tmp_path / "whole", changes)
    trainer = Trainer(make(**changes), tmp_path / "died")
    monkeypatch.setattr(trainer.task, "evaluate", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert [p.name for p in trainer.folder.newest()] == ["step-000006"]
    run(tmp_path / "died", changes)
    assert losses(tmp_path / "died") == losses(tmp_path / "whole")
    assert weights(tmp_path / "died") == weights(tmp_path / "whole")


def test_the_best_weights_that_a_checkpoint_names_are_there(tmp_path, monkeypatch):
    """Better ones were found after it, and then the run was killed: they may not be found again."""
    changes = {"checkpoint_every": 4, "evaluate_every": 3, "max_steps": 20}
    trainer = Trainer(make(**changes), tmp_path)
    values = iter([5.0, 1.0])  # after steps 3 and 6
    monkeypatch.setattr(trainer.task, "evaluate", lambda model: {"loss": next(values)})
    next_batch = trainer.next_batch
    monkeypatch.setattr(trainer, "next_batch", lambda: 1 / 0 if trainer.progress.step == 7 else next_batch())
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    best = weights(tmp_path / "checkpoints/best-000003")
    again = Trainer(make(**changes), tmp_path)
    monkeypatch.setattr(again.task, "evaluate", lambda model: {"loss": 9.0})
    assert again.run() and again.progress.best_step == 3 and weights(tmp_path) == best


def test_only_the_best_weights_that_are_needed_are_kept(tmp_path):
    folder, group = RunFolder(tmp_path), Group()
    for kind, step in [("best", 1), ("best", 2), ("step", 4), ("best", 4), ("best", 6), ("step", 8), ("best", 9)]:
        folder.save(kind, step, lambda part: None, group)
    assert [p.name for p in folder.newest("best")] == [f"best-00000{i}" for i in (9, 6, 4, 2)]
    folder.save("step", 12, lambda part: None, group)
    assert [p.name for p in folder.newest("best")] == ["best-000009", "best-000006"]


# --------------------------------------------------------------------------------------------------------- what is bad


def test_a_full_disk(tmp_path, monkeypatch):
    """Whatever a full disk makes of a checkpoint, the one before stays, and the run can be gone on with."""
    run(tmp_path / "whole", {})
    for i, place in enumerate(("trainer.pt", "model.safetensors", "rename", "log")):
        folder = tmp_path / str(i)
        trainer = Trainer(make(), folder)
        original = trainer.save

        def save_on_full_disk(trainer=trainer, original=original, place=place):
            with monkeypatch.context() as patch:
                if trainer.progress.step == 8:
                    fill_the_disk(patch, place, trainer)
                original()

        monkeypatch.setattr(trainer, "save", save_on_full_disk)
        with pytest.raises(TrainError, match="could not be written: .*No space left on device"):
            trainer.run()
        assert "step-000004" in [p.name for p in trainer.folder.newest()]
        assert not list(folder.rglob("*.part"))
        assert run(folder, {}) and weights(folder) == weights(tmp_path / "whole")


def fill_the_disk(patch, place, trainer):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "trainer.pt":
        patch.setattr(checkpoints.torch, "save", full)
    elif place == "model.safetensors":
        patch.setattr(files, "save_atomically", full)
        patch.setattr("seqfuse.models.files.save_atomically", full)
    elif place == "rename":
        patch.setattr(Path, "rename", full)
    else:

        class Full:
            write = flush = full
            close = staticmethod(lambda: None)

        trainer.log.file = Full()


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file"), OSError(errno.EIO, "I/O")])
def test_other_failures_of_writing(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    with pytest.raises(TrainError, match="step-000004: could not be written"):
        run(tmp_path, {})


def test_a_process_that_is_lost_is_no_failure_of_writing(tmp_path, monkeypatch):
    class Lonely(Group):
        def wait(self):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="gloo"):
        RunFolder(tmp_path).save("step", 1, lambda part: None, Lonely())


def test_a_loss_that_is_not_finite(tmp_path):
    """Training stops in that step and says which; the checkpoint before it is kept."""
    changes = {"poison": 1, "checkpoint_every": 1, "batch_size": 4, "examples": 40}
    step = next(i for i, batch in enumerate(make(**changes).order(0)) if 0 in batch)
    assert step > 1
    with pytest.raises(TrainError, match=rf"not finite \(NaN\) in step {step + 1}; the last good .*step-{step:06d}"):
        run(tmp_path, changes)
    with pytest.raises(TrainError, match=f"in step {step + 1};"):  # and again, from there
        run(tmp_path, changes)
    folder = RunFolder(tmp_path)
    assert folder.newest()[0].name == f"step-{step:06d}" and not folder.finished


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = Trainer(make(), tmp_path)
    trainer.begin()
    with torch.no_grad():
        trainer.weights[0][0] = float("inf")
    with pytest.raises(TrainError, match="a weight is not finite after step 0; .* has no checkpoint yet"):
        trainer.save()


@pytest.mark.parametrize("file", ["trainer.pt", "model.safetensors"])
@pytest.mark.parametrize("left", [0, 100, 0.5, 0.99])
def test_a_truncated_checkpoint(tmp_path, file, left, capsys):
    """The one before it takes its place; if there is none, one sentence says so."""
    trainer = Trainer(make(), tmp_path / "run")
    trainer.run()
    whole = weights(tmp_path / "run")
    (tmp_path / "run/results.json").unlink()

    def damage(path):
        data = (path / file).read_bytes()
        (path / file).write_bytes(data[: int(left * len(data)) if left < 1 else left])

    newest, before = trainer.folder.newest()
    damage(newest)
    assert run(tmp_path / "run", {}) and weights(tmp_path / "run") == whole
    out = capsys.readouterr().out
    assert f"{newest / file}: is " in out and "trying the checkpoint before it" in out and "step 8 of 12" in out
    for path in trainer.folder.newest():
        damage(path)
    with pytest.raises(TrainError, match="no checkpoint can be read .*begin a new run"):
        run(tmp_path / "run", {})


def test_a_checkpoint_without_a_file_or_with_code_in_it(tmp_path):
    run(tmp_path, {})
    newest = RunFolder(tmp_path).newest()[0]
    (newest / "trainer.pt").unlink()
    with pytest.raises(CheckpointError, match="trainer.pt: is missing"):
        checkpoints.load_state(newest)
    torch.save({"progress": Path("x"), "run": os.system}, newest / "trainer.pt")
    with pytest.raises(CheckpointError, match="trainer.pt: is missing, damaged, or no checkpoint"):
        checkpoints.load_state(newest)


def test_a_changed_config(tmp_path):
    run(tmp_path, {})
    with pytest.raises(TrainError, match="run.json: the run has optim.lr = 0.03, not 0.1; .*--resume"):
        run(tmp_path, {"optim.lr": 0.1})
    with pytest.raises(TrainError, match="has model.hidden = 16, not 8"):
        run(tmp_path, {"model.hidden": 8})
    path = tmp_path / "run.json"  # by hand: the checkpoint knows better
    settings = json.loads(path.read_text())
    settings["config"]["optim"]["lr"] = 0.1
    path.write_text(json.dumps(settings))
    with pytest.raises(TrainError, match="step-000012: the run has optim.lr = 0.03, not 0.1"):
        run(tmp_path, {"optim.lr": 0.1})
    path.write_text("{")
    with pytest.raises(CheckpointError, match="run.json: is not JSON"):
        run(tmp_path, {})
    path.write_text("{}")
    with pytest.raises(TrainError, match="run.json: has no config"):
        run(tmp_path, {})


def test_a_setting_that_is_newer_than_the_run(tmp_path):
    """It was at its default, whether or not it had a name then."""
    run(tmp_path, {})
    path = tmp_path / "run.json"
    settings = json.loads(path.read_text())
    del settings["config"]["poison"], settings["config"]["model"]["weight_drop"]
    path.write_text(json.dumps(settings))
    assert run(tmp_path, {})
    with pytest.raises(TrainError, match="run.json: the run has poison = 0, not 1"):
        run(tmp_path, {"poison": 1})


def test_changed_data(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("as it was")
    run(tmp_path / "run", {"data": str(data)})
    data.write_text("as it is")
    with pytest.raises(TrainError, match="the run was on other data .SHA-256 .*bring back"):
        run(tmp_path / "run", {"data": str(data)})
    moved = tmp_path / "moved.txt"
    moved.write_text("as it was")
    assert run(tmp_path / "run", {"data": str(moved)})


def test_nothing_is_written_over(tmp_path):
    make().model.save(tmp_path / "model")
    with pytest.raises(TrainError, match="exists, and nothing is written over"):
        run(tmp_path / "model", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="could not be written"):
        run(tmp_path / "file", {})


@pytest.mark.parametrize(
    "name", ["log.jsonl", "tokenizer.json", "report.html", "checkpoints/best-42/model.safetensors"]
)
def test_files_that_are_no_runs_are_not_written_over(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(TrainError, match="exists, and nothing is written over"):
        run(tmp_path, {})
    assert path.read_text() == "mine" and not (tmp_path / "run.json").exists()


def test_a_folder_that_a_run_was_killed_in_is_taken(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    run(tmp_path, {})


def test_a_checkpoint_of_another_model(tmp_path):
    """Other shapes, or other names: not a stack trace, and nothing is broadcast."""
    run(tmp_path, {})
    path = RunFolder(tmp_path).newest()[0] / "model.safetensors"
    good = models.files.read_safetensors(path)
    name = next(iter(good))
    for bad in (good | {name: good[name][:1]}, {n: t for n, t in good.items() if n != name}):
        models.files.write_tensors(path, {n: t.contiguous() for n, t in bad.items()})
        with pytest.raises(CheckpointError, match=f"is of another model: {name} is"):
            checkpoints.load_weights(path.parent, make().model)


def test_differences():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}) == {
        "b.c": (2, 4),
        "e": (None, 5),
    }


def test_leftovers_of_a_killed_run(tmp_path):
    run(tmp_path, {})
    stale = tmp_path / "checkpoints/best-000099"
    shutil.copytree(RunFolder(tmp_path).newest("best")[0], stale)
    part = tmp_path / "checkpoints/step-000099.part"
    part.mkdir()
    (part / "model.safetensors").write_text("half")
    half = tmp_path / "model.safetensors.123.part"
    half.write_text("half")
    (tmp_path / "log.jsonl").open("a").write('{"step": 13, "lo')
    assert train(RECIPE.configure(), tmp_path, device="cpu")
    assert (
        not part.exists()
        and not stale.exists()
        and not half.exists()
        and [r["step"] for r in read_log(tmp_path / "log.jsonl")][-1] == 12
    )
