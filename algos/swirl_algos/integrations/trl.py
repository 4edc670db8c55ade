"""TRL's GRPOTrainer with an advantage for each step instead of one for the trajectory.

GRPO gives every token of a rollout the same advantage (Shao et al. 2024, arXiv 2402.03300, equation 3). SWiRL gives each action its own
reward (Goldie et al. 2025, arXiv 2504.04736, section 3.2). Here the tokens of the k-th action of rollout g get

    A_gk = r_gk - mean of r_jk over the other rollouts j of the group that have a scored k-th step

so a good step in a failed rollout is still reinforced. The rollouts of a group begin with the same question but have gone their own
ways by step k, so the mean is a baseline of steps at this depth, not of the state itself (`swirl_algos.swirl` samples siblings of one
state); it does not depend on the action, which leaves the gradient unbiased. A step that is unknown, has no scored sibling, or comes
after the episode's end carries no gradient.

TRL's `_compute_loss` takes advantages of shape (B, T) "to support subclasses"; the rest of the trainer (generation, clipping, KL, loss
types, vLLM) is untouched. With `loss_type="dr_grpo"` and `scale_rewards="none"` the loss is divided by a constant, as in SWiRL. The
trajectory's rewards are still logged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from swirl_algos.advantages import BASELINES, advantages
from swirl_env.adapters.trl import step_rewards
from swirl_env.errors import ConfigError, UnknownNameError, near


class StepGRPOTrainer(GRPOTrainer):
    """GRPOTrainer for environments of `swirl_env.adapters.trl`, trained on the reward of each step.

    Args:
        arguments: of GRPOTrainer; `environment_factory` and `reward_funcs` of one spec, and `scale_rewards` `group` (the advantages
            of a step index are divided by the group's standard deviation) or `none`.
        baseline: `leave_one_out` or `group` (see `swirl_algos.advantages`).

    Raises:
        ConfigError: no environment, or `scale_rewards="batch"`. UnknownNameError: no such baseline.
    """

    def __init__(self, *arguments: Any, baseline: str = "leave_one_out", **named: Any):
        if baseline not in BASELINES:
            raise UnknownNameError(f"No baseline is called {baseline!r}.{near(baseline, BASELINES)}")
        super().__init__(*arguments, **named)
        if self.environment_factories is None:
            raise ConfigError("Steps are scored by an environment: give environment_factory=spec.environment_factory.")
        if self.scale_rewards == "batch":
            raise ConfigError("scale_rewards is 'group' or 'none' here: the steps of a batch are no group.")
        self.baseline = baseline

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        group: Any = self.num_generations if mode == "train" else self.num_generations_eval
        rewards: list[list[float | None]] = gather_object(step_rewards(self.environments or []))
        everyone = step_advantages(rewards, group, self.baseline, normalise=self.scale_rewards == "group")
        first = self.accelerator.process_index * len(inputs)
        mask_BT = output["completion_mask"]
        acted_BT = mask_BT * output["tool_mask"] if "tool_mask" in output else mask_BT
        output["advantages"] = spread(everyone[first : first + len(inputs)], acted_BT)
        known = [reward for steps in rewards for reward in steps if reward is not None]
        self._metrics[mode]["steps/reward"].append(float(np.mean(known)) if known else float("nan"))
        self._metrics[mode]["steps/unknown"].append(float(sum(map(len, rewards)) - len(known)))
        return output


def step_advantages(
    rewards: Sequence[Sequence[float | None]], group: int, baseline: str = "leave_one_out", normalise: bool = False
) -> list[np.ndarray]:
    """float[S] for each rollout: what each step was worth beside the same step of its siblings; 0 where nothing can be said.

    Args:
        rewards: of each rollout's steps, `None` where unknown; each `group` rollouts in a row share their task.
        group: rollouts a task.
        baseline: `leave_one_out` or `group`.
        normalise: divide by the standard deviation.
    """
    length = max(map(len, rewards), default=0)
    rewards_BS = np.full((len(rewards), length), np.nan)
    for row_S, steps in zip(rewards_BS, rewards, strict=True):
        row_S[: len(steps)] = [np.nan if reward is None else reward for reward in steps]
    for first in range(0, len(rewards), group):
        for k in range(length):
            rewards_BS[first : first + group, k] = advantages(rewards_BS[first : first + group, k], baseline, normalise)
    return [np.nan_to_num(row_S[: len(steps)]) for row_S, steps in zip(rewards_BS, rewards, strict=True)]


def spread(advantages: Sequence[np.ndarray], acted_BT: torch.Tensor) -> torch.Tensor:
    """float[B, T]: each step's advantage on the tokens of its action, 0 elsewhere.

    Args:
        advantages: float[S] for each rollout; an action without one (after the end of the episode) gets 0.
        acted_BT: 1 on tokens that the model wrote; the tool results between two actions separate them.
    """
    acted_BT = acted_BT.long()
    begins_BT = acted_BT - torch.nn.functional.pad(acted_BT, (1, 0))[:, :-1] == 1
    step_BT = begins_BT.long().cumsum(1)  # 1 on the first action, and on what follows it
    width = 1 + max(int(step_BT.max()) if step_BT.numel() else 0, max(map(len, advantages), default=0))
    table_BS = torch.zeros(len(advantages), width, device=acted_BT.device)
    for row_S, steps in zip(table_BS, advantages, strict=True):
        row_S[1 : 1 + len(steps)] = torch.as_tensor(steps, dtype=row_S.dtype)
    return table_BS.gather(1, step_BT) * acted_BT
