"""What tells a user that training goes wrong: pure functions of what was drawn."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from swirl_agents.rendering import Renderer

from swirl_env.types import Action, Step, Trajectory

WINDOW = 10
"""Updates that are averaged at each end when trends are compared."""
TREND = 0.02
"""Change of a mean in [0, 1] that counts as one."""


class Drawn(Protocol):
    """An action that was sampled (`swirl.Candidate`, `episodes.Act`)."""

    @property
    def state(self) -> int: ...
    @property
    def score(self) -> float | None: ...
    @property
    def malformed(self) -> bool: ...
    @property
    def repeated(self) -> bool: ...
    @property
    def finish(self) -> str: ...
    @property
    def tokens(self) -> int: ...


def repeats(action: Action, earlier: Iterable[Step]) -> bool:
    """Whether every call of an action was made before, with the same arguments."""
    made = [call for step in earlier for call in step.action.calls]
    return bool(action.calls) and all(call in made for call in action.calls)


def of_actions(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """`score`: mean over scored actions, `None` if there is none; `score_by_step`: at each step index; `unknown`: how many have no score;
    `malformed`, `repeated` (calls made before): shares; `cut` (neither stop string nor end within the token cap), `empty` (no token
    at all): how many; `sampled_tokens`."""
    scores = [(one.state, one.score) for one in drawn if one.score is not None]
    by_step = [
        [score for k, score in scores if k == step] for step in range(max((k for k, _ in scores), default=-1) + 1)
    ]
    return {
        "score": _mean([score for _, score in scores]),
        "score_by_step": [_mean(values) for values in by_step],
        "unknown": len(drawn) - len(scores),
        "malformed": _mean([one.malformed for one in drawn]),
        "repeated": _mean([one.repeated for one in drawn]),
        "cut": sum(one.finish == "length" for one in drawn),
        "empty": sum(not one.tokens for one in drawn),
        "sampled_tokens": sum(one.tokens for one in drawn),
    }  # fmt: skip


def flat(groups: Iterable[Sequence[float | None]]) -> int:
    """Groups whose known rewards are all equal: they carry no gradient."""
    return sum(len({reward for reward in group if reward is not None}) <= 1 for group in groups)


def of_episodes(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """`outcome` (mean of the known), `process` (mean over episodes of their mean step score), `steps`, and shares of `stops`."""
    scores = [
        [step.verdict.score for step in one.steps if step.verdict is not None and step.verdict.score is not None]
        for one in trajectories
    ]
    stops = sorted({one.stop for one in trajectories})
    return {
        "outcome": _mean([one.outcome for one in trajectories if one.outcome is not None]),
        "process": _mean([float(np.mean(values)) for values in scores if values]),
        "steps": _mean([len(one.steps) for one in trajectories]),
        "stops": {stop: _mean([one.stop == stop for one in trajectories]) for stop in stops},
    }


def alarm(process: Sequence[float], outcome: Sequence[float]) -> str | None:
    """A sentence if the process score rises while the outcome falls, which looks like reward hacking; `None` otherwise.

    Args:
        process: mean step score at each update, or before and after.
        outcome: mean outcome at the same.
    """
    many = min(WINDOW, len(process) // 2)
    if not many:
        return None
    up, down = (float(np.mean(values[-many:]) - np.mean(values[:many])) for values in (process, outcome))
    if up > TREND and down < -TREND:
        return (
            f"The process score rose by {up:.3f} while the outcome fell by {-down:.3f}: the policy may be learning to please the "
            "judge. Read some of its answers, try another judge, or raise beta."
        )
    return None


def warn_of_rewriting(renderer: Renderer) -> None:
    """Tell what a chat template that changes older turns costs."""
    if renderer.rewrites:
        warnings.warn(
            "The chat template changes older turns (it drops thoughts, say), so the states of a trajectory share only their "
            "beginning: updates and sampling cost up to as many times more as a trajectory has steps.",
            stacklevel=3,
        )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
