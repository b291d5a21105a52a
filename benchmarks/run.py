"""`seqfuse bench`: which cases, which contenders, in which order; the rows that come out. cli.py holds the options."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seqfuse import dispatch, tuned
from seqfuse.benchmarks import contenders, gate, harness, records, registry, report, tune
from seqfuse.benchmarks.ceilings import Ceilings
from seqfuse.benchmarks.records import Row
from seqfuse.benchmarks.registry import Case, Problem

_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float": "fp32"}


@dataclass(frozen=True)
class Options:
    """Checked options. backends: what each case is asked to run on. seconds: time for one group of contenders."""

    device: str
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    quick: bool
    tune: bool
    compile: bool
    seconds: float
    json_file: Path | None

    @property
    def min_rounds(self) -> int:
        return 3 if self.quick else 5


def main(
    ops: Sequence[str] = (),
    backend: Sequence[str] = (),
    dtype: Sequence[str] = (),
    quick: bool = False,
    tune: bool = False,
    json_file: Path | None = None,
    *,
    device: str | None = None,
    case: str | None = None,
    mode: Sequence[str] = (),
    seconds: float | None = None,
    compile: bool | None = None,
) -> int:
    """Run the benchmarks, print tables, write the record. Empty or None means the usual.

    Returns the exit status: 0, or 1 if seqfuse gave a wrong result, or 130 after Ctrl-C (what was measured is kept).
    Raises ValueError with one sentence on bad arguments.
    """
    options = check(backend, dtype, quick, tune, json_file, device, mode, seconds, compile)
    cases = select(ops, case, options)
    runner = Runner(options)
    return runner.run(cases)


def check(backend, dtype, quick, tune, json_file, device, mode, seconds, compile) -> Options:
    """Options from what was given; ValueError if it makes no sense."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    for name in backend:
        if name not in dispatch.BACKENDS:
            raise ValueError(f"--backend: unknown backend {name!r}: use one of {', '.join(dispatch.BACKENDS)}")
    if tune and "auto" in backend:
        raise ValueError("--tune measures what auto shall choose from: leave out --backend auto")
    if tune:
        try:
            tuned.cache_dir().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--tune: its table can't be kept in {tuned.cache_dir()}: {error.strerror}") from None
    dtypes = []
    for name in dtype:
        short = _DTYPE_NAMES.get(name, name)
        if short not in registry.DTYPES:
            raise ValueError(f"--dtype: unknown dtype {name!r}: use one of {', '.join(registry.DTYPES)}")
        if short == "fp16" and device == "cpu":
            raise ValueError("--dtype fp16 is measured on a GPU only: no CPU kernel takes it")
        dtypes.append(short)
    for name in mode:
        if name not in registry.MODES:
            raise ValueError(f"--mode: unknown mode {name!r}: use one of {', '.join(registry.MODES)}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {seconds}")
    return Options(
        device,
        tuple(backend) or (() if tune else (dispatch.forced_backend(),)),
        tuple(dict.fromkeys(dtypes)),
        tuple(mode) or registry.MODES,
        quick,
        tune,
        not quick if compile is None else compile,
        seconds or (0.3 if quick else 2.0),
        None if json_file is None else records.target(json_file, device),
    )


def select(ops: Sequence[str], part: str | None, options: Options) -> list[Case]:
    """The cases to run. part: text that a case's name must contain; it also reaches cases outside the quick subset."""
    cases = [c for c in registry.find(ops) if options.device in c.devices]
    if part is not None:
        named = [c for c in cases if part in c.name]
        if not named:
            raise ValueError(f"--case: no case has {part!r} in its name; there are {', '.join(c.name for c in cases)}")
        return named
    return [c for c in cases if c.quick] if options.quick else cases


class Runner:
    """One run of the command: collects rows, prints and writes them as they come."""

    def __init__(self, options: Options):
        self.options = options
        self.ceilings = Ceilings(options.device, options.quick)
        self.rows: list[Row] = []
        self.head = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            **records.commit(),
            "machine": records.machine(options.device),
            "memory_is": harness.MEMORY[options.device],
            "quick": options.quick,
        }

    def run(self, cases: Sequence[Case]) -> int:
        report.heading(self.head)
        for reason in dict.fromkeys(case.missing() for case in cases):
            if reason is not None:
                report.say(reason)
        cases = [case for case in cases if case.missing() is None]
        try:
            for op in dict.fromkeys(c.op for c in cases):
                mine = [c for c in cases if c.op == op]
                for dtype in self.options.dtypes or mine[0].dtypes(self.options.device):
                    self._table(mine, dtype)
        except KeyboardInterrupt:
            report.say("interrupted: what was measured so far follows")
            self.head["interrupted"] = True
            return self._finish(130)
        return self._finish(1 if any(row.bad for row in self.rows) else 0)

    def _table(self, cases: Sequence[Case], dtype: str) -> None:
        """All cases of one op and dtype: measure, record, print."""
        first = len(self.rows)
        try:
            for i, case in enumerate(cases):
                with report.progress(f"{case.id} {dtype} ({i + 1} of {len(cases)})"):
                    self._case(case, dtype)
                self._write()
        finally:
            report.table(self.rows[first:])

    def _case(self, case: Case, dtype: str) -> None:
        size = registry.DTYPES[dtype].itemsize
        clock = harness.timer(self.options.device, case.bytes("fwd", size))
        problem = case.build(self.options.device, dtype, clock.sets, self.options.quick)
        truth = problem.truth()
        for mode in [m for m in self.options.modes if m in case.modes]:
            self.rows += self._group(problem, dtype, mode, truth, clock)

    def _group(self, problem: Problem, dtype: str, mode: str, truth, clock) -> list[Row]:
        """All contenders of one case, dtype and mode: each through the gate, then together in one alternating run."""
        case, names = problem.case, problem.result_names(mode)
        backends = self.options.backends or tune.candidates(case.op, self.options.device)
        everyone, why_not = case.line_up(problem, mode, backends, self.options.compile)
        refused = [
            Row(case.op, case.name, mode, dtype, name, "refused", name.split()[-1], message=reason)
            for name, reason in why_not.items()
        ]
        rows, right, yardstick = {}, [], (None, None)
        for contender in everyone:
            row = rows[contender.name] = Row(case.op, case.name, mode, dtype, contender.name, asked=contender.asked)
            try:
                results, choice, described = contenders.call_once(contender, case.op)
            except Exception as error:  # whatever a kernel or a compiler may raise: the other contenders still run
                first_line = (str(error).strip() or "no message").splitlines()[0]
                row.status, row.message = "failed", f"{type(error).__name__}: {first_line[:300]}"
                continue
            if choice is not None:
                row.backend, row.reason, row.shape_class = choice.backend, choice.reason, described.shape_class()
            verdict = gate.judge(results, truth[: len(names)], yardstick[0], names, case.worst)
            if contender.name == case.eager_name and verdict.wrong is None:
                yardstick = results, verdict.error
            row.error, row.error_at, row.error_torch = verdict.error, verdict.where, yardstick[1]
            if verdict.wrong:
                row.status, row.message = "wrong", verdict.wrong
            else:
                right.append(contender)
        if any(c.asked for c in right):  # else nobody needs the baselines' times
            self._time(case, dtype, mode, right, rows, clock)
        return [*rows.values(), *refused]

    def _time(self, case: Case, dtype: str, mode: str, right, rows: dict[str, Row], clock) -> None:
        """Fill in all that the rows say about speed."""
        memory = {c.name: harness.peak_memory(c, self.options.device) for c in right}
        timings = harness.alternate(right, clock, self.options.seconds, self.options.min_rounds)
        moved, work = case.bytes(mode, registry.DTYPES[dtype].itemsize), case.flops(mode)
        ceiling = self.ceilings.limit(case.bound, dtype, moved)
        baseline = timings.get(case.eager_name)
        for name, timing in timings.items():
            row, seconds = rows[name], timing.median
            row.median_ms, (row.p10_ms, row.p90_ms) = seconds * 1e3, (t * 1e3 for t in timing.spread())
            row.rounds, row.how = len(timing.samples), timing.how
            row.host_us = None if timing.host is None else timing.host * 1e6
            row.ratio = None if baseline is None else harness.ratio(baseline, timing)
            row.tokens_per_s = case.tokens_per_call / seconds or None
            row.tflops, row.gbs = work / seconds / 1e12, moved / seconds / 1e9
            row.percent_of_ceiling = 100 * (work if case.bound == "compute" else moved) / seconds / ceiling
            row.peak_memory = memory[name]

    def _write(self) -> None:
        if self.options.json_file is not None:
            records.write(self.options.json_file, {**self.head, "ceilings": self.ceilings.measured()}, self.rows)

    def _finish(self, status: int) -> int:
        """Everything that is said and kept at the end of a run."""
        report.summary(records.geomeans(self.rows), self.ceilings.measured())
        report.refusals(self.rows)
        if self.options.tune:
            winners = tune.winners(self.rows)
            where = [tuned.save(self.options.device, op, table) for op, table in winners.items()]
            report.winners(winners, where[-1] if where else None)
            self.head["tuned"] = winners
        self._write()
        if self.options.json_file is not None:
            report.say(f"record: {self.options.json_file}")
        if status == 0 and not any(row.status == "ok" for row in self.rows):
            report.say(
                "nothing could be timed" + ("; the reasons are above" if self.rows else ": no case is like that")
            )
            return 2
        return status
