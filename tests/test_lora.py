"""LoRA through PEFT: adapters alone are trained, on every transformer, and what is left needs no PEFT."""

import json
import sys

import pytest
import task_files
import torch
from rich.console import Console
from training import run_recipe, together

from seqfuse import data, generate, models, trainer
from seqfuse.checkpoints import RunFolder
from seqfuse.parallel import processes
from seqfuse.recipes import RECIPES, lora
from seqfuse.run_report import evaluate

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"vocab": 20, "width": 16, "layers": 2, "heads": 2}
LLAMA = {"norm": "rms", "activation": "swiglu", "positions": "rope", "kv_heads": 1, "attention_bias": False,
         "mlp_bias": False, "tied": False}  # fmt: skip


def encoder():
    return models.Encoder(models.EncoderConfig(**SIZE, pooler=True))


def decoder(**options):
    return models.Decoder(models.DecoderConfig(**SIZE, **options))


MODELS = {
    "Decoder": decoder,
    "Llama": lambda: decoder(**LLAMA),
    "Encoder": encoder,
    "Transformer": lambda: models.Transformer(models.TransformerConfig(**SIZE, bos_id=1)),
    "Classifier": lambda: models.Classifier.on(encoder(), labels=3, pooling="pooler"),
    "Tagger": lambda: models.Tagger.on(encoder(), labels=3),
    "SpanQA": lambda: models.SpanQA.on(encoder()),
    "MaskedLM": lambda: models.MaskedLM.on(encoder()),
    "reward model": lambda: models.Classifier.on(decoder(), labels=1, pooling="last"),
    "ActorCritic": lambda: models.ActorCritic.on(decoder()),
}


def outputs(model):
    ids, lengths = torch.arange(12).view(2, 6), torch.tensor([6, 4])
    found = model(ids, ids) if isinstance(model, models.Transformer) else model(ids, lengths)
    found = found if isinstance(found, tuple) else (found,)
    values = (model.values(model.hidden(ids)),) if isinstance(model, models.ActorCritic) else ()
    return torch.cat([x[torch.isfinite(x)] for x in (*found, *values)])


@pytest.mark.parametrize("name", MODELS)
def test_every_transformer(name):
    """Adapters and the head change, nothing else does; merged they give a plain model that says the same."""
    model = MODELS[name]().double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    said = outputs(model)
    projections = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".blocks." in n}
    lora.attach(model, 2)
    torch.testing.assert_close(outputs(model), said, rtol=0, atol=0)  # one factor is zero in the beginning
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in before if not n.startswith("body.")} if isinstance(model, models.heads.Head) else set()
    assert head <= trained and all("lora_" in n for n in trained - head)
    adapted = {n.partition(".lora_")[0] for n in trained - head}
    assert adapted == projections  # none is left out

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (outputs(model) * torch.linspace(0, 1, len(said))).sum().backward()
        optimizer.step()
    merged = lora.merge(model.state_dict())
    assert merged.keys() == before.keys()
    changed = {n for n, t in merged.items() if not torch.equal(t, before[n])}
    assert changed == head | {f"{n}.weight" for n in adapted}
    plain = MODELS[name]().double()
    plain.load_state_dict(merged)
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(outputs(plain), said)
    if callable(getattr(model, "begin", None)):  # step by step, with a cache
        ids = torch.arange(8).view(2, 4)
        written = [generate(m.eval(), ids, max_new_tokens=6) for m in (model, plain)]
        assert torch.equal(*written)


def test_what_has_no_adapters():
    rnn = models.RNNEncoder(models.RNNEncoderConfig(vocab=8, embed=8, hidden=8))
    for model in (rnn, models.Tagger.on(rnn, labels=2)):
        with pytest.raises(data.DataError, match="adapters are for transformers, and a RNNEncoder is none"):
            lora.attach(model, 2)
    for recipe, changes in (("pos", {}), ("ner", {"arch": "transformer"}), ("align", {"stage": "sft"})):
        with pytest.raises(ValueError, match=r"adapters \(lora\) are for a .*, which start name"):
            RECIPES[recipe].configure(changes | {"lora": 2})


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(data.DataError, match="lora needs PEFT: pip install peft"):
        lora.attach(encoder(), 2)


# -------------------------------------------------------------------------------------------------------------- recipes

STEPS = {"max_steps": 3, "evaluate_every": 2, "checkpoint_every": 1, "log_every": 1, "batch_size": 8, "optim.warmup": 1,
         "optim.lr": 0.02, "lora": 2}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    task_files.write_tagged(folder), task_files.write_preferences(folder)
    text = task_files.write_labelled(folder).read_text()
    task_files.write_body(folder / "encoder", text)
    task_files.write_body(folder / "decoder", text, models.Decoder, models.DecoderConfig, positions="rope")
    return folder


def assert_adapted(folder, body, monkeypatch):
    """A plain model, whose body is another one by matrices of rank 2 at most in its projections alone."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        model = models.load(folder)
    own = model.body if isinstance(model, models.heads.Head) else model
    before = body.state_dict()
    changed = {n: t - before[n] for n, t in own.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(n.split(".")[-2] in ("qkv", "out", "up", "down") for n in changed)
    for difference in changed.values():
        sizes = torch.linalg.svdvals(difference.double())
        assert sizes[2:].max() < 1e-4 * sizes[0]


@pytest.mark.parametrize("recipe", ["pos", "ner", "sentiment"])
def test_fine_tuning_minilm(recipe, files, minilm, tmp_path, monkeypatch):
    """BERT's real weights, with one flag."""
    own = {"data": str(files / "labelled.tsv"), "labelled": 24} if recipe == "sentiment" else {
        "data": str(files / "tagged.conll"), "limit": 24}  # fmt: skip
    assert run_recipe(tmp_path, recipe, {"start": "minilm", "lora": 2, "max_steps": 3, "batch_size": 8} | own)
    assert_adapted(tmp_path, models.load(minilm), monkeypatch)


def test_an_interrupted_run_is_evaluated_with_its_adapters(files, tmp_path):
    """Before the first evaluation there are only checkpoints of steps, which hold adapters."""
    changes = STEPS | {"start": str(files / "encoder"), "data": str(files / "labelled.tsv"), "labelled": 24}
    config = RECIPES["sentiment"].configure(changes)
    assert run_recipe(tmp_path / "run", "sentiment", changes)
    found = json.loads((tmp_path / "run/results.json").read_text())["metrics"]
    folder = RunFolder(tmp_path / "run")
    (folder.path / "model.safetensors").unlink()
    for path in folder.newest("best"):
        path.rename(path.with_name("gone-" + path.name))
    findings, path = evaluate(RECIPES["sentiment"].task(config, "cpu", folder.path), folder)
    assert path.name == "step-000003" and findings.metrics["accuracy"] == found["accuracy"]
    assert findings.metrics["loss"] == pytest.approx(found["loss"], rel=1e-5)


ALIGN = task_files.ALIGN | STEPS | {"measured": 4}


def align(files, stage, **changes):
    options = ALIGN | {"stage": stage, "data": str(files / "preferences.jsonl"), "start": str(files / "decoder")}
    return {k: v for k, v in (options | changes).items() if not k.startswith("model.")}


@pytest.fixture(scope="module")
def reward(files, tmp_path_factory):
    """A reward model's folder."""
    folder = tmp_path_factory.mktemp("reward")
    assert run_recipe(folder, "align", align(files, "reward"))
    return str(folder)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "grpo", "ppo"])
def test_every_stage_of_align(stage, files, reward, tmp_path, monkeypatch):
    if stage == "reward":
        tmp_path = reward
    else:
        assert run_recipe(tmp_path, "align", align(files, stage, reward=reward))
    assert_adapted(tmp_path, models.load(files / "decoder"), monkeypatch)


SHARDINGS = ("ddp", "fsdp")


def train_both(folder, changes) -> None:
    torch.set_num_threads(1)
    with processes("cpu") as (group, device):
        for sharding in SHARDINGS:
            config = RECIPES["sentiment"].configure(changes | {"sharding": sharding})
            trainer.train_in(group, device, config, folder / sharding, Console(quiet=True))


def test_on_two_processes(files, tmp_path, monkeypatch):
    changes = STEPS | {"start": str(files / "encoder"), "data": str(files / "labelled.tsv"), "labelled": 24}
    assert together(2, train_both, tmp_path, changes) == [0, 0]
    for sharding in SHARDINGS:
        assert_adapted(tmp_path / sharding, models.load(files / "encoder"), monkeypatch)
