"""Metrics against values worked out by hand, and sacrebleu's own."""

import math
import random

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


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-ORG", "E-PER", "I-ORG"]


def test_spans():
    assert metrics.spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-PER"]) == [
        ("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("PER", 5, 5),
    ]  # fmt: skip
    assert metrics.spans(["S-A", "B-A", "E-A", "I-A"]) == [("A", 0, 0), ("A", 1, 2), ("A", 3, 3)]
    assert metrics.spans([]) == metrics.spans(["O"]) == []


def test_span_scores_are_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    draw = random.Random(0)
    for tags in (TAGS[:5], TAGS):  # BIO, and what marks ends as well
        for _ in range(50):
            true, predicted = ([draw.choices(tags, k=n) for n in (1, 7, 30)] for _ in range(2))
            predicted[2][:20] = true[2][:20]
            found, by_type = metrics.span_scores(true, predicted)
            theirs = seqeval.precision_recall_fscore_support(true, predicted, average="micro", zero_division=0)
            assert found == pytest.approx(tuple(theirs))
            each = seqeval.classification_report(true, predicted, output_dict=True, zero_division=0)
            for kind, score in by_type.items():
                assert score == pytest.approx(tuple(each[kind].values()))


def test_class_scores():
    scores = metrics.class_scores(list("aabbc"), list("abbbd"))
    assert scores["a"] == pytest.approx((1, 1 / 2, 2 / 3, 2)) and scores["b"] == pytest.approx((2 / 3, 1, 4 / 5, 2))
    assert scores["c"] == (0, 0, 0, 1) and scores["d"] == (0, 0, 0, 0) and list(scores) == list("abcd")
    assert metrics.macro_f1(scores) == pytest.approx((2 / 3 + 4 / 5) / 4)
    with pytest.raises(ValueError, match="1 outputs and 2 references"):
        metrics.class_scores(["a", "b"], ["a"])


TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "the fox, quick and brown, jumped over a dog", "", "A", "a an the",
    "police killed the gunman", "the gunman killed police!", "x-ray of the U.S. in 1999", "Ünïcode cafe's é", "the",
]  # fmt: skip


def test_rouge_is_the_reference_implementations():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for output in TEXTS:
        for reference in TEXTS:
            theirs = {name: score.fmeasure for name, score in scorer.score(reference, output).items()}
            assert metrics.rouge(output, reference) == pytest.approx(theirs), (output, reference)
    assert metrics.mean_rouge(["a b", "c"], ["a b", "d"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_answer_scores():
    """What SQuAD's evaluation script gives for these, which was run on all pairs of TEXTS."""
    for output, answer, exact, f1 in [
        (TEXTS[1], TEXTS[0], 0, 5 / 7),
        (TEXTS[6], TEXTS[5], 0, 1),
        ("us xray", TEXTS[7], 0, 4 / 7),
        ("cafes", TEXTS[8], 0, 1 / 2),
        ("The Dog!", "dog", 1, 1),
        ("dog", "the", 0, 0),
    ]:
        assert metrics.answer_scores(output, [answer]) == pytest.approx((exact, f1)), (output, answer)
    assert metrics.answer_scores("the dog", ["cat", "dog"]) == (1, 1)
    assert metrics.answer_scores("", []) == (1, 1) and metrics.answer_scores("dog", []) == (0, 0)
    assert metrics.answer_scores("dog cat", ["cat", "dog dog"])[1] == pytest.approx(2 / 3)
