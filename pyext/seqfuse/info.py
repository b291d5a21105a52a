"""build_info(): what this installation is and what this machine offers."""

import platform

import torch

from seqfuse import native, tuned
from seqfuse.ops import library


def build_info() -> dict:
    """Versions, compiled features, the CPU's instruction set, the GPU: all that a bug report or a record needs."""
    from seqfuse import __version__

    info = {
        "seqfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
        "extension": native.missing() or "compiled",
        "tuned": str(tuned.path()) if tuned.path().exists() else "no table (seqfuse bench --tune makes one)",
        **{f"build_{k}": v for k, v in native.build_facts().items()},
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        info["gpu"] = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory >> 30} GiB"
        info["cuda"] = torch.version.cuda
    else:
        info["gpu"] = "none"
    return info


def _triton_version() -> str:
    if library.triton_missing():
        return "not installed"
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
