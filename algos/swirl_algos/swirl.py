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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from swirl_agents.engine import has_plain_cache
from swirl_agents.local import LocalPolicy
from swirl_agents.rendering import Renderer
from swirl_agents.rollout import draw_seed

from swirl_algos import forward
from swirl_algos.advantages import leave_one_out
from swirl_algos.configs import SwirlConfig
from swirl_algos.losses import exact_kl, swirl_loss, token_logprobs
from swirl_algos.optimize import Optimizer, TrainingError, shuffled_batches
from swirl_algos.sft import finished
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


@dataclass(slots=True)
class _Tree:
    """A trajectory's trunk and the candidates on its states."""

    trunk: np.ndarray
    starts: list[int]
    actions: list[list[np.ndarray]]
    advantages: list[np.ndarray]


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
    if not config.reference and not has_plain_cache(model):
        warnings.warn(
            "This model keeps no plain keys and values (a sliding window, say): plain rows are used, which are slower.",
            stacklevel=2,
        )
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    policy = LocalPolicy(
        model, tokenizer, temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=seed
    )
    batches = shuffled_batches(usable, config.epochs, config.batch_size, seed)
    optimizer = Optimizer(model, config.learning_rate, len(batches))
    gradients = 0
    for update, batch in enumerate(batches):
        model.eval()
        candidates = list(sample_candidates(policy, batch, judge, grammar, config, seed, update))
        for _, _, drawn in candidates:
            for one in drawn:
                record(one)
        metrics: dict[str, Any] = {"update": update, "updates": len(batches), **_count(candidates)}
        trees = _trees(policy.renderer, batch, candidates)
        if metrics["scored"]:
            # in eval mode, as sampled: dropout would take the gradient of another policy
            metrics |= backward(model, reference, trees, config, metrics["scored"])
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


def _trees(renderer: Renderer, batch: Sequence[Trajectory], candidates) -> list[_Tree]:
    trees = []
    for i, trajectory in enumerate(batch):
        encoded = renderer.encode(finished(trajectory))
        mine = [(actions, drawn) for index, actions, drawn in candidates if index == i]
        tree = _Tree(encoded.ids, [], [], [])
        for actions, drawn in mine:
            scored = [g for g, one in enumerate(drawn) if one.advantage is not None]
            if scored:
                tree.starts.append(encoded.spans[drawn[0].state][0])
                tree.actions.append([actions[g] for g in scored])
                tree.advantages.append(np.array([drawn[g].advantage for g in scored]))
        if tree.starts:
            trees.append(tree)
    return trees


def backward(model, reference, trees: Sequence[_Tree], config: SwirlConfig, actions: int) -> dict[str, float]:
    """Accumulate the gradient of the loss over `trees`; returns `loss`, `kl` and `entropy` (nats a token)."""
    run = forward.rows if config.reference or not has_plain_cache(model) else forward.shared
    loss_sum, kl_sum, entropy_sum, tokens = 0.0, 0.0, 0.0, 0
    for tree in trees:
        arguments = (tree.trunk, tree.starts, tree.actions, config.temperature)
        loss = torch.zeros((), device=model.device)
        with torch.no_grad():
            targets = list(run(reference, *arguments))
        for logprobs_G, reference_G, ids_G, advantages_G in zip(
            run(model, *arguments), targets, tree.actions, tree.advantages, strict=True
        ):
            for logprobs_AV, reference_AV, ids, advantage in zip(
                logprobs_G, reference_G, ids_G, advantages_G, strict=True
            ):
                kl_A = exact_kl(logprobs_AV, reference_AV)
                logprobs_A = token_logprobs(logprobs_AV, torch.tensor(ids, device=model.device).long())
                loss = loss + swirl_loss(
                    logprobs_A,
                    kl_A,
                    float(advantage),
                    beta=config.beta,
                    max_tokens=config.max_new_tokens,
                    actions=actions,
                )
                with torch.no_grad():
                    kl_sum += float(kl_A.sum())
                    entropy_sum -= float((logprobs_AV.exp() * logprobs_AV).sum())
                tokens += len(ids)
        loss.backward()
        loss_sum += float(loss.detach())
    return {"loss": loss_sum, "kl": kl_sum / tokens, "entropy": entropy_sum / tokens, "tokens": tokens}


def _count(candidates) -> dict[str, float | None]:
    """What was drawn: counts, and means over the scored actions."""
    drawn = [one for _, _, group in candidates for one in group]
    scores = [one.verdict.score for one in drawn if one.verdict.score is not None]
    spread = [{one.verdict.score for one in group} for _, _, group in candidates]
    return {
        "states": len(candidates),
        "scored": sum(one.advantage is not None for one in drawn),
        "unknown": len(drawn) - len(scores),
        "score": float(np.mean(scores)) if scores else None,
        "flat_states": sum(len(kinds) <= 1 for kinds in spread),
    }
