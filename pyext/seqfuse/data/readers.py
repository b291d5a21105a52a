"""The user's own files: text, TSV, JSONL and CoNLL, as UTF-8. Every complaint names the file and the line.

records = read_records("mine.tsv", ("source", "target"))
records.rows     [("ein Haus", "a house"), ...]
records.said     "mine.tsv: 1,204 lines; source: column 1, target: column 2 of 3"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from seqfuse.data.fetch import DataError, short


@dataclass(frozen=True)
class Records:
    """What was read. rows: the fields that were asked for; lines: where each row stands; said: what was read, for the
    user."""

    rows: list[tuple[str, ...]]
    lines: list[int]
    said: str


class Sentence(NamedTuple):
    """Words and their tags, as many of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_text(path: str | Path) -> str:
    """A file as it is, a byte-order mark left out. Raises DataError if it can't be read, is empty or is not UTF-8."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def read_records(path: str | Path, fields: Sequence[str], optional: Sequence[str] = ()) -> Records:
    """Rows of named fields. In a .jsonl file they are keys of the object on each line; in any other file the first
    columns, separated by tabs. Blank lines are ignored, and so is all that was not asked for.

    optional: fields that follow the others and may be missing, "" then. Raises DataError with file and line number.
    """
    path = Path(path)
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    read = _json_fields if jsonl else _columns
    rows, lines, widest = [], [], 0
    for number, line in _lines(read_text(path)):
        row, width = read(f"{path}, line {number}", line, fields, optional)
        rows.append(row)
        lines.append(number)
        widest = max(widest, width)
    every = [*fields, *optional]
    if jsonl:
        what = ", ".join(f"key {name!r}" for name in every)
    else:
        found = every[: max(len(fields), min(widest, len(every)))]
        what = ", ".join(f"{name}: column {i}" for i, name in enumerate(found, 1)) + f" of {widest}"
    return Records(rows, lines, f"{path.name}: {len(rows):,} lines; {what}")


def read_conll(path: str | Path, tag_column: int | None = None, spans: bool = False) -> list[Sentence]:
    """Sentences of a CoNLL file: a word a line, its columns separated by tabs or spaces, a blank line after each
    sentence. The word is the first column, its tag column `tag_column` (counted from 0; by default the last).

    In a .conllu file words have numbers: the word is the second column, the tag by default the fourth (UPOS), and lines
    about several words in one (3-4) or about none (3.1) are left out. -DOCSTART- and comments, lines before a sentence
    that start with "# ", are ignored. spans: tags must mark spans of words. Raises DataError with file and line number.
    """
    path = Path(path)
    numbered = path.suffix.lower() == ".conllu"
    tag_column = (3 if numbered else -1) if tag_column is None else tag_column
    sentences, words, tags, width = [], [], [], 0

    def end() -> None:
        if words:
            sentences.append(Sentence(tuple(words), tuple(tags)))
            words.clear(), tags.clear()

    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            end()
            continue
        comment = "#" if numbered else "# "  # "#" is a word like any other
        if line.startswith("-DOCSTART-") or (line.startswith(comment) and "\t" not in line and not words):
            continue
        columns = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        width = width or len(columns)
        if len(columns) < 2:
            raise DataError(f"{path}, line {number}: expected a word and its tag, found one column in {short(line)}")
        if len(columns) != width:
            raise DataError(f"{path}, line {number}: {len(columns)} columns, but the lines before have {width}")
        try:
            word, tag = columns[numbered].strip(), columns[tag_column].strip()
        except IndexError:
            raise DataError(f"{path}, line {number}: there is no column {tag_column}, only {width}") from None
        if not word or not tag:
            raise DataError(f"{path}, line {number}: the word or its tag is empty in {short(line)}")
        if numbered and not columns[0].isdigit():
            if columns[0].replace("-", "").replace(".", "").isdigit():
                continue
            raise DataError(f"{path}, line {number}: expected the number of a word, found {short(columns[0])}")
        if spans and not re.fullmatch(r"O|[BIES]-.+", tag):
            raise DataError(f"{path}, line {number}: expected O, or B-, I-, E- or S- and a type, found {short(tag)}")
        words.append(word)
        tags.append(tag)
    end()
    return sentences


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _columns(where: str, line: str, fields: Sequence[str], optional: Sequence[str]) -> tuple[tuple[str, ...], int]:
    columns = line.split("\t")
    if len(columns) < len(fields):
        wanted, tabs = "<TAB>".join(fields), "no tab" if len(columns) == 1 else f"{len(columns)} columns"
        raise DataError(f"{where}: expected {wanted}, found {tabs} in {short(line)}")
    row = [column.strip() for column in columns[: len(fields) + len(optional)]]
    for i, (name, value) in enumerate(zip(fields, row, strict=False), start=1):
        if not value:
            raise DataError(f"{where}: {name} (column {i}) is empty in {short(line)}")
    return (*row, *[""] * (len(fields) + len(optional) - len(row))), len(columns)


def _json_fields(where: str, line: str, fields: Sequence[str], optional: Sequence[str]) -> tuple[tuple[str, ...], int]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error} in {short(line)}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object with {', '.join(map(repr, fields))}, found {short(line)}")
    row = []
    for name in (*fields, *optional):
        value = values.get(name, "" if name in optional else None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # a label may be a number
        if not isinstance(value, str) or (name in fields and not value.strip()):
            raise DataError(f"{where}: the key {name!r} must be a text that is not empty, found {short(str(value))}")
        row.append(value.strip())
    if any(map(is_broken, row)):
        raise DataError(f"{where}: half of a character (a lone surrogate) in {short(line)}")
    return tuple(row), len(values)


def is_broken(text: str) -> bool:
    """Whether it can't be written: JSON may have half of an emoji, as a \\u code of its own."""
    return any("\ud800" <= character <= "\udfff" for character in text)
