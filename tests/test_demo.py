"""The demo and its recipe: data, model, training, interruption, report, command line. Long claims are `make demo`'s."""

import html.parser
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
from safetensors.torch import load_file
from typer.testing import CliRunner

from seqfuse import data, demo, report
from seqfuse.recipes import g2p

TINY = dict(steps=12, batch_size=8, embed=16, hidden=32, warmup=4, validate_every=5, checkpoint_every=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much where other jobs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="module")
def corpus(lexicon_file) -> g2p.Corpus:
    return g2p.Corpus(data.read_lexicon(lexicon_file))


def new_demo(lexicon_file, out, **options) -> tuple[demo.Demo, Console]:
    config, device = g2p.Config(**TINY | options.pop("config", {})), options.pop("device", "cpu")
    console = Console(record=True, width=200, file=open(os.devnull, "w"), highlight=False)
    return demo.Demo(demo.Options(out, config, lexicon_file, device, **options), console), console


# -------------------------------------------------------------------------------------------------------------- recipe


def test_batches_cover_each_pair_once_and_repeat_by_seed(corpus):
    config = g2p.Config(**TINY)
    plan = corpus.epoch(config, 0)
    seen = sorted((index, row) for index, rows in plan for row in rows.tolist())
    assert seen == [(i, r) for i, group in enumerate(corpus.train) for r in range(len(group.lengths))]
    assert len(seen) == corpus.pairs("train")
    for (i, a), (j, b) in zip(plan, corpus.epoch(config, 0), strict=True):
        assert i == j and torch.equal(a, b)
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(plan, corpus.epoch(config, 1), strict=False))
    # starting late continues the same list, over the end of an epoch
    start = len(plan) + 2
    late, full = g2p.batches(corpus, config, start), g2p.batches(corpus, config)
    for _ in range(start):
        next(full)
    assert all(torch.equal(x, y) for x, y in zip(next(late), next(full), strict=True))


def test_no_letter_is_padding_and_no_split_shares_a_word(corpus):
    for source, target in (corpus.batch(i, rows) for i, rows in corpus.epoch(g2p.Config(**TINY), 0)):
        assert (source != g2p.PAD).all() and (target[:, 0] == g2p.BOS).all()
        assert (target[:, -1] != g2p.PAD).any(), "cut to the longest target"
    splits = [set(words) for words in corpus.words.values()]
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(corpus.lexicon)


def test_padding_on_the_target_side_changes_nothing(corpus):
    config = g2p.Config(**TINY)
    model = g2p.build(corpus, config)
    source, target = next(g2p.batches(corpus, config))
    padded = torch.cat([target, torch.full((len(target), 3), g2p.PAD)], dim=1)
    a, b = (g2p.loss_of(model, source, t, config) for t in (target, padded))
    torch.testing.assert_close(a, b)


def test_greedy_agrees_with_teacher_forcing(corpus):
    """Decoding step by step with a carried state is the same computation as the one call over all steps."""
    model = g2p.build(corpus, g2p.Config(**TINY))
    source = corpus.encode(["abcd", "hgfe", "aabb"])
    tokens, weights = model.greedy(source)  # (B, U), (B, U, T)
    inputs = torch.cat([torch.full((3, 1), g2p.BOS), tokens[:, :-1]], dim=1)
    logits = model(source, inputs)
    logits[..., [g2p.PAD, g2p.BOS, g2p.UNK]] = -torch.inf
    going = (tokens != g2p.PAD) | (inputs == g2p.BOS)
    assert torch.equal(logits.argmax(-1)[going], tokens[going])
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens.shape))


def test_edit_distance_and_error_rates():
    assert g2p.edit_distance(tuple("kitten"), tuple("sitting")) == 3
    assert g2p.edit_distance((), tuple("abc")) == g2p.edit_distance(tuple("abc"), ()) == 3
    right, wrong = g2p.Sample("a", ("A",), ("A",), 0), g2p.Sample("b", ("B", "C"), ("B", "D", "E"), 2)
    result = g2p.Evaluation([right, wrong], 1.0)
    assert result.phoneme_error_rate == pytest.approx(50) and result.word_error_rate == 50


def test_evaluation_takes_the_closest_reading(corpus, monkeypatch):
    monkeypatch.setattr(g2p, "transcribe", lambda *_: {"abc": ("A", "B", "K")})
    result = g2p.evaluate(None, corpus, ["abc"])
    assert result.word_error_rate == 0 and result.samples[0].truth == ("A", "B", "K")


def run_to(corpus, config, stop=None, restore=None) -> g2p.Run:
    run = g2p.Run(g2p.build(corpus, config), corpus, config)
    if restore:
        run.restore(*restore)
    run.train(lambda r, _: r.step != stop, lambda r: None)
    return run


def test_equal_seeds_give_equal_losses_and_weights(corpus):
    a, b = (run_to(corpus, g2p.Config(**TINY)) for _ in range(2))
    other = run_to(corpus, g2p.Config(**TINY | {"seed": 1}))
    assert torch.equal(a.losses, b.losses) and a.valid == b.valid
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not torch.equal(a.losses, other.losses)


@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_run_is_bit_identical(corpus, tmp_path, stop):
    config = g2p.Config(**TINY)
    whole, first = run_to(corpus, config), run_to(corpus, config, stop=stop)
    assert first.step == stop
    demo.save_checkpoint(tmp_path / "c.safetensors", first, {})
    second = run_to(corpus, config, restore=demo.load_checkpoint(tmp_path / "c.safetensors"))
    assert torch.equal(whole.losses, second.losses) and whole.valid == second.valid
    assert all(torch.equal(x, y) for x, y in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_it_learns(corpus):
    run = run_to(corpus, g2p.Config(**TINY | {"steps": 300, "warmup": 20, "hidden": 64, "batch_size": 16, "lr": 1e-2}))
    before = g2p.evaluate(g2p.build(corpus, run.config), corpus, corpus.words["test"]).phoneme_error_rate
    after = g2p.evaluate(run.model, corpus, corpus.words["test"]).phoneme_error_rate
    assert before > 80 and after < 30


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
    assert "logits and 23 gradients keep the error rule against float64" in text


def test_demo_under_bfloat16_autocast(lexicon_file, tmp_path):
    run, console = new_demo(lexicon_file, tmp_path, config={"bf16": True})
    assert run.run() == 0 and "phoneme error rate" in console.export_text()
    losses = load_file(tmp_path / demo.CHECKPOINT)["losses"]
    assert losses.isfinite().all() and losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_demo_on_a_gpu(lexicon_file, tmp_path, bf16):
    run, console = new_demo(lexicon_file, tmp_path, device="auto", config={"bf16": bf16})
    assert run.device.type == "cuda" and run.run() == 0
    assert torch.cuda.get_device_name() in console.export_text()
    resumed, console = new_demo(lexicon_file, tmp_path, device="auto", resume=True)
    assert resumed.run() == 0 and "resumed at step 12 of 12" in console.export_text()


def test_demo_writes_weights_that_plain_torch_loads(finished, corpus):
    out, _ = finished
    weights = load_file(out / "model.safetensors")
    g2p.build(corpus, g2p.Config(**TINY)).load_state_dict(weights, strict=True)
    assert (out / "model.safetensors").stat().st_mode == (out / "report.html").stat().st_mode, "not private"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.safetensors", "model.safetensors", "report.html"]


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
    assert reader.tags.count("svg") == 2, "loss curve and attention map"
    text = " ".join(reader.text)
    for heading in ("Loss", "Attention", "Speed", "Held-out words", "How it was made"):
        assert heading in reader.text
    rate = re.search(r"phoneme error rate: (\S+)", printed).group(1)
    assert rate in text and "training step" in text and torch.__version__ in text


def test_report_escapes_what_users_give():
    cell = report.table(["<a>"], [["<b> & c"]])
    assert "&lt;a&gt;" in cell and "&lt;b&gt; &amp; c" in cell
    read_html(report.page("<x>", report.heat_map(["<"], ["&"], [[0.5]], "a", "b"), report.paragraph("a < b")))


def test_line_chart_leaves_out_what_is_not_finite():
    chart = report.line_chart([report.Series("a", [1, 2, 3], [1.0, float("nan"), 2.0], marks=True)], "x", "y", "t")
    assert "nan" not in chart and chart.count("<circle") == 2
    assert "Nothing was recorded" in report.line_chart([report.Series("a", [], [])], "x", "y", "t")
    assert report.ticks(0, 3.1) == [0, 1, 2, 3] and report.ticks(0, 0.42) == [0, 0.1, 0.2, 0.3, 0.4]


def test_interrupted_by_a_real_signal_then_resumed(lexicon_file, tmp_path, finished):
    """SIGINT in training: exit code 130, a checkpoint, advice; resuming gives the uninterrupted result."""
    run, console = new_demo(lexicon_file, tmp_path)
    train = g2p.Run.train

    def send_in_step_six(self, on_step, save):
        def on(r, words):
            if r.step == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return on_step(r, words)

        return train(self, on, save)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g2p.Run, "train", send_in_step_six)
        assert run.run() == demo.INTERRUPTED == 130
    text = console.export_text()
    assert "stopped after step 6 of 12" in text and f"seqfuse demo --resume --out {tmp_path}" in text
    assert "make demo ARGS=" in text and "error rate" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]

    again, console = new_demo(
        lexicon_file, tmp_path, resume=True, config={"steps": 99}
    )  # the checkpoint's settings count
    assert again.run() == 0
    assert "resumed at step 6 of 12" in console.export_text()
    uninterrupted, resumed = (load_file(p / "model.safetensors") for p in (finished[0], tmp_path))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_interrupted_in_evaluation_keeps_the_trained_model(lexicon_file, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    run, console = new_demo(lexicon_file, tmp_path)
    monkeypatch.setattr(g2p, "evaluate", interrupt)
    assert run.run() == 130 and "--resume" in console.export_text()
    monkeypatch.undo()
    again, console = new_demo(lexicon_file, tmp_path, resume=True)
    assert again.run() == 0 and "resumed at step 12 of 12" in console.export_text()


def test_a_second_run_sets_the_first_ones_checkpoint_aside(lexicon_file, tmp_path):
    for _ in range(2):
        run, console = new_demo(lexicon_file, tmp_path, config={"steps": 1})
        assert run.run() == 0
    assert (tmp_path / "checkpoint.old.safetensors").is_file() and "earlier run" in console.export_text()


def test_resume_errors_are_sentences(lexicon_file, tmp_path, finished):
    with pytest.raises(demo.DemoError, match="nothing to resume"):
        new_demo(lexicon_file, tmp_path, resume=True)[0].run()
    (tmp_path / demo.CHECKPOINT).write_bytes((finished[0] / demo.CHECKPOINT).read_bytes()[:5000])
    with pytest.raises(demo.DemoError, match="damaged"):
        new_demo(lexicon_file, tmp_path, resume=True)[0].run()
    other = tmp_path / "other.tsv"
    other.write_text(lexicon_file.read_text() + "zzz\tZ\n")
    with pytest.raises(demo.DemoError, match="other data"):
        new_demo(other, finished[0], resume=True)[0].run()


def test_a_model_that_computes_something_else_is_refused(corpus):
    config = g2p.Config(**TINY)
    source, target = next(g2p.batches(corpus, config))
    plain, other = g2p.build(corpus, config), g2p.build(corpus, config)
    with torch.no_grad():
        other.decoder.bias_hh_l0[3] += 1e-3
    with pytest.raises(demo.DemoError, match="does not compute what the plain one does: logits"):
        demo.check_equal(plain, other, source, target, config)


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
    giving_up = threading.Timer(90, program.kill)
    giving_up.start()
    lines = []
    for line in program.stdout:
        lines.append(line)
        if line.startswith("step "):
            program.send_signal(signal.SIGINT)
            break
    rest = program.stdout.read()
    giving_up.cancel()
    assert program.wait() == 130, "".join(lines) + rest
    assert "--resume" in rest and (tmp_path / demo.CHECKPOINT).is_file()
