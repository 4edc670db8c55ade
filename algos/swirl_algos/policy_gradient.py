"""From advantages to new weights: the update that `swirl`, `reinforce` and `grpo` share.

    L = sum over scored actions a of w_a sum_t [ policy_loss_t + beta KL_t - entropy weight x H_t ]

with the parts of `losses` by the names in `PolicyConfig`, and w_a from `token_weights`. What differs between the algorithms,
where states and actions come from and what the advantage of each is, stays in their files.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from swirl_agents.rendering import Renderer

from swirl_algos import tree
from swirl_algos.configs import PolicyConfig
from swirl_algos.losses import adapted, kl_loss, policy_loss, token_weights
from swirl_algos.trainer import Trainer
from swirl_env.types import Step, Trajectory


class PolicyGradient:
    """The shared update of one training.

    Args:
        trainer: the model in training, before its first update.
        config: see `PolicyConfig`.
    """

    def __init__(self, trainer: Trainer, config: PolicyConfig):
        self.trainer, self.config = trainer, config
        self.reference = trainer.reference if config.beta else None
        self.renderer = Renderer(trainer.tokenizer)
        trainer.model.eval()
        self.lay_out = tree.plain if config.reference else layout_for(trainer.model)
        self._told = False

    @property
    def beta(self) -> float:
        """Weight of the KL term; it moves where there is a target."""
        return self.trainer.kept.get("beta", self.config.beta)

    def passes(self, trees: Sequence[tree.Tree]) -> Iterator[tuple[tree.Pack, bool]]:
        """As `Trainer.passes`: laid out anew each time, so that the masks of one row are held and not those of all."""
        return self.trainer.passes(self.lay_out, trees, self.config.row_tokens)

    def penalty(self, trees: Sequence[tree.Tree]) -> np.ndarray:
        """float[M]: beta times k1, sum_t log pi - log pi_ref, of each action; to be taken off its reward where `kl = "reward"`."""
        count = sum(len(state.actions) for states in trees for state in states)
        if self.config.kl != "reward" or self.reference is None:
            return np.zeros(count)
        model, tau, k1_M = self.trainer.model, self.config.temperature, np.zeros(count)
        with self.trainer.autocast():
            for pack, counts in self.passes(trees):
                ours_N = tree.logprobs(model, pack, tau)
                with tree.frozen(model, self.reference):
                    theirs_N = tree.logprobs(self.reference, pack, tau)
                if counts:
                    k1_M += np.bincount(pack.action_N.cpu(), (ours_N - theirs_N).double().cpu(), count)
        return self.beta * k1_M

    def update(
        self, trees: Sequence[tree.Tree], advantages_M: np.ndarray, *, lengths_M: np.ndarray | None = None, units: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Change the weights; where no action of any process carries a gradient, nothing is changed.

        Args:
            trees: this process's states and their actions.
            advantages_M: float[M] of these actions, in order; NaN carries no gradient.
            lengths_M: tokens that `length = "action"` divides by; `None`: of the action itself.
            units: N of the loss in this process; `None`: its scored actions.

        Returns:
            of all processes: `scored` (actions), `over_budget` (those longer with their state than `row_tokens`, left out), `tokens` (of
            scored actions), `row_tokens` (that the model ran over in all passes); and if there was a gradient `loss`, `kl` and `entropy` (nats a token),
            `ratio` (mean |pi / pi_old - 1|) and `clipped` (share of tokens without gradient) where there are several passes, `gradient_norm`,
            `learning_rate`, `beta`.
        """
        config, trainer = self.config, self.trainer
        model, kl = trainer.model, config.kl if config.kl != "reward" else None
        actions = [np.asarray(action) for states in trees for state in states for action in state.actions]
        over = set(tree.over_budget(trees, config.row_tokens))
        scored = [g for g, a in enumerate(actions) if len(a) and g not in over and not np.isnan(advantages_M[g])]
        self._warn(len(over))
        counted = trainer.total({
            "scored": len(scored), "over_budget": len(over), "tokens": sum(len(actions[g]) for g in scored),
            "units": len(scored) if units is None else units,
        })  # fmt: skip
        metrics: dict[str, Any] = {name: int(counted[name]) for name in ("scored", "over_budget", "tokens")}
        if not counted["scored"]:
            return metrics
        own_M = np.array([len(action) for action in actions]) if lengths_M is None else lengths_M
        weights_M = token_weights(config.length, own_M, config.max_new_tokens, int(counted["units"]), metrics["tokens"])
        known_M = np.zeros(len(actions), bool)
        known_M[scored] = True
        weigh = partial(torch.tensor, dtype=torch.float32, device=model.device)
        weights, advantages = weigh(np.where(known_M, weights_M, 0)), weigh(np.where(known_M, advantages_M, 0))
        kept = [_only(states, known) for states, known in _by_tree(trees, known_M)]
        beta, numbers, row_tokens = self.beta, np.flatnonzero(known_M), 0
        old: Iterable[torch.Tensor | None] = repeat(None)
        if config.passes > 1:
            with trainer.autocast():
                old = [tree.logprobs(model, pack, config.temperature) for pack, _ in self.passes(kept)]
        for _ in range(config.passes):
            # of tokens: KL, entropy, |ratio - 1|, clipped; and the loss
            sums = torch.zeros(5, dtype=torch.float64)

            def loss(terms: tree.Terms, old_N: torch.Tensor | None, action_N: torch.Tensor) -> torch.Tensor:
                action_n = action_N[terms.n]
                old_n = None if old_N is None else old_N[terms.n]
                value_n = policy_loss(terms.logprobs_n, advantages[action_n], old_n, config.clip)
                kl_n = torch.zeros_like(value_n)
                if kl and self.reference is not None:
                    kl_n = kl_loss(kl, terms.kl_n, terms.logprobs_n, terms.reference_n)
                    value_n = value_n + beta * kl_n
                if config.entropy:
                    value_n = value_n - config.entropy * terms.entropy_n
                value = (weights[action_n] * value_n).sum()
                shown_n = terms.logprobs_n - terms.reference_n if config.kl == "reward" else kl_n
                away_n = torch.zeros_like(shown_n) if old_n is None else (terms.logprobs_n - old_n).exp() - 1
                cut_n = away_n * advantages[action_n].sign() > config.clip  # else the least of both is the ratio itself
                parts = (
                    shown_n.sum(),
                    terms.entropy_n.sum(),
                    away_n.abs().sum(),
                    cut_n.sum(),
                    value,
                )
                sums.add_(torch.stack([part.detach().double().cpu() for part in parts]))  # noqa: B023
                return value

            with trainer.autocast(), trainer.checkpointing():
                for (pack, counts), old_N in zip(self.passes(kept), old, strict=False):
                    closure: Callable[[tree.Terms], torch.Tensor] = tree.nothing
                    if counts:
                        row_tokens += pack.tokens
                        action_N = torch.tensor(numbers[pack.action_N.cpu()], device=model.device)
                        closure = partial(loss, old_N=old_N, action_N=action_N)
                    tree.backward(
                        model, self.reference, pack, closure, config.temperature, exact=kl == "exact", entropy=config.entropy > 0
                    )  # fmt: skip
            stepped = trainer.step(float(sums[4]))
        kl_sum, entropy, away, clipped, _ = sums.tolist()
        seen = trainer.total({
            "kl": kl_sum, "entropy": entropy, "ratio": away, "clipped": clipped, "row_tokens": row_tokens,
        })  # fmt: skip
        metrics |= stepped | {"row_tokens": int(seen.pop("row_tokens"))}
        shown = {name: value / metrics["tokens"] for name, value in seen.items()}
        if config.passes == 1:
            del shown["ratio"], shown["clipped"]
        metrics |= shown | {"beta": beta}
        if config.kl_target is not None:
            trainer.kept["beta"] = adapted(beta, shown["kl"], config.kl_target)
        return metrics

    def _warn(self, over_budget: int) -> None:
        if over_budget and not self._told:
            self._told = True
            warnings.warn(
                f"{over_budget} actions of update {self.trainer.update} are longer with their state than row_tokens = "
                f"{self.config.row_tokens}; such actions are left out and counted as over_budget. Raise row_tokens.",
                stacklevel=3,
            )


def layout_for(model) -> Callable[..., Iterator[tree.Pack]]:
    """`tree.pack`, or `tree.plain` with a warning for a model that cannot be packed."""
    if (reason := tree.why_not(model)) is None:
        return tree.pack
    warnings.warn(f"This model cannot be packed: {reason}. Plain rows are used, which are slower.", stacklevel=4)
    return tree.plain


def spelled(renderer: Renderer, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories, without token ids that do not spell their actions: another model's. Those actions are tokenised anew, with a
    warning."""

    def own(step: Step) -> Step:
        if step.tokens is None:
            return step
        text = renderer.decode(step.tokens.action_ids).strip()
        said = step.action.text.strip()
        # a server may leave off a stop string in the text, or in the ids
        alike = text == said or bool(text and said and (said.startswith(text) or text.startswith(said)))
        return step if alike else replace(step, tokens=None)

    found = [replace(one, steps=tuple(map(own, one.steps))) for one in trajectories]
    pairs = zip(trajectories, found, strict=True)
    anew = sum(a.tokens is not b.tokens for old, new in pairs for a, b in zip(old.steps, new.steps, strict=True))
    if anew:
        warnings.warn(
            f"{anew} recorded actions have token ids that are not of this model's tokenizer: their texts are tokenised anew.",
            stacklevel=3,
        )
    return found


def _by_tree(trees: Sequence[tree.Tree], known_M: np.ndarray) -> Iterator[tuple[tree.Tree, np.ndarray]]:
    first = 0
    for states in trees:
        count = sum(len(state.actions) for state in states)
        yield states, known_M[first : first + count]
        first += count


def _only(states: tree.Tree, known: np.ndarray) -> list[tree.State]:
    """The states that have a scored action, with these actions."""
    kept, first = [], 0
    for state in states:
        actions = [a for a, one in zip(state.actions, known[first : first + len(state.actions)], strict=True) if one]
        first += len(state.actions)
        if actions:
            kept.append(tree.State(state.context, actions))
    return kept
