"""The recurrent models against plain torch.nn, and their steps of generation against the whole sequence."""

import pytest
import torch
from generating import every_sequence, log_probability

import seqfuse
from seqfuse import models, native, ops, testing
from seqfuse.beam import beam_search
from seqfuse.models.recurrent import RecurrentState
from seqfuse.sampling import Options

CELLS = ("rnn", "lstm", "gru")
ATTENTIONS = (None, "dot", "general", "additive")
PLAIN = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


def language_model(cell="lstm", **options):
    sizes = dict(vocab=11, embed=12, hidden=20, layers=2, bos_id=1, eos_id=2, pad_id=0)
    return models.RNNLanguageModel(models.RNNLanguageModelConfig(cell=cell, **sizes | options)).eval()


def seq2seq(attention="general", cell="gru", **options):
    sizes = dict(vocab=9, source_vocab=13, embed=10, hidden=16, layers=2, bos_id=1, eos_id=2, pad_id=0)
    model = models.RNNSeq2Seq(models.RNNSeq2SeqConfig(attention=attention, cell=cell, **sizes | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # logits that differ enough for a search to have something to find
    return model


def class_to_text(**options):
    sizes = dict(vocab=9, embed=10, hidden=16, layers=2, attributes=5, bos_id=1, eos_id=2, pad_id=0)
    return models.ClassToText(models.ClassToTextConfig(**sizes | options)).eval()


def drawn(vocab, *shape):
    return torch.randint(3, vocab, shape)


ENCODER_DECODERS = [
    *(pytest.param(lambda a=a, c=c: seq2seq(a, c), id=f"{a}-{c}") for a in ATTENTIONS for c in CELLS),
    pytest.param(lambda: seq2seq("general", norm=True, bidirectional=False), id="norm-one-direction"),
    pytest.param(class_to_text, id="class-to-text"),
]


@pytest.fixture
def one_thread():
    """For training in tiny steps, which threads of a busy machine would spend waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ language model


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_what_torch_nn_computes(cell, tied):
    model, ids = language_model(cell, tied=tied), drawn(11, 3, 9)
    layers = [PLAIN[cell](12, 20, batch_first=True), PLAIN[cell](20, 12 if tied else 20, batch_first=True)]

    def plain(dtype):
        with torch.no_grad():
            x = model.body.embedding.weight[ids].to(dtype)
            for layer, ours in zip(layers, model.body.layers, strict=True):
                layer.load_state_dict(ours.state_dict())
                x = layer.to(dtype)(x)[0]
            return x @ model.output.weight.to(dtype).t() + model.output.bias.to(dtype)

    testing.assert_accurate(model(ids), plain(torch.float64), plain(torch.float32), dims=(0, 1), what="logits")
    assert (model.output.weight is model.body.embedding.weight) == tied


@pytest.mark.parametrize("cell", CELLS)
def test_steps_give_the_logits_of_the_whole(cell):
    model, ids = language_model(cell), drawn(11, 3, 9)
    exact = language_model(cell).double()
    exact.load_state_dict(model.state_dict())
    truth, whole = exact(ids), model(ids)
    with torch.no_grad():
        logits, cache = model.begin(ids[:, :4], None, 9)
        found = [logits]
        for t in range(4, 9):
            found.append(model.step(ids[:, t], cache))
    testing.assert_accurate(torch.stack(found, 1), truth[:, 3:], whole[:, 3:], dims=(0, 1))


def test_a_language_model_generates_a_ragged_batch_as_its_rows():
    model, prompts = language_model(), [[3], [4, 5, 6, 7, 3], [8, 9]]
    for options in ({}, {"num_beams": 3}):
        out = seqfuse.generate(model, prompts, max_new_tokens=12, **options)
        for prompt, row in zip(prompts, out.tolist(), strict=True):
            alone = seqfuse.generate(model, [prompt], max_new_tokens=12, **options)[0].tolist()
            assert row == alone + [0] * (len(row) - len(alone))


def test_the_loss_is_cross_entropy_and_the_two_regularisations():
    model = language_model(activation=2.0, temporal=1.0)
    ids, targets = drawn(11, 3, 9), drawn(11, 3, 9)
    targets[1, 5:] = -100
    exact = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2).double(), targets)
    assert torch.allclose(model.loss(ids, targets).double(), exact, rtol=1e-5)
    model.train()
    h = model.hidden(ids)
    more = 2.0 * h.square().mean() + (h[:, 1:] - h[:, :-1]).square().mean()
    assert torch.allclose(model.loss(ids, targets), exact.float() + more, rtol=1e-5)
    lengths = torch.tensor([9, 5, 1])
    valid = [h[b, :n] for b, n in enumerate(lengths.tolist())]
    changes = torch.cat([(v[1:] - v[:-1]) for v in valid]).square().mean()
    more = 2.0 * torch.cat(valid).square().mean() + changes
    assert torch.allclose(model.loss(ids, targets, lengths), exact.float() + more, rtol=1e-5)


def test_a_state_carries_a_text_over_into_the_next_piece():
    model, ids, targets = language_model(), drawn(11, 2, 12), drawn(11, 2, 12)
    whole = model.loss(ids, targets)
    first, state = model.loss(ids[:, :5], targets[:, :5], return_state=True)
    second = model.loss(ids[:, 5:], targets[:, 5:], state=state)
    assert torch.allclose((5 * first + 7 * second) / 12, whole, rtol=1e-5)
    assert not any(s.requires_grad for layer in state for s in layer)


def test_dropouts_are_of_training_only_and_each_does_something():
    ids = drawn(11, 4, 9)
    for name in ("dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output", "weight_drop"):
        model = language_model(**{name: 0.5})
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids)), name


def test_dropout_takes_the_same_units_at_all_times_and_whole_words():
    model = language_model(dropout_output=0.5, dropout_embedding=0.4, tied=False).train()
    dropped = model.hidden(drawn(11, 4, 9)) == 0  # (B, T, H)
    assert torch.equal(dropped.all(1), dropped.any(1)) and 0 < dropped.float().mean() < 1
    x = model.body.embed(torch.arange(11).repeat(1, 2))[0]
    gone = (x == 0).all(1)
    assert torch.equal(gone[:11], gone[11:]) and torch.equal(gone, (x == 0).any(1))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_many_rows_see_what_has_changed_between_them(cell, inference):
    """With many rows of few tokens the embedding's products are taken once and kept, as long as they are true."""
    with torch.inference_mode(inference):
        model = language_model(cell, tied=False)
    ids = drawn(11, 40, 3)
    changes = [
        lambda: None,
        lambda: model.body.embedding.weight.mul_(2),
        lambda: model.body.layers[0].weight_ih_l0.mul_(2),
        lambda: model.body.layers[0].bias_ih_l0.add_(1),
        lambda: setattr(model.body.embedding, "weight", torch.nn.Parameter(model.body.embedding.weight * 2)),
    ]
    with torch.inference_mode(inference), torch.no_grad(), seqfuse.backend("cpu"):
        _, cache = model.begin(ids, None, 20)
        for change in changes:
            change()
            layers, found = list(cache.layers), model.step(ids[:, 0], cache)
            fresh = RecurrentState(layers, model.body.cells())
            assert torch.equal(found, model.step(ids[:, 0], fresh))


# ----------------------------------------------------------------------------------------------------- encoder-decoder


@pytest.mark.parametrize("make", ENCODER_DECODERS)
def test_steps_of_an_encoder_decoder_give_the_logits_of_the_whole(make):
    """With padding in the source, and the rows changing places twice."""
    model = make()
    exact = make().double()
    exact.load_state_dict(model.state_dict())
    src, lengths = drawn(5, 3, 7), torch.tensor([7, 2, 5])
    tgt = torch.cat([torch.ones(3, 1, dtype=torch.int64), drawn(9, 3, 6)], 1)
    truth, whole = exact(src, tgt, lengths), model(src, tgt, lengths)
    with torch.no_grad():
        logits, cache = model.begin(src, lengths, 7)
        found = [logits]
        for t in range(1, 4):
            found.append(model.step(tgt[:, t], cache))
        cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]), grouped=True)  # two beams a row
        two = model.step(tgt[:, 4].repeat_interleave(2), cache)
        assert torch.allclose(two[::2], two[1::2], atol=1e-5)
        found.append(two[::2])
        cache.reorder(torch.tensor([4, 1]))  # rows 2 and 0
        last = model.step(tgt[[2, 0], 5], cache)
    testing.assert_accurate(torch.stack(found, 1), truth[:, :5], whole[:, :5], dims=(0, 1))
    testing.assert_accurate(last, truth[[2, 0], 5], whole[[2, 0], 5], dims=(0,))


@pytest.mark.parametrize("make", ENCODER_DECODERS)
def test_what_lies_in_the_padding_changes_nothing(make):
    model, tgt = make(), drawn(9, 2, 4)
    src, lengths = drawn(5, 2, 7), torch.tensor([7, 3])
    other = src.clone()
    other[1, 3:] = 4
    other[1, 5:] = 0
    assert torch.equal(model(src, tgt, lengths), model(other, tgt, lengths))
    alone = model(src[1:, :3], tgt[1:])
    assert torch.allclose(model(src, tgt, lengths)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("make", ENCODER_DECODERS)
@pytest.mark.parametrize("beams", [1, 4])
def test_an_encoder_decoder_generates_a_ragged_batch_as_its_rows(make, beams):
    model, sources = make(), [[3], [4, 3, 4, 4, 3, 3], [4, 4]]
    out = seqfuse.generate(model, sources, max_new_tokens=9, num_beams=beams)
    for source, row in zip(sources, out.tolist(), strict=True):
        alone = seqfuse.generate(model, [source], max_new_tokens=9, num_beams=beams)[0].tolist()
        assert row == alone + [0] * (len(row) - len(alone))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_wide_beam_finds_the_likeliest_of_all_targets(attention):
    model = seq2seq(attention, vocab=4, layers=1)
    ids, lengths = torch.tensor([[3, 4, 5], [7, 0, 0]]), torch.tensor([3, 1])
    found, scores = beam_search(model, ids, lengths, Options(max_new_tokens=4, num_beams=256), torch.tensor([2]))
    for source, row, score in zip(([3, 4, 5], [7]), found.tolist(), scores.tolist(), strict=True):
        truth = max((log_probability(model, source, t) / len(t), t) for t in every_sequence(4, 2, 4))
        assert tuple(row) == truth[1] + (0,) * (len(row) - len(truth[1]))
        assert score == pytest.approx(truth[0], rel=1e-4)


@pytest.mark.parametrize("attention", ["dot", "general", "additive"])
def test_attention_is_the_papers_formula(attention):
    """Token by token in float64, with the products in the papers' places."""
    model = seq2seq(attention, layers=1).double()
    src, tgt = drawn(13, 1, 6), drawn(9, 1, 4)
    with torch.no_grad():
        states, last, _ = model.encoder(src)
        M, h = states[0], last[0][0]  # (T, H), (1, H)
        cell = torch.nn.GRUCell(*model.decoder.layers[0].weight_ih_l0.shape[:0:-1], 16).double()
        names = dict(
            zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), model.decoder.layers[0].parameters(), strict=True)
        )
        cell.load_state_dict(names)
        logits, alignment = [], []
        for token in tgt[0]:
            x = model.decoder.embedding.weight[token][None]
            if attention == "additive":
                e = model.score(torch.tanh(model.query(h) + model.keys(M)))[:, 0]
                x = torch.cat([x, e.softmax(0)[None] @ M], 1)
                h = cell(x, h)
            else:
                h = cell(x, h)
                e = M @ h[0] if attention == "dot" else M @ (h[0] @ model.keys.weight)
            a = e.softmax(0)
            context = (a[:, None] * M).sum(0)
            logits.append(model.output(torch.tanh(model.read_context(context) + model.read_hidden(h[0]))))
            alignment.append(a)
        testing.assert_accurate(model(src, tgt)[0], torch.stack(logits))
        testing.assert_accurate(model.alignment(src, tgt)[0], torch.stack(alignment))


@pytest.mark.parametrize("attention", [None, "general", "additive"])
def test_an_encoder_decoder_learns_to_reverse(attention, one_thread):
    torch.manual_seed(1)
    config = dict(vocab=8, embed=16, hidden=32, bos_id=1, eos_id=2, pad_id=0, cell="gru")
    model = models.RNNSeq2Seq(models.RNNSeq2SeqConfig(attention=attention, **config))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start, end = torch.ones(32, 1, dtype=torch.int64), torch.full((32, 1), 2)
    for _ in range(100):
        src = drawn(8, 32, 3)
        target = torch.cat([src.flip(1), end], 1)
        tgt = torch.cat([start, target[:, :-1]], 1)
        loss = model.loss(src, tgt, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    src = drawn(8, 64, 3)
    out = seqfuse.generate(model, src, max_new_tokens=4)
    right = (out[:, :3] == src.flip(1)).float().mean()
    assert right > 0.9, f"loss {loss:.3f}, {right:.0%} of the tokens"


def test_a_class_chooses_the_text(one_thread):
    model = class_to_text(cell="gru", layers=1).train()
    text = torch.tensor([[3, 4, 5, 2], [6, 6, 7, 2]])
    tgt = torch.cat([torch.ones(2, 1, dtype=torch.int64), text[:, :-1]], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(torch.tensor([[0], [1]]), tgt, text).backward()
        optimizer.step()
    assert seqfuse.generate(model, [[0], [1], [0]]).tolist() == [*text.tolist(), text[0].tolist()]


# ----------------------------------------------------------------------------------------------------- what all can do

EVERY = [
    pytest.param(language_model, 1, id="language-model"),
    pytest.param(seq2seq, 2, id="seq2seq"),
    pytest.param(lambda: seq2seq("additive", "lstm", norm=True), 2, id="additive"),
    pytest.param(class_to_text, 2, id="class-to-text"),
    pytest.param(lambda: models.RNNEncoder(models.RNNEncoderConfig(vocab=9, embed=8, hidden=12)), 1, id="encoder"),
]


def inputs(count):
    return (drawn(5, 2, 6), drawn(9, 2, 4))[:count]


@pytest.mark.parametrize(("make", "count"), EVERY)
def test_saved_and_loaded_it_is_the_same_model(make, count, tmp_path):
    model, args = make().eval(), inputs(count)
    model.save(tmp_path)
    loaded = models.load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert torch.equal(loaded(*args), model(*args))
    assert loaded.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(("make", "count"), EVERY)
def test_it_compiles_without_a_break(make, count):
    model, args = make().eval(), inputs(count)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        testing.assert_accurate(compiled(*args), model(*args).double(), model(*args))


@pytest.mark.parametrize(
    ("make", "count"),
    [pytest.param(lambda: language_model(layers=1, checkpoint=True, activation=1.0).train(), 1, id="language-model"),
     pytest.param(lambda: seq2seq(layers=1, norm=True), 2, id="seq2seq")],
)  # fmt: skip
def test_a_loss_compiles_with_its_gradients(make, count):
    model, args = make(), inputs(count)
    plain, compiled = model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")

    def outcome(f):
        loss = f(*args, args[-1])
        return [loss, *torch.autograd.grad(loss, model.parameters())]

    found, eager = outcome(compiled), outcome(plain)
    model.double()
    for got, truth, theirs in zip(found, outcome(plain), eager, strict=True):
        testing.assert_accurate(got, truth, theirs)


@pytest.mark.parametrize(("make", "count"), EVERY)
def test_every_backend_gives_the_same(make, count):
    """Logits, and the gradients of their squares; on Triton: test_models_interpret.py."""
    model, args = make().eval(), inputs(count)
    backends = ("reference", "auto") if native.missing() else ("reference", "auto", "cpu")

    def outcome(backend):
        with seqfuse.backend(backend):
            logits = model(*args)
        return [logits, *torch.autograd.grad(logits.square().sum(), model.parameters())]

    found = {backend: outcome(backend) for backend in backends}
    model.double()
    exact = outcome("reference")
    for backend in backends[1:]:
        for got, truth, plain in zip(found[backend], exact, found["reference"], strict=True):
            testing.assert_accurate(got, truth, plain, dims=(0, 1) if got.dim() == 3 else (), what=backend)


def test_checkpointing_changes_no_gradient():
    ids, targets = drawn(11, 3, 9), drawn(11, 3, 9)
    models_ = [language_model(checkpoint=c) for c in (False, True)]
    models_[1].load_state_dict(models_[0].state_dict())
    for model in models_:
        model.loss(ids, targets).backward()
    for a, b in zip(*(m.parameters() for m in models_), strict=True):
        testing.assert_accurate(b.grad, a.grad.double())


def test_a_body_with_two_directions_ignores_padding():
    model = models.RNNEncoder(models.RNNEncoderConfig(vocab=9, embed=8, hidden=12, layers=2)).eval()
    ids, lengths = drawn(9, 2, 6), torch.tensor([6, 3])
    out = model.hidden(ids, lengths)
    assert out.shape == (2, 6, 12) and model.width == 12
    assert torch.allclose(out[1, :3], model.hidden(ids[1:, :3])[0], atol=1e-6) and (out[1, 3:] == 0).all()


def test_heads_read_a_recurrent_body():
    """Many to one, and many to many in step."""
    body = models.RNNEncoder(models.RNNEncoderConfig(vocab=9, embed=8, hidden=12))
    ids, lengths = drawn(9, 2, 6), torch.tensor([6, 3])
    tags = models.Tagger.on(body, labels=4).eval()(ids, lengths)
    assert tags.shape == (2, 6, 4)
    for pooling in ("mean", "last"):
        head = models.Classifier.on(body, labels=3, pooling=pooling).eval()
        out = head(ids, lengths)
        assert out.shape == (2, 3) and torch.allclose(out[1:], head(ids[1:, :3]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: language_model()(torch.zeros(2, 3)), "ids must be an int64 tensor of shape .B, T., not empty, got"),
        (lambda: language_model()(drawn(30, 2, 30)), "ids must lie in 0 to 10, got"),
        (lambda: seq2seq()(drawn(30, 2, 30), drawn(9, 2, 3)), "src must lie in 0 to 12, got"),
        (lambda: seq2seq()(drawn(9, 2, 3), drawn(30, 2, 30)), "tgt must lie in 0 to 8, got"),
        (lambda: seq2seq()(drawn(9, 2, 3), drawn(9, 2, 3), torch.tensor([3, 0])), "lengths must lie in 1 to 3, got 0"),
        (lambda: class_to_text()(drawn(9, 2, 30), drawn(9, 2, 3)), "attributes must lie in 0 to 4, got"),
    ],
)
def test_wrong_ids_get_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_unfused_it_is_plain_torch_and_the_same():
    model, args = seq2seq(norm=True), inputs(2)
    before = model(*args)
    seqfuse.unfuse(model)
    assert type(model.encoder.layers[0]) is torch.nn.GRU and type(model.memory_norm) is torch.nn.LayerNorm
    assert torch.allclose(model(*args), before, atol=1e-5)
    assert torch.equal(seqfuse.fuse(model)(*args), before)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"cell": "qrnn"}, "cell must be 'rnn' or 'lstm' or 'gru', got 'qrnn'"),
        ({"hidden": 0}, "hidden must be positive"),
        ({"dropout_input": 1.0}, "dropout_input must be below 1"),
        ({"bos_id": None}, "bos_id must be given"),
        ({"hidden": 7}, "hidden must be even, got 7"),
        ({"attention": "additive", "weight_drop": 0.5}, "goes step by step"),
        ({"attention": "luong"}, "attention must be "),
        ({"layer": 3}, "unknown key 'layer'"),
    ],
)
def test_wrong_configs_get_one_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.RNNSeq2Seq.from_config({"vocab": 9, "bos_id": 1} | values)


def test_without_attention_there_is_no_alignment():
    with pytest.raises(ValueError, match="attention is None"):
        seq2seq(None).alignment(*inputs(2))


@pytest.mark.parametrize("lengths", [None, [1, 7, 4]], ids=["whole", "ragged"])
@pytest.mark.parametrize("width", [1, 20, 64, 130])
@pytest.mark.parametrize("level", native.LEVELS)
def test_the_kernel_of_a_readout_is_as_accurate_as_pytorchs_ops(level, width, lengths):
    if native.missing() or native.LEVELS.index(level) > native.LEVELS.index(native.isa()):
        pytest.skip(f"no {level} here")
    draw = torch.Generator().manual_seed(width)
    query, added = (torch.randn(3 * 4, width, generator=draw) for _ in range(2))
    keys, values = (torch.randn(3, 7, width, generator=draw) for _ in range(2))
    lengths = None if lengths is None else torch.tensor(lengths)
    if lengths is not None:
        keys[torch.arange(7) >= lengths[:, None]] = torch.nan  # nobody reads the padding
        values[torch.arange(7) >= lengths[:, None]] = torch.nan
    tensors = query, keys, values, added
    whole = [t.nan_to_num() for t in tensors]
    with seqfuse.backend("torch"):
        truth, plain = (ops.luong_readout(*map(to, whole), lengths) for to in (torch.Tensor.double, torch.Tensor.float))
    with seqfuse.backend("cpu"), native.isa_limit(level):
        found = ops.luong_readout(*tensors, lengths)
    testing.assert_accurate(found, truth, plain, dims=(0,))


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("lengths", [None, [1, 7, 4]], ids=["whole", "ragged"])
def test_the_kernel_of_a_readout_is_an_op_like_pytorchs(lengths):
    draw = torch.Generator().manual_seed(0)
    query, added = (torch.randn(3 * 4, 20, generator=draw) for _ in range(2))
    keys, values = (torch.randn(3, 7, 20, generator=draw) for _ in range(2))
    lengths = None if lengths is None else torch.tensor(lengths)
    torch.library.opcheck(torch.ops.seqfuse.luong_readout.default, (query, keys, values, added, lengths))
