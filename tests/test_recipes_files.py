"""The user's own files: each recipe refuses a malformed line with the file and its number."""

import re

import pytest

from seqfuse.data import DataError
from seqfuse.recipes import RECIPES

TEXTS = [(recipe, ".txt", b"fine\n\xff\n", 2, "not UTF-8 text") for recipe in ("charlm", "awd_lstm", "gpt", "bert_mlm")]
COLUMNS = {
    "g2p": ("word", "phonemes"),
    "translate": ("source", "target"),
    "sentiment": ("text", "label"),
    "ulmfit": ("text", "label"),
    "summarize": ("text", "summary"),
    "qa": ("question", "passage", "answer"),
    "class_to_text": ("label", "text"),
    "align": ("prompt", "chosen", "rejected"),
}


def rows():
    for recipe, names in COLUMNS.items():
        good = "\t".join(names) + "\n"
        keys = ", ".join(f'"{name}": "a"' for name in names)
        yield recipe, ".tsv", f"{good}\nalone\n".encode(), 3, f"expected {'<TAB>'.join(names)}, found no tab"
        yield recipe, ".tsv", f"{good}\ta\ta\n".encode(), 2, f"{names[0]} (column 1) is empty"
        yield recipe, ".tsv", good.encode() + b"a\t\xe9\tb\n", 2, "not UTF-8 text"
        yield recipe, ".jsonl", f"{{{keys}}}\n{{{keys}\n".encode(), 2, "no JSON"
        lacks = f'{{{keys}}}\n\n{{"{names[0]}": "a"}}\n'.encode()
        yield recipe, ".jsonl", lacks, 3, f"the key {names[1]!r} must be"
        yield recipe, ".jsonl", f"{{{keys}}}\n[1]\n".encode(), 2, "expected an object"


def tagged():
    for recipe in ("pos", "ner"):
        yield recipe, ".conll", b"EU B-ORG\nrejects\n", 2, "expected a word and its tag"
        yield recipe, ".conll", b"EU NNP B-ORG\n\nrejects O\n", 3, "2 columns, but the lines before have 3"
        yield recipe, ".conll", b"EU\tB-ORG\nrejects\t\n", 2, "the word or its tag is empty"
        yield recipe, ".conllu", b"1\tEU\t_\tB-ORG\nx\ty\t_\tO\n", 2, "expected the number of a word"
        yield recipe, ".conll", b"EU B-ORG\nr\xe9jette O\n", 2, "not UTF-8 text"
    for tag in (b"ORG", b"B-", b"U-ORG"):
        yield "ner", ".conll", b"EU B-ORG\nNATO " + tag + b"\n", 2, "expected O, or B-, I-, E- or S- and a type"


CASES = [*TEXTS, *rows(), *tagged()]
TESTED = list(dict.fromkeys(case[0] for case in CASES))


@pytest.mark.parametrize(("recipe", "suffix", "content", "line", "says"), CASES)
def test_a_malformed_line(recipe, suffix, content, line, says, tmp_path):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{path}, line {line}: ") + ".*" + re.escape(says)):
        RECIPES[recipe].task(configure(recipe, path))


def configure(recipe, path):
    """ulmfit: without fetching anything. align: the first stage."""
    own = {"ulmfit": {"text": "stdlib"}, "align": {"stage": "sft"}}.get(recipe, {})
    return RECIPES[recipe].configure(own | {"data": str(path)})


@pytest.mark.parametrize("recipe", TESTED)
def test_a_file_that_is_none(recipe, tmp_path):
    """Missing, a folder, empty, or too short to be split."""
    (tmp_path / "empty").write_text("\n \n")
    places = {"missing": "cannot read {}: No such file", ".": "cannot read {}: Is a", "empty": "{} is empty"}
    for name, says in places.items():
        with pytest.raises(DataError, match=says.format(re.escape(str(tmp_path / name)))):
            RECIPES[recipe].task(configure(recipe, tmp_path / name))
    short = tmp_path / "short"
    names = COLUMNS.get(recipe, ("word", "O"))
    short.write_text("\t".join(names) + "\n")
    with pytest.raises(DataError, match="too few|more lines are needed|are wanted"):
        RECIPES[recipe].task(configure(recipe, short))


def test_every_recipe_with_a_file_is_tested():
    assert set(TESTED) == RECIPES.keys() - {"bottleneck", "counting"}  # letters drawn at random; one of the tests' own
