"""The model of the PyPI package g2p-en against that package's own predict(), in numpy."""

import dataclasses
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

import seqfuse
from seqfuse import data, models
from seqfuse.interop import g2p_en
from seqfuse.models import CheckpointError

CODE = dataclasses.replace(
    g2p_en.CHECKPOINT,
    member="g2p_en/g2p.py",
    sha256="fc2548b855e102f774506a6afe4f4bc88424229b69701ab6040aa16710ddff3a",
)


@pytest.fixture(scope="module")
def model():
    try:
        return g2p_en.load()
    except data.DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(model):
    """The package's own object. It wants nltk's data for dictionary words, which predict() never looks at, so neither
    its constructor nor nltk is needed."""
    path = data.fetch(CODE)
    stubs = {
        name: types.ModuleType(name) for name in ("nltk", "nltk.corpus", "nltk.tokenize", "g2p_en", "g2p_en.expand")
    }
    stubs["nltk"].pos_tag = stubs["nltk.corpus"].cmudict = stubs["g2p_en.expand"].normalize_numbers = None
    stubs["nltk"].data = types.SimpleNamespace(find=lambda name: name)
    stubs["nltk.tokenize"].TweetTokenizer = lambda: types.SimpleNamespace(tokenize=None)
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        spec = importlib.util.spec_from_file_location("g2p_en.g2p", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
    found = object.__new__(module.G2p)
    found.g2idx = {letter: i for i, letter in enumerate(g2p_en.LETTERS)}
    found.idx2p = dict(enumerate(g2p_en.PHONEMES))
    found.load_variables()
    return found


def test_a_word_comes_out_as_the_package_says(model):
    assert seqfuse.generate(model, "translation", max_new_tokens=20) == "T R AE0 N S L EY1 SH AH0 N"


def test_the_letters_and_phonemes_are_the_packages(theirs):
    """Those of its constructor, which stand in its source."""
    source = data.fetch(CODE).read_text(encoding="utf-8")
    body = source[source.index("self.graphemes =") : source.index("self.g2idx")]
    them = types.SimpleNamespace()
    exec("\n".join(line.strip() for line in body.splitlines()), {"self": them})
    assert them.graphemes == g2p_en.LETTERS and them.phonemes == g2p_en.PHONEMES


def test_a_thousand_words_come_out_as_the_package_says(model, theirs):
    """Made of syllables, so that they come in all lengths and the test needs no list; with letters it doesn't know."""
    random = np.random.default_rng(0)
    syllables = "tra ns la tion qu ee ght ph ou str ing ed un re con ly er x z o' \u00e9 s".split()
    words = ["".join(random.choice(syllables, random.integers(1, 7))) for _ in range(1000)]
    ours = [
        text for i in range(0, 1000, 250) for text in seqfuse.generate(model, words[i : i + 250], max_new_tokens=20)
    ]
    expected = [theirs.predict(word) for word in words]
    # decode() leaves special tokens out
    assert ours == [" ".join(p for p in phonemes if not p.startswith("<")) for phonemes in expected]
    assert len(set(ours)) > 500


def test_it_saves_and_loads_with_both_tokenizers(model, tmp_path):
    model.save(tmp_path)
    loaded = models.load(tmp_path)
    assert seqfuse.generate(loaded, ["speech", "kernel"]) == seqfuse.generate(model, ["speech", "kernel"])
    model.tokenizer.save(tmp_path / "source_tokenizer.json")
    with pytest.raises(CheckpointError, match="source_tokenizer.json: it has 74 tokens, but .* 29 rows"):
        models.load(tmp_path)


def test_damaged_files_get_one_sentence(tmp_path):
    path = tmp_path / "checkpoint20.npz"
    for content in (b"", b"PK\x03\x04 not a zip", b"nothing of the kind"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="checkpoint20.npz: is damaged"):
            g2p_en.load(path)
    arrays = {name: np.zeros((4, 4), np.float32) for name in g2p_en.TENSORS}
    np.savez(path, **arrays)
    with pytest.raises(
        CheckpointError, match="'encoder.embedding.weight' has shape \\[4, 4\\], the config asks for \\[29, 4"
    ):
        g2p_en.load(path)
    del arrays["fc_b"]
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match="'fc_b' of a g2p-en checkpoint is missing"):
        g2p_en.load(path)
    np.savez(path, **arrays | {"fc_b": np.array([torch.zeros(1)], dtype=object)})
    with pytest.raises(CheckpointError, match="is damaged"):  # an object would have to be unpickled
        g2p_en.load(path)
