"""Recipes of tasks for a few steps on small data: tags, classes, answers."""

import json
import re

import pytest
import task_files
import torch
from rich.console import Console
from task_files import BILSTM, ENCODER, RNN, TRANSFORMER, ULMFIT
from typer.testing import CliRunner

import seqfuse
from seqfuse import data, models, schedules, trainer
from seqfuse.checkpoints import RunFolder
from seqfuse.cli import app
from seqfuse.parallel import pick_device
from seqfuse.recipes import RECIPES, qa
from seqfuse.recipes.texts import IGNORED
from seqfuse.run_report import PastRun, by_setting, evaluate, findings_of
from seqfuse.tokenizer import Tokenizer

STEPS = {"max_steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "log_every": 1, "batch_size": 8, "optim.warmup": 2}
SMALL = BILSTM | {"model.body.dropout_input": 0.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    return task_files.write_tagged(tmp_path_factory.mktemp("data"))


def configure(name, changes):
    return RECIPES[name].configure(STEPS | changes)


def run(config, folder) -> dict:
    assert trainer.train(config, folder, device="cpu", console=Console(quiet=True))
    found = json.loads((folder / "results.json").read_text())
    task = RECIPES[config.recipe].task(config, pick_device("cpu"), folder)
    assert evaluate(task, RunFolder(folder))[0].metrics == found["metrics"]  # as `seqfuse eval` says it
    assert (folder / "report.html").stat().st_size > 1000
    return found


# ---------------------------------------------------------------------------------------------------------------- tags


@pytest.mark.parametrize("name", ["pos", "ner"])
@pytest.mark.parametrize("size", [SMALL, ENCODER], ids=["bilstm", "transformer"])
def test_tags_are_learned(name, size, tagged, tmp_path):
    config = configure(name, size | {"data": str(tagged), "max_steps": 60, "evaluate_every": 30, "optim.lr": 0.02})
    found = run(config, tmp_path / "run")
    assert found["metrics"][found["objective"]] > 0.9
    model = models.load(tmp_path / "run")
    assert isinstance(model, models.Tagger) and model.config.label_names == ("B-A", "B-B", "B-C")
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "run")]).output
    assert "label_names" in shown and "B-A" in shown
    html = (tmp_path / "run" / "report.html").read_text()
    for section in ("Confusion matrix", "precision", "F1", "Sentences of the test split"):
        assert section in html


def test_a_tagger_starts_from_any_folder(tagged, tmp_path):
    first = run(configure("pos", ENCODER | {"data": str(tagged), "max_steps": 40, "optim.lr": 0.02}), tmp_path / "a")
    config = configure("pos", {"data": str(tagged), "start": str(tmp_path / "a"), "max_steps": 1})
    task = RECIPES["pos"].task(config)
    old, new = models.load(tmp_path / "a"), task.model
    for name, tensor in old.body.state_dict().items():
        assert torch.equal(new.body.state_dict()[name], tensor)
    assert first["metrics"]["accuracy"] > 0.9 and new.tokenizer.vocab_size == old.tokenizer.vocab_size
    assert task.encoded[0][0][0] == new.tokenizer.bos_id and task.encoded[0][1][0] == 1


def test_first_pieces_have_the_tags(tagged):
    task = RECIPES["pos"].task(configure("pos", SMALL | {"data": str(tagged), "longest": 3}))
    assert max(len(s.words) for s in task.train) == 3 and len(task.train) > 200
    ids, targets, lengths = task.batch([0, 1, 2])
    for row, sentence in enumerate(task.train[:3]):
        counted = targets[row] != IGNORED
        assert [task.names[i] for i in targets[row][counted]] == list(sentence.tags)
        assert task.pieces.decode(ids[row, : lengths[row]]).split() == list(sentence.words)
    sums = [task.loss(task.model.eval(), *task.batch([i])) for i in range(3)]
    together, count = task.loss(task.model, ids, targets, lengths)
    assert count == sum(int(n) for _, n in sums) and torch.allclose(together, sum(value for value, _ in sums))


def test_a_tag_that_training_has_not_counts_as_wrong(tagged, tmp_path):
    other = tmp_path / "test.conll"
    other.write_text("a1\tB-NEW\nb2\tB-B\n")
    task = RECIPES["pos"].task(configure("pos", SMALL | {"data": str(tagged), "test": str(other)}))
    findings = findings_of(task, task.model)
    assert findings.metrics["words"] == 2 and findings.metrics["accuracy"] <= 0.5


def test_a_bad_line_of_a_tagged_file_is_named(tmp_path):
    path = tmp_path / "mine.conll"
    path.write_text("EU B-ORG\nrejects\n")
    for name in ("pos", "ner"):
        with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: expected a word and its tag")):
            RECIPES[name].task(configure(name, {"data": str(path)}))


# ------------------------------------------------------------------------------------------------------- text to text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return task_files.write_pairs(tmp_path_factory.mktemp("pairs"))


TINY = TRANSFORMER | {"written": 4}
ARCHS = {"transformer": TINY, "decoder": TINY, "rnn": RNN | {"written": 4}}
FILES = {"summarize": "summaries.tsv", "qa": "questions.tsv"}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", FILES)
def test_text_to_text(name, arch, pairs, tmp_path):
    found = run(configure(name, ARCHS[arch] | {"arch": arch, "data": str(pairs / FILES[name])}), tmp_path / "run")
    assert {"summarize": "rougeL", "qa": "exact_match"}[name] in found["metrics"]


def test_positions_that_do_not_suffice_for_the_longest_pairs():
    for arch, needed in (("decoder", 240), ("transformer", 120)):
        changes = {"arch": arch, "model.max_positions": needed}
        assert configure("summarize", changes).positions == needed
        with pytest.raises(ValueError, match=f"max_positions must be at least {needed} for longest=120"):
            configure("summarize", changes | {"model.max_positions": needed - 1})


def test_a_decoder_alone_is_asked_for_the_target_only(pairs):
    task = RECIPES["summarize"].task(
        configure("summarize", TINY | {"arch": "decoder", "data": str(pairs / "summaries.tsv")})
    )
    ids, targets = task.batch([0, 1])
    for row, (source, target) in enumerate(task.train[:2]):
        whole = [*source, task.pieces.bos_id, *target]
        assert ids[row, : len(whole) - 1].tolist() == whole[:-1]
        assert targets[row][targets[row] != IGNORED].tolist() == target
        assert targets[row, len(source) : len(source) + len(target)].tolist() == target


def test_a_decoder_alone_learns_few_pairs_by_heart(pairs, tmp_path):
    """And writes them with generate, whatever the lengths of the prompts in a batch."""
    size = TINY | {"model.width": 32, "model.dropout": 0.0, "limit": 8, "max_steps": 150, "batch_size": 8}
    changes = {"arch": "decoder", "overfit": True, "data": str(pairs / "summaries.tsv"), "optim.lr": 0.01}
    found = run(configure("summarize", size | changes), tmp_path / "run")
    assert found["metrics"]["rouge1"] == 100
    model = models.load(tmp_path / "run")  # and who asks the finished model for a text gets what the recipe wrote
    task = RECIPES["summarize"].task(configure("summarize", size | changes), "cpu", tmp_path / "run")
    source, target = task.test[0]
    assert seqfuse.generate(model, source, max_new_tokens=task.config.written).removeprefix(source).strip() == target


def test_a_file_is_read_to_its_end(tmp_path):
    (tmp_path / "mine.txt").write_text("some words of text\n" * 1000)
    task = RECIPES["charlm"].task(RECIPES["charlm"].configure({"data": str(tmp_path / "mine.txt"), "limit": 500}))
    assert len(task.train_ids) + len(task.held_ids) == 19_000
    task = RECIPES["charlm"].task(RECIPES["charlm"].configure({"text": "stdlib", "limit": 5000}))
    assert len(task.train_ids) + len(task.held_ids) == 5000


def test_characters_that_are_no_tokens(tmp_path):
    """A few are said, many are refused: they would all be <unk>, and easily foretold."""
    (tmp_path / "few.txt").write_text("some words of text\n" * 2000 + "\u4e00")
    task = RECIPES["charlm"].task(RECIPES["charlm"].configure({"data": str(tmp_path / "few.txt"), "vocab": 16}))
    assert task.said.endswith("1 characters are too rare to be tokens")
    (tmp_path / "meant.txt").write_text("some words <unk>\n" * 2000)  # as in Penn Treebank
    for tokens in ("characters", "bpe"):
        changes = {"data": str(tmp_path / "meant.txt"), "tokens": tokens}
        assert RECIPES["charlm"].task(RECIPES["charlm"].configure(changes)).said.endswith("are held out")
    (tmp_path / "many.txt").write_text("".join(chr(0x4E00 + i % 2000) for i in range(20_000)))
    with pytest.raises(data.DataError, match="many.txt: .* are none of the 1000 tokens"):
        RECIPES["charlm"].task(RECIPES["charlm"].configure({"data": str(tmp_path / "many.txt")}))


def test_bad_lines_of_text_to_text(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("a\tb\tc\nalone\n")
    for name, says in (("summarize", "expected text<TAB>summary"), ("qa", "expected question<TAB>passage<TAB>answer")):
        with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: {says}")):
            RECIPES[name].task(configure(name, {"data": str(path)}))


def test_squad_files(tmp_path):
    path = tmp_path / "squad.json"
    asked = [
        {"question": "who?", "answers": [{"text": "Ann"}, {"text": "Ann B."}]},
        {"question": "when?", "answers": []},
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann came.", "qas": asked}]}]}))
    passage = "Ann came."
    assert qa.read_squad(path) == [("who?", passage, ("Ann", "Ann B."), passage), ("when?", passage, (), passage)]
    there = f"{path}: data[0].paragraphs[0].qas[0]: the key "
    for key, value, says in (
        ("question", 1, "'question' must be a text"),
        ("answers", {}, "'answers' must be a list"),
        ("answers", [{}], "'text' is missing"),
    ):
        wrong = [asked[0] | {key: value}]
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann came.", "qas": wrong}]}]}))
        with pytest.raises(data.DataError, match=re.escape(there + says)):
            qa.read_squad(path)
    for content in ("[]", '{"data": 5}', "{}"):
        path.write_text(content)
        with pytest.raises(data.DataError, match=re.escape(f"{path}: no SQuAD file: the key 'data' ")):
            qa.read_squad(path)
    del asked[1]["question"]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann came.", "qas": asked}]}]}))
    with pytest.raises(data.DataError, match=re.escape(f"{path}: data[0].paragraphs[0].qas[1]: the key 'question'")):
        qa.read_squad(path)
    path.write_text('{"data":\n [}')
    with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: no JSON")):
        qa.read_squad(path)


def test_cloze_questions():
    text = "Emma met Harriet there. They walked on. It rained. Then the tall Harriet, laughing, ran. All was well."
    passage = "Emma met Harriet there. They walked on. It rained."
    assert qa.cloze(text) == [("Then the tall _____, laughing, ran.", passage, ("Harriet",), "block 0")]


def test_no_passage_reaches_over_the_border_of_a_block():
    sentences = [f"It was Emma {chr(97 + i % 26) * (1 + i // 26)}." for i in range(2 * qa.BLOCK)]
    found = qa.cloze(" ".join(sentences))
    assert len(found) == 2 * (qa.BLOCK - qa.BEFORE)
    for _, passage, _, block in found:
        places = [i for i, sentence in enumerate(sentences) if sentence in passage.replace(". ", ".\n").split("\n")]
        assert len(places) == qa.BEFORE and {f"block {i // qa.BLOCK}" for i in places} == {block}


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return task_files.write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, labelled):
    """The folder of an Encoder with a tokenizer."""
    return task_files.write_body(tmp_path_factory.mktemp("encoder"), labelled.read_text())


def test_sentiment_is_learned(labelled, encoder, tmp_path):
    changes = {"data": str(labelled), "start": str(encoder), "labelled": 100, "max_steps": 60, "optim.lr": 0.01}
    found = run(configure("sentiment", changes), tmp_path / "run")
    assert found["metrics"]["accuracy"] > 0.9 and found["metrics"]["labelled"] == 100
    assert models.load(tmp_path / "run").config.label_names == ("neg", "pos")
    html = (tmp_path / "run" / "report.html").read_text()
    assert all(section in html for section in ("Confusion matrix", "precision", "Surest mistakes"))
    task = RECIPES["sentiment"].task(configure("sentiment", changes))
    again, other = (RECIPES["sentiment"].task(configure("sentiment", changes | {"seed": s})) for s in (0, 1))
    assert task.train == again.train != other.train and task.test == other.test
    assert not {text for text, _ in task.test} & {text for text, _ in task.pool}


def test_runs_that_differ_in_a_number_make_a_curve():
    """The label-efficiency curve: a line for pretrained and one for scratch."""
    past = [
        PastRun(f"{n}-{scratch}", configure("sentiment", {"labelled": n, "scratch": scratch}).to_dict(), [],
                {"metrics": {"accuracy": n / 1000 + scratch / 10}})
        for n in (100, 50, 500) for scratch in (False, True)
    ]  # fmt: skip
    (chart,) = by_setting(past)
    assert "accuracy by labelled" in chart and chart.count("<polyline") == 2 and chart.count("<circle") == 6 + 2
    assert "scratch True" in chart and "scratch False" in chart
    assert by_setting(past[:1]) == by_setting(past[:2]) == []
    rates = [
        PastRun(str(lr), configure("sentiment", {"optim.lr": lr}).to_dict(), [], {"metrics": {"accuracy": lr}})
        for lr in (3e-5, 1e-4, 1e-3)
    ]
    (chart,) = by_setting(rates)
    points = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)[:3]]
    assert points == sorted(points) and points[2] - points[0] > 700  # of 880: 3e-05 is a number like 0.001


def test_a_curve_in_the_report(labelled, encoder, tmp_path):
    """Accuracy against labelled examples, pretrained and from scratch, from runs within the run's folder."""
    changes = {"data": str(labelled), "start": str(encoder), "labelled": 40, "curve": (20, 10), "max_steps": 2}
    run(configure("sentiment", changes), tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text()
    chart = html[html.index("Label efficiency") :].partition("</svg>")[0]
    assert (
        "labelled examples" in chart and chart.count("<polyline") == 2 and chart.count("<circle") == 3 + 2 + 2
    )  # and the keys
    for n in (10, 20):
        for name, steps in ((f"labelled-{n}", 2), (f"labelled-{n}-scratch", 6)):
            results = json.loads((tmp_path / "run" / name / "results.json").read_text())
            assert results["metrics"]["labelled"] == n and results["steps"] == steps
            assert f"{100 * results['metrics']['accuracy']:.1f}" in html
    with pytest.raises(ValueError, match="a curve trains from scratch too"):
        configure("sentiment", changes | {"scratch": True})
    with pytest.raises(ValueError, match=r"curve must hold positive numbers, got \[0\]"):
        configure("sentiment", changes | {"curve": (0,)})


def test_examples_longer_than_the_body_has_positions_for(labelled, tagged, encoder, tmp_path):
    says = "an example of .* tokens is longer than the 512 that the model has positions for .* lower longest"
    with pytest.raises(data.DataError, match=f"longest: {says}"):
        RECIPES["sentiment"].task(
            configure("sentiment", {"data": str(labelled), "start": str(encoder), "longest": 513})
        )
    changes = ENCODER | {"data": str(tagged), "model.body.max_positions": 8}
    with pytest.raises(data.DataError, match=f"longest: {says.replace('512', '8')}"):
        RECIPES["pos"].task(configure("pos", changes))
    task = RECIPES["pos"].task(configure("pos", changes | {"longest": 2}))
    with torch.no_grad():
        assert task.evaluate(task.model.eval())["loss"] > 0


def test_scratch_is_the_same_architecture(labelled, encoder):
    changes = {"data": str(labelled), "start": str(encoder)}
    one = RECIPES["sentiment"].task(configure("sentiment", changes)).model
    two = RECIPES["sentiment"].task(configure("sentiment", changes | {"scratch": True})).model
    assert one.config == two.config and one.tokenizer.vocab_size == two.tokenizer.vocab_size
    old = models.load(encoder).stack.embedding.weight
    assert torch.equal(one.body.stack.embedding.weight, old) and not torch.equal(two.body.stack.embedding.weight, old)


def test_lora_trains_adapters_and_leaves_a_plain_model(labelled, encoder, tmp_path):
    pytest.importorskip("peft")
    changes = {"data": str(labelled), "start": str(encoder), "lora": 2, "optim.lr": 0.05, "max_steps": 6}
    config = configure("sentiment", changes)
    task = RECIPES["sentiment"].task(config)
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or name.startswith("output.") for name in trained)
    found = run(config, tmp_path / "run")
    kept, old = models.load(tmp_path / "run"), models.load(encoder)
    assert torch.equal(kept.body.stack.embedding.weight, old.stack.embedding.weight)
    assert not torch.equal(kept.body.stack.blocks[0].mlp.up.weight, old.stack.blocks[0].mlp.up.weight)
    last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][-1]["evaluation"]
    with torch.no_grad():  # the merged one says the same
        assert task.evaluate(kept)["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert found["steps"] == 6


def test_sentiment_refuses(labelled, tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("good\tpos\nalone\n")
    with pytest.raises(data.DataError, match=re.escape(f"{path}, line 2: expected text<TAB>label")):
        RECIPES["ulmfit"].task(configure("ulmfit", {"data": str(path), "text": "stdlib"}))
    path.write_text("\n".join(f"text {i}\tpos" for i in range(100)))
    with pytest.raises(data.DataError, match=re.escape(f"{path}: all texts have the label 'pos'; two labels")):
        RECIPES["ulmfit"].task(configure("ulmfit", {"data": str(path), "text": "stdlib"}))
    with pytest.raises(ValueError, match="not for scratch"):
        configure("sentiment", {"scratch": True, "lora": 4})


def test_ulmfit_goes_through_its_stages(labelled, tmp_path, monkeypatch):
    config = configure("ulmfit", ULMFIT | {"data": str(labelled), "unfreeze": 2})
    run(config, tmp_path / "run")
    target, general = tmp_path / "run" / "target", tmp_path / "run" / "target" / "general"
    assert all(RunFolder(folder).finished for folder in (target, general))
    assert models.load(tmp_path / "run").config.label_names == ("neg", "pos")
    whole = [(folder / "tokenizer.json").read_bytes() for folder in (tmp_path / "run", target, general)]
    assert whole[0] == whole[1] == whole[2]

    task = RECIPES["ulmfit"].task(configure("ulmfit", ULMFIT | {"data": str(labelled), "start": str(target)}))
    assert task.ready(tmp_path, None)
    for name, tensor in models.load(target).state_dict().items():
        assert torch.equal(task.model.body.state_dict()[name], tensor)


def test_passages_of_one_text_are_in_one_split(monkeypatch):
    rows = [(f"passage {n} of text {g}", ("news", "fiction")[g % 2], f"text{g}") for g in range(60) for n in range(3)]
    monkeypatch.setattr(data, "brown_genres", lambda: rows)
    task = RECIPES["ulmfit"].task(configure("ulmfit", ULMFIT | {"text": "stdlib", "scratch": True, "labelled": 0}))
    found = [{text.rpartition(" ")[2] for text, _ in part} for part in (task.train, task.valid, task.test)]
    assert sum(map(len, found)) == 60 == len(set.union(*found)) and all(found)
    assert len(task.train) == 3 * len(found[0])


def test_ulmfit_starts_from_another_tokenizer(labelled, tmp_path):
    """What a token is the model decides, not the texts; a model of another size is refused."""
    tokenizer = Tokenizer.train(["other texts"], "bpe", vocab=270)
    sizes = {"embed": 16, "hidden": 16}
    for name, changes in (("a", {}), ("b", {"hidden": 24})):
        config = models.RNNLanguageModelConfig(**sizes | changes | {"layers": 2}, **tokenizer.config())
        model = models.RNNLanguageModel(config)
        model.tokenizer = tokenizer
        model.to(torch.bfloat16).save(tmp_path / name)
    changes = ULMFIT | {"data": str(labelled), "model.layers": 2}
    task = RECIPES["ulmfit"].task(configure("ulmfit", changes | {"start": str(tmp_path / "a")}))
    assert task.pieces.vocab_size == tokenizer.vocab_size and task.ready(tmp_path, None)
    assert all(p.dtype == torch.float32 for p in task.model.parameters())
    task = RECIPES["ulmfit"].task(configure("ulmfit", changes | {"start": str(tmp_path / "b")}))
    with pytest.raises(data.DataError, match="b: its model is another one .* hidden is 24, not 16"):
        task.ready(tmp_path, None)


def test_ulmfit_rates(labelled):
    task = RECIPES["ulmfit"].task(configure("ulmfit", ULMFIT | {"data": str(labelled), "unfreeze": 5}))
    groups = {name: task.group(name) for name, _ in task.model.named_parameters()}
    assert groups["output.weight"] == 0 and groups["body.body.layers.1.weight_hh_l0"] == 1
    assert groups["body.body.layers.0.weight_ih_l0"] == 2 and groups["body.body.embedding.weight"] == 3
    assert [task.rate(2, step) for step in (0, 9, 10)] == [0, 0, pytest.approx(2.6**-2)]
    assert task.rate(0, 0) == 1


def test_frozen_layers_stay_as_they_are(labelled, tmp_path):
    config = configure("ulmfit", ULMFIT | {"data": str(labelled), "unfreeze": 3, "max_steps": 4})
    task = RECIPES["ulmfit"].task(config)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    training = trainer.Trainer(task, tmp_path)
    changed = []
    for _ in range(4):
        training.step(training.next_batch())
        changed.append(
            {task.group(name) for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
        )
    assert changed[2] == {0} and changed[3] == {0, 1}


def test_slanted_triangle():
    """Up and down in straight lines, from 1/32 of the rate and back."""
    factors = [schedules.factor("slanted", step, 10, 110) for step in (0, 5, 10, 60, 110)]
    assert factors == pytest.approx([1 / 32, 33 / 64, 1, 33 / 64, 1 / 32])
