"""Learning from preferences, the three steps of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155), and DPO.

    sft      a language model is fine-tuned on answers that people wrote
    reward   a reward model learns from pairs which of two answers people like better (Bradley-Terry)
    grpo     the language model learns to write what is rewarded and stays near the fine-tuned one; ppo: likewise, with
             a critic; dpo: from the pairs themselves, without a reward model and without samples

    seqfuse train align                                             # sft, reward, grpo; all in runs/align
    seqfuse train align --set stage=ppo --set start=runs/align/sft --set reward=runs/align/reward --out runs/ppo
    seqfuse train align --data mine.jsonl                           # in each line prompt, chosen, rejected

Without a file: sentences of film reviews, and which of two people rated as more positive. So the preference is for
sentiment, not for helpfulness. Nothing about the reward is programmed, but that an answer without an end costs
(`unfinished`). Methods: recipes/on_policy.py; losses: losses.py and ops.dpo_loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqfuse import losses, report
from seqfuse.models.heads import Classifier
from seqfuse.recipes import lora
from seqfuse.recipes.alignment import (
    SAMPLING_SEED,
    SHOWN,
    Align,
    OnPairs,
    Rows,
    align,
    answers,
)
from seqfuse.recipes.base import Findings, Recipe
from seqfuse.recipes.on_policy import Grpo, Ppo
from seqfuse.recipes.policies import Dpo
from seqfuse.recipes.texts import EVALUATED_ROWS, IGNORED


class FineTuning(Align):
    """A language model learns to answer as the demonstrations do."""

    def prepare(self):
        super().prepare()
        self.examples = len(self.demonstrations[0])

    def batch(self, indices):
        return tuple(self.rows([self.demonstrations[0][i] for i in indices]))

    def held_out(self):
        held = sorted(self.demonstrations[1], key=lambda row: len(row[0]))
        for i in range(0, len(held), EVALUATED_ROWS):
            yield tuple(self.rows(held[i : i + EVALUATED_ROWS]))

    def loss(self, model, *batch):
        rows = Rows(*batch)
        targets = rows.targets
        return model.loss(rows.inputs, targets, **self.loss_options(model)), (targets != IGNORED).sum()

    def report(self, model):
        texts = [self.model_tokenizer.decode(ids) for ids in self.prompts[1][:SHOWN]]
        samples = answers(model, self.prompts[1][:SHOWN], self.config.answer, SAMPLING_SEED)
        written = [self.model_tokenizer.decode(ids) for ids in samples]
        table = report.table(["prompt", "with its answer"], list(zip(texts, written, strict=True)))
        return Findings(self.evaluate(model), [report.section("Samples", table)], "\n".join(written))


class RewardModel(OnPairs):
    """A number for each text, on the body of the fine-tuned model. A finished one gives the held-out rejected texts 0
    and the chosen ones 1 on average: pairs alone decide neither where zero is nor how large the unit is."""

    objective = "accuracy"
    higher = True

    def build(self):
        return Classifier.on(super().build(), labels=1, pooling="last")

    def take_weights(self, model):
        lora.load_plain(self.model.body, model.state_dict())

    def loss(self, model, *batch):
        chosen, rejected = self.scores(model, Rows(*batch))
        return losses.bradley_terry_loss(chosen, rejected, reduction="sum"), len(chosen)

    def scores(self, model, rows: Rows) -> tuple[Tensor, Tensor]:
        return model(rows.ids, rows.lengths).float().chunk(2)

    def evaluate(self, model):
        return {"accuracy": self.accuracy(model)[0], **super().evaluate(model)}

    @torch.no_grad()
    def accuracy(self, model) -> tuple[float, float, float]:
        """(share of held-out pairs whose chosen text is rewarded more, mean reward of chosen and of rejected ones)."""
        found = [self.scores(model, Rows(*self.to_device(batch))) for batch in self.held_out()]
        chosen, rejected = (torch.cat(side) for side in zip(*found, strict=True))
        right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        return float(right.mean()), float(chosen.mean()), float(rejected.mean())

    @torch.no_grad()
    def finished(self, model):
        _, chosen, rejected = self.accuracy(model)
        unit = chosen - rejected if chosen > rejected else 1.0  # it has learned nothing: only zero moves
        model.output.weight /= unit
        model.output.bias.sub_(rejected).div_(unit)
        return model

    def report(self, model):
        accuracy, chosen, rejected = self.accuracy(model)
        values = {"accuracy": accuracy, "held_out_pairs": float(len(self.pairs[1])), "reward_of_chosen": chosen,
                  "reward_of_rejected": rejected}  # fmt: skip
        return Findings(values)


STAGES = {"sft": FineTuning, "reward": RewardModel, "dpo": Dpo, "grpo": Grpo, "ppo": Ppo}


def task(config, *args) -> Align:
    return STAGES[config.stage](config, *args)


RECIPE = Recipe("align", "preferences: fine-tuning, a reward model, then DPO, GRPO or PPO", align, task)
