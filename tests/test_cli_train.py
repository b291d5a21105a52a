"""The commands of runs: train, eval, plot; what they print, write and refuse."""

import copy
import html.parser
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
import torch
from rich.console import Console
from training import RECIPE, run
from typer.testing import CliRunner

from seqfuse import dispatch, report, run_report, testing
from seqfuse.checkpoints import RunFolder, TrainError
from seqfuse.cli import app
from seqfuse.comparison import compare
from seqfuse.recipes import RECIPES
from seqfuse.runlog import RunLog, read_log
from seqfuse.trainer import Trainer


def call(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished runs, which nobody changes."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "first", {})
    run(folder / "second", {"optim.lr": 0.01})
    return folder


# --------------------------------------------------------------------------------------------------------------- train


def test_train_resume_and_again(tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "counting", "--out", out, "--device", "cpu", "--set", "optim.lr=0.02", "--set", "seed=3"]
    code, text = call(*arguments)
    assert code == 0 and "step 12/12" in text and "held-out loss" in text and "tokens/s" in text
    assert "loss: " in text and "a sample [not markup]" in text and "report.html" in text
    assert RunFolder(out).settings()["config"]["optim"]["lr"] == 0.02
    assert call(*arguments) == (0, f"{out}: this run is finished; another --out begins a new one\n")
    code, text = call(*arguments, "--set", "seed=4")
    assert code == 1 and "the run has seed = 3, not 4" in text
    before = (out / "model.safetensors").read_bytes()
    (out / "results.json").unlink()
    (out / "model.safetensors").unlink()
    code, text = call("train", "--resume", out, "--device", "cpu")
    assert code == 0 and (out / "model.safetensors").read_bytes() == before


def test_list_and_print_config(tmp_path):
    code, text = call("train", "--list")
    assert code == 0 and all(f"{name} " in text and recipe.about in text for name, recipe in RECIPES.items())
    code, text = call("train", "counting", "--print-config", "--set", "kind=decoder", "--data", tmp_path / "x.txt")
    config = json.loads(text)
    assert code == 0 and config["model"]["model"] == "Decoder" and config["data"] == str(tmp_path / "x.txt")
    assert {"max_steps", "checkpoint_every", "seed"} <= config.keys()
    assert RECIPE.read(config) == RECIPE.configure({"kind": "decoder", "data": str(tmp_path / "x.txt")})


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        (["train"], 2, "which recipe? There are"),
        (["train", "cooking"], 2, "there is no recipe 'cooking'; there are"),
        (["train", "counting", "--set", "lr"], 2, "--set takes KEY=VALUE, got 'lr'"),
        (["train", "counting", "--set", "lr=1"], 2, "unknown key 'lr' (did you mean 'optim.lr'?); there are"),
        (["train", "counting", "--set", "optim.lr=fast"], 2, "Optim: lr must be a number, got 'fast'"),
        (["train", "counting", "--set", "model.cell=gnu"], 2, "cell must be 'rnn' or 'lstm' or 'gru'"),
        (["train", "--resume", "nowhere"], 1, "nowhere/run.json: there is no such file"),
        (["train", "counting", "--resume", "x", "--set", "a=1"], 2, "leave out RECIPE, --set"),
        (["train", "counting", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["eval", "nowhere"], 1, "nowhere/run.json: there is no such file"),
        (["plot", "nowhere"], 1, "nowhere/run.json: there is no such file"),
    ],
)
def test_refusals(arguments, code, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result[0] == code and sentence in result[1].replace("\n", " ") and len(result[1].splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_values_of_set(tmp_path):
    for value, read in (("null", None), ("a.txt", "a.txt"), ("3", "3")):
        code, text = call("train", "counting", "--print-config", "--set", f"data={value}")
        assert (code, json.loads(text)["data"]) == (0, read) if value != "3" else code == 2
    code, text = call("train", "counting", "--print-config", "--set", "carry=true", "--set", "optim.lr=3e-4")
    assert json.loads(text)["carry"] is True and json.loads(text)["optim"]["lr"] == 3e-4


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    """A run is gone on with from any folder; what isn't there may be a name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "body").mkdir()
    (tmp_path / "minilm").mkdir()
    for value, read in (("body", str(tmp_path / "body")), ("nothing", "nothing"), ("minilm", "minilm")):
        code, text = call("train", "sentiment", "--print-config", "--set", f"start={value}")
        assert (code, json.loads(text)["start"]) == (0, read)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_keeps_everything(tmp_path, number):
    """As a user runs it: Ctrl-C, or the end of a job, in the middle of a run; then --resume."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    command = [sys.executable, "-m", "seqfuse", "train", "charlm", "--data", text, "--out", tmp_path / "run"]
    command += ["--set", "max_steps=100000", "--set", "evaluate_every=5", "--set", "checkpoint_every=100000"]
    program = subprocess.Popen(
        [*map(str, command), "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in program.stdout:
        lines.append(line)
        if line.startswith("step "):
            program.send_signal(number)
            break
    lines += program.stdout
    assert program.wait(60) == 130, "".join(lines)
    assert lines[-1] == f"stopped; go on with  seqfuse train --resume {tmp_path / 'run'}\n"
    assert RunFolder(tmp_path / "run").newest() and not RunFolder(tmp_path / "run").finished


# ---------------------------------------------------------------------------------------------------------------- eval


def test_eval(finished, tmp_path):
    run_folder = finished / "first"
    code, text = call("eval", run_folder, "--device", "cpu")
    results = json.loads((run_folder / "results.json").read_text())
    assert code == 0 and f"loss: {run_report.show(results['metrics']['loss'])}\nsignature: exact" in text
    assert text.splitlines()[-1] == f"{run_folder / 'evaluation.html'}: the same with pictures"
    page = (run_folder / "evaluation.html").read_text()
    assert is_self_contained(page) and "signature" in page and torch.__version__ in page
    trainer = Trainer(RECIPES["counting"].task(RECIPE.configure()), tmp_path / "half")
    trainer.begin()
    code, text = call("eval", tmp_path / "half")
    assert code == 1 and "has no checkpoint yet" in text
    trainer.step(trainer.next_batch())
    trainer.save()
    code, text = call("eval", tmp_path / "half")
    assert code == 0 and text.startswith(f"{tmp_path / 'half/checkpoints/step-000001'}: counting")


def test_eval_on_other_data(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    Trainer(RECIPES["counting"].task(RECIPE.configure({"data": str(text)})), tmp_path / "run").begin()
    text.write_text("two")
    code, said = call("eval", tmp_path / "run", "--device", "cpu")
    assert code == 1 and "run.json: the run was on other data" in said and len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- plot, reports


class Outside(html.parser.HTMLParser):
    """Whatever a page would load from elsewhere."""

    found: list

    def handle_starttag(self, tag, attributes):
        self.found += [(tag, k, v) for k, v in attributes if k in ("src", "href", "data")]


def is_self_contained(text: str) -> bool:
    parser = Outside()
    parser.found = []
    parser.feed(text)
    return text.startswith("<!doctype html>") and not parser.found and "@import" not in text and "url(" not in text


def test_report(finished):
    text = (finished / "first/report.html").read_text()
    assert is_self_contained(text)
    for what in ("counting: report of a run", "loss", "tokens/s", "optim.lr", "SHA-256", "exact", torch.__version__):
        assert what in text
    assert text.count("<svg") == 3  # the loss (training and held-out), the speed, the learning rate


def test_plot(finished, tmp_path):
    code, text = call("plot", finished / "first", "--out", tmp_path / "a.svg")
    assert code == 0 and xml.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "held-out" in (tmp_path / "a.svg").read_text()
    code, text = call("plot", finished / "first", finished / "second", "--out", tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert code == 0 and is_self_contained(page)
    assert "first training" in page and "second held-out" in page
    assert "<tr><td>signature</td><td>exact</td><td>exact</td></tr>" in page and '<th class="number">loss</th>' in page
    settings = page[page.index("Settings that differ") :]
    assert "optim.lr" in settings and "0.03" in settings and "0.01" in settings and "optim.beta1" not in settings
    assert call("plot", finished / "first", "--out", tmp_path / "one.html")[0] == 0
    assert call("plot", finished / "first", finished / "first", "--out", tmp_path / "same.html")[0] == 0
    assert "None: only the data" in (tmp_path / "same.html").read_text()
    code, text = call("plot", finished / "first", "--out", tmp_path / "a.pdf")
    assert code == 1 and "a.pdf: a plot is written as .svg, .html or .png" in text


def test_png_without_matplotlib(finished, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    code, text = call("plot", finished / "first", "--out", tmp_path / "a.png")
    assert code == 1 and "PNG needs matplotlib" in text and not (tmp_path / "a.png").exists()


def test_png(finished, tmp_path):
    """The losses of the logs, in a picture that shows something."""
    image = pytest.importorskip("matplotlib.image")
    runs = run_report.open_runs([finished / "first", finished / "second"])
    (axes,) = run_report.matplotlib_figure(runs).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    for one in runs:
        trained = [[r["step"], r["loss"]] for r in one.log if "loss" in r]
        held = [[r["step"], r["evaluation"]["loss"]] for r in one.log if "evaluation" in r]
        assert drawn[f"{one.name} training"] == trained and drawn[f"{one.name} held-out"] == held
    assert len(drawn) == 4 == len(axes.get_legend().get_texts()) and axes.get_ylabel() == "loss"
    assert call("plot", finished / "first", finished / "second", "--out", tmp_path / "new/a.png")[0] == 0
    pixels = image.imread(tmp_path / "new/a.png")
    assert pixels.shape[1] > pixels.shape[0] > 300 and pixels.std() > 0.05
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_runs_of_one_name_are_told_apart(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(finished / "first", tmp_path / name / "run")
    assert call("plot", "a/run", "b/run") == (0, "comparison.html\n")
    page = (tmp_path / "comparison.html").read_text()
    for what in ("<td>a/run</td>", "<td>b/run</td>", "a/run training", "b/run held-out"):
        assert what in page, what


def test_damaged_files_of_a_run(finished, tmp_path):
    """Lines of a log that are none are passed over, by plot and by a run that goes on; the rest gets one sentence."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "first", folder)
    log, whole = folder / "log.jsonl", read_log(folder / "log.jsonl")
    good = log.read_bytes().splitlines(keepends=True)
    bad = [b"[1]\n", b'{"step": "x", "loss": 1}\n', b'{"x": 1}\n', b"\xff\n", b"3\n", b'{"step": 5, "lo\n', b"\n"]
    log.write_bytes(b"".join(b"".join(pair) for pair in zip(good, bad, strict=False)) + b"".join(good[len(bad) :]))
    assert read_log(log) == whole and call("plot", folder)[0] == 0
    (folder / "results.json").unlink()
    assert call("train", "--resume", folder, "--device", "cpu")[0] == 0 and log.read_bytes() == b"".join(good)
    settings = json.loads((folder / "run.json").read_text())
    settings["config"]["recipe"] = ["counting"]
    (folder / "run.json").write_text(json.dumps(settings))
    for arguments in (("eval", folder), ("train", "--resume", folder)):
        code, text = call(*arguments)
        assert code == 2 and "run.json: there is no recipe ['counting']; there are" in text
    del settings["config"]["recipe"]
    (folder / "run.json").write_text(json.dumps(settings))
    assert call("plot", folder, finished / "second", "--out", tmp_path / "a.html")[0] == 0


def test_plot_of_a_run_that_has_not_begun(tmp_path):
    Trainer(RECIPES["counting"].task(RECIPE.configure()), tmp_path).begin()
    code, text = call("plot", tmp_path)
    assert code == 1 and "log.jsonl: holds nothing yet" in text


def test_curves_leave_out_nothing():
    """Averages of many points, each of them in one; more runs than colours."""
    log = [{"step": i, "loss": float(i), "tokens_per_second": 1.0, "lr": 0.1} for i in range(1, 1001)]
    series = run_report.line("x", log, "loss")
    assert len(series.x) <= run_report.POINTS and series.x[-1] == 1000
    assert sum(series.y) / len(series.y) == pytest.approx(500.5)
    chart = run_report.curves({f"run{i}": log for i in range(9)})[0]
    assert chart.count("<polyline") == 9 > len(report.COLORS)


def test_lines_of_one_run_have_one_colour():
    log = [{"step": 1, "loss": 1.0, "tokens_per_second": 1.0, "lr": 0.1}, {"step": 1, "evaluation": {"loss": 1.0}}]
    chart = run_report.curves({f"run{i}": log for i in range(9)})[0]
    strokes = [e.get("style") for e in xml.fromstring(chart).iter("polyline")]
    assert strokes[::2] == strokes[1::2] and len({*strokes}) == 9
    assert run_report.curves({"one": log})[0].count("var(--two)") > 0


def places(svg: str) -> list[tuple[float, float, float, str]]:
    """(left, right, baseline, text) of the level texts of a picture, at 7 units a character."""
    found = []
    for e in xml.fromstring(svg).iter("text"):
        if e.get("transform") is None:
            x, wide = float(e.get("x")), 7 * len(e.text)
            left = x - {"start": 0, "middle": wide / 2, "end": wide}[e.get("text-anchor", "start")]
            found.append((left, left + wide, float(e.get("y")), e.text))
    return found


@pytest.mark.parametrize("count", [1, 3, 8])
def test_names_of_lines_neither_overlap_nor_leave_the_picture(count):
    series = [report.Series(f"a-run-with-a-name-{i} held-out", [0, 1e5], [0, 2.5e6]) for i in range(count)]
    chart = report.line_chart(series, "step", "tokens per second", "t")
    width, height = map(float, xml.fromstring(chart).get("viewBox").split()[2:])
    texts = places(chart)
    assert all(0 <= left and right <= width and y < height for left, right, y, _ in texts)
    for i, (left, right, y, text) in enumerate(texts):
        for other in texts[i + 1 :]:
            assert y != other[2] or right < other[0] or other[1] < left, (text, other)
    assert "2.5M" in [text for *_, text in texts]


@pytest.mark.parametrize("from_zero", [True, False])
def test_axes(from_zero):
    chart = report.line_chart([report.Series("s", [0, 10], [1.91, 1.99])], "x", "y", "t", from_zero)
    marks = [e.text for e in xml.fromstring(chart).iter("text")]
    assert ("0" in marks[:2]) == from_zero and ("1.92" in marks) == (not from_zero)
    for value in (2.0, 0.0, 3e-5):
        flat = report.line_chart([report.Series("s", [1], [value])], "x", "y", "t", from_zero)
        marks = [e for e in xml.fromstring(flat).iter("text") if e.get("text-anchor") == "end"]
        assert "<polyline" in flat and len(marks) > 1 and (value or marks[-1].text == "1")
        assert all(float(e.get("x")) - 7 * len(e.text) > 22 for e in marks)  # beside the axis's name


def test_names_in_a_heat_map_have_room():
    chart = report.heat_map(["a", "longer<"], ["of 12 letters"], [[0.5, 1.0]], "x", "y")
    names = {e.text: e for e in xml.fromstring(chart).iter("text")}
    assert "rotate(-90)" in names["longer<"].get("transform") and float(names["of 12 letters"].get("x")) > 13 * 8
    short = report.heat_map(["a", "b"], ["c"], [[0.5, 1.0]], "x", "y")
    assert short.count("rotate(-90)") == 1  # the axis


# ------------------------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_progress_bar_fits_a_terminal(tmp_path, width):
    """... and begins where a resumed run goes on."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    log = RunLog(tmp_path, console, 30_000, "characters")
    log.rewind(1200, 1200)
    with log:
        assert "1200/30000" in rendered(log, width)
        log.trained({"step": 2000, "loss": 12.3456, "tokens_per_second": 123456.0})
        log.evaluated(2000, {"loss": 2.71828, "perplexity": 15.16, "bits_per_byte": 3.97})
        line = rendered(log, width)
        for what in ("2000/30000", "loss 12.346", "held-out 2.718", "123,456 characters/s", "left"):
            assert what in line, line
        assert line.index("2000") >= 6  # the bar itself


def rendered(log: RunLog, width: int) -> str:
    screen = Console(file=io.StringIO(), width=width)
    screen.print(log.bar.get_renderable())
    assert screen.file.getvalue().count("\n") == 1
    return screen.file.getvalue()


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    """If it is installed: here something that looks like it."""
    got = []

    class SummaryWriter:
        def __init__(self, folder):
            got.append(folder)

        def add_scalar(self, name, value, step):
            got.append((name, value, step))

        def close(self):
            got.append("closed")

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "tensorboard" else find_spec(name))
    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(tmp_path, {"max_steps": 2, "evaluate_every": 2})
    log = read_log(tmp_path / "log.jsonl")
    assert got[0] == str(tmp_path / "tensorboard") and got[-1] == "closed"
    assert ("training/loss", log[0]["loss"], 1) in got
    assert ("held-out/loss", log[-1]["evaluation"]["loss"], 2) in got


# --------------------------------------------------------------------------------------------------- compare-reference


@pytest.mark.parametrize("kind", ["rnn", "decoder"])
def test_compare_reference(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = call("train", "counting", "--compare-reference", "--set", f"kind={kind}", "--set", "max_steps=8")
    assert code == 0, text
    plain, fused, ratio = text.splitlines()
    assert plain.startswith("plain PyTorch: ") and fused.startswith("seqfuse: ") and "tokens/s" in plain
    assert ratio.startswith("ratio: ") and "8 steps in turn" in ratio and not list(tmp_path.iterdir())


def test_compare_reference_runs_on_what_it_says(monkeypatch):
    """The plain model on PyTorch's own ops alone, with dropout too; both to equal losses without it."""
    seen = {False: set(), True: set()}

    def listen(choice, case):
        seen[dispatch.forced_backend() == dispatch.PLAIN].add(choice.backend)

    with dispatch.listening(listen):
        for kind in ("decoder", "rnn"):
            compare(RECIPE.configure({"kind": kind, "max_steps": 6}), device="cpu")
        result = compare(RECIPE.configure({"kind": "decoder", "model.dropout": 0.0, "max_steps": 8}), device="cpu")
    assert seen[True] == {"torch"}
    assert result.fused_loss == pytest.approx(result.plain_loss, rel=1e-4) and result.steps == 8


def test_plain_layers_take_lengths(tmp_path):
    """Padded rows through PyTorch's packed sequences: what seqfuse's layers give."""
    from seqfuse.comparison import make_plain
    from seqfuse.nn import GRU

    layer, x, lengths = GRU(4, 6, batch_first=True, bidirectional=True), torch.randn(3, 5, 4), torch.tensor([5, 2, 3])
    ours, state = layer(x, lengths=lengths)
    truth, last = copy.deepcopy(layer).double()(x.double(), lengths=lengths)
    make_plain(layer)
    assert isinstance(layer, torch.nn.GRU)
    plain, plain_state = layer(x, lengths=lengths)
    testing.assert_accurate(plain, truth, ours)
    testing.assert_accurate(plain_state, last, state)


def test_compare_reference_shows_no_speed_of_another_model(monkeypatch, capsys):
    from seqfuse import comparison

    unfuse = comparison.seqfuse.unfuse

    def spoil(model):
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        return unfuse(model)

    monkeypatch.setattr(comparison.seqfuse, "unfuse", spoil)
    with pytest.raises(TrainError, match="do not compute the same, so no speed is compared"):
        compare(RECIPE.configure(), device="cpu")
    assert "ratio" not in capsys.readouterr().out
