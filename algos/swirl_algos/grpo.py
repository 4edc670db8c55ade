"""GRPO: the rival with outcome reward (Shao et al. 2024, arXiv 2402.03300, equation 3; Guo et al. 2025, arXiv 2501.12948).

G whole trajectories of a question are sampled from the current policy, with its tools; each has one reward, the outcome of its
final answer, and every action of it the same advantage, normalised within the group:

    A_g = (r_g - mean(r)) / std(r),    L = -(1 / tokens) sum_g A_g sum_{t in actions of g} log pi(a_t | s) + beta KL

Tool results and prompts are masked. With `passes` above 1 the ratio is clipped as published. Defaults follow the paper where later
work has not shown it wrong: one weight for all tokens in place of 1 / length (DAPO: Yu et al. 2025, arXiv 2503.14476);
`--no-normalise --length constant` is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783); `--baseline leave_one_out --no-normalise`
is RLOO (Ahmadian et al. 2024, arXiv 2402.14740).
"""

from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np

from swirl_algos.advantages import advantages
from swirl_algos.configs import GrpoConfig
from swirl_algos.diagnostics import flat
from swirl_algos.episodes import Episode, learn_online
from swirl_algos.policy_gradient import PolicyGradient
from swirl_algos.trainer import Trainer


def train(trainer: Trainer, make_env: Callable[[], gym.Env], tasks: Sequence[str], config: GrpoConfig) -> None:
    """Improve `trainer.model` in place.

    Args:
        trainer: the model in training.
        make_env: makes one environment, wrapped or not. Its rewards are not read, only the outcome; a judge in it is for the
            metrics alone.
        tasks: ids of the questions to practise.
        config: see `GrpoConfig`.

    Logs and raises as `episodes.learn_online` says.
    """

    def credit(episodes: list[Episode], gradient: PolicyGradient) -> dict:
        trees = [episode.tree(gradient.renderer) for episode in episodes]
        penalty = iter(gradient.penalty(trees))
        outcomes = np.array([np.nan if episode.outcome is None else episode.outcome for episode in episodes])
        costs = np.array([sum(next(penalty) for _ in episode.acts) for episode in episodes])
        groups = [slice(g, g + config.samples) for g in range(0, len(episodes), config.samples)]
        learnable = len(groups) - flat([one for one in outcomes[group] if not np.isnan(one)] for group in groups)
        counts = {"groups": learnable, "known": int(np.count_nonzero(~np.isnan(outcomes))), "asked": len(outcomes)}
        trainer.check_signal(**{name: int(value) for name, value in trainer.total(counts).items()})
        values = [
            value for group in groups for value in advantages(outcomes[group], config.baseline, config.normalise, costs[group])
        ]  # fmt: skip
        actions = [len(episode.acts) for episode in episodes]
        return gradient.update(
            trees, np.repeat(values, actions) if episodes else np.zeros(0), units=int(np.count_nonzero(~np.isnan(outcomes))),
            lengths_M=np.repeat([episode.tokens for episode in episodes], actions),
        )  # fmt: skip

    learn_online(trainer, make_env, tasks, config, "grpo", credit)


if __name__ == "__main__":
    from swirl_algos.launch import main

    main("grpo")
