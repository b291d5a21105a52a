"""`seqfuse demo`: build, time, fuse, check, time again, train, evaluate, report. The recipe is recipes/g2p.py.

The model is written in plain torch.nn and knows nothing of seqfuse; the one line that makes it fast is
`seqfuse.fuse(model)`. Every speed that is printed was measured in this run (or, after --resume, in the run that was
interrupted), whether the fused model is faster or not.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import seqfuse
from seqfuse import data, files, report, testing
from seqfuse.interrupts import INTERRUPTED, CatchInterrupt
from seqfuse.parallel import pick_device
from seqfuse.recipes import g2p
from seqfuse.runlog import progress_bar

CHECKPOINT = "checkpoint.safetensors"
Check = tuple[str, float, float]  # what, relative error of plain float32, of fused float32
Speed = tuple[str, float, float, str]  # what, plain, fused, unit
TIMED_STEPS = 16


class DemoError(Exception):
    """One sentence for the user."""


@dataclass(frozen=True)
class Options:
    out: Path
    config: g2p.Config
    data: Path | None = None  # None: CMUdict
    device: str = "auto"
    resume: bool = False


# ----------------------------------------------------------------------------------------------- files of the run


@dataclass(frozen=True)
class Source:
    """Where the lexicon came from; `identity` tells one data set from another when a run is resumed."""

    text: str
    licence: str
    identity: str


def load_data(path: Path | None) -> tuple[data.Lexicon, Source]:
    if path is None:
        item = data.CMUDICT
        return data.cmudict(), Source(f"{item.source} {item.version}", item.licence, item.sha256)
    lexicon = data.read_lexicon(path)
    return lexicon, Source(f"your own file {path.name}", "as its owner says", data.sha256_of(path))


def save_checkpoint(path: Path, run: g2p.Run, extra: dict) -> None:
    tensors, values = run.state()
    header = {"seqfuse": json.dumps(values | extra)}
    files.save_atomically(path, lambda part: save_file(tensors, str(part), metadata=header))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        raise DemoError(f"nothing to resume: there is no {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            values = json.loads(file.metadata()["seqfuse"])
            return {name: file.get_tensor(name) for name in file.keys()}, values
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DemoError(f"{path} is not a checkpoint of this demo or is damaged ({error})") from error


# ------------------------------------------------------------------------------------------- correctness and speed


def check_equal(plain: nn.Module, fused: nn.Module, source: Tensor, target: Tensor, config: g2p.Config) -> list[Check]:
    """Hold fused logits and gradients against float64 by the library's one error rule (seqfuse.testing).

    Raises DemoError on a violation.
    """
    exact = copy.deepcopy(plain).double()
    config = g2p.Config(**asdict(config) | {"bf16": False})
    logits, grads = [], []
    for model in (exact, plain, fused):
        model.zero_grad()
        logits.append(model(source, target[:, :-1]).detach())
        g2p.loss_of(model, source, target, config).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    rows = []
    try:
        testing.assert_accurate(logits[2], logits[0], logits[1], dims=(0, 1), what="logits")
        rows.append(("logits", *(float(testing.relative_error(x, logits[0])) for x in logits[1:])))
        for name, truth in grads[0].items():
            testing.assert_accurate(grads[2][name], truth, grads[1][name], what=f"gradient of {name}")
            errors = (float(testing.relative_error(g[name], truth)) for g in grads[1:])
            rows.append((f"gradient of {name}", *errors))
    except AssertionError as error:
        raise DemoError(f"the fused model does not compute what the plain one does: {error}") from error
    return rows


def time_alternately(contenders: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over rounds; in every round each runs once on the same work, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders) if i % 2 == 0 else list(contenders)[::-1]
        for name in names:
            start = time.perf_counter()
            contenders[name](i)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def stepper(model: nn.Module, work: Sequence[tuple[Tensor, Tensor]], config: g2p.Config) -> Callable[[int], None]:
    optimizer = g2p.make_optimizer(model, config)

    def step(i: int) -> None:
        source, target = work[i % len(work)]
        g2p.train_step(model, optimizer, source, target, i, config)

    return step


# -------------------------------------------------------------------------------------------------------- the demo


class Demo:
    def __init__(self, options: Options, console: Console | None = None):
        self.options = options
        self.console = console or Console(highlight=False)
        self.checkpoint = options.out / CHECKPOINT
        self.device = pick_device(options.device)
        self.config = options.config
        self.speed: list[Speed] = []
        self.checks: list[Check] = []
        self.backends: list[tuple[str, ...]] = []  # module, op, backend, reason
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def head(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def run(self) -> int:
        """The whole demo; returns the exit code."""
        try:
            self.options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"cannot make the folder {self.options.out}: {error.strerror}") from error
        saved = load_checkpoint(self.checkpoint) if self.options.resume else None
        try:
            corpus, model = self.prepare(saved)
            run = g2p.Run(model, corpus, self.config)
            if saved is None:
                self.set_aside_old_checkpoint()
                self.compare(model, corpus)
            else:
                seqfuse.fuse(model)
                run.restore(*saved)
                self.speed = [tuple(row) for row in saved[1]["speed"]]
                self.checks = [tuple(row) for row in saved[1]["checks"]]
                self.backends = [tuple(row) for row in saved[1]["backends"]]
                self.say(f"resumed at step {run.step:,} of {self.config.steps:,}")
        except KeyboardInterrupt:
            self.say("\n[bold]interrupted[/bold] before training began: start again with the same command")
            return INTERRUPTED
        try:
            if not self.train(run):
                return self.explain_resume(f"stopped after step {run.step:,} of {self.config.steps:,}")
            self.evaluate(run)
        except KeyboardInterrupt:
            return self.explain_resume("stopped")
        return 0

    def explain_resume(self, what: str) -> int:
        if not self.checkpoint.is_file():
            self.say(f"\n[bold]{what}[/bold] before the first checkpoint: start again with the same command")
            return INTERRUPTED
        more = [] if self.options.out == Path("demo") else ["--out", str(self.options.out)]
        more += ["--data", str(self.options.data)] if self.options.data else []
        arguments = shlex.join(["--resume", *more])
        self.say(f"\n[bold]{what}[/bold]; everything is in {self.checkpoint}. Go on from there with")
        self.say(f"    seqfuse demo {arguments}")
        self.say(f'or  make demo ARGS="{arguments}"')
        return INTERRUPTED

    def prepare(self, saved) -> tuple[g2p.Corpus, g2p.G2P]:
        self.head("1  Data and model")
        with self.console.status("reading the pronouncing dictionary"):
            lexicon, self.source = load_data(self.options.data)
            if saved is not None:
                if saved[1]["data"] != self.source.identity:
                    raise DemoError(f"{self.checkpoint} was trained on other data: resume with the same --data")
                self.config = g2p.Config.from_dict(saved[1]["config"])
            corpus = g2p.Corpus(lexicon, self.device)
        self.say(f"{self.source.text}; licence: {self.source.licence}")
        counts = ", ".join(f"{len(corpus.words[s]):,} {name}" for s, name in SPLITS)
        self.say(f"{len(lexicon):,} words split by hash: {counts}; {len(corpus.phonemes) - 4} phonemes")
        model = g2p.build(corpus, self.config)
        size = sum(p.numel() for p in model.parameters())
        self.model_text = f"attention encoder-decoder (GRU) in plain torch.nn, {size / 1e6:.2f} million parameters"
        self.say(f"{self.model_text}; on {report.device_name(self.device)}")
        return corpus, model

    def set_aside_old_checkpoint(self) -> None:
        """A new run never overwrites an interrupted one that somebody may still want."""
        if self.checkpoint.is_file():
            old = self.checkpoint.with_suffix(".old.safetensors")
            shutil.move(self.checkpoint, old)
            self.say(f"the checkpoint of an earlier run is now {old}")

    def compare(self, model: g2p.G2P, corpus: g2p.Corpus) -> None:
        """Time plain, fuse, check, time both alternately. Leaves `model` fused, its weights as they were."""
        config = self.config
        # Rare word lengths make small batches: of the first ones take the largest.
        first = list(itertools.islice(g2p.batches(corpus, config), 4 * TIMED_STEPS))
        work = sorted(first, key=lambda batch: -len(batch[0]))[:TIMED_STEPS]
        plain = copy.deepcopy(model)

        self.head("2  Plain torch.nn")
        plain_step = stepper(plain, work, config)
        time_alternately({"plain": plain_step}, 2)  # allocations, first-call choices
        alone = time_alternately({"plain": plain_step}, TIMED_STEPS)
        self.say(f"{1 / alone['plain']:.2f} training steps/s, {config.batch_size} words each")

        self.head("3  Fused: seqfuse.fuse(model)")
        seqfuse.fuse(model)
        plain.load_state_dict(model.state_dict())
        self.checks = check_equal(plain, model, *work[0], config)
        # what the training pass inside check_equal ran on; seqfuse.explain(model) also tells what was refused and why
        self.backends = [(row.module, row.op, row.backend, row.reason) for row in seqfuse.explain(model)]
        chosen = Table("module", "op", "backend", "why", box=None, pad_edge=False, header_style="dim")
        for row in self.backends:
            chosen.add_row(*row)
        self.console.print(chosen)
        worst = max(self.checks, key=lambda row: row[2])
        self.say(
            f"logits and {len(self.checks) - 1} gradients keep the error rule against float64; largest relative error "
            f"{worst[2]:.1e} (plain torch.nn there: {worst[1]:.1e}), {worst[0]}"
        )

        self.head("4  Plain and fused, alternately")
        contenders = {"plain": plain_step, "fused": stepper(copy.deepcopy(model), work, config)}
        time_alternately(contenders, 2)
        seconds = time_alternately(contenders, TIMED_STEPS)
        self.speed = [("training step", 1 / seconds["plain"], 1 / seconds["fused"], "steps/s")]
        self.print_speed()

    def print_speed(self) -> None:
        for what, plain, fused, unit in self.speed:
            self.say(f"{what}: plain {plain:,.2f} {unit}, fused {fused:,.2f} {unit}, ratio {fused / plain:.2f}x")

    def save(self, run: g2p.Run) -> None:
        measured = {"speed": self.speed, "checks": self.checks, "backends": self.backends}
        save_checkpoint(self.checkpoint, run, {"data": self.source.identity} | measured)

    def train(self, run: g2p.Run) -> bool:
        self.head("5  Training the fused model")
        first, words, start, shown = run.step, 0, time.perf_counter(), 0
        with CatchInterrupt() as interrupt, progress_bar(self.console) as bar:
            task = bar.add_task("training", total=self.config.steps, completed=run.step, loss="", speed="", held="")

            def on_step(run: g2p.Run, batch: int) -> bool:
                nonlocal words, shown
                words += batch
                fields = {}
                if run.step % 20 == 0 or run.step == self.config.steps:
                    recent = run.losses[max(first, run.step - 50) : run.step].mean()
                    rate = words / (time.perf_counter() - start)
                    fields = {"loss": f"loss {recent:.3f}", "speed": f"{rate:,.0f} words/s"}
                if len(run.valid) > shown:
                    shown = len(run.valid)
                    fields["held"] = f"held-out {run.valid[-1][1]:.3f}"
                    if not self.console.is_terminal:
                        recent = run.losses[max(first, run.step - 50) : run.step].mean()
                        self.say(f"step {run.step:,}/{self.config.steps:,}  loss {recent:.3f}  {fields['held']}")
                bar.update(task, completed=run.step, **fields)
                return not interrupt.wanted

            finished = run.train(on_step, self.save)
        if finished:
            self.say(f"{run.step:,} steps in {run.seconds:.0f} s")
        return finished

    def evaluate(self, run: g2p.Run) -> None:
        self.head("6  Held-out words")
        model, corpus = run.model.eval(), run.corpus
        final = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        files.save_atomically(self.options.out / "model.safetensors", lambda part: save_file(final, str(part)))
        with self.console.status("decoding"):
            result = g2p.evaluate(model, corpus, corpus.words["test"])
        samples = random.Random(run.config.seed).sample(result.samples, min(40, len(result.samples)))
        shown = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("word", "dictionary", "decoded", ""):
            shown.add_column(name)
        for s in samples[:12]:
            mark = "[green]ok[/green]" if s.errors == 0 else f"[red]{s.errors} wrong[/red]"
            shown.add_row(s.word, " ".join(s.truth), " ".join(s.decoded), mark)
        self.console.print(shown)
        self.say(f"\nphoneme error rate: {result.phoneme_error_rate:.1f}%")
        self.say(f"word error rate: {result.word_error_rate:.1f}%")
        self.say(f"({len(result.samples):,} held-out words decoded in {result.seconds:.1f} s)\n")
        self.compare_decoding(model, corpus)
        self.print_speed()
        path = self.options.out / "report.html"
        html = self.report(run, result, samples)
        files.save_atomically(path, lambda part: part.write_text(html, encoding="utf-8"))
        self.say(f"\nreport: {path}    weights: {self.options.out / 'model.safetensors'}")
        self.say(f"{time.perf_counter() - self.started:.0f} s in all")

    def compare_decoding(self, model: g2p.G2P, corpus: g2p.Corpus) -> None:
        words = corpus.words["test"][:1500]
        plain = g2p.build(corpus, self.config).eval()
        plain.load_state_dict(model.state_dict())
        contenders = {
            "plain": lambda i: g2p.transcribe(plain, corpus, words),
            "fused": lambda i: g2p.transcribe(model, corpus, words),
        }
        time_alternately(contenders, 1)
        seconds = time_alternately(contenders, 4)
        rates = (len(words) / seconds["plain"], len(words) / seconds["fused"])
        self.speed = [*self.speed[:1], ("greedy decoding", *rates, "words/s")]

    def report(self, run: g2p.Run, result: g2p.Evaluation, samples: list[g2p.Sample]) -> str:
        losses = run.losses.tolist()
        window = max(1, len(losses) // 200)
        smooth = [(i + window, statistics.fmean(losses[i : i + window])) for i in range(0, len(losses), window)]
        chart = report.line_chart(
            [
                report.Series("training", [x for x, _ in smooth], [y for _, y in smooth]),
                report.Series("held-out", [x for x, _ in run.valid], [y for _, y in run.valid], marks=True),
            ],
            "training step",
            "cross entropy, nats per phoneme",
            "loss over training steps",
        )
        # a right answer with silent letters or digraphs shows more than a diagonal
        right = [s for s in samples if s.errors == 0 and len(s.word) <= 14] or samples
        word = max(right, key=lambda s: (len(s.word) - len(s.truth), len(s.word))).word
        letters, phonemes, weights = g2p.attention_map(run.model, run.corpus, word)
        attention = report.heat_map(letters, phonemes, weights, "letters read", "phonemes written")
        speed = report.table(
            ["", "plain torch.nn", "fused", "ratio"],
            [(w, f"{p:,.2f} {u}", f"{f:,.2f} {u}", f"{f / p:.2f}x") for w, p, f, u in self.speed],
            numbers=(1, 2, 3),
        )
        checks = report.table(
            ["relative L2 error against float64", "plain torch.nn", "fused"],
            [(name, f"{plain:.1e}", f"{fused:.1e}") for name, plain, fused in self.checks],
            numbers=(1, 2),
        )
        drawn = f"{len(samples)} words drawn at random from the {len(result.samples):,} held-out ones."
        settings = ", ".join(f"{name} {value}" for name, value in asdict(run.config).items())
        ratio = self.speed[0][2] / self.speed[0][1]
        counts = ", ".join(f"{len(run.corpus.words[s]):,} {name}" for s, name in SPLITS)
        return report.page(
            "Letters to phonemes: the seqfuse demo",
            report.paragraph(
                f"An {self.model_text}, fused with one call and trained for {run.step:,} steps of "
                f"{run.config.batch_size} words to pronounce words it has never seen."
            ),
            report.tiles(
                [
                    (f"{result.phoneme_error_rate:.1f}%", "phoneme error rate, held-out words"),
                    (f"{result.word_error_rate:.1f}%", "word error rate, held-out words"),
                    (f"{ratio:.2f}x", "training steps/s, fused over plain torch.nn"),
                    (f"{run.seconds:.0f} s", f"training on {report.device_name(self.device)}"),
                ]
            ),
            report.section("Loss", report.figure(chart)),
            report.section(
                "Attention",
                report.paragraph(f"Where the model looks in “{word}”, a held-out word, for each phoneme it writes."),
                report.figure(attention),
            ),
            report.section(
                "Speed",
                speed,
                report.paragraph(
                    "Measured in one run, plain and fused taking turns on the same batches; medians. Larger is faster.",
                    soft=True,
                ),
                report.table(["module", "op", "backend in training", "why"], self.backends),
            ),
            report.section(
                "Held-out words",
                report.paragraph(drawn),
                report.table(["word", "dictionary", "decoded", ""], [sample_row(s) for s in samples], raw=True),
            ),
            report.section(
                "Is it the same model?",
                report.paragraph(
                    "Before training: logits and every gradient of one batch, in float32. The rule is at most twice "
                    "plain PyTorch's own error plus a floor of 2e-6."
                ),
                report.details(f"logits and {len(self.checks) - 1} gradients", checks),
            ),
            report.section(
                "How it was made",
                report.table(["", ""], report.environment(self.device)),
                report.paragraph(f"Data: {self.source.text}; {counts}. Licence: {self.source.licence}.", soft=True),
                report.paragraph(f"Settings: {settings}.", soft=True),
            ),
        )


SPLITS = (("train", "for training"), ("valid", "for validation"), ("test", "held out for the test"))


def sample_row(s: g2p.Sample) -> tuple[str, ...]:
    verdict = '<span class="good">ok</span>' if s.errors == 0 else f'<span class="bad">{s.errors} wrong</span>'
    cells = (report.escape(text) for text in (s.word, " ".join(s.truth), " ".join(s.decoded)))
    word, truth, decoded = cells
    return word, f'<span class="mono">{truth}</span>', f'<span class="mono">{decoded}</span>', verdict
