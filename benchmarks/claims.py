"""`make claims`: train what the recipes claim, hold it against the bars, and write docs/claims.md with plots.

    python -m seqfuse.benchmarks.claims [--only bottleneck | --finished] [--runs build/claims] [--docs docs] [--jobs 2]

Each claim is some runs of `seqfuse train` and a judgement of their results. Runs are trained side by side, as many
as there are cores but at most four; what they print goes to RUN.txt in the folder of the runs. A run that is finished
is not repeated, one that was stopped goes on, so the command may be given again; delete a folder to train it anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from seqfuse import report, run_report
from seqfuse.benchmarks.runs import RUNS, Run, command_of, train_all
from seqfuse.info import build_info
from seqfuse.recipes import RECIPES
from seqfuse.recipes.bottleneck import curves
from seqfuse.runlog import read_log

SETTLED = 20  # steps of each of two models that are timed in turn


@dataclass(frozen=True)
class Finding:
    """claim: in words. bar: what was promised. found: what came out. holds: whether that is enough."""

    claim: str
    bar: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """runs: what has to be trained. judge: from the folders of the runs, by name. chart: SVG, from the same."""

    name: str
    runs: tuple[Run, ...]
    judge: Callable[[dict[str, Path]], list[Finding]]
    chart: Callable[[dict[str, Path]], str]


def result(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def metric(folder: Path, name: str) -> float:
    return result(folder)["metrics"][name]


def losses(folders: dict[str, Path]) -> str:
    return run_report.curves({name: read_log(folder / "log.jsonl") for name, folder in folders.items()})[0]


# ---------------------------------------------------------------------------------------------------------- judgements


def pronounces(folders: dict[str, Path]) -> list[Finding]:
    phonemes, words = (metric(folders["g2p"], f"{unit}_error_rate") for unit in ("phoneme", "word"))
    found = f"{phonemes:.1f}% of phonemes, {words:.1f}% of words"
    return [Finding("words it has never seen are pronounced", "phoneme error below 30%", found, phonemes < 30)]


def gates(folders: dict[str, Path]) -> list[Finding]:
    rnn, *gated = (metric(folders[f"charlm-{cell}"], "loss") for cell in ("rnn", "lstm", "gru"))
    found = f"rnn {rnn:.3f}, lstm {gated[0]:.3f}, gru {gated[1]:.3f} nats per character"
    return [
        Finding("gated cells beat the plain RNN, one width and as many steps", "below the RNN", found, max(gated) < rnn)
    ]


def weight_drop(folders: dict[str, Path]) -> list[Finding]:
    plain, dropped = (metric(folders[name], "perplexity") for name in ("awd_lstm-plain", "awd_lstm"))
    cost = weight_drop_cost()
    return [
        Finding(
            "weight-drop improves the held-out loss",
            "below the same model without it",
            f"perplexity {dropped:.1f} with, {plain:.1f} without",
            dropped < plain,
        ),
        Finding(
            "and costs little",
            "at most 1.1 times a step without it",
            f"{cost:.2f} times the processor time, medians of {SETTLED} steps in turn on one thread",
            cost <= 1.1,
        ),
    ]


def weight_drop_cost() -> float:
    """Processor time of a training step with weight-drop over one without, taken in turn: other jobs don't count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tasks = [RECIPES["awd_lstm"].configure(change) for change in ({}, {"model.weight_drop": 0.0})]
    tasks = [RECIPES["awd_lstm"].task(config) for config in tasks]
    seconds: list[list[float]] = [[], []]
    for step in range(2 + SETTLED):
        for task, times in zip(tasks, seconds, strict=True):
            start = time.process_time()
            loss, tokens = task.loss(task.model, *task.batch(task.order(0)[step % task.pieces]))
            (loss / tokens).backward()
            times.append(time.process_time() - start)
            task.model.zero_grad(set_to_none=True)
    torch.set_num_threads(before)
    with_drop, without = (statistics.median(times[2:]) for times in seconds)
    return with_drop / without


def attention_helps(folders: dict[str, Path]) -> list[Finding]:
    attention, fixed = (
        metric(folders[name], "accuracy_at_20") for name in ("bottleneck-attention", "bottleneck-fixed")
    )
    return [
        Finding("attention reads 20 letters backwards", "at least 0.99 right", f"{attention:.3f}", attention >= 0.99),
        Finding("the same model without attention can't", "at most 0.5 right", f"{fixed:.3f}", fixed <= 0.5),
    ]


def accuracies(folders: dict[str, Path]) -> str:
    lines = {}
    for name, folder in folders.items():
        values = result(folder)["metrics"]
        found = {int(k.rpartition("_")[2]): v for k, v in values.items() if k.startswith("accuracy_at_")}
        lines[name.partition("-")[2]] = found
    return curves(lines)


def pretrains(folders: dict[str, Path]) -> list[Finding]:
    loss = metric(folders["gpt"], "loss")
    return [
        Finding("a GPT learns a million characters", "held-out loss at most 1.90", f"{loss:.3f} nats per character",
                loss <= 1.90)
    ]  # fmt: skip


def guesses(folders: dict[str, Path]) -> list[Finding]:
    """Against a guess from frequencies alone: the cross entropy of the held-out tokens under those of training."""
    task = RECIPES["bert_mlm"].task(RECIPES["bert_mlm"].configure())
    counts, held = Counter(task.train_ids.tolist()), task.held_ids.tolist()
    total = len(task.train_ids) + task.text_tokenizer.vocab_size
    unigram = -sum(math.log((counts[token] + 1) / total) for token in held) / len(held)
    loss = metric(folders["bert_mlm"], "loss")
    evaluations = [r["evaluation"]["loss"] for r in read_log(folders["bert_mlm"] / "log.jsonl") if "evaluation" in r]
    accuracy = metric(folders["bert_mlm"], "accuracy")
    return [
        Finding(
            "a masked language model learns from context",
            f"falling, and below the {unigram:.2f} of token frequencies alone",
            f"{evaluations[0]:.2f} at the first evaluation, {loss:.2f} in the end, {accuracy:.1f}% right",
            loss < min(evaluations[0], unigram),
        )
    ]


def bleu_of(folder: Path) -> float:
    value = metric(folder, "BLEU")
    if isinstance(value, str):  # it says why there is none
        sys.exit(f"claims need sacrebleu: {folder}: BLEU {value}; then delete that folder's results.json")
    return value


def translates(folders: dict[str, Path]) -> list[Finding]:
    found = []
    for arch in ("transformer", "rnn"):
        value = bleu_of(folders[f"overfit-{arch}"])
        found.append(Finding(f"{arch}: learns a tiny set by heart", "BLEU at least 95", f"{value:.1f}", value >= 95))
    values = result(folders["translate"])["metrics"]
    bleu, chrf, pairs = bleu_of(folders["translate"]), values["chrF"], values["pairs"]
    text = f"BLEU {bleu:.1f}, chrF {chrf:.1f} on {pairs} held-out pairs ({values['BLEU signature']})"
    found.append(Finding("English to Italian, trained this shortly", "no bar", text, True))
    return found


def aligns(folders: dict[str, Path]) -> list[Finding]:
    found = []
    for name, folder in folders.items():
        values = result(folder)["metrics"]
        text = (
            f"{values['reward_before']:.2f} before, {values['reward']:.2f} after, KL {values['kl']:.1f} nats, "
            f"distinct-2 {values['distinct_2_before']:.2f} and {values['distinct_2']:.2f}"
        )
        holds = values["reward"] >= 2 * values["reward_before"] > 0 and values["within_bound"] == "yes"
        bar = f"twice the fine-tuned model's reward at a KL of at most {values['kl_bound']:g}"
        found.append(Finding(f"{name.partition('-')[2]} learns what people prefer", bar, text, holds))
    return found


def rewards(folders: dict[str, Path]) -> str:
    lines = []
    for name, folder in folders.items():
        values = [record for record in read_log(folder / "log.jsonl") if "evaluation" in record]
        before = metric(folder, "reward_before")
        points = [(0, before), *((record["step"], record["evaluation"]["reward"]) for record in values)]
        lines.append(report.Series(name.partition("-")[2], *zip(*points, strict=True), marks=True))
    return report.line_chart(lines, "step", "reward of answers to held-out prompts", "reward by step")


def controls(folders: dict[str, Path]) -> list[Finding]:
    values = result(folders["class_to_text"])["metrics"]
    accuracy, majority = values["class_accuracy"], values["majority_class"]
    found = f"{accuracy:.3f}; the more frequent class alone {majority:.3f}"
    bar = "the class of held-out texts by Bayes' rule better than the more frequent one"
    return [Finding("the class decides what is written", bar, found, accuracy > majority)]


def tags(folders: dict[str, Path]) -> list[Finding]:
    accuracy, f1 = metric(folders["pos"], "accuracy"), metric(folders["ner"], "f1")
    found = f"{100 * accuracy:.1f}% of the words of the Brown corpus's test texts"
    return [
        Finding("a BiLSTM tags parts of speech", "at least 94.5% right", found, accuracy >= 0.945),
        Finding("a BiLSTM finds the parts of addresses", "no bar", f"F1 of spans {100 * f1:.1f}%", True),
    ]


LABELLED = (100, 500)


def transfers(folders: dict[str, Path]) -> list[Finding]:
    found = []
    for n in LABELLED:
        pretrained, scratch = (100 * metric(folders[f"{name}-{n}"], "accuracy") for name in ("minilm", "scratch"))
        bar = "10 points above the same architecture from scratch" if n == 500 else "no bar"
        text = f"{pretrained:.1f}% pretrained, {scratch:.1f}% from scratch"
        found.append(Finding(f"MiniLM learns from {n} labels", bar, text, n != 500 or pretrained - scratch >= 10))
    return found


def efficiency(folders: dict[str, Path]) -> str:
    return run_report.by_setting([run_report.PastRun.open(folder) for folder in folders.values()])[0]


SEEDS = range(3)


def language_model_helps(folders: dict[str, Path]) -> list[Finding]:
    ulmfit, scratch = (
        statistics.fmean(100 * metric(folders[f"{name}-{seed}"], "accuracy") for seed in SEEDS)
        for name in ("ulmfit", "ulmfit-scratch")
    )
    text = f"{ulmfit:.1f}% from the language model, {scratch:.1f}% from scratch, means of {len(SEEDS)} seeds"
    return [Finding("ULMFiT learns from 100 labels", "above the same model from scratch", text, ulmfit > scratch)]


def answers(folders: dict[str, Path]) -> list[Finding]:
    found = []
    for name, folder in folders.items():
        recipe, _, arch = name.partition("-")
        measure = "rougeL" if recipe == "summarize" else "exact_match"
        values = result(folder)["metrics"]
        value, tested = values[measure], values.get("tested", 50)
        claim = f"{recipe} with a {arch}: learns {tested} pairs by heart"
        found.append(Finding(claim, f"{measure} at least 95", f"{value:.1f}", value >= 95))
    return found


CLAIMS = (
    Claim("g2p", (Run("g2p", "g2p"),), pronounces, losses),
    Claim("charlm", tuple(Run(f"charlm-{c}", "charlm", {"cell": c}) for c in ("rnn", "lstm", "gru")), gates, losses),
    Claim(
        "awd_lstm",
        (Run("awd_lstm", "awd_lstm"), Run("awd_lstm-plain", "awd_lstm", {"model.weight_drop": 0})),
        weight_drop,
        losses,
    ),
    Claim(
        "bottleneck",
        (Run("bottleneck-attention", "bottleneck"), Run("bottleneck-fixed", "bottleneck", {"attention": None})),
        attention_helps,
        accuracies,
    ),
    Claim("gpt", (Run("gpt", "gpt"),), pretrains, losses),
    Claim("bert_mlm", (Run("bert_mlm", "bert_mlm"),), guesses, losses),
    Claim(
        "translate",
        (
            Run("translate", "translate", {"max_steps": 500}),
            *(
                Run(
                    f"overfit-{arch}",
                    "translate",
                    {
                        "arch": arch,
                        "overfit": True,
                        "max_steps": 300,
                        "batch_size": 25,
                        "vocab": 600,
                        "beams": 1,
                        "evaluate_every": 100,
                        "label_smoothing": 0,
                        "optim.warmup": 30,
                    },
                    tiny=True,
                )  # fmt: skip
                for arch in ("transformer", "rnn")
            ),
        ),
        translates,
        losses,
    ),
    Claim("tags", (Run("pos", "pos"), Run("ner", "ner")), tags, losses),
    Claim(
        "sentiment",
        tuple(
            Run(f"{name}-{n}", "sentiment", {"labelled": n, "scratch": name == "scratch"})
            for n in LABELLED
            for name in ("minilm", "scratch")
        ),
        transfers,
        efficiency,
    ),
    Claim(
        "ulmfit",
        (
            Run("ulmfit-0", "ulmfit"),
            *(Run(f"ulmfit-{s}", "ulmfit", {"seed": s, "start": f"{RUNS}/ulmfit-0/target"}) for s in SEEDS[1:]),
            *(Run(f"ulmfit-scratch-{s}", "ulmfit", {"seed": s, "scratch": True}) for s in SEEDS),
        ),
        language_model_helps,
        losses,
    ),
    Claim(
        "answers",
        tuple(
            Run(f"{recipe}-{arch}", recipe, {"arch": arch, "overfit": True})
            for recipe in ("summarize", "qa")
            for arch in ("transformer", "decoder")
        ),
        answers,
        losses,
    ),
    Claim("class_to_text", (Run("class_to_text", "class_to_text"),), controls, losses),
    Claim(
        "align",
        (
            Run("align-grpo", "align"),
            Run("align-ppo", "align", {"stage": "ppo"}, after="align-grpo"),
            Run("align-dpo", "align", {"stage": "dpo"}, after="align-grpo"),
        ),
        aligns,
        rewards,
    ),
)


# ---------------------------------------------------------------------------------------------------------- the command


def minutes(folder: Path) -> float:
    """Of training, with its evaluations, all stages in the folder together."""
    logs = [read_log(path) for path in folder.rglob("log.jsonl")]
    return sum(max((record["seconds"] for record in log if "seconds" in record), default=0.0) for log in logs) / 60


def in_a_cell(text: str) -> str:
    """A signature of sacreBLEU has the bars that divide a table."""
    return text.replace("|", r"\|")


def page(done: list[tuple[Claim, dict[str, Path], list[Finding]]], took: str = "") -> str:
    info = build_info()
    lines = [
        "# Claims of the recipes",
        "",
        "Written by `make claims`. Each run is one command of `seqfuse train`, with seed 0 if it names no other; plots",
        "are of these runs.",
        "Minutes are the training's own, whatever else the machine did. How long a step takes is asked of weight-drop",
        "alone; for all else see [benchmarks.md](benchmarks.md)." + took,
        "",
        f"Machine: {info['cpu']}, {os.cpu_count()} logical cores; torch {info['torch']}, CPU kernels at {info['isa']}.",
        "",
        "| claim | bar | measured | holds |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {f.claim} | {f.bar} | {in_a_cell(f.found)} | {'yes' if f.holds else '**no**'} |"
        for _, _, found in done
        for f in found
    ]
    for claim, folders, _ in done:
        lines += ["", f"## {claim.name}", "", f"![{claim.name}](claims/{claim.name}.svg)", ""]
        lines += ["| run | finished | steps | parameters | minutes |", "| --- | --- | --- | --- | --- |"]
        for run in claim.runs:
            path = folders[run.name] / "results.json"
            values, when = result(folders[run.name]), datetime.fromtimestamp(path.stat().st_mtime, UTC)
            command = " ".join(command_of(run, Path("runs")))
            sizes = f"{values['steps']:,} | {values['parameters']:,} | {minutes(folders[run.name]):.1f}"
            lines.append(f"| `{command}` | {when:%Y-%m-%d} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=[claim.name for claim in CLAIMS], help="one claim, and no page is written")
    parser.add_argument("--finished", action="store_true", help="train nothing: the claims whose runs are all finished")
    parser.add_argument("--runs", type=Path, default=Path("build/claims"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs side by side")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    start = time.perf_counter()
    claims = [claim for claim in CLAIMS if options.only in (None, claim.name)]
    trained = {run.name: (options.runs / run.name / "results.json").is_file() for claim in claims for run in claim.runs}
    fresh = not any(trained.values())
    if options.finished:
        missing = [claim for claim in claims if not all(trained[run.name] for run in claim.runs)]
        for claim in missing:
            print(f"left out: {claim.name} is not trained yet")
        claims = [claim for claim in claims if claim not in missing]
    else:
        train_all([run for claim in claims for run in claim.runs], options.runs, options.jobs)
    done = []
    for claim in claims:
        folders = {run.name: options.runs / run.name for run in claim.runs}
        done.append((claim, folders, claim.judge(folders)))
    minutes_in_all = (time.perf_counter() - start) / 60
    print(f"{minutes_in_all:.1f} minutes in all")
    for _, _, found in done:
        for f in found:
            print(f"{'holds' if f.holds else 'FAILS'}: {f.claim}: {f.found} ({f.bar})")
    if options.only is None:
        took = f" All of it took {minutes_in_all:.0f} minutes, {options.jobs} runs side by side." if fresh else ""
        (options.docs / "claims").mkdir(parents=True, exist_ok=True)
        for claim, folders, _ in done:
            svg = report.standalone(claim.chart(folders))
            (options.docs / "claims" / f"{claim.name}.svg").write_text(svg, encoding="utf-8")
        (options.docs / "claims.md").write_text(page(done, took), encoding="utf-8")
    return 0 if all(f.holds for _, _, found in done for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
