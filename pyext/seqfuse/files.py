"""Files that are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under a temporary name, then rename it: readers see the old file or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may write one file
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the name without the contents
        umask = os.umask(0)  # there is no way to read it without setting it
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors makes its files private
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
