"""Several processes (gloo, on the CPU) train what one trains: the same data in the same order, and equal gradients."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training
from training import run, save_gradients, together

from seqfuse import models, testing
from seqfuse.checkpoints import RunFolder
from seqfuse.parallel import processes
from seqfuse.runlog import read_log

NO_DROPOUT = {"rnn": {"model.dropout_output": 0.0}, "decoder": {"kind": "decoder", "model.dropout": 0.0}}
ALL = {"double": True, "ema": 0.5, "accumulate": 2, "optim.clip": 0.2, "carry": True, "max_steps": 8, "keep": "last"}


def assert_same_weights(got: Path, truth: Path) -> None:
    """Trained in float64, they agree as if rounded to float32: AdamW divides differences by small second moments."""
    tensors = models.load(truth).state_dict()
    for name, tensor in models.load(got).state_dict().items():
        testing.assert_accurate(tensor, tensors.pop(name), what=name, dtype=torch.float32)
    assert not tensors


both = pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
kinds = pytest.mark.parametrize("kind", ["rnn", "decoder"])


@both
@kinds
@pytest.mark.parametrize("batch_size", [8, 3])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, kind, sharding, batch_size):
    """In float64, shares and parts of any size, clipped."""
    changes = NO_DROPOUT[kind] | {"accumulate": 2, "double": True, "batch_size": batch_size, "optim.clip": 0.1}
    save_gradients(tmp_path / "one", changes)
    assert together(2, save_gradients, tmp_path / "two", changes | {"sharding": sharding}) == [0, 0]
    one, two = (torch.load(tmp_path / name / "gradients.pt") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        testing.assert_accurate(two[name], gradient, what=name)


@both
@pytest.mark.parametrize("kind, batch_size", [("rnn", 8), ("decoder", 8), ("rnn", 3)])
def test_two_processes_train_what_one_trains(tmp_path, kind, batch_size, sharding):
    """With a carried state too, which the pass of a part that is empty, as one of three examples is, leaves alone."""
    changes = NO_DROPOUT[kind] | ALL | {"sharding": sharding, "batch_size": batch_size}
    run(tmp_path / "one", changes)
    assert together(2, run, tmp_path / "two", changes) == [0, 0]
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    logs = [
        [(r["loss"], r["tokens"]) for r in read_log(tmp_path / n / "log.jsonl") if "loss" in r] for n in ("one", "two")
    ]
    assert logs[1] == [(pytest.approx(loss, rel=1e-5), tokens) for loss, tokens in logs[0]]


@both
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_a_checkpoint_is_gone_on_with_by_any_number_of_processes(tmp_path, sharding, before, after):
    changes = NO_DROPOUT["decoder"] | ALL | {"sharding": sharding}
    run(tmp_path / "one", changes)
    assert together(before, training.run_until, tmp_path / "many", changes, 4) == [0] * before
    assert RunFolder(tmp_path / "many").newest()[0].name == "step-000004"
    assert together(after, run, tmp_path / "many", changes) == [0] * after
    assert_same_weights(tmp_path / "many", tmp_path / "one")


@both
@pytest.mark.parametrize("step", [3, 6])
def test_resumed_on_as_many_processes_it_is_bit_identical(tmp_path, sharding, step):
    """With dropout, averages and a carried state; after step 6 an evaluation comes first."""
    changes = ALL | {"kind": "decoder", "sharding": sharding}
    assert together(2, run, tmp_path / "whole", changes) == [0, 0]
    assert together(2, training.run_until, tmp_path / "parts", changes, step) == [0, 0]
    assert together(2, run, tmp_path / "parts", changes) == [0, 0]
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_full_disk_under_fsdp(tmp_path):
    """One sentence on every process, and the checkpoint before is gone on with."""
    changes = NO_DROPOUT["decoder"] | ALL | {"sharding": "fsdp", "max_steps": 12}
    assert together(2, training.run_on_full_disk, tmp_path / "run", changes) == [0, 0]
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.newest()] == ["step-000004"] and not list(folder.path.rglob("*.part"))
    assert together(2, run, folder.path, changes) == [0, 0] and folder.finished


class LossOfHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        encoder = models.Encoder(models.EncoderConfig(vocab=8, width=8, layers=1, heads=2, pooler=True))
        self.model = models.Classifier.on(encoder, labels=2, pooling="mean")

    def forward(self, ids, targets):
        return self.model.loss(ids, targets)


def train_head() -> None:
    torch.set_num_threads(1)
    with processes("cpu") as (group, _):
        loss = group.wrap(LossOfHead(), "ddp")
        for _ in range(2):
            loss(torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1])).backward()


def test_a_head_may_leave_a_part_of_its_body_unused():
    assert together(2, train_head) == [0, 0]


def test_a_killed_process_ends_the_job_which_resumes(tmp_path):
    """Under torchrun itself: no process is left waiting, the message says what happened, and the run goes on."""
    changes = {"max_steps": 100_000, "checkpoint_every": 5, "evaluate_every": 100_000, "kind": "decoder"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={training.free_port()}", training.__file__, str(tmp_path / "run"), json.dumps(changes)]
    said, folder = tmp_path / "said.txt", RunFolder(tmp_path / "run")
    with said.open("w") as file:
        job = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    try:
        wait_for(lambda: folder.newest() or job.poll() is not None)
        children = [int(p) for p in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        os.kill(children[-1], signal.SIGKILL)
        assert job.wait(60) != 0
    finally:
        job.kill()
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert "lost another one" in said.read_text() and str(folder.path) in said.read_text(), said.read_text()
    step = int(folder.newest()[0].name[-6:])
    assert together(2, training.run_until, folder.path, changes, step + 2) == [0, 0]
    assert int(folder.newest()[0].name[-6:]) == step + 2


def wait_for(condition) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)
