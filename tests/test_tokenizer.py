"""Each kind of tokenizer: trained, used, saved and loaded; and files that are none."""

import pytest

import seqfuse
from seqfuse import models
from seqfuse.models import CheckpointError
from seqfuse.tokenizer import KINDS, Tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "no cat, no dog", "on and on"] * 4
VOCAB = {"bpe": 300, "unigram": 60, "wordpiece": 60, "bytes": 260, "characters": 60, "words": 60}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_text_comes_back_and_is_the_same_after_a_file(kind, tmp_path):
    tokenizer = Tokenizer.train(TEXTS, kind, vocab=VOCAB[kind])
    assert tokenizer.vocab_size <= VOCAB[kind]
    assert [tokenizer.id_of(t) for t in ("<pad>", "<bos>", "<eos>", "<unk>")] == [0, 1, 2, 3]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    tokenizer.save(tmp_path / "tokenizer.json")
    for t in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = t.encode("the dog sat on a log")
        assert ids == tokenizer.encode("the dog sat on a log") and 3 not in ids
        assert t.decode([1, *ids, 2, 0]) == "the dog sat on a log"
        assert "<eos>" in t.decode([*ids, 2], specials=True)


def test_a_bigger_vocabulary_needs_fewer_tokens():
    small, large = (Tokenizer.train(TEXTS, "bpe", vocab=v) for v in (260, 300))
    assert len(large.encode(TEXTS[0])) < len(small.encode(TEXTS[0])) == len(TEXTS[0])


def test_what_it_never_saw(kind):
    tokenizer = Tokenizer.train(TEXTS, kind, vocab=VOCAB[kind])
    text = "zebra \u00fc\u4e16\n\U0001f600"
    if kind in ("bpe", "bytes"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    else:
        assert 3 in tokenizer.encode(text)


def test_a_template_puts_tokens_around_a_text(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, "bpe", vocab=VOCAB["bpe"])
    plain = tokenizer.encode("a b")
    assert tokenizer.with_template("$A <eos> <bos>") is tokenizer
    assert tokenizer.encode("a b") == [*plain, 2, 1] and tokenizer.encode("a b", specials=False) == plain
    assert tokenizer.encode_batch(["a b"], specials=False) == [plain]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("a b") == [*plain, 2, 1]
    with pytest.raises(ValueError, match="has '<cls>', which is none of the tokens"):
        tokenizer.with_template("<cls> $A")


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters", "words"])
def test_training_is_repeatable(kind):
    first, second = (Tokenizer.train(TEXTS, kind, vocab=VOCAB[kind]) for _ in range(2))
    assert first.inner.to_str() == second.inner.to_str()


def test_options_of_training(kind):
    tokenizer = Tokenizer.train(TEXTS, kind, vocab=VOCAB[kind], lowercase=True, add_eos=True)
    assert tokenizer.encode("THE cat") == tokenizer.encode("the CAT")
    assert tokenizer.encode("the cat")[-1] == 2 and tokenizer.encode("") == [2]


def test_batches_are_padded_on_the_right():
    tokenizer = Tokenizer.train(TEXTS, "words", vocab=60)
    ids, lengths = tokenizer.batch(["the cat", "a", "no dog on the mat"])
    assert lengths.tolist() == [2, 1, 5] and ids.shape == (3, 5) and (ids[1, 1:] == 0).all()
    assert tokenizer.decode_batch(ids) == ["the cat", "a", "no dog on the mat"]


def test_a_list_of_tokens_keeps_its_ids():
    tokens = ["<pad>", "<unk>", "</s>", "b", "a"]
    letters = Tokenizer.of(tokens, "characters", specials=tokens[:3], add_eos=True)
    assert letters.encode("ab?") == [4, 3, 1, 2] and letters.decode([4, 3, 2]) == "ab"
    words = Tokenizer.of(["<s>", "AA1", "B"], "words", specials=["<s>"])
    assert words.decode([0, 2, 1]) == "B AA1" and words.token_of(1) == "AA1"
    with pytest.raises(ValueError, match="stands twice"):
        Tokenizer.of(["a", "a"], "words")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(kind="syllables"), "kind must be one of bpe, unigram"),
        (dict(kind="bpe", vocab=100), "at least 260 for 'bpe', got 100"),
        (dict(kind="words", specials=["<pad>"]), "needs <unk> among the specials"),
        (dict(kind="bytes", specials=[], vocab=256, add_eos=True), "add_eos needs <eos>"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer.train(TEXTS, **arguments)
    with pytest.raises(TypeError, match="put it into a list"):
        Tokenizer.train("the cat")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0", "model": {"type": "Magic"}}', "\x00\x01"])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer.json: is damaged"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="none.json: cannot be read"):
        Tokenizer.load(tmp_path / "none.json")


def test_it_lives_in_the_models_folder(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, "bytes", vocab=260)
    config = models.RNNLanguageModelConfig(embed=8, hidden=8, **tokenizer.config())
    model = models.RNNLanguageModel(config)
    model.tokenizer = tokenizer
    model.save(tmp_path)
    loaded = models.load(tmp_path)
    text = seqfuse.generate(loaded, "the c", max_new_tokens=8)
    assert text.startswith("the c") and text == seqfuse.generate(model, "the c", max_new_tokens=8)
    small = models.RNNLanguageModel(models.RNNLanguageModelConfig(vocab=100, embed=8, hidden=8))
    small.save(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer.json: it has 260 tokens, but .* 100"):
        models.load(tmp_path)


def test_a_stream_of_bytes_gives_whole_characters():
    tokenizer = Tokenizer.train(TEXTS, "bytes", vocab=260)
    from seqfuse.generate import Writer

    writer, pieces = Writer(tokenizer, tokenizer.encode("x"), []), []
    for token in tokenizer.encode("\u00fc\u4e16a\U0001f600"):
        writer.push([token])
        pieces.append(writer.take())
    assert pieces == ["", "\u00fc", "", "", "\u4e16", "a", "", "", "", "\U0001f600"]
