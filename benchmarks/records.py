"""What was measured, where and when: rows, and the JSON file that holds them (benchmarks/records/README.md)."""

import datetime
import json
import os
import re
import statistics
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

FORMAT = 1


@dataclass
class Row:
    """One contender on one case. Everything about speed is None unless status is "ok".

    status: "ok", "wrong" (a red gate), "failed" (it raised) or "refused" (the backend can't run the case).
    asked, backend, reason: of seqfuse's contenders: what was asked for, what ran, why. message: why there is no speed.
    ratio: how many times faster than the eager baseline. error, error_torch: largest relative L2 error against float64.
    """

    op: str
    case: str
    mode: str
    dtype: str
    contender: str
    status: str = "ok"
    asked: str = ""
    backend: str = ""
    reason: str = ""
    message: str = ""
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    rounds: int = 0
    how: str = ""
    host_us: float | None = None
    ratio: float | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    percent_of_ceiling: float | None = None
    peak_memory: int | None = None
    error: float | None = None
    error_at: str = ""
    error_torch: float | None = None
    shape_class: str = ""

    @property
    def ours(self) -> bool:
        return self.contender.startswith("seqfuse")

    @property
    def bad(self) -> bool:
        """Whether seqfuse gave a wrong result or broke down."""
        return self.ours and self.status in ("wrong", "failed")


def geomeans(rows: list[Row]) -> list[dict]:
    """One entry per op, dtype, mode and contender: the geometric mean of the ratios to eager, and the worst."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.status == "ok" and row.ratio is not None:
            groups.setdefault((row.op, row.dtype, row.mode, row.contender), []).append(row)
    out = []
    for (op, dtype, mode, contender), members in groups.items():
        worst = min(members, key=lambda r: r.ratio)
        mean = statistics.geometric_mean(r.ratio for r in members)
        out.append(
            dict(op=op, dtype=dtype, mode=mode, contender=contender, cases=len(members), geomean=round(mean, 4),
                 worst=worst.ratio, worst_case=worst.case)
        )  # fmt: skip
    return out


def commit() -> dict:
    """The commit of the checkout that this file belongs to, and whether it has changes; nulls for an installed copy."""
    here = Path(__file__).resolve().parent

    def git(*args):
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "registry.py")  # an environment inside another project's checkout is not it
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def machine(device: str) -> dict:
    """build_info() without what belongs to the user's home, and the state that timings depend on."""
    import seqfuse

    info = seqfuse.build_info()
    info["tuned"] = "no table" not in info["tuned"]
    info["device"] = device
    info["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    info["cores"] = os.cpu_count()
    if device == "cuda":
        info["clocks"] = _clocks()
    return info


def _clocks() -> str | None:
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{query}: {done.stdout.strip()}" if done.returncode == 0 else None


def kind(machine: dict) -> str:
    """The kind of processor, by what decides its figures: the instruction set, "zen5" where MKL uses half of it, and
    "slow_dots" where instructions for bfloat16 are slower than none."""
    if machine.get("build_mkl_is_narrow"):
        return "zen5"
    return "slow_dots" if machine.get("build_bf16_dots_are_slow") else machine["isa"]


def file_name(device: str) -> str:
    """cpu-avx512_bf16-2threads-20260131.json, or nvidia-h100-80gb-hbm3-20260131.json."""
    if device == "cuda":
        where = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    else:
        where = f"cpu-{kind(machine(device))}-{torch.get_num_threads()}threads"
    return f"{where}-{datetime.date.today():%Y%m%d}.json"


def target(path: Path, device: str) -> Path:
    """The file to write: a folder stands for a file of the usual name in it. ValueError if it can't be written."""
    path = Path(path)
    if path.is_dir():
        path = path / file_name(device)
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"--json: the folder {folder} does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--json: {path} can't be written")
    return path


def write(path: Path, head: dict, rows: list[Row]) -> None:
    """Write the record, atomically, so that an interrupted run leaves what it had."""
    record = {"format": FORMAT, **head, "geomeans": geomeans(rows), "rows": [_compact(row) for row in rows]}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as f:
        json.dump(record, f, indent=1)
        f.write("\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def read(path: Path) -> dict:
    """A record. Raises ValueError with one sentence if the file is none."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no benchmark record: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is no benchmark record of format {FORMAT}")
    record["rows"] = [Row(**row) for row in record["rows"]]
    return record


def _compact(row: Row) -> dict:
    """Without the fields that say nothing, and numbers to as many digits as were measured."""
    out = {}
    for key, value in asdict(row).items():
        if value is None or value == "" or (key == "rounds" and value == 0):
            continue
        out[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    return out
