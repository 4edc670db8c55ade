"""What is reported of trajectories, each figure with a 95 % interval.

Questions are the unit: intervals come from resampling whole trajectories (percentile bootstrap, 10,000 resamples, fixed
seed). A mean of zeros and ones gets Wilson's interval, which stays honest where all values are equal.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swirl_env.types import Trajectory

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; `None` where nothing was measured."""

    mean: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return "unknown" if self.mean is None else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, n: int) -> Estimate:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    mean = successes / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Estimate(mean, float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def bootstrap(values_N: Sequence[float], weights_N: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """sum(values) / sum(weights) with its percentile bootstrap interval over the N units.

    Args:
        values_N: one number a unit.
        weights_N: its denominator (how many actions it has, say); `None`: 1 each, the plain mean.
        seed: of the resampling.
    """
    values_N = np.asarray(values_N, float)
    weights_N = np.ones(len(values_N)) if weights_N is None else np.asarray(weights_N, float)
    if not weights_N.sum():
        return Estimate(None, None, None)
    draw = np.random.default_rng(seed).integers(len(values_N), size=(RESAMPLES, len(values_N)))
    below = weights_N[draw].sum(1)
    ratios = values_N[draw].sum(1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(values_N.sum() / weights_N.sum()), float(low), float(high))


def _mean(values_N: list[float]) -> Estimate:
    if not values_N:
        return Estimate(None, None, None)
    if set(values_N) <= {0.0, 1.0}:
        return wilson(sum(values_N), len(values_N))
    return bootstrap(values_N)


def process_score(trajectory: Trajectory) -> float | None:
    """Mean score of the judged steps (the paper's process label, section 4.2); `None` if none is known."""
    scores = [s.verdict.score for s in trajectory.steps if s.verdict is not None and s.verdict.score is not None]
    return float(np.mean(scores)) if scores else None


def summary(trajectories: Sequence[Trajectory], metrics: Callable[[Trajectory], dict[str, float]]) -> dict[str, Any]:
    """The JSON of an evaluation.

    Args:
        trajectories: judged trajectories, one or more a question.
        metrics: the official metrics of a trajectory.

    Returns:
        `n`; as {mean, low, high}: `outcome`, `process` (mean score within a trajectory, then across), `malformed` (share
        of actions), `tool_errors` (share of calls), `steps`, and `metrics`; `stops` (counts), `unknown` (verdicts).
    """
    steps = [trajectory.steps for trajectory in trajectories]
    process = [score for score in map(process_score, trajectories) if score is not None]
    named = [metrics(trajectory) for trajectory in trajectories]
    errors = [sum(result.error is not None for step in one for result in step.results) for one in steps]
    malformed = [sum(step.action.malformed is not None for step in one) for one in steps]
    estimates = {
        "outcome": _mean([t.outcome for t in trajectories if t.outcome is not None]),
        "process": _mean(process),
        "malformed": bootstrap(malformed, [len(one) for one in steps]),
        "tool_errors": bootstrap(errors, [sum(len(step.results) for step in one) for one in steps]),
        "steps": bootstrap([len(one) for one in steps]),
    }
    return {
        "n": len(trajectories),
        **{name: asdict(estimate) for name, estimate in estimates.items()},
        "metrics": {name: asdict(_mean([row[name] for row in named])) for name in (named[0] if named else {})},
        "stops": dict(Counter(trajectory.stop for trajectory in trajectories)),
        "unknown": sum(step.verdict is None or step.verdict.score is None for one in steps for step in one),
    }


def paired_difference(
    before: Sequence[Trajectory], after: Sequence[Trajectory], value: Callable[[Trajectory], float | None]
) -> Estimate:
    """Mean of after - before over the same (task, sample), with its bootstrap interval; pairs with an unknown are left out."""
    old = {(t.task.id, t.sample): value(t) for t in before}
    pairs = [(old.get((t.task.id, t.sample)), value(t)) for t in after]
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    return bootstrap(differences) if differences else Estimate(None, None, None)
