"""What a run leaves for people to read: results.json, report.html, curves, and a page that compares several runs."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from seqfuse import files, models, report
from seqfuse.checkpoints import RunFolder, TrainError, load_weights, writing
from seqfuse.models.files import read_json, write_json
from seqfuse.recipes.base import Findings, Task
from seqfuse.runlog import read_log

POINTS = 300  # of a curve; more are averaged


def show(value: float | str) -> str:
    """A metric, for tables and the terminal."""
    return value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


# ----------------------------------------------------------------------------------------------------- a finished run


def finish(task: Task, folder: RunFolder, progress) -> Findings:
    """Let the task report on the finished model in the folder; write results.json and report.html."""
    model = models.load(folder.path, device=task.device)
    findings = findings_of(task, model)
    results = {
        "recipe": task.config.recipe,
        "metrics": findings.metrics,
        "steps": progress.step,
        "objective": task.objective,
        "best": progress.best,
        "best_step": progress.best_step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / max(1e-9, progress.seconds), 1),
        "unit": task.unit,
        "parameters": model.num_parameters(),
    }
    path = folder.path / "report.html"
    with writing(path):
        html = page(task, read_log(folder.path / "log.jsonl"), findings, results)
        files.save_atomically(path, lambda part: part.write_text(html, encoding="utf-8"))
        write_json(folder.path / "results.json", results)
    return findings


def findings_of(task: Task, model: models.Model) -> Findings:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(task.config.seed)
        return task.report(model.eval())


def page(task: Task, log: list[dict], findings: Findings, results: dict) -> str:
    config = task.config
    numbers = [(show(v), name) for name, v in findings.metrics.items() if not isinstance(v, str)][:4]
    speed = f"{results['tokens_per_second']:,.0f}"
    best = f"the best evaluation was at step {results['best_step']:,}" if results["best"] is not None else ""
    return report.page(
        f"{config.recipe}: report of a run",
        report.paragraph(
            f"A {type(task.model).__name__} of {results['parameters']:,} parameters, trained for {results['steps']:,} "
            f"steps of {config.batch_size} examples; {best or 'it was never evaluated'}."
        ),
        report.tiles([*numbers, (speed, f"{task.unit}/s in training"), (f"{results['seconds']:,.0f} s", "training")]),
        report.section("Curves", *(report.figure(svg) for svg in curves({config.recipe: log}))),
        *findings.sections,
        report.section("Results", report.table(["", ""], [(k, show(v)) for k, v in findings.metrics.items()], (1,))),
        report.section(
            "How it was made",
            report.table(["", ""], report.environment(task.device)),
            report.details("all settings", report.table(["", ""], flat(config.to_dict()))),
            report.paragraph(f"SHA-256 of the data: {task.fingerprint}", soft=True),
        ),
    )


def flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows: ("optim.lr", "0.001")."""
    rows = []
    for name, value in values.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, str(value))]
    return rows


# -------------------------------------------------------------------------------------------------------------- curves


UNDRAWN = {"step", "bounded_reward"}  # the latter orders weights; reward and kl, of which it is made, are drawn


def curves(logs: dict[str, list[dict]]) -> list[str]:
    """Charts (SVG) of one run or several, by name: losses and every other number of the evaluations, and the speed."""
    several = len(logs) > 1
    series: dict[str, list[report.Series]] = {"loss": []}
    for number, (run, log) in enumerate(logs.items()):
        prefix, color = (f"{run} ", number) if several else ("", None)
        trained = [r for r in log if "evaluation" not in r]
        series["loss"].append(line(f"{prefix}training", trained, "loss", color))
        evaluations = [r["evaluation"] | {"step": r["step"]} for r in log if "evaluation" in r]
        for name in dict.fromkeys(name for e in evaluations for name in e if name not in UNDRAWN):
            points = [e for e in evaluations if name in e]
            steps, values = [e["step"] for e in points], [e[name] for e in points]
            one = report.Series(f"{prefix}held-out", steps, values, marks=True, color=color)
            series.setdefault(name, []).append(one)
    for name, key in (("tokens per second", "tokens_per_second"), ("learning rate", "lr")):
        series[name] = [line(run, [r for r in log if key in r], key) for run, log in logs.items()]
    zero = ("tokens per second", "learning rate")
    return [report.line_chart(lines, "step", name, f"{name} by step", name in zero) for name, lines in series.items()]


def line(name: str, records: Sequence[dict], key: str, color: int | None = None) -> report.Series:
    size = -(-len(records) // POINTS) or 1
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    means = [fmean(r[key] for r in g) for g in groups]
    return report.Series(name, [g[-1]["step"] for g in groups], means, color=color)


# ------------------------------------------------------------------------------------------------------- several runs


@dataclasses.dataclass(frozen=True)
class PastRun:
    """A run's folder, as far as it has come. results: {} if it isn't finished."""

    name: str
    config: dict
    log: list[dict]
    results: dict

    @classmethod
    def open(cls, path: Path) -> PastRun:
        folder = RunFolder(path)
        config = folder.settings()["config"]
        log = read_log(path / "log.jsonl")
        if not log:
            raise TrainError(f"{path / 'log.jsonl'}: holds nothing yet")
        return cls(path.name or str(path), config, log, read_json(path / "results.json") if folder.finished else {})


def comparison(runs: Sequence[PastRun]) -> str:
    """A page about several runs: results side by side, curves in one picture, the settings in which they differ."""
    found = [r.results.get("metrics", {}) for r in runs]
    words = list(dict.fromkeys(name for each in found for name, value in each.items() if isinstance(value, str)))
    metrics = [name for name in dict.fromkeys(name for each in found for name in each) if name not in words]
    facts = ["steps", "best", "best_step", "tokens_per_second", "seconds", "parameters"]
    rows = [
        (r.name, str(r.config.get("recipe")), *(show(each.get(m, "")) for m in metrics),
         *(show(r.results.get(f) if r.results.get(f) is not None else "") for f in facts))
        for r, each in zip(runs, found, strict=True)
    ]  # fmt: skip
    settings = [dict(flat(r.config)) for r in runs]
    names = list(dict.fromkeys(name for s in settings for name in s))
    differing = [n for n in names if len({s.get(n, "") for s in settings}) > 1]
    return report.page(
        "Comparison of runs",
        report.section(
            "Results",
            report.table(["run", "recipe", *metrics, *facts], rows, range(2, 2 + len(metrics) + len(facts))),
            *([side_by_side(runs, [(n, *(str(each.get(n, "")) for each in found)) for n in words])] if words else []),
        ),
        *([report.section("By setting", *map(report.figure, charts))] if (charts := by_setting(runs)) else []),
        report.section("Curves", *(report.figure(svg) for svg in curves(logs_of(runs)))),
        report.section(
            "Settings that differ",
            side_by_side(runs, [(n, *(s.get(n, "") for s in settings)) for n in differing])
            if differing
            else report.paragraph("None: only the data can make a difference."),
        ),
    )


def side_by_side(runs: Sequence[PastRun], rows: Sequence[Sequence[str]]) -> str:
    """A table with a column for each run."""
    return report.table(["", *(run.name for run in runs)], rows)


def by_setting(runs: Sequence[PastRun]) -> list[str]:
    """Charts of the runs' first metric against each number in which they differ, such as that of labelled examples: a
    line for those that agree in all else, if there are several."""
    done = [r for r in runs if isinstance(next(iter(r.results.get("metrics", {}).values()), None), float)]
    settings = [dict(flat(r.config)) for r in done]
    differing = [n for n in dict.fromkeys(n for s in settings for n in s) if len({s.get(n) for s in settings}) > 1]
    charts = []
    for name in differing:
        lines: dict[tuple, list[tuple[float, float]]] = {}
        for run, values in zip(done, settings, strict=True):
            x, y = number(values.get(name, "")), next(iter(run.results["metrics"].values()))
            if x is not None:
                others = tuple((n, values.get(n)) for n in differing if n != name)
                lines.setdefault(others, []).append((x, y))
        series = []
        for others, points in lines.items():
            words = [f"{n} {v}" for n, v in others if v in ("True", "False")] or [f"{n} {v}" for n, v in others]
            x, y = zip(*sorted(points), strict=True)
            series += [report.Series(", ".join(words) or name, x, y, marks=True)] if len({*x}) > 1 else []
        if series:
            metric = next(iter(done[0].results["metrics"]))
            charts.append(report.line_chart(series, name, metric, f"{metric} by {name}", from_zero=False))
    return charts


def number(setting: str) -> float | None:
    try:
        return float(setting)
    except ValueError:
        return None


def logs_of(runs: Sequence[PastRun]) -> dict[str, list[dict]]:
    return {run.name: run.log for run in runs}


def open_runs(paths: Sequence[Path]) -> list[PastRun]:
    """Runs by the names of their folders, or by their paths where two folders have one name."""
    runs, names = list(map(PastRun.open, paths)), Counter(path.name for path in paths)
    return [dataclasses.replace(r, name=str(p)) if names[p.name] > 1 else r for r, p in zip(runs, paths, strict=True)]


def plot(runs: Sequence[PastRun], path: Path) -> None:
    """Curves as .svg (the loss), .html (everything; of several runs the comparison) or .png (matplotlib's)."""
    if path.suffix == ".svg":
        text = report.standalone(curves(logs_of(runs))[0])
    elif path.suffix == ".html" and len(runs) > 1:
        text = comparison(runs)
    elif path.suffix == ".html":
        text = report.page(runs[0].name, *(report.figure(svg) for svg in curves(logs_of(runs))))
    elif path.suffix == ".png":
        return _png(runs, path)
    else:
        raise TrainError(f"{path}: a plot is written as .svg, .html or .png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _png(runs: Sequence[PastRun], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise TrainError(f"{path}: PNG needs matplotlib (pip install matplotlib); .svg and .html need nothing")
    figure = matplotlib_figure(runs)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save_atomically(path, lambda part: figure.savefig(part, format="png", dpi=150))


def matplotlib_figure(runs: Sequence[PastRun]):
    """The losses of runs; training and evaluation of a run in one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, log) in enumerate(logs_of(runs).items()):
        trained = line(name, [r for r in log if "evaluation" not in r], "loss")
        axes.plot(trained.x, trained.y, color=f"C{i}", label=f"{name} training")
        held = [(r["step"], r["evaluation"]["loss"]) for r in log if "loss" in r.get("evaluation", {})]
        if held:
            axes.plot(*zip(*held, strict=True), "o--", color=f"C{i}", label=f"{name} held-out")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return figure


def evaluate(task: Task, folder: RunFolder) -> tuple[Findings, Path]:
    """What `seqfuse eval` shows: the finished model's findings, or of a run under way those of its best checkpoint."""
    path = folder.path
    if not (path / "model.safetensors").is_file():
        found = [*folder.newest("best"), *folder.newest()]
        found = [path for path in found if (path / "model.safetensors").is_file()]  # one in shares has none
        if not found:
            raise TrainError(f"{path}: the run has no checkpoint yet that holds a whole model")
        path = found[0]
        if path in folder.newest():  # the model as it is trained, perhaps with adapters
            load_weights(path, task.model)
            return findings_of(task, task.model), path
    return findings_of(task, models.load(path, device=task.device)), path


def write_evaluation(task: Task, folder: RunFolder, findings: Findings, model: Path) -> Path:
    """evaluation.html in the run's folder: what the terminal shows, and the pictures."""
    path = folder.path / "evaluation.html"
    html = report.page(
        f"{task.config.recipe}: evaluation",
        report.paragraph(f"Of the model in {model}, on held-out data."),
        report.section("Results", report.table(["", ""], [(k, show(v)) for k, v in findings.metrics.items()], (1,))),
        *findings.sections,
        report.section("How it was made", report.table(["", ""], report.environment(task.device))),
    )
    with writing(path):
        files.save_atomically(path, lambda part: part.write_text(html, encoding="utf-8"))
    return path
