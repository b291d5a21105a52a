"""generate and beam search against transformers' own generate, on tiny random GPT-2 and with the same options."""

import pytest
import torch
from hf_checks import loaded, randomised

import seqfuse

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2,
                                     bos_token_id=1, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    theirs = randomised(transformers.GPT2LMHeadModel(config))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(3)  # else all tokens are about as likely, and rounding chooses
    return theirs, loaded(theirs, tmp_path_factory.mktemp("gpt2"))


def both(pair, ours, **theirs):
    ids = torch.randint(3, 40, (5, 6), generator=torch.Generator().manual_seed(0))
    common = dict(max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = pair[0].generate(ids, **common, **theirs)
    found = seqfuse.generate(pair[1], ids, max_new_tokens=12, **ours)
    width = max(expected.shape[1], found.shape[1])
    return [torch.nn.functional.pad(t, (0, width - t.shape[1])).tolist() for t in (found, expected)]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search_finds_the_same(pair, beams, length_penalty):
    """early_stopping="never" is their exact search; their default stops by a guess."""
    ours = dict(num_beams=beams, length_penalty=length_penalty)
    found, expected = both(pair, ours, **ours, early_stopping="never")
    assert found == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_the_rules_are_the_same(pair, beams):
    theirs = dict(num_beams=beams, **({"early_stopping": "never"} if beams > 1 else {}))
    for ours, names in (
        (dict(repetition_penalty=1.3), dict(repetition_penalty=1.3)),
        (dict(no_repeat_ngram=2), dict(no_repeat_ngram_size=2)),
        (dict(no_repeat_ngram=1, repetition_penalty=0.8), dict(no_repeat_ngram_size=1, repetition_penalty=0.8)),
    ):
        found, expected = both(pair, dict(num_beams=beams, **ours), **theirs, **names)
        assert found == expected, ours
