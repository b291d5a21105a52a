"""Encoder and its heads against BERT of transformers; the real weights of a sentence encoder."""

import pytest
import torch
import transformers
from hf_checks import close, loaded, randomised, returned

import seqfuse
from seqfuse import models
from seqfuse.models import Classifier, Decoder, Encoder, MaskedLM, SpanQA, Tagger

IDS = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(1))
TYPES = (torch.arange(9) > 4).long().expand(3, 9).contiguous()
LENGTHS = torch.tensor([4, 9, 7])
MASK = (torch.arange(9) < LENGTHS[:, None]).long()
THERE = MASK.bool()


def bert(cls, **options):
    config = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
              "intermediate_size": 40, "max_position_embeddings": 16, "num_labels": 5} | options  # fmt: skip
    return randomised(cls(transformers.BertConfig(**config)))


HEADS = {
    Encoder: (transformers.BertModel, "last_hidden_state"),
    MaskedLM: (transformers.BertForMaskedLM, "logits"),
    Classifier: (transformers.BertForSequenceClassification, "logits"),
    Tagger: (transformers.BertForTokenClassification, "logits"),
}


@pytest.mark.parametrize("head", HEADS, ids=lambda h: h.__name__)
@torch.no_grad()
def test_same_outputs_and_back(head, tmp_path):
    cls, name = HEADS[head]
    theirs = bert(cls)
    ours = loaded(theirs, tmp_path / "theirs")
    assert type(ours) is head
    wanted = theirs(IDS, attention_mask=MASK, token_type_ids=TYPES)[name]
    got = ours(IDS, LENGTHS, types=TYPES)
    keep = THERE if got.dim() == 3 else slice(None)
    close(got[keep], wanted[keep])
    again = returned(ours, cls, tmp_path / "back")
    assert torch.equal(again(IDS, attention_mask=MASK, token_type_ids=TYPES)[name][keep], wanted[keep])
    if head is Encoder:
        close(ours.pooled(ours(IDS, LENGTHS)), theirs(IDS, attention_mask=MASK).pooler_output)


@pytest.mark.parametrize("head", [Classifier, Tagger])
def test_names_of_labels_are_kept(head, tmp_path):
    cls, names = HEADS[head][0], ("none", "person", "place")
    ids = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    ours = loaded(bert(cls, num_labels=3, **ids), tmp_path / "theirs")
    assert ours.config.labels == 3 and ours.config.label_names == names
    ours.save(tmp_path / "ours")
    assert models.load(tmp_path / "ours").config == ours.config
    again = returned(ours, cls, tmp_path / "back").config
    assert {"id2label": again.id2label, "label2id": again.label2id} == ids


@torch.no_grad()
def test_spans(tmp_path):
    theirs = bert(transformers.BertForQuestionAnswering, num_labels=2)
    ours = loaded(theirs, tmp_path / "theirs")
    wanted = theirs(IDS, attention_mask=MASK)
    start, end = ours(IDS, LENGTHS)
    close(start[THERE], wanted.start_logits[THERE])
    close(end[THERE], wanted.end_logits[THERE])
    assert (start[~THERE] == -torch.inf).all() and (end[~THERE] == -torch.inf).all()
    returned(ours, transformers.BertForQuestionAnswering, tmp_path / "back")


def test_names_of_old_checkpoints(tmp_path):
    theirs = bert(transformers.BertForMaskedLM)
    ours = loaded(theirs, tmp_path)
    tensors = models.files.read_safetensors(tmp_path / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()}  # fmt: skip
    old |= {"cls.predictions.decoder.weight": torch.zeros(60, 24), "bert.pooler.dense.weight": torch.zeros(24, 24)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert torch.equal(models.load(tmp_path)(IDS), ours(IDS))


@pytest.mark.parametrize("kind", [transformers.BertForTokenClassification, transformers.BertForQuestionAnswering])
def test_a_pooler_that_was_left_over_is_left_out(kind, tmp_path):
    ours = loaded(bert(kind, num_labels=2), tmp_path)
    tensors = models.files.read_safetensors(tmp_path / "model.safetensors")
    tensors |= {"bert.pooler.dense.weight": torch.zeros(24, 24), "bert.pooler.dense.bias": torch.zeros(24)}
    models.files.write_tensors(tmp_path / "model.safetensors", tensors)
    for a, b in zip(models.load(tmp_path).parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_masked_lm_with_a_vocabulary_matrix_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tie_word_embeddings False is not supported"):
        loaded(bert(transformers.BertForMaskedLM, tie_word_embeddings=False), tmp_path)


BODY = {"vocab": 60, "width": 24, "layers": 2, "heads": 3, "max_positions": 16}


def encoder(**options):
    return Encoder.from_config(BODY | options).eval()


def decoder(**options):
    return Decoder.from_config(BODY | options).eval()


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "pooler"])
def test_padding_does_not_change_a_class(pooling):
    model = Classifier.on(encoder(pooler=True), labels=3, pooling=pooling).eval()
    batch = model(IDS, LENGTHS)
    assert batch.shape == (3, 3)
    for row, n, got in zip(IDS, LENGTHS, batch, strict=True):
        close(got, model(row[None, :n])[0])


def test_a_reward_model_over_a_decoder():
    model = Classifier.on(decoder(), labels=1, pooling="last").eval()
    rewards = model(IDS, LENGTHS)
    assert rewards.shape == (3,)
    loss = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
    loss.backward()
    assert model.body.stack.embedding.weight.grad.abs().sum() > 0
    close(model.loss(IDS, torch.zeros(3), LENGTHS), rewards.square().mean())


def test_losses_are_those_of_the_logits():
    tags = torch.randint(0, 4, (3, 9)).masked_fill(~THERE, -100)
    tagger = Tagger.on(encoder(), labels=4).eval()
    wanted = torch.nn.functional.cross_entropy(tagger(IDS, LENGTHS).flatten(0, 1), tags.flatten())
    close(tagger.loss(IDS, tags, LENGTHS), wanted)
    spans, starts, ends = SpanQA.on(encoder()).eval(), torch.tensor([0, 3, 2]), torch.tensor([3, 8, 2])
    start, end = spans(IDS, LENGTHS)
    wanted = (torch.nn.functional.cross_entropy(start, starts) + torch.nn.functional.cross_entropy(end, ends)) / 2
    close(spans.loss(IDS, starts, ends, LENGTHS), wanted)
    masked = MaskedLM.on(encoder(), mask_id=4).eval()
    wanted = torch.nn.functional.cross_entropy(masked(IDS, LENGTHS)[THERE], IDS[THERE])
    close(masked.loss(IDS, IDS.masked_fill(~THERE, -100), LENGTHS), wanted)


ALL = {
    "Encoder": lambda: encoder(pooler=True),
    "MaskedLM": lambda: MaskedLM.on(encoder(activation="relu"), mask_id=3),
    "Classifier": lambda: Classifier.on(encoder(positions="rope", norm="rms"), labels=3, pooling="mean"),
    "Tagger": lambda: Tagger.on(encoder(token_types=0, norm_first=True), labels=4),
    "SpanQA": lambda: SpanQA.on(encoder()),
    "over a Decoder": lambda: Classifier.on(decoder(), labels=1, pooling="last"),
}


def flat(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([y.masked_fill(y.isinf(), 0).flatten() for y in outputs])


@pytest.mark.parametrize("name", ALL)
def test_saved_compiled_and_on_every_backend(name, tmp_path):
    model = ALL[name]().eval()
    wanted = flat(model(IDS, LENGTHS))
    model.save(tmp_path)
    again = models.load(tmp_path)
    assert again.config == model.config and torch.equal(flat(again(IDS, LENGTHS)), wanted)
    assert again.num_parameters() == model.num_parameters() == sum(p.numel() for p in model.parameters())
    close(flat(torch.compile(model, fullgraph=True, backend="eager")(IDS, LENGTHS)), wanted)
    for backend in ("reference", "cpu"):
        if backend == "cpu" and seqfuse.native.missing():
            continue
        with seqfuse.backend(backend):
            close(flat(model(IDS, LENGTHS)), wanted)


def test_checkpointing_of_a_body_gives_the_same_gradients():
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        config = {"body": {"model": "Encoder", "dropout": 0.1} | BODY, "labels": 4, "checkpoint": checkpoint}
        model = Tagger.from_config(config).train()
        assert model.body.config.checkpoint == checkpoint
        torch.manual_seed(1)
        model.loss(IDS, IDS % 4, LENGTHS).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Classifier.on(encoder(), labels=2, pooling="pooler"), 'pooling "pooler" needs a body with a pooler'),
        (lambda: Classifier.on(encoder(), labels=0), "labels must be positive, got 0"),
        (lambda: Tagger.on(encoder(), labels=2, label_names=("A",)), r"must be as many as labels, 2, got \('A',\)"),
        (lambda: Tagger.on(encoder(), labels=1, label_names=["A"]), "must be a list, each of it a string or None"),
        (lambda: MaskedLM.on(decoder()), "body must be an EncoderConfig"),
        (lambda: Tagger.from_config({"labels": 2, "body": {"model": "Dreamer"}}), '"model" must be one of .*Encoder'),
        (lambda: encoder().pooled(torch.zeros(1, 2, 24)), "Encoder: it has no pooler"),
    ],
    ids=range(7),
)
def test_what_is_wrong_is_said(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("head", [Classifier, Tagger])
def test_what_hugging_face_has_no_head_for(head, tmp_path):
    with pytest.raises(ValueError, match="BERT has no counterpart of a .* over a Decoder"):
        seqfuse.interop.export_hf(head.on(decoder(), labels=2), tmp_path)


SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
]


@torch.no_grad()
def test_real_weights(minilm):
    ours = models.load(minilm)
    rows = [ours.tokenizer.encode(sentence) for sentence in SENTENCES]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    there = torch.arange(ids.shape[1]) < lengths[:, None]
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    x = ours(ids, lengths)
    close(x[there], theirs(ids, attention_mask=there.long()).last_hidden_state[there])
    means = Classifier.on(ours, labels=1, pooling="mean").pool(x, lengths)
    alike = torch.nn.functional.cosine_similarity(means[:1], means)
    assert alike[1] > 0.4 > 0.2 > alike[2]


@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(norm_first):
    """Branches in bfloat16, what they are added to in float32."""
    torch.manual_seed(0)
    model = models.Encoder(models.EncoderConfig(vocab=11, width=16, layers=2, heads=2, norm_first=norm_first))
    ids = torch.arange(10)[None]
    with torch.autocast("cpu", torch.bfloat16):
        x = model(ids)
    x.sum().backward()
    assert x.dtype == torch.float32 and torch.isfinite(model.stack.embedding.weight.grad).all()
