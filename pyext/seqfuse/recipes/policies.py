"""Policies of recipe `align`: how they are measured against their reference and a reward model; and DPO."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from seqfuse import ops, report
from seqfuse.data import DataError
from seqfuse.models.base import Model
from seqfuse.models.heads import Classifier
from seqfuse.recipes.alignment import REPORT_SEED, SAMPLING_SEED, SHOWN, Align, OnPairs, Rows, answers
from seqfuse.recipes.base import Findings
from seqfuse.recipes.texts import EVALUATED_ROWS, IGNORED

BEYOND = -1e6  # of rewards beyond the bound: below all others, which are near those of texts, between 0 and 1


class Measured(Align):
    """A policy: how its answers to held-out prompts are rewarded, and how far it has gone from its reference.

    chosen_by, reported: held-out prompts that decide which weights are kept, and others that the report measures.
    """

    objective = "bounded_reward"
    higher = True

    def prepare(self):
        super().prepare()
        held = self.prompts[1]
        count = min(self.config.measured, len(held) // 2)
        if count == 0:
            raise DataError(
                f"{self.config.data or 'ratings'}: one held-out prompt is too few: some choose the weights, the report "
                "measures others"
            )
        self.chosen_by, self.reported = held[:count], held[count : 2 * count]

    def ready(self, folder, train):
        config = self.config
        if not super().ready(folder, train):
            return False
        if config.reward is not None:
            return True
        steps = config.reward_steps or 2 * config.max_steps
        return train(self.earlier("reward", steps, start=str(self.start_folder.absolute())), "reward")

    @functools.cached_property
    def reference(self) -> Model:
        return self.loaded(self.start_folder).requires_grad_(False)

    @functools.cached_property
    def reward_model(self) -> Classifier:
        folder = Path(self.config.reward or self.folder / "reward")
        model = self.loaded(folder).requires_grad_(False)
        if not isinstance(model, Classifier) or model.config.labels != 1:
            raise DataError(f"{folder}: is a {type(model).__name__}, not a reward model: a Classifier with one label")
        if model.config.vocab != self.model.config.vocab:
            raise DataError(f"{folder}: knows {model.config.vocab} tokens, the policy {self.model.config.vocab}")
        return model

    def sample(self, model: Model, prompts: list[list[int]], seed: int | None = None) -> Rows:
        """One answer to each prompt, drawn from the model's own distribution: [B, longest]."""
        ids = answers(model, prompts, self.config.answer, seed)
        ids = torch.nn.functional.pad(ids, (0, self.config.longest - ids.shape[1]), value=self.pad_id)
        first = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        drawn = (place >= first[:, None]) & (place < first[:, None] + self.config.answer)
        ended = self.is_end(ids) & drawn
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, first + self.config.answer)
        return Rows(ids.where(place < lengths[:, None], self.pad_id), first, lengths)

    def have_ended(self, rows: Rows) -> Tensor:
        """[B] bool: whether an answer has an end."""
        return self.is_end(rows.ids.gather(1, rows.lengths[:, None] - 1)[:, 0])

    def is_end(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.ends, device=ids.device))

    @torch.no_grad()
    def rewards(self, rows: Rows) -> Tensor:
        """[B] float32."""
        return self.reward_model(rows.ids, rows.lengths).float()

    @torch.no_grad()
    def divergence(self, model: Model, rows: Rows) -> Tensor:
        """KL(model || reference), summed over the tokens of all answers: at each token that of the two distributions,
        not an estimate from the one that was drawn."""
        (x, weight), (y, other) = (vocabulary(m, rows.inputs) for m in (model, self.reference))
        return ops.kl_loss(y, other, x, weight, mask=rows.targets != IGNORED, reduction="sum")

    def evaluate(self, model):
        return self.measure(model, self.chosen_by, SAMPLING_SEED)

    def measure(self, model: Model, prompts: list[list[int]], seed: int) -> dict[str, float]:
        rewards, kl, lengths, ended, written = [], 0.0, [], [], []
        for i in range(0, len(prompts), EVALUATED_ROWS):
            rows = self.sample(model, prompts[i : i + EVALUATED_ROWS], seed + i)
            rewards.append(self.rewards(rows))
            kl += float(self.divergence(model, rows)) / len(prompts)
            lengths.append(rows.lengths - rows.first)
            ended.append(self.have_ended(rows))
            written += rows.targets.tolist()
        reward = float(torch.cat(rewards).double().mean())
        return {
            "bounded_reward": reward if kl <= self.config.kl_bound else BEYOND - kl,  # there the nearest is best
            "reward": reward,
            "kl": kl,
            "answer_tokens": float(torch.cat(lengths).double().mean()),
            "ended": float(torch.cat(ended).double().mean()),
            "distinct_2": distinct_pairs(written),
        }

    def report(self, model):
        """Reward and distance before and after, and what both write, on prompts that chose nothing."""
        before, after = (self.measure(m, self.reported, REPORT_SEED) for m in (self.reference, model))
        values = {name: value for name, value in after.items() if name != "bounded_reward"}
        values |= {
            "reward_before": before["reward"],
            "distinct_2_before": before["distinct_2"],
            "kl_bound": self.config.kl_bound,
            "within_bound": "yes" if after["kl"] <= self.config.kl_bound else "no",
        }
        if before["reward"] > 0:  # else it was worse than the rejected texts, and a multiple of it says nothing
            values["reward_ratio"] = after["reward"] / before["reward"]
        names = [name for name in after if name != "bounded_reward"]
        numbers = report.table(["", "fine-tuned", "aligned"],
                               [(n, f"{before[n]:.3g}", f"{after[n]:.3g}") for n in names], (1, 2))  # fmt: skip
        prompts = self.reported[:SHOWN]
        texts = [
            [self.model_tokenizer.decode(ids) for ids in self.sample(m, prompts, REPORT_SEED).ids]
            for m in (self.reference, model)
        ]
        samples = report.table(["before", "after"], list(zip(*texts, strict=True)))
        said = report.paragraph(
            "Reward is the reward model's: 0 is the mean of the held-out rejected texts, 1 that of the chosen ones. "
            "kl is the KL divergence of the aligned model from the fine-tuned one, in nats for an answer."
        )
        sections = [report.section("Before and after", said, numbers), report.section("Samples", samples)]
        text = "\n".join(f"before  {a}\nafter   {b}\n" for a, b in zip(*texts, strict=True))
        return Findings(values, sections, text)


class Dpo(Measured, OnPairs):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290). Its evaluation asks a reward model; its
    training does not."""

    def batch(self, indices):
        self.model.eval()  # no dropout: the reference has none either
        return super().batch(indices)

    def loss(self, model, *batch):
        rows = Rows(*batch)
        inputs, targets = rows.inputs, rows.targets
        with torch.no_grad():
            reference = log_probs(self.reference, self.reference.hidden(inputs), targets).sum(1)
        weight, bias = model.output_weights()
        loss = ops.dpo_loss(model.hidden(inputs), weight, targets, reference, bias=bias, beta=self.config.beta,
                            label_smoothing=self.config.label_smoothing)  # fmt: skip
        return loss * (len(targets) // 2), len(targets) // 2


def log_probs(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of the targets, [B, T], where the model's hidden states are known; 0 where they are ignored."""
    weight, bias = model.output_weights()
    return ops.linear_log_probs(hidden, weight, targets, bias=bias).float()


def vocabulary(model: Model, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states, vocabulary matrix) of a model, a bias in the matrix' last column."""
    x, (weight, bias) = model.hidden(inputs), model.output_weights()
    if bias is None:
        return x, weight
    return torch.cat([x, torch.ones_like(x[..., :1])], -1), torch.cat([weight, bias[:, None]], 1)


def distinct_pairs(rows: list[list[int]]) -> float:
    """distinct-2 (Li et al. 2016, arXiv:1510.03055): different pairs of neighbouring tokens / all pairs of them."""
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False) if IGNORED not in pair]
    return len(set(pairs)) / max(1, len(pairs))
