"""Every recipe for a few steps on small data, its batches and metrics; long claims are `make claims`'s."""

import json
import math
import random
import re

import pytest
import torch
from rich.console import Console

from seqfuse import comparison, data, models, run_report, trainer
from seqfuse.checkpoints import RunFolder
from seqfuse.recipes import RECIPES
from seqfuse.recipes.texts import IGNORED

SMALL_RNN = {"model.embed": 16, "model.hidden": 24}
SMALL = {
    "charlm": SMALL_RNN | {"length": 16, "batch_size": 4},
    "awd_lstm": SMALL_RNN | {"length": 10, "batch_size": 4, "vocab": 280},
    "gpt": {"model.width": 16, "model.layers": 1, "model.heads": 2, "length": 16, "batch_size": 4},
    "bert_mlm": {"model.body.width": 16, "model.body.layers": 1, "model.body.heads": 2, "length": 16, "batch_size": 4,
                 "vocab": 280},
    "bottleneck": SMALL_RNN | {"longest": 8, "measured_on": 8, "batch_size": 4},
    "translate": {"model.width": 16, "model.layers": 1, "model.heads": 2, "vocab": 280, "batch_size": 8, "tested": 4,
                  "beams": 2},
    "g2p": SMALL_RNN | {"batch_size": 8},
}  # fmt: skip
STEPS = {"max_steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "log_every": 1, "optim.warmup": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text, and a TSV of pairs, of made-up words."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 5))) for _ in range(50)]
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(400)))
    sentences = [draw.choices(words, k=draw.randint(1, 6)) for _ in range(300)]
    (folder / "pairs.tsv").write_text("\n".join(f"{' '.join(s)}\t{' '.join(s).upper()}" for s in sentences))
    return folder


def configure(name, files, changes=None):
    values = STEPS | SMALL[name]
    if name != "bottleneck":
        values |= {"data": str(files / ("pairs.tsv" if name in ("translate", "g2p") else "text.txt"))}
    return RECIPES[name].configure(values | (changes or {}))


def task_of(name, files, changes=None):
    return RECIPES[name].task(configure(name, files, changes))


def run(config, folder) -> dict:
    quiet = Console(quiet=True)
    assert trainer.train(config, folder, device="cpu", console=quiet)
    return json.loads((folder / "results.json").read_text())


OTHERS = [
    ("bottleneck", {"attention": None}),
    ("g2p", {"model.attention": None}),
    ("translate", {"arch": "rnn"} | SMALL_RNN),
    ("charlm", {"cell": "rnn"}),
]


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in SMALL), *OTHERS])
def test_a_recipe_trains_reports_and_leaves_a_model(name, changes, files, tmp_path):
    if "arch" in changes:
        changes = changes | {k: v for k, v in SMALL[name].items() if not k.startswith("model.")}
        config = RECIPES[name].configure(STEPS | changes | {"data": str(files / "pairs.tsv")})
    else:
        config = configure(name, files, changes)
    found = run(config, tmp_path / "run")
    assert found["steps"] == 4 and found["tokens"] > 0 and math.isfinite(found["metrics"]["loss"])
    page = (tmp_path / "run" / "report.html").read_text()
    model = models.load(tmp_path / "run")
    assert re.search("<h2>(Sample|Samples|Translations|Held-out words|Hidden tokens)</h2>", page)
    looks = name not in ("charlm", "awd_lstm") and getattr(model.config, "attention", "") is not None
    assert ("<h2>Attention</h2>" in page) == (page.count("fill-opacity") > 8) == looks
    assert model.tokenizer.vocab_size == model.config.vocab


@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_recipe_ends_with_the_same_bytes(name, files, tmp_path, monkeypatch):
    """With a state that goes from batch to batch too, as that of awd_lstm: it is part of the checkpoint."""
    config = configure(name, files, {"max_steps": 6, "checkpoint_every": 100})
    run(config, tmp_path / "whole")
    next_batch = trainer.Trainer.next_batch

    def interrupted(self):
        self.interrupt.wanted = self.progress.step == 3
        return next_batch(self)

    monkeypatch.setattr(trainer.Trainer, "next_batch", interrupted)
    assert not trainer.train(config, tmp_path / "parts", device="cpu", console=Console(quiet=True))
    monkeypatch.undo()
    found = run(config, tmp_path / "parts")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b
    task = RECIPES[name].task(config, "cpu", tmp_path / "parts")  # as `seqfuse eval` makes it
    assert run_report.evaluate(task, RunFolder(tmp_path / "parts"))[0].metrics == found["metrics"]


@pytest.mark.parametrize("name", [*SMALL, "translate rnn"])
def test_a_recipe_is_compared_with_plain_pytorch(name, files):
    changes = {"max_steps": 2}
    if name == "translate rnn":
        config = RECIPES["translate"].configure(STEPS | SMALL_RNN | changes | {"arch": "rnn", "vocab": 280,
                                                "data": str(files / "pairs.tsv")})  # fmt: skip
    else:
        config = configure(name, files, changes)
    found = comparison.compare(config, device="cpu", console=Console(quiet=True))
    assert found.ratio > 0 and found.fused_loss == pytest.approx(found.plain_loss, rel=1e-3)


def test_a_bad_line_of_the_users_file_is_named(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("a\tb\nno tab\n")
    with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: expected source<TAB>target")):
        RECIPES["translate"].task(RECIPES["translate"].configure({"data": str(path)}))
    path.write_bytes(b"fine\n\xff\n")
    for name in ("charlm", "awd_lstm", "gpt", "bert_mlm"):
        with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: not UTF-8")):
            RECIPES[name].task(RECIPES[name].configure({"data": str(path)}))
    path.write_text("too short")
    for name in ("charlm", "awd_lstm", "gpt", "bert_mlm"):
        with pytest.raises(data.DataError, match="are too few"):
            RECIPES[name].task(RECIPES[name].configure({"data": str(path)}))
    path.write_text("abcd efgh " * 100)
    with pytest.raises(data.DataError, match="tokens that are held out are too few for one example of 64"):
        RECIPES["bert_mlm"].task(RECIPES["bert_mlm"].configure({"data": str(path), "tokens": "characters"}))
    with pytest.raises(data.DataError, match="takes no file"):
        RECIPES["bottleneck"].task(RECIPES["bottleneck"].configure({"data": str(path)}))


# ---------------------------------------------------------------------------------------------------------- their data


def test_held_out_text_is_predicted_once_as_a_whole(files):
    task = task_of("charlm", files)
    ids, targets = (torch.cat(list(side)) for side in zip(*task.held_out(), strict=True))
    counted = targets != IGNORED
    assert torch.equal(targets[counted], task.held_ids[1:]) and torch.equal(ids[counted], task.held_ids[:-1])
    ids, targets = task.batch([0, 3])
    assert torch.equal(ids[:, 1:], targets[:, :-1]) and torch.equal(ids[1], task.train_ids[48:64])


def test_bits_per_byte_of_a_model_that_knows_nothing(files):
    """Every token equally likely: log2(vocab) bits a token."""
    task = task_of("charlm", files)
    for p in task.model.parameters():
        p.data.zero_()
    found = task.evaluate(task.model.eval())
    vocab, tokens = task.text_tokenizer.vocab_size, len(task.held_ids) - 1
    assert found["perplexity"] == pytest.approx(vocab, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(vocab) * tokens / task.held_bytes, rel=1e-4)


def test_rows_of_awd_lstm_go_on_where_they_stopped(files):
    task = task_of("awd_lstm", files)
    first, second = task.order(0)[:2]
    assert len(first) == task.config.batch_size
    (_, targets, rows, fresh), (more, _, same, later) = task.batch(first), task.batch(second)
    assert torch.equal(targets[:, -1], more[:, 0]) and rows.tolist() == same.tolist() == [0, 1, 2, 3]
    assert fresh and not later
    assert task.batch(second[2:])[2].tolist() == [2, 3]  # a share of the batch knows its rows

    model = task.model.train()
    task.loss(model, *task.batch(first))
    carried = {name: t.clone() for name, t in task.carried().items()}
    assert all((t != 0).any() for t in carried.values()) and set(carried) == {"h0", "c0", "h1", "c1"}
    task.evaluate(model.eval())
    assert all(torch.equal(t, carried[name]) for name, t in task.carried().items())
    halves = [task.loss(model, *task.batch(part))[0] for part in (second[:2], second[2:])]
    for name, t in task.carried().items():
        t.copy_(carried[name])
    torch.testing.assert_close(sum(halves), task.loss(model, *task.batch(second))[0])


def test_masks_depend_on_the_example_and_the_epoch_alone(files):
    task = task_of("bert_mlm", files)
    first, again = task.order(0), task.order(1)
    assert sorted(i % task.examples for b in again for i in b) == sorted(i for b in first for i in b)
    seen, targets = task.batch(first[0])
    for i, index in enumerate(first[0]):
        one, target = task.batch([index])
        assert torch.equal(one[0], seen[i]) and torch.equal(target[0], targets[i])
    assert not torch.equal(task.batch([first[0][0] + task.examples])[1][0], targets[0])
    hidden = targets != IGNORED
    assert (hidden.sum(1) == round(0.15 * task.config.length)).all()
    plain = task.train_ids[: task.examples * task.config.length].view(-1, task.config.length)[first[0]]
    assert torch.equal(targets[hidden], plain[hidden]) and torch.equal(seen[~hidden], plain[~hidden])


def test_letters_of_a_share_are_those_of_the_whole_batch(files):
    task = task_of("bottleneck", files)
    batch = task.order(1)[3]
    whole, length = task.batch(batch)
    share, same = task.batch(batch[1:3])
    assert length == same == whole.shape[1] and torch.equal(share, whole[1:3])
    assert not torch.equal(whole[0], whole[1])
    loss, letters = task.loss(task.model.eval(), whole, length)
    assert letters == whole.shape[0] * (length + 1) and float(loss) > 0


def test_translate_pads_only_what_does_not_count(files):
    task = task_of("translate", files)
    assert sorted(i for batch in task.order(0) for i in batch) == list(range(task.examples))
    assert task.order(0) == task.order(0) != task.order(1)
    source, lengths, inputs, targets = task.batch([0, 1, 2])
    for row, (read, written) in enumerate(task.train[:3]):
        assert source[row, : lengths[row]].tolist() == read and read[-1] == task.pieces.eos_id
        assert targets[row][targets[row] != IGNORED].tolist() == written
        assert inputs[row, : len(written)].tolist() == [task.pieces.bos_id, *written[:-1]]
    sums = [task.loss(task.model.eval(), *task.batch([i])) for i in range(3)]
    together, count = task.loss(task.model, source, lengths, inputs, targets)
    torch.testing.assert_close(sum(loss for loss, _ in sums), together)
    assert int(count) == sum(int(n) for _, n in sums)


def test_a_report_keeps_to_the_models_positions(files):
    """A source of more tokens is cut; a sample ends where there are no more positions."""
    positions = {"longest": 20, "model.max_positions": 41}
    task = task_of("translate", files, positions)
    assert len(task.translations(task.model, ["abc " * 200, "abc"])) == 2
    with pytest.raises(ValueError, match="max_positions must be at least 43 for longest=21, got 41"):
        configure("translate", files, positions | {"longest": 21})
    task = task_of("gpt", files, {"model.max_positions": 20})
    assert 4 < len(task.report(task.model).text) <= 20
    with pytest.raises(
        data.DataError, match="length: an example of 16 tokens is longer than the 15 that the model has"
    ):
        task_of("gpt", files, {"model.max_positions": 15})
    with pytest.raises(
        data.DataError, match="length: an example of 16 tokens is longer than the 15 that the model has"
    ):
        task_of("bert_mlm", files, {"model.body.max_positions": 15})
    with pytest.raises(data.DataError, match="prompt: it leaves no room for a sample in the model's 20 positions"):
        task_of("gpt", files, {"model.max_positions": 20, "prompt": "a" * 20})


def test_pairs_of_one_group_share_a_split(files, tmp_path):
    path = tmp_path / "grouped.tsv"
    path.write_text("".join(f"word {i}\tWORT {i}\tgroup{i % 40}\n" for i in range(800)))
    task = task_of("translate", files, {"data": str(path), "tested": 1000})
    tested = {int(source.split()[1]) % 40 for source, _ in task.test}
    assert task.said.startswith("grouped.tsv: 800 lines; source: column 1, target: column 2, group: column 3 of 3")
    assert tested == {g for g in range(40) if data.split_of(f"group{g}") == "test"} != set()
    assert len(task.test) == 20 * len(tested)
