"""Transformer against Marian and BART of transformers; generation from a cache against whole sequences."""

import pytest
import torch
import transformers
from hf_checks import close, greedy, loaded, randomised, returned

import seqfuse
from seqfuse import models
from seqfuse.models import Transformer
from seqfuse.models.attention_maps import attention_maps

SRC = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
TGT = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.tensor([4, 9, 7])
MASK = (torch.arange(9) < LENGTHS[:, None]).long()


def seq2seq(kind, **options):
    config = {"vocab_size": 60, "d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 3,
              "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "pad_token_id": 1,
              "max_position_embeddings": 32, "decoder_start_token_id": 2, "eos_token_id": 0,
              "forced_eos_token_id": None} | options  # fmt: skip
    if kind == "marian":
        model = transformers.MarianMTModel(transformers.MarianConfig(**config))
        sinusoids = [m.embed_positions for m in (model.model.encoder, model.model.decoder)]
        tables = [m.weight.clone() for m in sinusoids]
        randomised(model)
        with torch.no_grad():
            for module, table in zip(sinusoids, tables, strict=True):
                module.weight.copy_(table)
    else:
        model = randomised(transformers.BartForConditionalGeneration(transformers.BartConfig(**config)))
    model.final_logits_bias = torch.randn(model.final_logits_bias.shape)
    return model


FAMILIES = {
    "marian": lambda: seq2seq("marian"),
    "marian-scaled": lambda: seq2seq("marian", scale_embedding=True, activation_function="swish", decoder_layers=3),
    "marian-two-vocabularies": lambda: seq2seq("marian", decoder_vocab_size=50, share_encoder_decoder_embeddings=False),
    "bart": lambda: seq2seq("bart"),
    "marian-untied": lambda: seq2seq("marian", tie_word_embeddings=False),
    "bart-untied": lambda: seq2seq("bart", tie_word_embeddings=False, scale_embedding=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_same_greedy_ids_and_back(family, tmp_path):
    theirs = FAMILIES[family]()
    ours = loaded(theirs, tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(SRC, attention_mask=MASK, decoder_input_ids=TGT).logits
        close(ours(SRC, TGT, LENGTHS), wanted)
    options = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "num_beams": 1, "eos_token_id": None,
               "bad_words_ids": [[1]]}  # fmt: skip
    ids = theirs.generate(SRC, **options)
    assert torch.equal(greedy(ours, SRC, 12, LENGTHS), ids[:, 1:])
    again = returned(ours, type(theirs), tmp_path / "back")
    with torch.no_grad():
        close(again(SRC, attention_mask=MASK, decoder_input_ids=TGT).logits, wanted)
    # their configs make transformers end with eos where it may go no further
    assert torch.equal(again.generate(SRC, **options)[:, :-1], ids[:, :-1])


@torch.no_grad()
def test_attention_maps_are_theirs(tmp_path):
    """Of the encoder, the decoder, and the decoder over the source, whose padding nobody sees."""
    theirs = FAMILIES["marian"]()
    ours = loaded(theirs, tmp_path)
    theirs.set_attn_implementation("eager")
    out = theirs(SRC, attention_mask=MASK, decoder_input_ids=TGT, output_attentions=True)
    maps = attention_maps(ours, SRC, TGT, LENGTHS)
    wanted = {f"encoder.blocks.{i}.attention": t for i, t in enumerate(out.encoder_attentions)}
    wanted |= {
        "decoder.blocks.0.attention": out.decoder_attentions[0],
        "decoder.blocks.0.cross": out.cross_attentions[0],
    }
    assert list(maps) == list(wanted)
    for name, t in wanted.items():
        close(maps[name], t)
    assert (maps["decoder.blocks.0.cross"][0, :, :, LENGTHS[0] :] == 0).all()


def test_a_checkpoint_with_copies_of_its_embedding(tmp_path):
    ours = loaded(seq2seq("marian"), tmp_path)
    tensors = models.files.read_safetensors(tmp_path / "model.safetensors")
    shared = tensors.pop("model.shared.weight")
    tensors |= {f"model.{side}.embed_tokens.weight": shared.clone() for side in ("encoder", "decoder")}
    tensors |= {"lm_head.weight": shared.clone(), "model.encoder.embed_positions.weight": torch.zeros(32, 24)}
    models.files.write_tensors(tmp_path / "model.safetensors", tensors)
    assert torch.equal(models.load(tmp_path)(SRC, TGT), ours(SRC, TGT))


CONFIGS = {
    "vaswani": {},
    "pre-norm": {"norm_first": True, "positions": "learned", "activation": "gelu", "decoder_layers": 1},
    "modern": {"norm_first": True, "positions": "rope", "activation": "swiglu", "norm": "rms", "kv_heads": 2,
               "source_vocab": 70, "tied": False, "output_bias": True},
}  # fmt: skip


def small(name, **options):
    config = {"vocab": 60, "width": 32, "layers": 2, "heads": 4, "max_positions": 32, "bos_id": 1}
    return Transformer.from_config(config | CONFIGS[name] | options).eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_of_ragged_sources_equal_whole_sequences(name):
    model = small(name)
    logits, cache = model.begin(SRC, LENGTHS, capacity=16)
    target = torch.ones(3, 1, dtype=torch.long)
    for _ in range(6):
        alone = [model(s[None, :n], t[None])[0, -1] for s, n, t in zip(SRC, LENGTHS, target, strict=True)]
        close(logits, torch.stack(alone))
        chosen = logits.argmax(-1)
        target = torch.cat([target, chosen[:, None]], dim=1)
        logits = model.step(chosen, cache)


@pytest.mark.parametrize(
    "indices",
    [[[2, 0, 1]], [[1, 1]], [[0, 0, 1, 1, 2, 2], [1, 1, 3, 2, 4, 4], [5, 4, 0]], [[0, 2, 2, 1]]],
    ids=str,
)
def test_a_reordered_cache_goes_on_with_its_rows(indices):
    model = small("vaswani")
    logits, cache = model.begin(SRC, LENGTHS, capacity=16)
    rows, target = torch.arange(3), torch.ones(3, 1, dtype=torch.long)
    for index in map(torch.tensor, indices):
        chosen = logits.argmax(-1)
        cache.reorder(index)
        rows, target = rows[index], torch.cat([target, chosen[:, None]], dim=1)[index]
        logits = model.step(chosen[index], cache)
        close(logits, model(SRC[rows], target, LENGTHS[rows])[:, -1])
        assert torch.equal(cache.lengths, torch.full((len(index),), target.shape[1]))


def test_beams_share_the_keys_of_their_source():
    model = small("vaswani")
    _, cache = model.begin(SRC, LENGTHS, capacity=16)
    before = cache.sources[0][0]
    cache.reorder(torch.arange(3).repeat_interleave(4), grouped=True)
    cache.reorder(torch.tensor([1, 1, 0, 3, 4, 5, 6, 7, 11, 11, 11, 8]), grouped=True)
    assert cache.sources[0][0] is before
    cache.reorder(torch.arange(3))  # three beams of the first source
    assert cache.sources[0][0] is not before


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_compiled_and_on_every_backend(name, tmp_path):
    model = small(name)
    wanted = model(SRC, TGT, LENGTHS)
    model.save(tmp_path)
    again = models.load(tmp_path)
    assert again.config == model.config and torch.equal(again(SRC, TGT, LENGTHS), wanted)
    close(torch.compile(model, fullgraph=True, backend="eager")(SRC, TGT, LENGTHS), wanted)
    results = {}
    for backend in ("reference", "cpu", "auto"):
        if backend == "cpu" and seqfuse.native.missing():
            continue
        with seqfuse.backend(backend):
            model.zero_grad()
            loss = model.loss(SRC, TGT[:, :-1], TGT[:, 1:], LENGTHS)
            loss.backward()
            results[backend] = model(SRC, TGT, LENGTHS), loss, model.encoder.embedding.weight.grad.clone()
    for result in results.values():
        for got, expected in zip(result, results["reference"], strict=True):
            close(got, expected)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = small("modern")
    wanted = torch.nn.functional.cross_entropy(model(SRC, TGT, LENGTHS).flatten(0, 1), TGT.flatten())
    close(model.loss(SRC, TGT, TGT, LENGTHS), wanted)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = small("vaswani", checkpoint=checkpoint, dropout=0.1, attention_dropout=0.1).train()
        torch.manual_seed(1)
        model.loss(SRC, TGT, TGT, LENGTHS).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_sizes():
    model = small("vaswani")
    embedding, d = 60 * 32, 32
    attention, norm, mlp = 4 * (d * d + d), 2 * d, 8 * d * d + 5 * d
    assert model.num_parameters() == embedding + 2 * (attention + 2 * norm + mlp) + 2 * (2 * attention + 3 * norm + mlp)
    step = embedding + 2 * (2 * attention + 3 * norm + mlp) - 2 * 2 * (d * d + d)
    assert model.weight_bytes() == 4 * step


def test_padding_is_never_said():
    logits, _ = small("vaswani", pad_id=5).begin(SRC, LENGTHS, capacity=16)
    assert (logits[:, 5] == -torch.inf).all() and logits[:, :5].isfinite().all()


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: small("vaswani", bos_id=None), "start_id or bos_id must be given"),
        (lambda: small("vaswani")(SRC + 10, TGT), "Transformer: src must lie in 0 to 59, got"),
        (lambda: small("modern")(SRC, TGT + 20), "Transformer: tgt must lie in 0 to 59, got"),
        (lambda: small("vaswani").begin(SRC, None, 33), r"capacity must be 1 to 32 \(max_positions\), got 33"),
        (lambda: small("vaswani")(SRC, TGT, LENGTHS + 5), "lengths must lie in 1 to 9, got 9 to 14"),
    ],
    ids=range(5),
)
def test_what_is_wrong_is_said(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_what_hugging_face_has_no_model_for(tmp_path):
    with pytest.raises(ValueError, match="Marian has no counterpart of norm='rms'.*; Bart has no counterpart"):
        seqfuse.interop.export_hf(small("modern"), tmp_path)


@torch.no_grad()
def test_an_output_of_its_own_is_exported_with_the_embedding_that_both_sides_share(tmp_path):
    ours = small("vaswani", tied=False, output_bias=True, pad_id=3, eos_id=4)
    theirs = returned(ours, transformers.MarianMTModel, tmp_path)
    close(theirs(SRC, attention_mask=MASK, decoder_input_ids=TGT).logits, ours(SRC, TGT, LENGTHS))
    close(models.load(tmp_path)(SRC, TGT, LENGTHS), ours(SRC, TGT, LENGTHS))
