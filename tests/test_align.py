"""Recipe align: every stage for a few steps on made-up preferences, and what its pieces compute."""

import dataclasses
import io
import json
import math
import random
import tarfile

import pytest
import task_files
import torch
from rich.console import Console
from training import together

from seqfuse import comparison, data, models, run_report, testing, trainer
from seqfuse.benchmarks import claims
from seqfuse.checkpoints import RunFolder
from seqfuse.data import DataError, Rated, preferences
from seqfuse.recipes import RECIPES, alignment, on_policy, policies
from seqfuse.recipes.alignment import Rows
from seqfuse.recipes.texts import IGNORED

ALIGN = RECIPES["align"]
SMALL = task_files.ALIGN | {"batch_size": 4, "max_steps": 3, "evaluate_every": 2, "checkpoint_every": 1, "log_every": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return task_files.write_preferences(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def earlier(file, tmp_path_factory):
    """The folders of a fine-tuned model and a reward model."""
    folder = tmp_path_factory.mktemp("earlier")
    changes = {"data": str(file), "max_steps": 2}
    assert run(folder / "sft", "sft", changes)
    assert run(folder / "reward", "reward", changes | {"start": str(folder / "sft")})
    return {"data": str(file), "start": str(folder / "sft"), "reward": str(folder / "reward")}


def run(folder, stage, changes):
    config = ALIGN.configure(SMALL | {"stage": stage} | changes)
    return trainer.train(config, folder, device="cpu", console=Console(quiet=True))


def ready(stage, earlier, folder, **changes):
    """A task whose reference and reward model are there."""
    task = ALIGN.task(ALIGN.configure(SMALL | {"stage": stage} | earlier | changes))
    assert task.ready(folder, train=None)
    return task


def results(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


# --------------------------------------------------------------------------------------------------------------- stages


def test_one_command_trains_all_stages(file, tmp_path):
    assert run(tmp_path / "run", "grpo", {"data": str(file)})
    for name in ("sft", "reward", "."):
        assert (tmp_path / "run" / name / "report.html").is_file()
    assert type(models.load(tmp_path / "run" / "reward")) is models.Classifier
    found = results(tmp_path / "run")
    assert {"reward", "reward_before", "kl", "within_bound"} <= found.keys()
    config = ALIGN.read(json.loads((tmp_path / "run" / "run.json").read_text())["config"])
    task = ALIGN.task(config, "cpu", tmp_path / "run")  # as `seqfuse eval` makes it
    assert run_report.evaluate(task, RunFolder(tmp_path / "run"))[0].metrics == found


def test_all_stages_on_two_processes(file, tmp_path):
    assert together(2, run, tmp_path / "run", "ppo", {"data": str(file)}) == [0, 0]
    assert type(models.load(tmp_path / "run")) is models.Decoder
    assert "reward_before" in results(tmp_path / "run")


@pytest.mark.parametrize("stage", ["dpo", "grpo", "ppo"])
def test_a_stage_on_finished_ones(stage, earlier, tmp_path):
    assert run(tmp_path, stage, earlier)
    assert not (tmp_path / "sft").exists()
    assert type(models.load(tmp_path)) is models.Decoder  # ppo leaves no critic
    before = models.load(earlier["start"]).state_dict()
    after = models.load(tmp_path).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    html = (tmp_path / "report.html").read_text()
    assert all(
        part in html for part in ("reward by step", "kl by step", "Before and after", "Samples", "reward_before")
    )


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_stage_in_bf16(stage, earlier, tmp_path):
    assert run(tmp_path, stage, earlier | {"precision": "bf16"})
    assert math.isfinite(results(tmp_path)["reward"])


@pytest.mark.parametrize("stage, updates", [("grpo", 2), ("ppo", 3), ("dpo", 1)])
def test_a_resumed_run_draws_the_same_answers(stage, updates, earlier, tmp_path, monkeypatch):
    """Stopped after the first step on some answers, of which others follow: they are in the checkpoint."""
    changes = earlier | {"updates": updates, "max_steps": 5}
    assert run(tmp_path / "whole", stage, changes)
    step, stops = trainer.Trainer.step, [1, 4]

    def stopping(self, indices):
        if self.progress.step in stops:
            stops.remove(self.progress.step)
            raise SystemExit
        step(self, indices)

    monkeypatch.setattr(trainer.Trainer, "step", stopping)
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(tmp_path / "parted", stage, changes)
    assert run(tmp_path / "parted", stage, changes)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parted")]
    assert weights[0] == weights[1]
    assert results(tmp_path / "whole") == results(tmp_path / "parted")


def test_the_bound_decides_which_weights_are_kept(earlier, tmp_path):
    """Beyond kl_bound the objective is below that of everything within, whatever its reward."""
    task = ready("grpo", earlier, tmp_path, kl_bound=1e-3)
    rewards = task.rewards
    task.rewards = lambda rows: rewards(rows) - 1e3
    with torch.no_grad():
        near = task.evaluate(task.model)
        task.model.output_weights()[0].mul_(3)
        far = task.evaluate(task.model)
    assert near["bounded_reward"] == near["reward"] and near["kl"] <= 1e-3
    assert far["kl"] > 1e-3 and far["bounded_reward"] < near["bounded_reward"] < -900
    assert far["bounded_reward"] == policies.BEYOND - far["kl"]  # beyond it, what is nearer is better


# ---------------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_programmatic_reward_is_learned(stage, earlier, tmp_path, monkeypatch):
    """Rewarded is the share of an answer's tokens that are even numbers: chance gives about a half."""

    def rewards(self, rows):
        answer = rows.targets != IGNORED
        return ((rows.targets % 2 == 0) & answer).sum(1) / answer.sum(1)

    monkeypatch.setattr(policies.Measured, "rewards", rewards)
    changes = earlier | {"max_steps": 60, "optim.lr": 2e-2, "optim.warmup": 1, "evaluate_every": 60, "samples": 16,
                         "checkpoint_every": 60, "beta": 0.0, "kl_bound": 1e6, "unfinished": 0.0}  # fmt: skip
    assert run(tmp_path, stage, changes)
    found = results(tmp_path)
    assert found["reward_before"] < 0.65 and found["reward"] > 0.85, found
    assert found["kl"] > 0


def test_dpo_learns_its_pairs(earlier, tmp_path):
    task = ready("dpo", earlier, tmp_path)
    batch = task.batch(list(range(16)))
    first = float(task.loss(task.model, *batch)[0].detach()) / 16
    testing.assert_accurate(torch.tensor(first), torch.tensor(0.5, dtype=torch.float64).log().neg())  # no margin yet
    optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss, count = task.loss(task.model, *batch)
        (loss / count).backward()
        optimizer.step()
    assert float(loss.detach()) / count < 0.5 * first


def test_a_finished_reward_model_has_a_scale(earlier, tmp_path):
    task = ready("reward", earlier, tmp_path)
    with torch.no_grad():
        task.model.output.weight.normal_(std=3)
    _, chosen, rejected = task.accuracy(task.model)
    unit = chosen - rejected
    assert unit != 0
    task.finished(task.model)
    _, after_chosen, after_rejected = task.accuracy(task.model)
    assert abs(after_rejected) < 1e-5
    assert abs(after_chosen - (1.0 if unit > 0 else unit)) < 1e-5


# ------------------------------------------------------------------------------------------------------------ its parts


def test_rows_predict_answers_only():
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]])
    rows = Rows(ids, torch.tensor([2, 1]), torch.tensor([5, 3]))
    assert rows.targets.tolist() == [[IGNORED, 6, 7, 2], [8, 2, IGNORED, IGNORED]]
    assert rows.inputs.tolist() == ids[:, :-1].tolist()


def test_samples_end_where_they_end(earlier, tmp_path):
    """The first <eos> of an answer ends it, one that stands in the prompt does not; without one it has all tokens."""
    task = ready("grpo", earlier, tmp_path)
    eos = task.model_tokenizer.eos_id
    prompts = [[1, eos, 9], [1, 9]] * 20
    rows = task.sample(task.model, prompts)
    assert rows.ids.shape == (40, task.config.longest)
    for ids, first, length, prompt in zip(*map(torch.Tensor.tolist, rows), prompts, strict=True):
        answer = ids[first:length]
        assert ids[:first] == prompt and 1 <= len(answer) <= task.config.answer
        assert eos not in answer[:-1] and set(ids[length:]) <= {task.pad_id}
        assert answer[-1] == eos or len(answer) == task.config.answer
    ended = task.have_ended(rows).tolist()
    assert ended == [row[n - 1] == eos for row, n in zip(rows.ids.tolist(), rows.lengths.tolist(), strict=True)]


@pytest.fixture
def another(earlier, tmp_path):
    """The fine-tuned model as other people keep theirs: the tokenizer puts <s> in front of each text, the config says
    that another token than the tokenizer's <eos> ends one, or a third one, and padding is the third one too."""
    model = models.load(earlier["start"])
    names = ["a", "b"]  # of tokens that the text has as well; the vocabulary is full
    first, second = map(model.tokenizer.id_of, names)
    model.tokenizer.with_template("<bos> $A")
    model.config = dataclasses.replace(model.config, eos_id=first, more_eos_ids=(second,), pad_id=second)
    model.save(tmp_path / "another")
    return {"start": str(tmp_path / "another")}, (first, second)


def test_a_model_from_elsewhere_keeps_its_tokens(earlier, another, tmp_path):
    start, ends = another
    task = ready("grpo", earlier | start, tmp_path)
    assert task.ends == ends and task.bos_id == task.model_tokenizer.bos_id
    for part in task.demonstrations:
        assert all(ids.count(task.bos_id) == 1 and ids[0] == task.bos_id and ids[-1] == ends[0] for ids, _ in part)
    assert all(ids.count(task.bos_id) == 1 for part in task.prompts for ids in part)
    prompts = [[1, *ends, 9], [1, 9]] * 30
    rows = task.sample(task.model, prompts)
    for ids, first, length, prompt in zip(*map(torch.Tensor.tolist, rows), prompts, strict=True):
        answer = ids[first:length]
        assert ids[:first] == prompt and not set(ends) & set(answer[:-1]) and set(ids[length:]) <= {task.pad_id}
        assert answer[-1] in ends or len(answer) == task.config.answer
    assert 0 < int(task.have_ended(rows).sum()) < 60


def test_who_asks_the_finished_model_starts_as_training_did(earlier):
    model = models.load(earlier["start"])
    assert model.tokenizer.encode("ab")[0] == model.tokenizer.bos_id


def test_dpo_takes_its_ratios_without_dropout(earlier, tmp_path):
    model = models.load(earlier["start"])
    model.config = dataclasses.replace(model.config, dropout=0.5)
    model.save(tmp_path / "dropout")
    task = ready("dpo", earlier | {"start": str(tmp_path / "dropout")}, tmp_path)
    task.model.train()
    batch = task.batch([0, 1, 2, 3])
    assert float(task.loss(task.model, *batch)[0].detach()) / 4 == pytest.approx(math.log(2), rel=1e-5)


def test_label_smoothing_is_dpos_or_refused(earlier, tmp_path):
    task = ready("dpo", earlier, tmp_path, label_smoothing=0.25)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        batch = task.batch([0, 1, 2, 3])
        smooth = float(task.loss(task.model, *batch)[0])
        task.config = dataclasses.replace(task.config, label_smoothing=0.0)
        assert smooth != float(task.loss(task.model, *batch)[0])
    with pytest.raises(ValueError, match="label_smoothing is of sft and dpo, grpo has none"):
        ALIGN.configure(SMALL | {"stage": "grpo", "label_smoothing": 0.1})


def test_divergence_is_that_of_whole_distributions(earlier, tmp_path):
    task = ready("grpo", earlier, tmp_path)
    rows = task.sample(task.model, task.prompts[0][:6])
    assert float(task.divergence(task.model, rows).abs()) < 1e-4
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def plain(dtype):
        p, q = (m.to(dtype)(rows.inputs).log_softmax(-1) for m in (task.model, task.reference))
        return ((p.exp() * (p - q)).sum(-1) * (rows.targets != IGNORED)).sum().detach()

    ours = task.divergence(task.model, rows)
    testing.assert_accurate(ours, plain(torch.float64), plain(torch.float32))


def test_the_first_step_on_answers_is_on_policy(earlier, tmp_path):
    """Log-probabilities that were kept are those of the model that drew: all ratios are 1, the reference is equal."""
    task = ready("ppo", earlier, tmp_path)
    B = task.config.batch_size
    batch = dict(zip(task.kept, task.batch(task.order(0)[0]), strict=True))
    assert batch["ids"].shape[:2] == (B, task.config.samples)
    rows = Rows(*(batch[name].flatten(0, 1) for name in ("ids", "first", "lengths")))
    now = task.opinions(task.model, rows.inputs, rows.targets)
    for name in ("log_probs", "values"):
        assert torch.equal(now[name], batch[name].flatten(0, 1))
    testing.assert_accurate(batch["reference_log_probs"], batch["log_probs"].double())
    again = task.batch(task.order(0)[1])
    assert all(torch.equal(a, b) for a, b in zip(batch.values(), again, strict=True))


def test_parts_of_a_batch_keep_their_own_answers(earlier, tmp_path):
    """As under torchrun, or with accumulate: later steps find what their part drew."""
    task = ready("grpo", earlier, tmp_path)
    first, second = task.order(0)[:2]
    drawn = [task.batch(first[:1]), task.batch(first[1:])]
    for part, kept in zip((second[:1], second[1:]), drawn, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(task.batch(part), kept, strict=True))


# ----------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a", "chosen": "b"}', "the key 'rejected' must be a text"),
        ('{"prompt": "a", "chosen": "b", "rejected": ', "no JSON"),
        ('["a", "b", "c"]', "expected an object"),
    ],
)
def test_malformed_preferences(line, said, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    with pytest.raises(DataError, match=f"mine.jsonl, line 2: {said}"):
        ALIGN.task(ALIGN.configure(SMALL | {"stage": "sft", "data": str(path)}))


def test_too_few_preferences(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    with pytest.raises(DataError, match="split has no demonstrations"):
        ALIGN.task(ALIGN.configure(SMALL | {"stage": "sft", "data": str(path)}))


def test_prompts_and_answers_that_are_too_long(file):
    with pytest.raises(DataError, match="too long"):
        ALIGN.task(ALIGN.configure(SMALL | {"stage": "sft", "data": str(file), "longest": 4, "answer": 2}))


def test_pairs_have_one_length_and_the_better_text_first():
    draw = random.Random(1)
    texts = [Rated(" ".join(draw.choices("abcdef", k=draw.randint(1, 4))) + f" {i}", i % 9 - 4.0) for i in range(200)]
    rating = dict(texts)
    pairs = data.length_matched_pairs(texts, gap=2.0, rounds=2)
    assert len(pairs) > 50 and pairs == data.length_matched_pairs(texts, gap=2.0, rounds=2)
    for pair in pairs:
        assert len(pair.chosen.split()) == len(pair.rejected.split())
        assert rating[pair.chosen] - rating[pair.rejected] >= 2.0


def test_reviews_become_pairs_prompts_and_demonstrations(tmp_path, monkeypatch):
    """Read from the archive as it is, CRLF and all; prompts are the first words, pairs lie within a split."""
    draw = random.Random(2)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(6, 8))) for _ in range(300)]
    lines = [f"{i}\t{i % 9 - 4 + 0.5}\t{text}" for i, text in enumerate(texts)]
    content = "\r\n".join(lines).encode()
    with tarfile.open(tmp_path / "ratings.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(preferences, "fetch", lambda item: tmp_path / "ratings.tar.gz")
    assert data.rated_reviews()[1] == (texts[1], -2.5)
    task = ALIGN.task(ALIGN.configure(SMALL | {"stage": "dpo", "start": None, "longest": 40}))
    decode = task.model_tokenizer.decode
    held = {decode(ids) for ids, _ in task.demonstrations[1]}
    assert 10 < len(held) < 60 and "300 sentences" in task.said
    assert {decode(ids) for pair in task.pairs[1] for ids, _ in pair} <= held
    assert all(any(text.startswith(decode(ids)) for text in held) for ids in task.prompts[1])
    assert all(len(decode(ids).split()) == task.config.prompt_words for ids in task.prompts[1])
    train, asked = (list(map(tuple, part)) for part in task.prompts)
    assert len(set(asked)) == len(asked) and not set(train) & set(asked)


def test_splits_share_no_prompt(file):
    task = ALIGN.task(ALIGN.configure(SMALL | {"stage": "sft", "data": str(file)}))
    train, held = ({tuple(ids) for ids in part} for part in task.prompts)
    assert train and held and not train & held
    assert all(tuple(ids[:n]) in held for ids, n in task.demonstrations[1])


def test_the_report_asks_other_prompts_than_those_that_chose_the_weights(earlier, tmp_path, monkeypatch):
    task, asked = ready("dpo", earlier, tmp_path, measured=2), []
    monkeypatch.setattr(task, "measure", lambda model, prompts, seed: asked.append((prompts, seed)) or {"kl": 0.0})
    task.evaluate(task.model)
    monkeypatch.undo()
    chosen_by, reported = asked[0][0], task.reported
    assert chosen_by == task.prompts[1][:2] and reported == task.prompts[1][2:4] and len(reported) == 2
    values = task.report(task.model).metrics
    assert values["reward"] == task.measure(task.model, reported, alignment.REPORT_SEED)["reward"]


def test_a_model_to_start_from_is_trained_in_float32(file, earlier, tmp_path):
    model = models.load(earlier["start"])
    model.to(torch.bfloat16).save(tmp_path / "half")
    task = ALIGN.task(ALIGN.configure(SMALL | earlier | {"stage": "dpo", "start": str(tmp_path / "half")}))
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="samples must be two at least"):
        ALIGN.configure({"stage": "grpo", "samples": 1})
    with pytest.raises(ValueError, match="sharding must be ddp"):
        ALIGN.configure({"stage": "ppo", "sharding": "fsdp"})
    with pytest.raises(ValueError, match="longest must leave room"):
        ALIGN.configure({"answer": 55})


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "grpo"])
def test_compared_with_plain_pytorch(stage, earlier):
    """Stages with a loss on held-out examples; others say that they have none."""
    config = ALIGN.configure(SMALL | {"stage": stage} | earlier)
    if stage == "grpo":
        with pytest.raises(ValueError, match="grpo has no loss on held-out examples"):
            comparison.compare(config, device="cpu", console=Console(quiet=True))
        return
    assert comparison.compare(config, device="cpu", console=Console(quiet=True)).steps == 6


def test_dpo_without_a_model_to_start_from(file):
    config = ALIGN.configure(SMALL | {"stage": "dpo", "data": str(file)})
    with pytest.raises(ValueError, match="dpo needs start"):
        comparison.compare(config, device="cpu", console=Console(quiet=True))


def test_a_model_that_is_no_reward_model(earlier, tmp_path):
    task = ready("grpo", earlier | {"reward": earlier["start"]}, tmp_path)
    with pytest.raises(DataError, match="is a Decoder, not a reward model"):
        task.evaluate(task.model)


def test_no_dropout_where_ratios_are_taken(earlier, tmp_path):
    task = ready("grpo", earlier, tmp_path)
    task.model.train()
    task.batch(task.order(0)[0])
    assert not task.model.training


def test_a_critic_generates_as_its_body(earlier, tmp_path):
    task = ready("ppo", earlier, tmp_path)
    task.model.save(tmp_path / "critic")
    both = models.load(tmp_path / "critic"), models.load(earlier["start"])
    assert type(both[0]) is models.ActorCritic
    ids = [alignment.answers(model, task.prompts[0][:4], 8, seed=3) for model in both]
    assert torch.equal(*ids)
    assert isinstance(task, on_policy.Ppo) and dataclasses.is_dataclass(both[0].config)


def test_the_claim_is_judged_by_reward_and_bound(tmp_path):
    claim = next(claim for claim in claims.CLAIMS if claim.name == "align")
    values = {"reward": 1.1, "reward_before": 0.5, "kl": 9.0, "kl_bound": 20.0, "within_bound": "yes",
              "distinct_2": 0.4, "distinct_2_before": 0.5}  # fmt: skip
    folders = {one.name: tmp_path / one.name for one in claim.runs}
    changes = {"align-grpo": {}, "align-ppo": {"reward": 0.9}, "align-dpo": {"within_bound": "no"}}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"metrics": values | changes[name]}))
        (folder / "log.jsonl").write_text(json.dumps({"step": 5, "evaluation": {"reward": 1.0}}) + "\n")
    assert [finding.holds for finding in claim.judge(folders)] == [True, False, False]
    assert "reward by step" in claim.chart(folders)
    later = claims.command_of(claim.runs[1], tmp_path)
    assert f"start={folders['align-grpo'] / 'sft'}" in later and f"reward={folders['align-grpo'] / 'reward'}" in later
