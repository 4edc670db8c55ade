"""REINFORCE online: like ordinary reinforcement learning, on any registered id (Williams 1992).

    J(theta) = E_{episodes of pi_theta} [ sum_i sum_{j >= i} discount^(j - i) r_j ]

The policy acts in the vector environment; each action is reinforced by its own reward and those after it. With discount 0 each
step has its own process reward alone, which is SWiRL's objective at the states that the current policy visits, rather than at
recorded ones. The baseline of an action is the mean return of the update's other actions at the same step index:

    A_{e,i} = R_{e,i} - mean_{e' != e} R_{e',i},    L = -(1/N) sum A_{e,i} sum_t log pi(a_t | s) / L_max + beta KL

An action alone at its index carries no gradient, nor does one whose return counts an unknown reward.
"""

from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np

from swirl_algos.advantages import advantages, returns
from swirl_algos.configs import ReinforceConfig
from swirl_algos.diagnostics import flat
from swirl_algos.episodes import Episode, learn_online
from swirl_algos.policy_gradient import PolicyGradient
from swirl_algos.trainer import Trainer


def train(trainer: Trainer, make_env: Callable[[], gym.Env], tasks: Sequence[str], config: ReinforceConfig) -> None:
    """Improve `trainer.model` in place.

    Args:
        trainer: the model in training.
        make_env: makes one environment, wrapped or not, whose rewards are what is learned from.
        tasks: ids of the questions to practise.
        config: see `ReinforceConfig`.

    Logs and raises as `episodes.learn_online` says.
    """

    def credit(episodes: list[Episode], gradient: PolicyGradient) -> dict:
        trees = [episode.tree(gradient.renderer) for episode in episodes]
        penalty = iter(gradient.penalty(trees))
        mine = [
            (i, value, cost)
            for episode in episodes
            for i, (value, cost) in enumerate(zip(
                returns(episode.rewards, config.discount),
                returns(np.array([next(penalty) for _ in episode.acts]), config.discount), strict=True,
            ))
        ]  # fmt: skip
        everyone = trainer.gather([[(trainer.rank, place, *one) for place, one in enumerate(mine)]])
        acts = [one for part in everyone for one in part]
        found = np.full(len(mine), np.nan)
        groups = [[one for one in acts if one[2] == step] for step in {one[2] for one in acts}]
        learnable = len(groups) - flat([one[3] for one in here if not np.isnan(one[3])] for here in groups)
        trainer.check_signal(learnable, sum(not np.isnan(one[3]) for one in acts), len(acts))
        for here in groups:
            scores, costs = (np.array([one[part] for one in here]) for part in (3, 4))
            values = advantages(scores, config.baseline, config.normalise, costs)
            for (rank, place, *_), value in zip(here, values, strict=True):
                if rank == trainer.rank:
                    found[place] = value
        return gradient.update(trees, found)

    learn_online(trainer, make_env, tasks, config, "reinforce", credit)


if __name__ == "__main__":
    from swirl_algos.launch import main

    main("reinforce")
