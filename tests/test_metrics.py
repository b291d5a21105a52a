"""Metrics against values worked out by hand, and sacrebleu's own."""

import math

import pytest

from seqfuse import metrics


def test_edit_distance():
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance((), tuple("abc")) == metrics.edit_distance(tuple("abc"), ()) == 3
    assert metrics.edit_distance(("TH", "AO1"), ("TH", "AO1", "T")) == 1


def test_error_rates_take_the_closest_reference():
    outputs = [("A",), ("B", "C"), ("R", "EH", "D")]
    references = [[("A",)], [("B", "D", "E")], [("R", "IY", "D"), ("R", "EH", "D")]]
    assert metrics.token_error_rate(outputs, references) == pytest.approx(100 * 2 / 7)
    assert metrics.sequence_error_rate(outputs, references) == pytest.approx(100 / 3)
    assert metrics.token_error_rate(["ab".split()], [["a b c d".split()]]) == 100
    with pytest.raises(ValueError, match="1 outputs and 2 references"):
        metrics.token_error_rate(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="hold no tokens"):
        metrics.token_error_rate(["a"], [[""]])


def test_perplexity_and_bits_per_byte():
    assert metrics.perplexity(math.log(50)) == pytest.approx(50) and metrics.perplexity(1e9) == math.inf
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    with pytest.raises(ValueError, match="text_bytes must be positive"):
        metrics.bits_per_byte(1.0, 0)


def test_bleu_and_chrf_are_sacrebleus_with_its_signature():
    sacrebleu = pytest.importorskip("sacrebleu")
    outputs = ["the cat sat on the mat", "a dog barked at the tall tree"]
    references = ["the cat sat on a mat", "a dog barked at the old tree today"]
    found = metrics.bleu(outputs, references)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score)
    assert 0 < found.value < 100 and "tok:13a" in found.signature and "version:" in found.signature
    found = metrics.chrf(outputs, references)
    assert found.value == pytest.approx(sacrebleu.corpus_chrf(outputs, [references]).score)
    assert metrics.bleu(outputs, outputs).value == pytest.approx(100)
    with pytest.raises(ValueError, match="0 outputs"):
        metrics.bleu([], [])


def test_bleu_by_length_of_the_source():
    pytest.importorskip("sacrebleu")
    outputs = ["one two three four five", "one two three four", "a b c d e"]
    rows = metrics.bleu_by_length(outputs, ["one two three four five", "one two three four", "v w x y z"], [3, 10, 25])
    assert [(name, count) for name, count, _ in rows] == [("1 to 10", 2), ("21 to 30", 1)]
    assert rows[0][2] == pytest.approx(100) and rows[1][2] < 20


def test_without_sacrebleu_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    assert not metrics.has_sacrebleu()
    with pytest.raises(ImportError, match=r"bleu needs sacrebleu: pip install seqfuse\[eval\]"):
        metrics.bleu(["a"], ["a"])
