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

from seqfuse.recipes.alignment import Align, Dpo, FineTuning, RewardModel, align
from seqfuse.recipes.base import Recipe
from seqfuse.recipes.on_policy import Grpo, Ppo

STAGES = {"sft": FineTuning, "reward": RewardModel, "dpo": Dpo, "grpo": Grpo, "ppo": Ppo}


def task(config, *args) -> Align:
    return STAGES[config.stage](config, *args)


RECIPE = Recipe("align", "preferences: fine-tuning, a reward model, then DPO, GRPO or PPO", align, task)
