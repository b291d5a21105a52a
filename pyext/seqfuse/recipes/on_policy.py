"""Learning from one's own answers: GRPO and PPO with a bound on the distance from the reference.

A global batch is some prompts. The policy answers each `samples` times, the reward model reads the answers, and
`updates` steps are made on them, before the next prompts are answered. Answers are drawn from torch's generator, which
the trainer seeds with the run's seed and the step's number; those that later steps still need are part of a
checkpoint. So a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqfuse import losses
from seqfuse.models.heads import ActorCritic
from seqfuse.recipes import lora
from seqfuse.recipes.alignment import Rows
from seqfuse.recipes.policies import Measured, log_probs
from seqfuse.recipes.texts import IGNORED


class OnPolicy(Measured):
    """A batch is answers, [answers, longest - 1], and what was found out about them when they were drawn."""

    def prepare(self):
        super().prepare()
        config = self.config
        self.examples = len(self.prompts[0])
        B, G, L = min(config.batch_size, self.examples), config.samples, config.longest
        self.kept = {
            "ids": torch.zeros(B, G, L, dtype=torch.int64),
            "first": torch.zeros(B, G, dtype=torch.int64),
            "lengths": torch.zeros(B, G, dtype=torch.int64),
            "rewards": torch.zeros(B, G),
            "log_probs": torch.zeros(B, G, L - 1),
            "reference_log_probs": torch.zeros(B, G, L - 1),
            "values": torch.zeros(B, G, L - 1),
        }
        self.kept = {name: tensor.to(self.device) for name, tensor in self.kept.items()}

    def carried(self):
        return self.kept

    def order(self, epoch):
        """Each batch of prompts `updates` times; an index also says which row of the batch, and which time, it is."""
        B, updates = len(self.kept["ids"]), self.config.updates
        return [
            [(example * B + row) * updates + time for row, example in enumerate(batch)]
            for batch in super().order(epoch)
            for time in range(updates)
        ]

    def batch(self, indices):
        self.model.eval()  # no dropout: what is trained is the policy that drew the answers
        B, updates = len(self.kept["ids"]), self.config.updates
        rows = [index // updates % B for index in indices]
        if indices[0] % updates == 0:
            self.draw([index // updates // B for index in indices], rows)
        return tuple(tensor[rows] for tensor in self.kept.values())

    @torch.no_grad()
    def draw(self, examples: list[int], rows: list[int]) -> None:
        """Answer prompts, and keep answers, rewards, log-probabilities (and a critic's values) in these rows."""
        prompts = [self.prompts[0][i] for i in examples for _ in range(self.config.samples)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            drawn = self.sample(self.model, prompts)
            inputs, targets = drawn.inputs, drawn.targets
            found = {
                **drawn._asdict(),
                "rewards": self.rewards(drawn) - self.config.unfinished * ~self.have_ended(drawn),
                "reference_log_probs": log_probs(self.reference, self.reference.hidden(inputs), targets),
                **self.opinions(self.model, inputs, targets),
            }
        for name, tensor in found.items():
            self.kept[name][rows] = tensor.view(len(rows), self.config.samples, *tensor.shape[1:])

    def opinions(self, model, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the policy thinks of answers, [B, T] each."""
        return {"log_probs": log_probs(model, model.hidden(inputs), targets)}

    def loss(self, model, ids, first, lengths, rewards, *kept):
        """kept: log_probs, reference_log_probs and values as they were when the answers were drawn."""
        rows = Rows(ids.flatten(0, 1), first.flatten(), lengths.flatten())
        targets = rows.targets
        now = self.opinions(model, rows.inputs, targets)
        return self.update(now, rewards, *(tensor.flatten(0, 1) for tensor in kept), targets != IGNORED)

    def update(self, now, rewards, old_log_probs, reference_log_probs, values, mask):
        """(sum of the losses, how many)."""
        raise NotImplementedError

    def held_out(self):
        raise ValueError(f"align: {self.config.stage} has no loss on held-out examples, only rewards of its answers")


class Grpo(OnPolicy):
    """Group relative policy optimisation: an answer is good if it is better than the others to its prompt."""

    unit = "answers"

    def update(self, now, rewards, old_log_probs, reference_log_probs, values, mask):
        advantages = losses.group_advantages(rewards).flatten()
        loss = losses.grpo_loss(now["log_probs"], old_log_probs, reference_log_probs, advantages, mask,
                                clip=self.config.clip, beta=self.config.beta, reduction="sum")  # fmt: skip
        return loss, len(mask)


class Ppo(OnPolicy):
    """Proximal policy optimisation: a critic on the policy's hidden states says what was to be expected. A finished
    run leaves the policy without its critic."""

    def build(self):
        return ActorCritic.on(super().build())

    def take_weights(self, model):
        lora.load_plain(self.model.body, model.state_dict())

    def finished(self, model):
        return model.body

    def opinions(self, model, inputs, targets):
        x = model.hidden(inputs)
        return {"log_probs": log_probs(model, x, targets), "values": model.values(x).float()}

    def update(self, now, rewards, old_log_probs, reference_log_probs, values, mask):
        config = self.config
        each = losses.penalised_rewards(rewards.flatten(), old_log_probs, reference_log_probs, mask, config.beta)
        advantages, returns = losses.gae(each, values, mask, lam=config.lam)
        loss = losses.ppo_loss(now["log_probs"], old_log_probs, advantages, now["values"], returns, mask,
                               clip=config.clip, value_weight=config.value_weight, reduction="sum")  # fmt: skip
        return loss, mask.sum()
