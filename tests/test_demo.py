"""The demo and its recipe: data, model, training, interruption, report, command line. Long claims are `make demo`'s."""

import html.parser
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import seqfuse
from seqfuse import checkpoints, demo, models, report, trainer
from seqfuse.data import DataError
from seqfuse.recipes import g2p

TINY = {"max_steps": 12, "batch_size": 8, "model.embed": 16, "model.hidden": 32, "optim.warmup": 4,
        "evaluate_every": 5, "checkpoint_every": 4, "log_every": 1}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lexicon_file(tmp_path_factory) -> Path:
    """400 made-up words with an obvious spelling rule, some with a second reading."""
    draw = random.Random(0)
    lines = {}
    while len(lines) < 400:
        word = "".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 6)))
        lines[word] = f"{word}\t{' '.join(word.upper())}"
    lines["abc"] = "abc\tA B C\nabc\tA B K"
    path = tmp_path_factory.mktemp("data") / "words.tsv"
    path.write_text("\n".join(lines.values()) + "\n")
    return path


def config(lexicon_file, **changes):
    return g2p.RECIPE.configure(TINY | {"data": str(lexicon_file)} | changes)


@pytest.fixture(scope="module")
def task(lexicon_file) -> g2p.G2P:
    return g2p.G2P(config(lexicon_file))


def new_demo(lexicon_file, out, changes=None, device="cpu", **options) -> tuple[demo.Demo, Console]:
    console = Console(record=True, width=200, file=open(os.devnull, "w"), highlight=False)
    return demo.Demo(demo.Options(out, config(lexicon_file, **changes or {}), device, **options), console), console


# -------------------------------------------------------------------------------------------------------------- recipe


def test_batches_cover_each_pair_once_and_repeat_by_seed(task, lexicon_file):
    plan = task.order(0)
    assert sorted(i for batch in plan for i in batch) == list(range(task.examples)) == list(range(len(task.train)))
    assert task.examples == sum(len(task.lexicon[word]) for word in task.words["train"])
    assert plan == g2p.G2P(config(lexicon_file)).order(0) != task.order(1)
    assert plan != g2p.G2P(config(lexicon_file, seed=1)).order(0)
    assert all(len(batch) <= 8 for batch in plan)


def test_no_letter_is_padding_and_no_split_shares_a_word(task):
    pad, bos, eos = task.phonemes.pad_id, task.phonemes.bos_id, task.phonemes.eos_id
    for source, inputs, targets in (*map(task.batch, task.order(0)), *task.held_out()):
        assert (source != task.letters.pad_id).all() and (inputs[:, 0] == bos).all()
        assert (targets[:, -1] == eos).any(), "cut to the longest target"
        assert torch.equal(inputs[:, 1:][targets[:, 1:] >= 0], targets[:, :-1][targets[:, 1:] >= 0])
        assert (inputs[:, 1:][targets[:, 1:] < 0][targets[:, :-1][targets[:, 1:] < 0] != eos] == pad).all()
    splits = [set(words) for words in task.words.values()]
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(task.lexicon)


def test_padding_on_the_target_side_changes_nothing(task):
    source, inputs, targets = task.batch(task.order(0)[0])
    wider = (torch.nn.functional.pad(inputs, (0, 3)), torch.nn.functional.pad(targets, (0, 3), value=-100))
    (a, n), (b, m) = task.loss(task.model, source, inputs, targets), task.loss(task.model, source, *wider)
    assert n == m
    torch.testing.assert_close(a, b)


def test_decoding_agrees_with_teacher_forcing_and_says_no_special_token(task):
    words = ["abcd", "hgfe", "aabb", "ab"]
    decoded = task.transcribe(task.model, words)
    bos, eos = task.phonemes.bos_id, task.phonemes.eos_id
    for word in words:
        written = [*task.phonemes.encode(" ".join(decoded[word])), eos][: 2 * len(word) + 10]
        logits = task.model(torch.tensor([task.letters.encode(word)]), torch.tensor([[bos, *written[:-1]]]))
        logits[..., [task.letters.pad_id, bos, 3]] = -torch.inf
        assert logits[0].argmax(-1).tolist() == written


def test_a_lexicon_that_is_too_small_is_a_sentence(tmp_path):
    (tmp_path / "few.tsv").write_text("ab\tA B\n")
    with pytest.raises(DataError, match="split is empty: 1 words are too few, give some hundreds"):
        g2p.G2P(config(tmp_path / "few.tsv"))


def test_it_learns(lexicon_file, tmp_path):
    changes = {"max_steps": 300, "optim.warmup": 20, "model.hidden": 64, "batch_size": 16, "optim.lr": 1e-2}
    changes |= {"evaluate_every": 300, "checkpoint_every": 300}
    task = g2p.G2P(config(lexicon_file, **changes))
    before = task.report(task.model).metrics["phoneme_error_rate"]
    assert trainer.Trainer(task, tmp_path, console=Console(quiet=True)).run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert before > 80 and results["metrics"]["phoneme_error_rate"] < 30
    word = task.words["train"][0]
    model = models.load(tmp_path)
    assert seqfuse.generate(model, word, max_new_tokens=20).split() == list(word.upper())


# ---------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def finished(lexicon_file, tmp_path_factory) -> tuple[Path, str]:
    """A whole demo on a tiny model: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    run, console = new_demo(lexicon_file, out)
    assert run.run() == 0
    return out, console.export_text()


def test_demo_prints_the_promised_lines(finished):
    _, text = finished
    assert re.search(r"^phoneme error rate: \d+\.\d%$", text, re.M)
    assert re.search(r"^word error rate: \d+\.\d%$", text, re.M)
    assert re.search(r"^training step: plain [\d.,]+ steps/s, fused [\d.,]+ steps/s, ratio \d+\.\d\dx$", text, re.M)
    assert re.search(r"^greedy decoding: plain [\d.,]+ words/s, fused [\d.,]+ words/s, ratio \d+\.\d\dx$", text, re.M)
    assert "logits and 24 gradients keep the error rule against float64" in text


def test_demo_under_bfloat16_autocast(lexicon_file, tmp_path):
    run, console = new_demo(lexicon_file, tmp_path, {"precision": "bf16"})
    assert run.run() == 0 and "phoneme error rate" in console.export_text()
    losses = [r["loss"] for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert len(losses) == 12 and losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_demo_on_a_gpu(lexicon_file, tmp_path, bf16):
    run, console = new_demo(lexicon_file, tmp_path, {"precision": "bf16" if bf16 else "fp32"}, device="auto")
    assert run.device.type == "cuda" and run.run() == 0
    assert torch.cuda.get_device_name() in console.export_text()
    resumed, console = new_demo(lexicon_file, tmp_path, device="auto", resume=True)
    assert resumed.run() == 0 and "going on from step 12 of 12" in console.export_text()


def test_demo_writes_a_model_that_everything_else_takes(finished, task):
    out, _ = finished
    model = models.load(out)
    assert model.config == task.model.config and seqfuse.generate(model, "abc", num_beams=2, max_new_tokens=9)
    assert (out / "model.safetensors").stat().st_mode == (out / "report.html").stat().st_mode, "not private"
    assert not {p.suffix for p in out.rglob("*")} & {".part", ".tmp"}


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "srcset", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def read_html(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == [], "every element is closed"
    return reader


def test_report_is_whole_and_self_contained(finished):
    out, printed = finished
    source = (out / "report.html").read_text(encoding="utf-8")
    reader = read_html(source)
    assert reader.links == [] and not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "url(" not in source and "@import" not in source and "http" not in source
    assert reader.tags.count("svg") == 4, "loss, tokens per second, learning rate, and the attention map"
    text = " ".join(reader.text)
    for heading in ("Curves", "Attention", "Speed", "Held-out words", "Is it the same model?", "How it was made"):
        assert heading in reader.text
    rate = re.search(r"phoneme error rate: (\S+)", printed).group(1)
    assert rate.rstrip("%") in text and "training step" in text and torch.__version__ in text


def test_report_escapes_what_users_give():
    cell = report.table(["<a>"], [["<b> & c"]])
    assert "&lt;a&gt;" in cell and "&lt;b&gt; &amp; c" in cell
    read_html(report.page("<x>", report.heat_map(["<"], ["&"], [[0.5]], "a", "b"), report.paragraph("a < b")))


def test_line_chart_leaves_out_what_is_not_finite():
    chart = report.line_chart([report.Series("a", [1, 2, 3], [1.0, float("nan"), 2.0], marks=True)], "x", "y", "t")
    assert "nan" not in chart and chart.count("<circle") == 3  # two points, and the key
    assert "Nothing was recorded" in report.line_chart([report.Series("a", [], [])], "x", "y", "t")
    assert report.ticks(0, 3.1) == [0, 1, 2, 3] and report.ticks(0, 0.42) == [0, 0.1, 0.2, 0.3, 0.4]


def test_interrupted_by_a_real_signal_then_resumed(lexicon_file, tmp_path, finished):
    """SIGINT in training: exit code 130, a checkpoint, advice; resuming gives the uninterrupted result."""
    run, console = new_demo(lexicon_file, tmp_path / "run")
    step = trainer.Trainer.step

    def send_in_step_six(self, indices):
        step(self, indices)
        if self.progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", send_in_step_six)
        assert run.run() == demo.INTERRUPTED == 130
    text = console.export_text()
    assert "stopped after step 6 of 12" in text and f"seqfuse demo --resume --out {tmp_path / 'run'}" in text
    assert "make demo ARGS=" in text and "error rate" not in text
    assert not (tmp_path / "run" / "model.safetensors").exists()

    again, console = new_demo(
        lexicon_file, tmp_path / "run", {"max_steps": 99}, resume=True
    )  # the run's settings count
    assert again.run() == 0
    text = console.export_text()
    assert "going on from step 6 of 12" in text and "training step: plain" in text
    uninterrupted, resumed = ((p / "model.safetensors").read_bytes() for p in (finished[0], tmp_path / "run"))
    assert uninterrupted == resumed


def test_interrupted_in_evaluation_keeps_the_trained_model(lexicon_file, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    run, console = new_demo(lexicon_file, tmp_path / "run")
    monkeypatch.setattr(g2p.G2P, "transcribe", interrupt)
    assert run.run() == 130 and "--resume" in console.export_text()
    monkeypatch.undo()
    again, console = new_demo(lexicon_file, tmp_path / "run", resume=True)
    assert again.run() == 0 and "going on from step 12 of 12" in console.export_text()


def test_a_second_run_sets_the_first_one_aside(lexicon_file, tmp_path):
    for _ in range(3):
        run, console = new_demo(lexicon_file, tmp_path / "run", {"max_steps": 1})
        assert run.run() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old1", "run.old2"]
    assert all((p / "model.safetensors").is_file() for p in tmp_path.iterdir())
    assert f"the earlier run in {tmp_path / 'run'} is now {tmp_path / 'run.old2'}" in console.export_text()


def test_resume_errors_are_sentences(lexicon_file, tmp_path, finished):
    with pytest.raises(checkpoints.TrainError, match="there is no run to go on with"):
        new_demo(lexicon_file, tmp_path, resume=True)[0].run()
    lexicon = tmp_path / "words.tsv"
    lexicon.write_bytes(lexicon_file.read_bytes())
    assert new_demo(lexicon, tmp_path / "run", {"max_steps": 1})[0].run() == 0
    lexicon.write_text(lexicon_file.read_text() + "zzz\tZ\n")
    with pytest.raises(checkpoints.TrainError, match="the run was on other data"):
        new_demo(lexicon, tmp_path / "run", resume=True)[0].run()


def test_a_model_that_computes_something_else_is_refused(task):
    plain, other = demo.plain_copy(task.model), demo.plain_copy(task.model)
    with torch.no_grad():
        other.decoder.layers[0].bias_hh_l0[3] += 1e-3
    with pytest.raises(demo.DemoError, match="does not compute what the plain one does: logits"):
        demo.check_equal(task, plain, other, task.batch(task.order(0)[0]))


def test_plain_runs_on_pytorch_alone(task):
    """What the speeds are compared with takes none of our kernels, in training and in decoding."""
    chosen = set()
    plain = demo.plain_copy(task.model)
    batch = task.batch(task.order(0)[0])
    calls = {
        "plain": lambda i: (
            demo.stepper(task, plain, [batch])(0),
            task.transcribe(plain, ["abc"]),
        )
    }
    with seqfuse.dispatch.listening(lambda choice, case: chosen.add(choice.backend)):
        demo.time_alternately(calls, 1)
    assert chosen == {"torch"}


def test_timing_alternates_and_takes_the_median():
    calls = []
    seconds = demo.time_alternately(
        {"a": lambda i: (calls.append("a"), time.sleep(0.01)), "b": lambda i: calls.append("b")}, 4
    )
    assert calls == list("abbaabba") and seconds["a"] > 0.009 > seconds["b"]


# -------------------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path, lexicon_file):
    from seqfuse.cli import app

    runner = CliRunner()
    assert "demo" in runner.invoke(app, ["--help"]).output and runner.invoke(app, ["demo", "--help"]).exit_code == 0
    bad = tmp_path / "bad.tsv"
    bad.write_text("abc A B C\n")
    result = runner.invoke(app, ["demo", "--data", str(bad), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and f"{bad}, line 1: expected word<TAB>phonemes" in result.output
    result = runner.invoke(app, ["demo", "--resume", "--steps", "5"])
    assert result.exit_code == 2 and "leave out --steps" in result.output
    result = runner.invoke(app, ["demo", "--device", "tpu", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "unknown device 'tpu'" in result.output
    if not torch.cuda.is_available():
        result = runner.invoke(app, ["demo", "--device", "cuda", "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and "sees no CUDA GPU" in result.output
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["demo", "--data", str(lexicon_file), "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "cannot make the folder" in result.output


def test_info_names_versions():
    from seqfuse.cli import app

    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0 and torch.__version__ in result.output


def test_the_repository_command_line_obeys_ctrl_c(lexicon_file, tmp_path):
    """The whole program as a user runs it: Ctrl-C in training ends it with 130 and a checkpoint."""
    command = [sys.executable, "-m", "seqfuse.cli", "demo", "--data", str(lexicon_file), "--out", str(tmp_path)]
    # a shell that starts background jobs may have set SIGINT to be ignored; a terminal has not
    program = subprocess.Popen(
        [*command, "--steps", "100000"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    giving_up = threading.Timer(300, program.kill)  # of a machine with much else to do
    giving_up.start()
    lines = []
    for line in program.stdout:
        lines.append(line)
        if line.startswith("5  Training"):
            break
    while program.poll() is None and not ((log := tmp_path / "log.jsonl").exists() and log.stat().st_size):
        time.sleep(0.1)  # until some steps are done
    program.send_signal(signal.SIGINT)
    rest = program.stdout.read()
    giving_up.cancel()
    assert program.wait() == 130, "".join(lines) + rest
    assert "--resume" in rest and list((tmp_path / "checkpoints").glob("step-*/trainer.pt"))
