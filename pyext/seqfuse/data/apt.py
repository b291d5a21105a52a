"""Sentences and their translations, made of Debian's descriptions of its packages (Translation-it and the like).

apt downloads the descriptions in both languages into a folder of its own, which needs no root and leaves the system's
lists alone. A description and its translation carry the MD5 of the English text, so an outdated translation joins
nothing. Paragraphs are paired where both sides have as many.

apt checks the archive's signature; what it brings depends on the release that this machine follows, so no SHA-256 can
be written down here: the one that was found is kept beside the file, and the cached file is held against it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqfuse.data.fetch import DataError, cache_dir, reason, run, write_atomically

# No hooks: some systems clean their own package cache after each update. "Languages" and hooks are lists, which must
# be emptied first.
_CONFIG = """
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::Languages;
Acquire::Languages {{ "en"; "{language}"; }};
Acquire::GzipIndexes "false";
Acquire::IndexTargets::deb::Packages::DefaultEnabled "false";
Dir::State::Lists "{lists}";
Dir::Cache "{cache}";
APT::Sandbox::User "";
"""


SHORTEST = 15  # words of a text that is worth a summary


@dataclass(frozen=True)
class AptTranslations:
    """Pairs of English and another language as a TSV: source, target, and the package they describe."""

    language: str  # it, fr, de ...
    size: int  # bytes of the TSV, about: releases differ
    licence: str = (
        "free by Debian's guidelines (its section main): a description and its translation stand under the licence of "
        "the package they describe"
    )

    @property
    def name(self) -> str:
        return f"debian-en-{self.language}"

    @property
    def source(self) -> str:
        return f"Debian's package descriptions in English and in {self.language!r}, through apt"

    @property
    def path(self) -> Path:
        return cache_dir() / "debian-translations" / f"en-{self.language}.tsv"

    @property
    def _sum(self) -> Path:
        return self.path.with_name(self.path.name + ".sha256")

    def sha256_in_cache(self) -> str:
        return self._sum.read_text().strip() if self._sum.is_file() else ""

    @property
    def needed(self) -> tuple[str, ...]:
        """The languages whose descriptions are fetched."""
        return ("en", self.language)

    def rows(self, english: list[Description], other: list[Description]) -> Iterator[tuple[str, str, str]]:
        return pair_paragraphs(english, other)

    def make(self, folder: Path) -> None:
        """Let apt fetch the descriptions, pair them, and write the TSV."""
        if shutil.which("apt-get") is None:
            raise DataError(f"{self.name} comes through apt-get, which is not here: give your own pairs with --data")
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            lists, cache = Path(scratch) / "lists", Path(scratch) / "cache"
            for path in (lists / "partial", cache / "archives" / "partial"):
                path.mkdir(parents=True)
            config = Path(scratch) / "apt.conf"
            config.write_text(_CONFIG.format(language=self.language, lists=lists, cache=cache))
            done = run(["apt-get", "update", "-q", "-c", str(config)])
            found = [sorted(lists.glob(f"*_i18n_Translation-{name}")) for name in self.needed]
            if not all(found):
                why = reason(done, "apt-get") if done.stderr.strip() else f"it brought no Translation-{self.language}"
                raise DataError(f"could not download {self.name} with apt-get ({why}); or give your own pairs: --data")
            rows = list(self.rows(*([d for path in paths for d in descriptions(path)] for paths in found)))
        data = "".join("\t".join(row) + "\n" for row in rows).encode()
        write_atomically(self._sum, hashlib.sha256(data).hexdigest().encode() + b"\n")
        write_atomically(self.path, data)


@dataclass(frozen=True)
class AptSummaries(AptTranslations):
    """The first paragraph of each package's English description, its title as the summary, and the package."""

    @property
    def name(self) -> str:
        return "debian-summaries"

    @property
    def source(self) -> str:
        return "Debian's package descriptions and their titles, through apt"

    @property
    def path(self) -> Path:
        return cache_dir() / "debian-summaries" / f"{self.language}.tsv"

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.language,)

    def rows(self, english: list[Description]) -> Iterator[tuple[str, str, str]]:
        """Each text once; those that are no longer than a title left out."""
        seen = set()
        for d in english:
            title, *texts = d.paragraphs
            text = next((text for text in texts if len(text.split()) >= SHORTEST), "")
            if text and text not in seen:
                seen.add(text)
                yield text, title, d.package


@dataclass(frozen=True)
class Description:
    package: str
    md5: str  # of the English text
    paragraphs: list[str]  # the first is the title; "" for one that is laid out by hand, a list or a table


def descriptions(path: Path) -> Iterator[Description]:
    """The entries of a Translation file."""
    for entry in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        head, _, body = entry.partition("\nDescription-md5: ")
        md5, _, text = body.partition("\n")
        _, _, text = text.partition(": ")
        lines = text.strip("\n").split("\n")
        if not head.startswith("Package: ") or not lines[0]:
            continue
        paragraphs: list[list[str]] = [[]]
        for line in lines[1:]:
            if line.strip() == ".":
                paragraphs.append([])
            else:
                paragraphs[-1].append(line)
        joined = ["" if any(line.startswith(("  ", " -", " *")) for line in p) else " ".join("".join(p).split())
                  for p in paragraphs if p]  # fmt: skip
        yield Description(head.removeprefix("Package: "), md5.strip(), [lines[0].strip(), *joined])


def pair_paragraphs(english: list[Description], other: list[Description]) -> Iterator[tuple[str, str, str]]:
    """(English, translation, package), each English paragraph once, untranslated ones left out."""
    originals = {d.md5: d.paragraphs for d in english}
    seen = set()
    for translated in other:
        original = originals.get(translated.md5, [])
        if len(original) != len(translated.paragraphs):
            continue
        for source, target in zip(original, translated.paragraphs, strict=True):
            if source and target and source != target and source not in seen:
                seen.add(source)
                yield source, target, translated.package
