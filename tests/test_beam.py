"""Beam search against trying every sequence, and against itself row by row."""

import pytest
import torch
from generating import TableModel, every_sequence, log_probability

import seqfuse
from seqfuse import native, ops, testing
from seqfuse.beam import beam_search
from seqfuse.sampling import Options

STOPS = torch.tensor([2])
OUTPUTS = ("scores", "parents", "tokens", "best_scores", "best_at", "over")


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wide_beam_finds_what_trying_everything_finds(length_penalty, encoder_decoder, seed):
    model, most = TableModel(vocab=4, seed=seed, encoder_decoder=encoder_decoder), 5
    prompts = [[3, 1], [1, 1, 3], [3]]
    truth = []
    for prompt in prompts:
        scored = [(log_probability(model, prompt, t) / len(t) ** length_penalty, t) for t in every_sequence(4, 2, most)]
        truth.append(max(scored))
    ids, lengths = torch.tensor([[3, 1, 0], [1, 1, 3], [3, 0, 0]]), torch.tensor([2, 3, 1])
    options = Options(max_new_tokens=most, num_beams=4**most, length_penalty=length_penalty)
    found, scores = beam_search(model, ids, lengths, options, STOPS)
    for row, score, (best, tokens) in zip(found.tolist(), scores.tolist(), truth, strict=True):
        assert tuple(row) == tokens + (0,) * (len(row) - len(tokens))
        assert score == pytest.approx(best, rel=1e-5)


def test_a_beam_of_one_is_greedy_search():
    model = TableModel(spread=1.0)
    ids = torch.tensor([[3], [4], [5], [6]])
    greedy = seqfuse.generate(model, ids, max_new_tokens=15)[:, 1:]
    found, _ = beam_search(model, ids, None, Options(max_new_tokens=15, length_penalty=0.0), STOPS)
    width = max(greedy.shape[1], found.shape[1])
    pad = torch.nn.functional.pad
    assert torch.equal(pad(greedy, (0, width - greedy.shape[1])), pad(found, (0, width - found.shape[1])))


def test_a_wider_beam_scores_at_least_as_well_on_average():
    model, ids = TableModel(vocab=30, spread=1.0), torch.arange(3, 30)[:, None]
    searches = [Options(max_new_tokens=12, num_beams=k) for k in (1, 2, 4, 8)]
    scores = [float(beam_search(model, ids, None, options, STOPS)[1].mean()) for options in searches]
    assert scores == sorted(scores) and scores[0] < scores[-1]


@pytest.mark.parametrize("extra", [{}, {"no_repeat_ngram": 2}, {"repetition_penalty": 1.5}])
def test_each_row_is_searched_as_if_alone(extra):
    """Fails where a search forgets to reorder a row's state, or its rules' memory."""
    model, prompts = TableModel(vocab=12, spread=1.0), [[3, 4], [5, 1, 6, 4, 3], [1], [6, 6, 6]]
    options = dict(max_new_tokens=10, num_beams=4, length_penalty=0.6, **extra)
    out = seqfuse.generate(model, prompts, **options)
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        alone = seqfuse.generate(model, [prompt], **options)[0].tolist()
        assert row == alone + [0] * (len(row) - len(alone))
        if "no_repeat_ngram" in extra:
            pairs = list(zip(alone[len(prompt) - 1 :], alone[len(prompt) :], strict=False))
            assert len(pairs) == len(set(pairs))


def test_the_score_is_what_the_model_says_of_the_tokens():
    model, ids = TableModel(vocab=9), torch.tensor([[4, 5], [7, 8]])
    found, scores = beam_search(model, ids, None, Options(max_new_tokens=8, num_beams=3, length_penalty=0.7), STOPS)
    for prompt, row, score in zip(ids.tolist(), found.tolist(), scores.tolist(), strict=True):
        tokens = row[: row.index(2) + 1] if 2 in row else row
        assert score == pytest.approx(log_probability(model, prompt, tokens) / len(tokens) ** 0.7, rel=1e-5)


def test_it_ends_when_nothing_can_win_any_more():
    model = TableModel(vocab=5, spread=4.0)
    _, report = seqfuse.generate(model, [[3]], max_new_tokens=400, num_beams=2, length_penalty=0.0, return_report=True)
    assert report.steps < 100 and report.tokens <= report.steps + 1


def drawn_step(batch, kept, vocab, beams, stops, seed=0):
    """Arguments of beam_step, with a token that no beginning may take and a beginning that is none."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch * kept, vocab, generator=draw) * 3
    logits[:, vocab // 2] = -torch.inf
    scores = torch.randn(batch, kept, generator=draw).sort(descending=True).values - 4
    if kept > 1:
        scores[0, -1] = -torch.inf
    best_scores = torch.randn(batch, generator=draw) * 2 - 3
    best_scores[0] = -torch.inf
    return logits, scores, torch.tensor(stops).long(), best_scores, torch.arange(batch * 3).view(batch, 3), beams


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 2, 4, [1]), (3, 4, 74, 4, [2]), (2, 5, 1000, 5, []), (33, 2, 129, 2, [0, 7, 9]), (1, 3, 6, 40, [5])],
    ids=str,
)
def test_the_kernel_of_a_step_chooses_as_the_reference_does(isa, sizes, normalised, last):
    *tensors, beams = drawn_step(*sizes)
    if not normalised:
        tensors[0] = tensors[0].log_softmax(-1)
    options = dict(beams=beams, step=3, last=last, divisor=3**0.7, flattering=9**0.7, normalised=normalised)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    with seqfuse.backend("reference"):
        truth, plain = ops.beam_step(*exact, **options), ops.beam_step(*tensors, **options)
    with seqfuse.backend("cpu"):
        found = ops.beam_step(*tensors, **options)
    for name, t, p, f in zip(OUTPUTS, truth, plain, found, strict=True):
        assert p.shape == f.shape and p.dtype == f.dtype, name
        if f.is_floating_point():
            testing.assert_accurate(f, t, p, what=name)
        else:
            assert torch.equal(f, t), name


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("sizes", [(3, 4, 74, 4, [2]), (1, 3, 6, 40, [])], ids=str)
def test_the_kernel_of_a_step_is_an_op_like_pytorchs(sizes):
    """Schema and fake say what the kernel does, so a search may stand in a compiled function."""
    *tensors, beams = drawn_step(*sizes)
    arguments = (*tensors, beams, 3, False, 2.0, 3.0, True)
    torch.library.opcheck(torch.ops.seqfuse.beam_step.default, arguments)

    def step(*tensors):
        return ops.beam_step(*tensors, beams=beams, step=3, last=False, divisor=2.0, flattering=3.0, normalised=True)

    with seqfuse.backend("cpu"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
        for name, a, b in zip(OUTPUTS, compiled, step(*tensors), strict=True):
            assert torch.equal(a, b), name


def test_a_search_runs_on_every_backend_by_name():
    model, prompts = TableModel(vocab=12, spread=1.0), [[3, 4], [5, 1, 6, 4, 3], [1]]
    found = {}
    for name in ("auto", "cpu", "reference", "triton"):
        with seqfuse.backend(name):
            found[name] = seqfuse.generate(model, prompts, max_new_tokens=10, num_beams=4)
    assert all(torch.equal(ids, found["auto"]) for ids in found.values())
