"""seqfuse.generate on a model that is a table: what is chosen, what is forbidden, what comes back."""

import pytest
import torch
from generating import TableModel

import seqfuse
from seqfuse.sampling import Options, Rules, choose

PROMPTS = [[3, 4], [5, 1, 6, 4, 3], [1], [6, 6, 6]]


def by_hand(model, prompt, most):
    """Greedy search in the plainest way."""
    state, out = torch.zeros(1, dtype=torch.int64), list(prompt)
    for token in prompt:
        state = model.after(state, token)
    for _ in range(most):
        out.append(int(model.table[state].argmax()))
        state = model.after(state, out[-1])
        if out[-1] == model.config.eos_id:
            break
    return out


def test_greedy_is_the_likeliest_token_each_time():
    model = TableModel()
    for prompt in PROMPTS:
        out = seqfuse.generate(model, torch.tensor([prompt]), max_new_tokens=12)
        assert out.tolist() == [by_hand(model, prompt, 12)]


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_a_ragged_batch_equals_its_rows_alone(encoder_decoder):
    model = TableModel(encoder_decoder=encoder_decoder, spread=0.5)
    out = seqfuse.generate(model, PROMPTS, max_new_tokens=20)
    for prompt, row in zip(PROMPTS, out.tolist(), strict=True):
        alone = seqfuse.generate(model, [prompt], max_new_tokens=20)[0].tolist()
        assert row == alone + [0] * (len(row) - len(alone))


def test_rows_end_with_padding_after_a_stop_token():
    model = TableModel()
    out = seqfuse.generate(model, torch.tensor([[3], [4], [5], [6]]), max_new_tokens=30)
    stopped = (out == 2).any(1)
    assert stopped.any()
    for row in out[stopped].tolist():
        assert set(row[row.index(2) + 1 :]) <= {0}


def test_stop_ids_take_the_place_of_eos():
    model = TableModel()
    free = seqfuse.generate(model, [[3, 4]], max_new_tokens=40, stop=())[0].tolist()
    assert len(free) == 42 and 2 in free[2:-1]
    token = free[4]
    assert (
        seqfuse.generate(model, [[3, 4]], max_new_tokens=40, stop=token)[0].tolist() == free[: free.index(token, 2) + 1]
    )
    assert seqfuse.generate(model, [[3, 4]], max_new_tokens=40, stop=[token, free[3]])[0, -1] in (token, free[3])


def test_streaming_gives_the_same_tokens_and_their_report():
    model = TableModel()
    whole = seqfuse.generate(model, PROMPTS, max_new_tokens=9, stop=())
    stream = seqfuse.generate(model, PROMPTS, max_new_tokens=9, stop=(), stream=True)
    first = next(stream)
    assert model.steps == 8  # of the call before: nothing runs ahead of whoever reads
    streamed = torch.stack([first, *stream], 1)
    for row, prompt, tokens in zip(whole.tolist(), PROMPTS, streamed.tolist(), strict=True):
        assert row[len(prompt) : len(prompt) + 9] == tokens
    assert stream.report.tokens == 36 and stream.report.steps == 8


def test_the_report_counts_what_was_done():
    model = TableModel()
    _, report = seqfuse.generate(model, torch.tensor([[3, 4]]), max_new_tokens=10, stop=(), return_report=True)
    assert (report.tokens, report.steps, report.step_bytes) == (10, 9, model.table.nbytes)
    assert report.tokens_per_second > 0 and report.bandwidth_percent() > 0 and "tokens/s" in str(report)
    _, report = seqfuse.generate(model, PROMPTS, max_new_tokens=30, return_report=True)
    alone = [seqfuse.generate(model, [prompt], max_new_tokens=30).shape[1] - len(prompt) for prompt in PROMPTS]
    assert report.tokens == sum(alone) and len(set(alone)) > 1


def test_training_mode_comes_back():
    model = TableModel().train()
    seqfuse.generate(model, [[3]], max_new_tokens=3)
    assert model.training
    seqfuse.generate(model, [[3]], max_new_tokens=3, num_beams=2)
    assert model.training and torch.is_grad_enabled()


# -------------------------------------------------------------------------------------------------------------- drawing


def frequencies(logits, **options):
    tokens = choose(logits.expand(20000, -1), Options(temperature=1.0, **options), torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / 20000


def test_drawn_tokens_have_the_models_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    assert (frequencies(logits) - logits.softmax(-1)[0]).abs().max() < 0.015  # 4 standard deviations of the largest


def test_top_k_and_top_p_draw_only_from_the_likeliest():
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()
    two = torch.tensor([0.0, 0.0, 4 / 7, 3 / 7])
    assert (frequencies(logits, top_k=2) - two).abs().max() < 0.015
    assert (frequencies(logits, top_p=0.65) - two).abs().max() < 0.015  # 0.4 alone is not enough
    assert frequencies(logits, top_p=0.4)[2] == 1  # it is, exactly
    assert (frequencies(logits, top_k=9, top_p=1.0) > 0).all()


def test_a_seed_repeats_and_a_low_temperature_is_greedy():
    model = TableModel()

    def drawn(**options):
        return seqfuse.generate(model, PROMPTS, max_new_tokens=10, stop=(), **options).tolist()

    assert drawn(temperature=1.0, seed=3) == drawn(temperature=1.0, seed=3) != drawn(temperature=1.0, seed=4)
    assert drawn(temperature=1e-4) == drawn()


# -------------------------------------------------------------------------------------------------------------- rules


def test_the_repetition_penalty_weakens_what_was_said():
    rules = Rules(Options(repetition_penalty=2.0), torch.tensor([[1, 3, 0], [2, 0, 0]]), torch.tensor([2, 1]), 2, "cpu")
    logits = torch.tensor([[1.0, 1.0, 1.0, -1.0]] * 2)
    assert rules.apply(logits).tolist() == [[1.0, 0.5, 1.0, -2.0], [1.0, 1.0, 0.5, -1.0]]
    rules.push(torch.tensor([0, 0]))
    rules.reorder(torch.tensor([1, 1, 0]))
    assert rules.apply(logits[[0, 0, 0]]).tolist() == [[0.5, 1.0, 0.5, -1.0]] * 2 + [[0.5, 0.5, 1.0, -2.0]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_is_said_twice(n):
    model = TableModel(vocab=12)
    prompts = [[3, 4], [5, 6, 5, 4, 3], [7]]
    out = seqfuse.generate(model, prompts, max_new_tokens=8, stop=(), no_repeat_ngram=n)
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        row = row[: len(prompt) + 8]
        ngrams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        before = len(prompt) - n + 1
        new = ngrams[max(0, before) :]
        assert len(new) == len(set(new)) and not set(new) & set(ngrams[: max(0, before)])
        assert row == seqfuse.generate(model, [prompt], max_new_tokens=8, stop=(), no_repeat_ngram=n)[0].tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 0}, {"num_beams": 3}], ids=str)
def test_forbidden_tokens_are_never_said(options):
    model, prompts = TableModel(), [[3, 4], [5]]
    free = seqfuse.generate(model, prompts, max_new_tokens=30, stop=(), **options)
    assert {3, 5} <= set(free[0, 2:].tolist())
    out = seqfuse.generate(model, prompts, max_new_tokens=30, stop=(), forbidden=(3, 5), **options)
    assert not {3, 5} & set(out[0, 2:].tolist()) and out.shape == free.shape


# ---------------------------------------------------------------------------------------------------------------- text


class Letters:
    """A tokenizer of one character a token, ids from 3; id 1 and 2 are special."""

    def encode(self, text):
        return [ord(c) - ord("a") + 3 for c in text]

    def decode(self, ids):
        return "".join(chr(i - 3 + ord("a")) for i in ids if i > 2)


@pytest.fixture
def reader():
    model = TableModel(vocab=29)
    model.tokenizer = Letters()
    return model


def test_strings_go_in_and_come_out(reader):
    out = seqfuse.generate(reader, "abc", max_new_tokens=10, stop=())
    ids = seqfuse.generate(reader, [[3, 4, 5]], max_new_tokens=10, stop=())[0].tolist()
    assert out == reader.tokenizer.decode(ids) and out.startswith("abc")
    assert seqfuse.generate(reader, ["abc", "z"], max_new_tokens=10, stop=())[0] == out
    pieces = list(seqfuse.generate(reader, "abc", max_new_tokens=10, stop=(), stream=True))
    assert "abc" + "".join(pieces) == out and len(pieces) > 5
    assert seqfuse.generate(reader, "abc", max_new_tokens=10, num_beams=1, stop=()) == out
    assert seqfuse.generate(reader, ["abc"], max_new_tokens=5, num_beams=3)[0].startswith("abc")


def test_an_encoder_decoder_gives_back_only_what_is_new(reader):
    reader.config.encoder_decoder = True
    out = seqfuse.generate(reader, ["abc", "z"], max_new_tokens=6, stop=())
    ids = seqfuse.generate(reader, [[3, 4, 5], [28]], max_new_tokens=6, stop=())
    assert ids.shape == (2, 6) and out == [reader.tokenizer.decode(row) for row in ids.tolist()]


def test_a_stop_string_ends_a_row_and_is_not_in_it(reader):
    free = seqfuse.generate(reader, "ab", max_new_tokens=12, stop=())
    stop = free[6:8]  # two tokens: neither alone may stop
    out = seqfuse.generate(reader, ["ab", "x"], max_new_tokens=12, stop=["##", stop])
    assert out[0] == free[: free.index(stop, 2)]
    pieces = list(seqfuse.generate(reader, "ab", max_new_tokens=12, stop=stop, stream=True))
    assert "ab" + "".join(pieces) == out[0]


def test_an_empty_prompt_starts_with_bos(reader):
    out = seqfuse.generate(reader, "", max_new_tokens=5, stop=())
    assert out == reader.tokenizer.decode(seqfuse.generate(reader, [[1]], max_new_tokens=5, stop=())[0].tolist())
    reader.config.bos_id = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        seqfuse.generate(reader, "")


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[3]], {"max_tokens": 3}, "unknown option 'max_tokens'; known are max_new_tokens, "),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ([[3]], {"temperature": -1.0}, "temperature must be a number at least 1e-6, or 0 \\(greedy\\)"),
        ([[3]], {"temperature": 1.0, "top_p": 0.0}, "top_p must be a number in"),
        ([[3]], {"top_k": 3}, "temperature=0 draws nothing"),
        ([[3]], {"num_beams": 2, "temperature": 0.5}, "leave out temperature"),
        ([[3]], {"num_beams": 2, "stream": True}, "leave out stream"),
        ([[3]], {"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ([[3]], {"stop": "x"}, "the prompts must be text too"),
        ([[3]], {"stop": [None]}, "stop takes token ids and strings, got None"),
        ([[3]], {"forbidden": [7]}, "forbidden names token 7, but there are 7"),
        ([[3]], {"forbidden": 7}, "forbidden must be a list of token ids, got 7"),
        ([[3]], {"forbidden": list(range(7))}, "forbidden names every token that there is"),
        ([[3]], {"temperature": 1.0, "seed": 2**64}, "seed must be below 2\\*\\*63"),
        ("abc", {}, "this model has no tokenizer"),
        ([], {}, "prompts must be ids or text, or a list of them, got an empty list"),
        ([[]], {}, "prompts\\[0\\] is empty"),
        ([[3], ["a"]], {}, "prompts\\[1\\] must be a list of ids"),
        ([[3], [7]], {}, "token id 7 is outside the model's vocabulary of 7"),
        (torch.zeros(2, 3), {}, "of int64 with at least one row and one token, got \\[2, 3\\] of float32"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "at least one row and one token"),
        (5, {}, "got int"),
    ],
)
def test_wrong_calls_get_one_sentence(prompts, options, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        seqfuse.generate(TableModel(), prompts, **options)


@pytest.mark.parametrize(
    ("encoder_decoder", "prompt", "new", "sentence"),
    [
        (False, [3] * 4, 7, "a prompt of 4 tokens and max_new_tokens=7 are 11 tokens, more than the 10 that the model"),
        (False, [3] * 10, 1, "a prompt of 10 tokens and max_new_tokens=1 are 11 tokens, more than the 10"),
        (True, [3] * 4, 10, "max_new_tokens=10 and the token that starts a target are more than the 10"),
        (True, [3] * 11, 2, "a source of 11 tokens is more than the 10 that the model has positions for .max_pos"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"stream": True}, {"num_beams": 2}], ids=str)
def test_a_text_that_has_no_room_is_refused_before_the_model_runs(encoder_decoder, prompt, new, sentence, options):
    model = TableModel(encoder_decoder=encoder_decoder)
    model.config.max_positions = 10
    with pytest.raises(ValueError, match=sentence):
        seqfuse.generate(model, [prompt], max_new_tokens=new, **options)
    assert model.steps == 0
    out = seqfuse.generate(model, [prompt[:4]], max_new_tokens=6, stop=(), **options)
    assert len(list(out) if "stream" in options else out[0]) == 6 + 4 * (
        not encoder_decoder and "stream" not in options
    )


def test_a_model_without_the_protocol_is_named():
    with pytest.raises(TypeError, match="Linear does not generate: it has no method begin"):
        seqfuse.generate(torch.nn.Linear(2, 2), [[3]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_to_which_the_rules_leave_no_token_ends(temperature):
    model = seqfuse.models.Decoder.from_config(dict(vocab=4, width=16, layers=1, heads=2, max_positions=32)).eval()
    options = dict(no_repeat_ngram=1, max_new_tokens=6, temperature=temperature, stop=())
    out = seqfuse.generate(model, torch.tensor([[1, 2], [3, 3]]), **options)
    first, second = out[0, 2:].tolist(), out[1, 2:].tolist()
    assert sorted(first[:2]) == [0, 3] and sorted(second[:3]) == [0, 1, 2]
    assert set(first[2:]) | set(second[3:]) <= {0}, "padding"
