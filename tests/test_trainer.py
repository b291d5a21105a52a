"""The training loop: what a step computes, what is kept, when it ends."""

import dataclasses
import json
import math

import pytest
import torch
from training import RECIPE, Counting, make, run

from seqfuse import models, schedules, testing
from seqfuse.checkpoints import RunFolder
from seqfuse.parallel import Group, parts
from seqfuse.recipes.base import Findings
from seqfuse.runlog import read_log
from seqfuse.trainer import Trainer


def trainer_of(tmp_path, double=False, **changes) -> Trainer:
    task = make(**changes)
    if double:
        task.model.double()
    return Trainer(task, tmp_path)


def gradients(trainer: Trainer, indices) -> dict[str, torch.Tensor]:
    """Of one global batch, as the optimizer sees them."""
    trainer.optimizer.zero_grad()
    trainer.scale_gradients(trainer.gradients(indices)[1])
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


PLAIN = {"model.dropout_output": 0.0, "optim.clip": 0.0}


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_accumulation_is_the_big_batch(tmp_path, clip):
    """In float64, for parts with different numbers of tokens, and whether or not the norm is clipped."""
    changes = PLAIN | {"optim.clip": clip, "batch_size": 10}
    whole = gradients(trainer_of(tmp_path, double=True, **changes), range(10))
    for accumulate in (2, 3, 10):
        parted = gradients(trainer_of(tmp_path, double=True, accumulate=accumulate, **changes), list(range(10)))
        for name, gradient in whole.items():
            testing.assert_accurate(parted[name], gradient, what=name)


def test_the_gradient_is_that_of_the_mean_over_tokens(tmp_path):
    task = make(**PLAIN)
    task.model.double()
    ids, targets = (t[:8] for t in task.train)
    loss = torch.nn.functional.cross_entropy(task.model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    truth = torch.autograd.grad(loss, list(task.model.parameters()))
    got = gradients(Trainer(task, tmp_path), list(range(8)))
    for gradient, (name, value) in zip(truth, got.items(), strict=True):
        testing.assert_accurate(value, gradient, what=name)


def test_clipping(tmp_path):
    free = gradients(trainer_of(tmp_path, **PLAIN), list(range(8)))
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    clipped = gradients(trainer_of(tmp_path, **PLAIN | {"optim.clip": norm / 4}), list(range(8)))
    for name, gradient in free.items():
        testing.assert_accurate(clipped[name], gradient.double() / 4, what=name)
    loose = gradients(trainer_of(tmp_path, **PLAIN | {"optim.clip": norm * 4}), list(range(8)))
    assert all(torch.equal(loose[name], free[name]) for name in free)


def test_parts():
    for count, total in ((1, 5), (3, 10), (4, 2), (2, 0)):
        cut = parts(list(range(total)), count)
        assert len(cut) == count and sum(cut, []) == list(range(total))
        assert max(map(len, cut)) - min(map(len, cut)) <= 1


@pytest.mark.parametrize("examples, size, accumulate, each", [(4, 3, 4, 2), (8, 2, 2, 2), (2, 3, 5, 1), (9, 1, 3, 3)])
def test_shares(examples, size, accumulate, each):
    """Every process has equally many parts, though shares differ, and together they are the batch, in order."""
    shares = []
    for rank in range(size):
        group = Group()
        group.rank, group.size = rank, size
        shares.append(group.share(list(range(examples)), accumulate))
    assert {len(share) for share in shares} == {each}
    assert sum((part for share in shares for part in share), []) == list(range(examples))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules(schedule):
    rates = [schedules.factor(schedule, step, 10, 110) for step in range(110)]
    assert rates[:10] == [(i + 1) / 10 for i in range(10)] and max(rates) == 1.0
    after = rates[10:]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))
    half, last = {"cosine": (0.5, 0), "wsd": (1, 0), "linear": (0.5, 0), "constant": (1, 1)}[schedule]
    assert after[50] == pytest.approx(half) and schedules.factor(schedule, 110, 10, 110) == pytest.approx(last)
    assert schedules.factor(schedule, 0, 0, 10) == 1.0


def test_it_learns_and_writes_everything(tmp_path):
    assert run(tmp_path / "run", {"max_steps": 60, "log_every": 5})
    folder = RunFolder(tmp_path / "run")
    log = read_log(folder.path / "log.jsonl")
    losses = [r["loss"] for r in log if "loss" in r]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]
    assert [r["step"] for r in log if "evaluation" in r] == list(range(6, 61, 6))
    assert [p.name for p in folder.newest()] == ["step-000060", "step-000056"]
    results = json.loads((folder.path / "results.json").read_text())
    assert results["metrics"]["loss"] == results["best"] and results["metrics"]["signature"] == "exact"
    assert results["tokens"] == log[-2]["tokens"] and results["steps"] == 60
    model = models.load(folder.path)
    assert model.tokenizer is not None and Counting(RECIPE.configure()).evaluate(model)["loss"] == results["best"]
    names = {p.name for p in folder.path.iterdir()}
    assert {"run.json", "config.json", "model.safetensors", "tokenizer.json", "report.html"} <= names


def test_equal_runs_give_equal_bytes(tmp_path):
    for name in "ab":
        run(tmp_path / name, {"ema": 0.5, "accumulate": 2})
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    run(tmp_path / "c", {"ema": 0.5, "accumulate": 2, "seed": 1})
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_evaluations_do_not_change_the_training(tmp_path):
    run(tmp_path / "often", {"evaluate_every": 1, "keep": "last"})
    run(tmp_path / "once", {"evaluate_every": 12, "keep": "last"})
    assert (tmp_path / "often/model.safetensors").read_bytes() == (tmp_path / "once/model.safetensors").read_bytes()


def test_a_large_seed(tmp_path):
    trainer = trainer_of(tmp_path, seed=2**40)
    trainer.step(trainer.next_batch())
    assert trainer.progress.step == 1


def test_averaged_weights(tmp_path):
    """ema: what is evaluated and kept is the average over the steps; training goes on with its own weights."""
    trainer = trainer_of(tmp_path, ema=0.5)
    expected = [p.detach().clone() for p in trainer.weights]
    for _ in range(3):
        trainer.step(trainer.next_batch())
        expected = [torch.lerp(e, p.detach(), 0.5) for e, p in zip(expected, trainer.weights, strict=True)]
    own = [p.detach().clone() for p in trainer.weights]
    with trainer.evaluating():
        assert all(torch.equal(p, e) for p, e in zip(trainer.weights, expected, strict=True))
        assert not trainer.model.training
    assert all(torch.equal(p, o) for p, o in zip(trainer.weights, own, strict=True))


def test_bf16_is_autocast_of_fp32_weights(tmp_path):
    seen = []

    class Watching(Counting):
        def loss(self, model, *batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().loss(model, *batch)

    trainer = Trainer(Watching(RECIPE.configure({"precision": "bf16"})), tmp_path)
    trainer.begin()
    trainer.step(trainer.next_batch())
    trainer.log.__enter__()
    trainer.evaluate()
    trainer.log.__exit__()
    assert seen == [True, True] and all(p.dtype == torch.float32 for p in trainer.weights)


def test_label_smoothing_is_for_training(tmp_path):
    plain, smooth = (make(label_smoothing=s, **PLAIN) for s in (0.0, 0.2))
    batch = tuple(t[:4] for t in plain.train)
    for model in (plain.model, smooth.model):
        model.train()
    assert float(smooth.loss(smooth.model, *batch)[0]) != float(plain.loss(plain.model, *batch)[0])
    assert smooth.evaluate(smooth.model.eval()) == plain.evaluate(plain.model.eval())


@pytest.mark.parametrize("kind", ["rnn", "decoder"])
def test_activation_checkpointing_changes_nothing_but_memory(tmp_path, kind):
    for name, again in (("kept", False), ("again", True)):
        run(tmp_path / name, {"kind": kind, "model.checkpoint": again, "max_steps": 4})
    first, second = (models.load(tmp_path / n).state_dict() for n in ("kept", "again"))
    for name, tensor in first.items():
        testing.assert_accurate(second[name], tensor.double(), what=name)


RECURRENT = {"vocab": 19, "bos_id": 1, "embed": 16, "hidden": 32, "layers": 2}
BLOCKS = {"vocab": 19, "bos_id": 1, "width": 32, "heads": 2, "layers": 3, "max_positions": 64}


@pytest.mark.parametrize(
    ("kind", "config", "inputs"),
    [("RNNLanguageModel", RECURRENT, 1), ("RNNLanguageModel", RECURRENT | {"cell": "gru"}, 1),
     ("RNNSeq2Seq", RECURRENT, 2), ("Decoder", BLOCKS, 1), ("Transformer", BLOCKS, 2)],
)  # fmt: skip
def test_activation_checkpointing_keeps_less(kind, config, inputs):
    """Bytes that the backward pass is kept for, parameters aside: less than half."""
    ids = torch.randint(3, 19, (4, 40))

    def kept(checkpoint: bool) -> int:
        sizes = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = max(tensor.nbytes, sizes.get(tensor.data_ptr(), 0))
            return tensor

        model = models.MODELS[kind].from_config(config | {"checkpoint": checkpoint}).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(*[ids] * inputs, ids)
        own = {p.data_ptr() for p in model.parameters()}
        assert loss.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert kept(True) < kept(False) / 2


def test_weight_decay_is_of_matrices_only(tmp_path):
    trainer = trainer_of(tmp_path, **{"optim.weight_decay": 0.1})
    decayed, others = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() < 2 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(trainer.weights)


@pytest.mark.parametrize("higher", [False, True])
def test_early_stopping_and_the_best_weights(tmp_path, higher):
    """The objective gets worse from its second value on: the run ends after `patience` more, and keeps the second."""
    values = iter([3.0, 1.0, 2.0, 2.5, float("nan"), 0.0])

    class Scripted(Counting):
        objective = "score"

        def evaluate(self, model):
            value = next(values)
            return {"score": -value if higher else value}

        def report(self, model):
            return Findings({})

    Scripted.higher = higher
    config = RECIPE.configure({"patience": 3, "evaluate_every": 2, "max_steps": 100, "checkpoint_every": 50})
    trainer = Trainer(Scripted(config), tmp_path)
    assert trainer.run()
    assert trainer.progress.step == 10 and trainer.progress.best_step == 4
    assert [p.name for p in trainer.folder.newest("best")] == ["best-000004"]
    best = (tmp_path / "checkpoints/best-000004/model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == best


def test_order_of_events(tmp_path, monkeypatch):
    """Where a checkpoint and an evaluation are due at one step, the checkpoint comes first."""
    events = []
    trainer = trainer_of(tmp_path, max_steps=4, checkpoint_every=2, evaluate_every=2)
    for name in ("step", "save", "evaluate"):
        method = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, n=name, m=method: (events.append(n), m(*a)))
    trainer.run()
    assert events == ["step", "step", "save", "evaluate"] * 2


# ------------------------------------------------------------------------------------------------------------- configs


def test_settings_by_path():
    config = RECIPE.configure({"kind": "decoder", "optim.lr": 3e-4, "model.width": 32, "seed": 5})
    assert (config.optim.lr, config.model.width, config.model.model, config.seed) == (3e-4, 32, "Decoder", 5)
    assert RECIPE.read(json.loads(json.dumps(config.to_dict()))) == config
    for changes, sentence in (
        ({"optim.rate": 1}, "unknown key 'optim.rate'; there are beta1"),
        ({"speed": 1}, "unknown key 'speed'.*kind.*max_steps"),
        ({"optim.lr": "fast"}, "lr must be a number"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"model.layers": 0}, "layers must be positive"),
        ({"seed.x": 0}, "no settings called 'seed'; settings of their own have optim, model"),
        ({"optim.lrr": 1}, r"unknown key 'optim.lrr' \(did you mean 'optim.lr'\?\); there are beta1"),
        ({"lr": 1}, r"unknown key 'lr' \(did you mean 'optim.lr'\?\); there are accumulate"),
        ({"max_step": 1}, r"unknown key 'max_step' \(did you mean 'max_steps'\?\)"),
        ({"model.hiden": 1}, r"\(did you mean 'model.hidden'\?\)"),
        ({"recipe": "gpt"}, "unknown key 'recipe'"),
        ({"optim.lr": float("inf")}, "lr must be finite, got inf"),
        ({"optim.lr": float("nan")}, "lr must be finite, got nan"),
        ({"model": 3}, '"model" must be one of ClassToText|ActorCritic, .*got None'),
        ({"precision": "fp8"}, "precision must be 'fp32' or 'bf16'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be below 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            RECIPE.configure(changes)


def test_the_order_of_a_task_depends_on_seed_and_epoch_alone():
    task = make()
    first = task.order(0)
    assert first == make().order(0) != task.order(1) and first != make(seed=1).order(0)
    assert all(len(batch) == 8 for batch in first) and sorted(sum(first, [])) == list(range(40))
    far, further = make(seed=2**63 - 1), make(seed=2**63 - 2)
    assert far.order(0) != further.order(0) and far.order(0) != far.order(1)
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*63"):
        make(seed=2**63)
    few = Counting(dataclasses.replace(task.config, batch_size=64))
    assert [sorted(b) for b in few.order(0)] == [list(range(40))]
