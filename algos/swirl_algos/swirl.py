"""SWiRL stage 2: step-wise policy gradient on recorded states (Goldie et al. 2025, arXiv 2504.04736, section 2.2).

    J(theta) = E_{s ~ T, a ~ pi_theta(.|s)} [ R(a | s) ]

T holds every state of the kept trajectories. At each state G actions are sampled afresh from the current policy at
temperature tau (no top-p, no top-k), and judged; they are never executed: the recorded tool results stand in the prompt.
Each action is its own one-step decision: no return, no discount. With the leave-one-out advantage A_g,

    L = -(1/N) sum_g A_g sum_t log pi(a_t | s) / L_max  +  beta (1/N) sum_g sum_t KL_t(pi || pi_ref) / L_max

over the N scored actions of the batch, log pi at the same tau, pi_ref the checkpoint that stage 2 starts from. Not in the
paper: G, the baseline, tau, beta, the learning rate; `PolicyConfig` has what else its readers try. A state with fewer than two
scored actions carries no gradient. With rounds (not in the paper, whose states are those of the base model to the end) each
further round's states come from the policy of the one before: `launch` acts, judges and filters, and calls `train` again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from swirl_agents.local import LocalPolicy
from swirl_agents.rendering import Renderer
from swirl_agents.rollout import draw_seed

from swirl_algos import tree
from swirl_algos.advantages import advantages
from swirl_algos.configs import SwirlConfig
from swirl_algos.diagnostics import flat, of_actions, repeats, warn_of_rewriting
from swirl_algos.folders import content
from swirl_algos.policy_gradient import PolicyGradient, spelled
from swirl_algos.trainer import Trainer, TrainingError, shuffled_batches
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
    finish: str
    """How sampling ended: `stop`, `eos`, or `length` where neither came within the token cap."""
    tokens: int
    """Tokens sampled; an action without any carries no gradient."""
    malformed: bool
    repeated: bool
    """Whether its calls were all made before, in the recorded steps."""

    @property
    def score(self) -> float | None:
        return self.verdict.score


Sampled = tuple[int, list[np.ndarray], list[Candidate]]
"""(trajectory index, actions int[A] of G, their `Candidate`s) at one state."""


def train(
    trainer: Trainer, trajectories: Sequence[Trajectory], judge: Judge, grammar: Grammar, config: SwirlConfig
) -> None:
    """Improve `trainer.model` in place.

    Args:
        trainer: the model in training; the checkpoint that it starts from is the KL reference.
        trajectories: the kept trajectories, whose states are T.
        judge: R; sees what it saw when the trajectories were judged.
        grammar: reads the sampled actions.
        config: see `SwirlConfig`.

    Logs once an update what `PolicyGradient.update` returns, and of the actions drawn: `states`, `score` (mean), `score_by_step`,
    `unknown` verdicts, `flat_states` (all scores equal), `malformed` and `repeated` shares, `cut` (neither stop string nor end within
    the token cap), `empty`, `too_long` (states without room for an action), `sampled_tokens`.

    Raises:
        TrainingError: no trajectory, no advantage that is not 0 or a judge that fell silent (see `Trainer.check_signal`), a loss that is not
            finite, or a checkpoint of another run.
    """
    usable = [trajectory for trajectory in trajectories if trajectory.steps]
    if not usable:
        raise TrainingError("No trajectory is left to train on. Generate more, or use a filter that keeps some.")
    gradient = PolicyGradient(trainer, config)
    usable = spelled(gradient.renderer, usable)
    policy = trainer.policy(config.temperature, config.max_new_tokens)
    warn_of_rewriting(policy.renderer)
    batches = shuffled_batches(usable, config.epochs, config.batch_size, trainer.seed)
    for update in trainer.updates(len(batches), "swirl", config, content(usable)):
        batch = trainer.mine(batches[update])
        with trainer.acting():
            sampled = list(sample_candidates(policy, batch, judge, grammar, config, trainer.seed, update))
        policy.free()  # its keys and values are dead after this update, and the update needs the room
        trees = branches(policy.renderer, batch, sampled)
        penalty = iter(gradient.penalty(trees))
        groups = [_with_advantages(drawn, penalty, config) for _, _, drawn in sampled]
        everyone = trainer.gather(groups)
        drawn = [one for group in everyone for one in group]
        trainer.record(drawn)
        metrics = {
            "states": len(everyone), "too_long": sum(not group for group in everyone),
            "flat_states": flat([one.score for one in group] for group in everyone if group), **of_actions(drawn),
        }  # fmt: skip
        known = sum(one.score is not None for one in drawn)
        trainer.check_signal(sum(map(bool, everyone)) - metrics["flat_states"], known, len(drawn))
        values = [one.advantage for group in groups for one in group]
        metrics |= gradient.update(trees, np.array([np.nan if value is None else value for value in values]))
        trainer.log(metrics)


def sample_candidates(
    policy: LocalPolicy, batch: Sequence[Trajectory], judge: Judge, grammar: Grammar, config: SwirlConfig, seed: int,
    update: int,
) -> Iterator[Sampled]:  # fmt: skip
    """G actions at each state of each trajectory, with their verdicts; advantages are still unknown.

    A state that leaves no room for an action in the model's context has none.
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
    verdicts, shown_again = iter(ask(judge, asked)), iter(asked)
    for (i, k, _), completions in zip(jobs, sampled, strict=True):
        judged, seen = [next(verdicts) for _ in completions], [next(shown_again) for _ in completions]
        actions = [completion.tokens.action_ids for completion in completions if completion.tokens is not None]
        trajectory = batch[i]
        drawn = [
            Candidate(
                trajectory.task.id, trajectory.sample, trajectory.round, k, g, update, completion.text, verdict,
                None, completion.finish, 0 if completion.tokens is None else len(completion.tokens.action_ids),
                view.action.malformed is not None, repeats(view.action, view.steps),
            )
            for g, (completion, verdict, view) in enumerate(zip(completions, judged, seen, strict=True))
        ]  # fmt: skip
        yield i, actions, drawn


def branches(renderer: Renderer, batch: Sequence[Trajectory], sampled: Sequence[Sampled]) -> list[list[tree.State]]:
    """The states of each trajectory with the actions drawn there."""
    trees: list[list[tree.State]] = [[] for _ in batch]
    states = [trajectory.states() for trajectory in batch]
    for i, actions, drawn in sampled:
        if drawn:
            context = renderer.encode(states[i][drawn[0].state]).ids
            trees[i].append(tree.State(context, actions))
    return trees


def _with_advantages(drawn: list[Candidate], penalty: Iterator[float], config: SwirlConfig) -> list[Candidate]:
    """A state's candidates with their advantages; unknown stays `None`."""
    if not drawn:
        return []
    scores = np.array([np.nan if one.score is None else one.score for one in drawn])
    costs = np.array([next(penalty) for _ in drawn])
    known = advantages(scores, config.baseline, config.normalise, costs)
    return [
        replace(one, advantage=None if np.isnan(value) else float(value))
        for one, value in zip(drawn, known, strict=True)
    ]


if __name__ == "__main__":
    from swirl_algos.launch import main

    main("swirl")
