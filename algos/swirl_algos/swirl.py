"""SWiRL stage 2: step-wise policy gradient on recorded states (Goldie et al. 2025, arXiv 2504.04736, section 2.2).

    J(theta) = E_{s ~ T, a ~ pi_theta(.|s)} [ R(a | s) ]

T holds every state of the kept trajectories. At each state G actions are sampled afresh from the current policy at
temperature tau (no top-p, no top-k), and judged; they are never executed: the recorded tool results stand in the prompt.
Each action is its own one-step decision: no return, no discount. With the leave-one-out advantage A_g,

    L = -(1/N) sum_g A_g sum_t log pi(a_t | s) / L_max  +  beta (1/N) sum_g sum_t KL_t(pi || pi_ref) / L_max

over the N scored actions of the batch, log pi at the same tau, pi_ref the checkpoint that stage 2 starts from. Not in the
paper: G, the baseline, tau, beta, the learning rate. A state with fewer than two scored actions carries no gradient.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from swirl_agents.local import LocalPolicy
from swirl_agents.rendering import Renderer
from swirl_agents.rollout import draw_seed

from swirl_algos import tree
from swirl_algos.advantages import leave_one_out
from swirl_algos.configs import SwirlConfig
from swirl_algos.losses import swirl_loss
from swirl_algos.optimize import Optimizer, TrainingError, shuffled_batches
from swirl_env.grammar import Grammar
from swirl_env.judges import ask, views
from swirl_env.types import Judge, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class Candidate:
    """One action sampled at a recorded state."""

    task: str
    sample: int
    round: int
    state: int
    """Index of the step whose state this is."""
    g: int
    update: int
    text: str
    verdict: Verdict
    advantage: float | None
    """`None`: no gradient (unknown score, or no scored sibling)."""


def train(
    model, tokenizer, trajectories: Sequence[Trajectory], judge: Judge, grammar: Grammar, config: SwirlConfig, *,
    seed: int = 0, log: Callable[[dict], None] = lambda metrics: None,
    record: Callable[[Candidate], None] = lambda candidate: None,
) -> None:  # fmt: skip
    """Improve `model` in place.

    Args:
        model: the policy; a frozen copy of it is the KL reference.
        tokenizer: its tokenizer.
        trajectories: the kept trajectories, whose states are T.
        judge: R; sees what it saw when the trajectories were judged.
        grammar: reads the sampled actions.
        config: see `SwirlConfig`.
        seed: of the order of the trajectories and of every draw.
        log: called once an update with its metrics.
        record: called for each candidate with its verdict and advantage.

    Raises:
        TrainingError: no trajectory, no state with a gradient in the whole run, or a loss that is not finite.
    """
    usable = [trajectory for trajectory in trajectories if trajectory.steps]
    if not usable:
        raise TrainingError("No trajectory is left to train on. Generate more, or use a filter that keeps some.")
    model.eval()
    lay_out = tree.plain if config.reference else layout_for(model)
    # a model whose fresh adapter does nothing yet is its own reference with the adapter off (peft)
    reference = model if _fresh_adapter(model) else copy.deepcopy(model).requires_grad_(False)
    policy = LocalPolicy(
        model, tokenizer, temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=seed
    )
    if policy.renderer.rewrites:
        warnings.warn(
            "The chat template changes older turns (it drops thoughts, say), so the states of a trajectory share only their "
            "beginning: updates and sampling cost up to as many times more as a trajectory has steps.",
            stacklevel=2,
        )
    batches = shuffled_batches(usable, config.epochs, config.batch_size, seed)
    optimizer = Optimizer(model, config.learning_rate, len(batches))
    gradients, told = 0, False
    for update, batch in enumerate(batches):
        model.eval()
        candidates = list(sample_candidates(policy, batch, judge, grammar, config, seed, update))
        for _, _, drawn in candidates:
            for one in drawn:
                record(one)
        metrics: dict[str, Any] = {"update": update, "updates": len(batches), **_count(candidates)}
        policy.free()  # its keys and values are dead after this update, and the update needs the room
        trees, advantages_M = branches(policy.renderer, batch, candidates)
        metrics["over_budget"] = len(tree.over_budget(trees, config.row_tokens))
        metrics["scored"] = len(advantages_M) - metrics["over_budget"]
        if metrics["over_budget"] and not told:
            told = True
            warnings.warn(
                f"{metrics['over_budget']} actions of update {update} are longer with their state than row_tokens = "
                f"{config.row_tokens}; such actions are left out and counted as over_budget. Raise row_tokens.",
                stacklevel=2,
            )
        if metrics["scored"]:
            # in eval mode, as sampled: dropout would take the gradient of another policy
            packs = lay_out(trees, config.row_tokens, model.device)
            metrics |= backward(model, reference, packs, advantages_M, config, metrics["scored"])
            metrics["gradient_norm"] = optimizer.step(metrics["loss"])
            gradients += 1
        log(metrics)
    model.eval()
    if not gradients:
        raise TrainingError("No state had two scored actions, so there was nothing to learn. Is the judge answering?")


def sample_candidates(
    policy: LocalPolicy, batch: Sequence[Trajectory], judge: Judge, grammar: Grammar, config: SwirlConfig, seed: int,
    update: int,
) -> Iterator[tuple[int, list[np.ndarray], list[Candidate]]]:  # fmt: skip
    """For each state of each trajectory: (trajectory index, actions int[A] of G, their `Candidate`s).

    A state that leaves no room for an action in the model's context is left out.
    """
    jobs = [(i, k, state) for i, trajectory in enumerate(batch) for k, state in enumerate(trajectory.states())]
    states = [
        replace(state, stop=grammar.stop, seed=draw_seed(seed, batch[i].id, k, update, "stage 2"))
        for i, k, state in jobs
    ]
    sampled = policy(states, config.samples)
    shown = [views(trajectory) for trajectory in batch]
    asked = [
        replace(shown[i][k], action=grammar.parse(completion.text), results=None)
        for (i, k, _), completions in zip(jobs, sampled, strict=True)
        for completion in completions
    ]
    verdicts = iter(ask(judge, asked))
    for (i, k, _), completions in zip(jobs, sampled, strict=True):
        judged = [next(verdicts) for _ in completions]
        scores = np.array([np.nan if verdict.score is None else verdict.score for verdict in judged])
        advantages = leave_one_out(scores)
        actions = [completion.tokens.action_ids for completion in completions if completion.tokens is not None]
        trajectory = batch[i]
        drawn = [
            Candidate(
                trajectory.task.id, trajectory.sample, trajectory.round, k, g, update, completion.text, verdict,
                None if np.isnan(advantage) else float(advantage),
            )
            for g, (completion, verdict, advantage) in enumerate(zip(completions, judged, advantages, strict=True))
        ]  # fmt: skip
        yield i, actions, drawn


def _fresh_adapter(model) -> bool:
    """Whether a model is one with LoRA adapters that change nothing yet: every B is zero."""
    if not hasattr(model, "disable_adapter"):
        return False
    added = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return any("lora_B" in name for name in added) and not any(p.any() for name, p in added.items() if "lora_B" in name)


def layout_for(model) -> Callable[..., Iterator[tree.Pack]]:
    """`tree.pack`, or `tree.plain` with a warning for a model that cannot be packed."""
    if (reason := tree.why_not(model)) is None:
        return tree.pack
    warnings.warn(f"This model cannot be packed: {reason}. Plain rows are used, which are slower.", stacklevel=3)
    return tree.plain


def branches(renderer: Renderer, batch: Sequence[Trajectory], candidates) -> tuple[list[list[tree.State]], np.ndarray]:
    """The states of each trajectory with the candidates that carry a gradient, and their advantages float[M] in that order."""
    trees: list[list[tree.State]] = [[] for _ in batch]
    advantages: list[float] = []
    for i, actions, drawn in candidates:
        scored = [
            (a, one.advantage) for a, one in zip(actions, drawn, strict=True) if one.advantage is not None and len(a)
        ]
        if scored:
            context = renderer.encode(batch[i].states()[drawn[0].state]).ids
            trees[i].append(tree.State(context, [action for action, _ in scored]))
            advantages += [advantage for _, advantage in scored]
    return trees, np.array(advantages)


def backward(
    model, reference, packs: Iterable[tree.Pack], advantages_M: np.ndarray, config: SwirlConfig, actions: int
) -> dict[str, float]:
    """Accumulate the gradient of the loss; returns `loss`, `kl` and `entropy` (nats a token), `tokens`, and `row_tokens` (tokens
    that the model ran over)."""
    sums = torch.zeros(3, dtype=torch.float64)
    weights_M = torch.tensor(advantages_M, dtype=torch.float32, device=model.device)
    tokens = row_tokens = 0

    def loss(terms: tree.Terms) -> torch.Tensor:
        value = swirl_loss(
            terms.logprobs_n, terms.kl_n, weights_M[terms.action_n],
            beta=config.beta, max_tokens=config.max_new_tokens, actions=actions,
        )  # fmt: skip
        sums.add_(torch.stack([value.detach(), terms.kl_n.detach().sum(), terms.entropy_n.sum()]).double().cpu())
        return value

    for pack in packs:
        tree.backward(model, reference, pack, loss, config.temperature)
        tokens, row_tokens = tokens + len(pack.targets_N), row_tokens + pack.tokens
    total, kl, entropy = sums.tolist()
    return {
        "loss": total,
        "kl": kl / tokens,
        "entropy": entropy / tokens,
        "tokens": tokens,
        "row_tokens": row_tokens,
    }


def _count(candidates) -> dict[str, float | None]:
    """What was drawn: counts, and means over the scored actions."""
    drawn = [one for _, _, group in candidates for one in group]
    scores = [one.verdict.score for one in drawn if one.verdict.score is not None]
    spread = [{one.verdict.score for one in group} for _, _, group in candidates]
    return {
        "states": len(candidates),
        "too_long": sum(not group for _, _, group in candidates),
        "unknown": len(drawn) - len(scores),
        "score": float(np.mean(scores)) if scores else None,
        "flat_states": sum(len(kinds) <= 1 for kinds in spread),
    }
