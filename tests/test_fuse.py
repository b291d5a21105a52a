"""fuse / unfuse / explain on models as people write them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqfuse
from seqfuse.testing import assert_accurate


class Tagger(nn.Module):
    """Embedding, norm, two-way LSTM, GRU, norm, linear: an ordinary model."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.norm = nn.LayerNorm(32)
        self.encoder = nn.LSTM(32, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.decoder = nn.GRU(48, 40, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 7))

    def forward(self, ids):
        x, _ = self.encoder(self.norm(self.embed(ids)))
        return self.out(self.decoder(x)[0])


def step(model, ids, dtype=None):
    model.zero_grad()
    out = model(ids)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    out.backward(g)
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture
def ids():
    return torch.randint(0, 20, (5, 11))


def test_fused_model_keeps_the_error_rule(ids):
    model = Tagger()
    exact = step(copy.deepcopy(model).double(), ids)
    theirs = step(model, ids)
    got = step(seqfuse.fuse(model), ids)
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c)


def test_same_objects_same_keys_and_back(ids):
    model = Tagger()
    expected = model(ids)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys, text = list(model.state_dict()), repr(model)
    assert seqfuse.fuse(model) is model
    assert type(model.encoder) is seqfuse.nn.LSTM and type(model.decoder) is seqfuse.nn.GRU
    assert type(model.norm) is type(model.out[0]) is seqfuse.nn.LayerNorm
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys and repr(model) == text
    seqfuse.fuse(model)  # twice is once
    assert seqfuse.unfuse(model) is model
    assert type(model.encoder) is nn.LSTM and type(model.norm) is nn.LayerNorm
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert torch.equal(model(ids), expected)


def test_optimizer_made_before_fusing_still_works(ids):
    def train(fuse):
        torch.manual_seed(0)
        model = Tagger()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if fuse:
            seqfuse.fuse(model)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 7)
            loss.backward()
            optimizer.step()
        return loss.detach(), [p.detach() for p in model.parameters()]

    (loss, weights), (expected, theirs) = train(True), train(False)
    assert_accurate(loss, expected.double())
    for a, b in zip(weights, theirs, strict=True):
        assert_accurate(a, b.double())


def test_hooks_are_kept(ids):
    model, seen = Tagger(), []
    model.encoder.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model.encoder.register_forward_hook(lambda m, args, out: seen.append("post"))
    model.norm.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    step(seqfuse.fuse(model), ids)
    assert seen == ["pre", "post", "backward"]


def test_shared_module_is_fused_once():
    shared = nn.LSTM(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    seqfuse.fuse(model)
    assert model["a"] is model["b"] is shared and type(shared) is seqfuse.nn.LSTM


def test_tied_weights_stay_tied():
    a, b = nn.GRU(8, 8), nn.GRU(8, 8)
    b.weight_hh_l0 = a.weight_hh_l0
    model = nn.ModuleList([a, b])
    seqfuse.fuse(model)
    x = torch.randn(4, 2, 8)
    b(a(x)[0])[0].sum().backward()
    assert a.weight_hh_l0 is b.weight_hh_l0 and len(list(model.parameters())) == 7
    assert a.weight_hh_l0.grad.abs().sum() > 0


class Halved(nn.Module):
    def forward(self, w):
        return w * 0.5


def test_parametrized_weights():
    module = nn.LSTM(6, 10)
    parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    x = torch.randn(4, 3, 6)
    expected = module(x)[0]
    seqfuse.fuse(module)
    assert isinstance(module, seqfuse.nn.LSTM) and parametrize.is_parametrized(module, "weight_hh_l0")
    got = module(x)[0]
    assert_accurate(got, expected.double())
    got.sum().backward()
    assert module.parametrizations.weight_hh_l0.original.grad is not None
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x)[0], got)
    seqfuse.unfuse(module)
    assert isinstance(module, nn.LSTM) and parametrize.is_parametrized(module)
    assert_accurate(module(x)[0], expected.double())


def test_weight_norm_as_a_parametrization():
    module = parametrizations.weight_norm(nn.GRU(6, 10), "weight_hh_l0")
    x = torch.randn(4, 3, 6)
    expected = module(x)[0]
    assert_accurate(seqfuse.fuse(module)(x)[0], expected.double())


def test_edited_weights_are_seen():
    module = seqfuse.fuse(nn.LSTM(6, 10))
    x = torch.randn(4, 3, 6)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(40, 10))
    plain = nn.LSTM(6, 10)
    plain.load_state_dict(module.state_dict())
    assert_accurate(module(x)[0], plain(x)[0].double())


def test_packed_sequences_run_on_the_kernel():
    x, lengths = torch.randn(3, 7, 6), torch.tensor([5, 7, 2])
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        module = kind(6, 10, batch_first=True, bidirectional=True)

        def call(m, x):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, state = m(packed)
            return pad_packed_sequence(out, batch_first=True)[0], *(state if isinstance(state, tuple) else [state])

        exact, theirs = call(copy.deepcopy(module).double(), x.double()), call(module, x)
        for got, truth, pytorch in zip(call(seqfuse.fuse(module), x), exact, theirs, strict=True):
            assert_accurate(got, truth, pytorch)
        assert seqfuse.explain(module)[0].backend == "cpu"


def test_proj_size_runs_on_the_kernel_and_float64_goes_to_torch():
    module = nn.LSTM(6, 10, proj_size=5)
    x = torch.randn(4, 3, 6)
    exact, theirs = copy.deepcopy(module).double()(x.double()), module(x)
    got = seqfuse.fuse(module)(x)
    assert_accurate(got[0], exact[0], theirs[0])
    for g, e, t in zip(got[1], exact[1], theirs[1], strict=True):
        assert_accurate(g, e, t)
    assert seqfuse.explain(module)[0].backend == "cpu"
    double = nn.GRU(6, 10).double()
    expected = double(x.double())[0]
    assert torch.equal(seqfuse.fuse(double)(x.double())[0], expected)
    assert "torch" in str(seqfuse.explain(double)) and "float64" in str(seqfuse.explain(double))


def test_unbatched_input():
    module = nn.LSTM(6, 10)
    x = torch.randn(4, 6)
    expected, (h, c) = module(x, (torch.ones(1, 10), torch.ones(1, 10)))
    got, (h2, c2) = seqfuse.fuse(module)(x, (torch.ones(1, 10), torch.ones(1, 10)))
    for a, b in ((got, expected), (h2, h), (c2, c)):
        assert_accurate(a, b.double())


def test_include_and_exclude():
    model = seqfuse.fuse(Tagger(), include=["encoder", "out.*"])
    assert type(model.encoder) is seqfuse.nn.LSTM and type(model.out[0]) is seqfuse.nn.LayerNorm
    assert type(model.decoder) is nn.GRU and type(model.norm) is nn.LayerNorm
    model = seqfuse.fuse(Tagger(), exclude=[nn.LayerNorm])
    assert type(model.norm) is nn.LayerNorm and type(model.decoder) is seqfuse.nn.GRU
    with pytest.raises(TypeError, match="include takes module paths and module classes"):
        seqfuse.fuse(Tagger(), include=[3])
    with pytest.raises(TypeError, match="include takes module paths and module classes, got 3"):
        seqfuse.fuse(Tagger(), include=3)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        seqfuse.fuse(3)
    with pytest.warns(UserWarning, match="no module's path is 'encodr', which exclude names"):
        seqfuse.fuse(Tagger(), exclude="encodr")


def test_include_and_exclude_by_any_path_container_or_class_of_ours():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.LSTM(4, 4)
            self.inside = nn.Sequential(self.a, nn.LayerNorm(4))

    for pattern in ("a", "inside", "inside.0", "*.0", seqfuse.nn.LSTM, nn.RNNBase):
        assert type(seqfuse.fuse(Shared(), exclude=pattern).a) is nn.LSTM
        assert type(seqfuse.fuse(Shared(), include=pattern).a) is seqfuse.nn.LSTM
    assert type(seqfuse.fuse(Shared(), exclude="inside").inside[1]) is nn.LayerNorm
    assert type(seqfuse.fuse(Shared(), include="a").inside[1]) is nn.LayerNorm


def test_subclasses_are_left_alone():
    class Mine(nn.LSTM):
        def forward(self, x):
            return "mine"

    class Same(nn.LSTM):
        pass

    assert type(seqfuse.fuse(nn.Sequential(Same(4, 4)))[0]) is Same
    model = seqfuse.fuse(nn.Sequential(Mine(4, 4)))
    assert type(model[0]) is Mine and model(torch.randn(2, 1, 4)) == "mine"


def test_deepcopy_pickle_and_state_dict_both_ways(ids):
    plain, fused = Tagger(), seqfuse.fuse(Tagger())
    fused.load_state_dict(plain.state_dict(), strict=True)
    expected = plain(ids)
    assert_accurate(fused(ids), expected.double())
    plain.load_state_dict(fused.state_dict(), strict=True)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(again(ids), fused(ids))
    back = seqfuse.unfuse(pickle.loads(pickle.dumps(fused)))
    assert torch.equal(back(ids), expected)
    assert torch.equal(seqfuse.unfuse(copy.deepcopy(fused)).double().float()(ids), expected)


def test_transformer_layer_with_fused_norms():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.randn(2, 5, 32)
    layer.eval()
    expected = layer(x)
    seqfuse.fuse(layer)
    assert type(layer.norm1) is seqfuse.nn.LayerNorm
    with torch.no_grad():  # torch's fast path reads the norm's weights itself
        assert_accurate(layer(x), expected.double())
    assert_accurate(layer(x), expected.double())


def test_compiled_fused_model_has_no_graph_break(ids):
    model = seqfuse.fuse(Tagger())
    expected = step(model, ids)
    got = step(torch.compile(model, fullgraph=True), ids)
    for a, b in zip(got, expected, strict=True):
        assert_accurate(a, b.double(), b)


def test_explain_shows_choice_and_reasons(ids):
    model = Tagger()
    assert "no fused module" in str(seqfuse.explain(model))
    seqfuse.fuse(model)
    before = seqfuse.explain(model)
    assert [row.module for row in before] == ["norm", "encoder", "decoder", "out.0"]
    assert all("not called yet" in row.reason for row in before)
    with seqfuse.backend("reference"):
        model(ids)
    assert [row.backend for row in seqfuse.explain(model)] == ["reference"] * 4
    after = seqfuse.explain(model, ids)
    assert [row.op for row in after] == ["layer_norm", "lstm", "gru", "layer_norm"]
    assert all("asked for" not in row.reason for row in after)
    assert "encoder" in str(after) and "not called yet" not in str(after)


def test_explain_after_a_call_that_failed():
    model, x = seqfuse.fuse(nn.Sequential(nn.LSTM(8, 8))), torch.randn(40, 3, 8)
    model(x)
    wanted = seqfuse.explain(model)[0]
    with pytest.raises(ValueError):
        model[0](x, lengths=[1])
    seqfuse.ops.layer_norm(torch.randn(3, 8))
    assert seqfuse.explain(model)[0] == wanted


def test_explain_says_what_it_takes_and_what_a_backend_can_not_run():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        seqfuse.explain("model")
    if not torch.cuda.is_available():
        with seqfuse.backend("cuda"):
            (row,) = seqfuse.explain(seqfuse.nn.LSTM(8, 8))
        assert row.backend == "none" and "no CUDA device is available" in row.reason


@pytest.mark.parametrize(
    "module", [nn.LSTM(8, 8), nn.GRU(8, 8), nn.GRUCell(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8)], ids=str
)
def test_meta_tensors(module):
    fused = seqfuse.fuse(copy.deepcopy(module)).to("meta")
    x = torch.randn(4, 8, device="meta")
    x = x[None] if "RNN" in type(module).__bases__[0].__name__ and "Cell" not in type(module).__name__ else x
    found, wanted = fused(x), copy.deepcopy(module).to("meta")(x)
    first = found[0] if isinstance(found, tuple) else found
    assert first.is_meta and first.shape == (wanted[0] if isinstance(wanted, tuple) else wanted).shape


def test_a_layer_norm_of_another_dtype_or_device_gets_one_sentence():
    norm = seqfuse.nn.LayerNorm(8)
    with pytest.raises(RuntimeError, match="LayerNorm: input is float64, but weight is float32: convert one of them"):
        norm(torch.randn(3, 8).double())
    with pytest.raises(ValueError, match="weight is on cpu, but x is on meta"):
        norm(torch.randn(3, 8, device="meta"))


def test_explain_evaluates_no_parametrization():
    plain = torch.nn.utils.parametrizations.spectral_norm(nn.GRUCell(8, 8), "weight_hh")
    fused = seqfuse.fuse(copy.deepcopy(plain))
    x, h = torch.randn(4, 8), torch.randn(4, 8)
    for model in (plain, fused):
        for _ in range(3):
            model(x, h)
    (one,), (other,) = (m.parametrizations.weight_hh for m in (plain, fused))
    assert torch.equal(one._u, other._u)
