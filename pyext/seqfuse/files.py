"""Files that are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under a temporary name, then rename it: readers see the old file or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        umask = os.umask(0)  # there is no way to read it without setting it
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors makes its files private
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
