"""What is reported of trajectories, each figure with a 95 % interval.

Questions are the unit: intervals come from resampling questions with all of their samples (percentile bootstrap, 10,000
resamples, fixed seed). A mean of zeros and ones gets Wilson's interval, which stays honest where all values are equal.
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
        if self.mean is None:
            return "unknown"
        return f"{self.mean:.3f}" if self.low is None else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, n: int) -> Estimate:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    mean = successes / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = round(float(centre - half), 12), round(float(centre + half), 12)
    return Estimate(mean, max(0.0, low), min(1.0, high))


def bootstrap(values_N: Sequence[float], weights_N: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """sum(values) / sum(weights) with its percentile bootstrap interval over the N units.

    Args:
        values_N: one number a unit.
        weights_N: its denominator (how many actions it has, say); `None`: 1 each, the plain mean.
        seed: of the resampling.

    Returns:
        without bounds for a single unit; without a mean where there is nothing.
    """
    values = np.asarray(values_N, float)
    weights = np.ones(len(values)) if weights_N is None else np.asarray(weights_N, float)
    if not weights.sum():
        return Estimate(None, None, None)
    mean = float(values.sum() / weights.sum())
    if len(values) < 2:
        return Estimate(mean, None, None)
    draw = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    below = weights[draw].sum(1)
    ratios = values[draw].sum(1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def share(counts_N: Sequence[float], totals_N: Sequence[float]) -> Estimate:
    """A rate, sum(counts) / sum(totals). Where it is 0 or 1 in every unit, Wilson's bound over the units stands in."""
    measured = [(count, total) for count, total in zip(counts_N, totals_N, strict=True) if total]
    if measured and all(count == 0 for count, _ in measured):
        return wilson(0, len(measured))
    if measured and all(count == total for count, total in measured):
        return wilson(len(measured), len(measured))
    return bootstrap(counts_N, totals_N)


def _mean(values_N: list[float], strata_N: Sequence[Any] | None = None) -> Estimate:
    """The mean over units; with strata the mean of their means (macro average), each unit weighing 1 / its stratum's size."""
    if not values_N:
        return Estimate(None, None, None)
    if strata_N is not None and len(set(strata_N)) > 1:
        sizes = Counter(strata_N)
        weights = [1 / sizes[stratum] for stratum in strata_N]
        return bootstrap([value * weight for value, weight in zip(values_N, weights, strict=True)], weights)
    if set(values_N) <= {0.0, 1.0}:
        return wilson(sum(values_N), len(values_N))
    return bootstrap(values_N)


Value = Callable[[Trajectory], float | None]


def _by_question(trajectories: Sequence[Trajectory], value: Value) -> dict[str, float]:
    """Mean over the samples of each question; samples of one question are not independent. Unknown ones are left out."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if (known := value(trajectory)) is not None:
            values.setdefault(trajectory.task.id, []).append(known)
    return {task_id: float(np.mean(known)) for task_id, known in values.items()}


def process_score(trajectory: Trajectory) -> float | None:
    """Mean score of the judged steps (the paper's process label, section 4.2); `None` if none is known."""
    scores = [s.verdict.score for s in trajectory.steps if s.verdict is not None and s.verdict.score is not None]
    return float(np.mean(scores)) if scores else None


def summary(
    trajectories: Sequence[Trajectory],
    metrics: Callable[[Trajectory], dict[str, float | None]],
    macro: str | None = None,
) -> dict[str, Any]:
    """The JSON of an evaluation.

    Args:
        trajectories: judged trajectories, one or more a question.
        metrics: the official metrics of a trajectory.
        macro: key of `Task.meta` over whose values outcome and metrics are averaged; `None`: over the questions.

    Returns:
        `n` (questions), `trajectories`; as {mean, low, high}: `outcome`, `process` (mean score within a trajectory, then across), `malformed` (share
        of actions), `tool_errors` (share of calls), `steps`, and `metrics`; `stops` (counts), `unknown` (verdicts). An episode that
        an error ended (`stop="error"`) says nothing of the policy: it is counted, and left out of outcome, metrics and steps.
    """
    questions: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        questions.setdefault(trajectory.task.id, []).append(trajectory)

    def count(what: Callable[[Trajectory], int]) -> list[float]:
        return [float(sum(map(what, group))) for group in questions.values()]

    actions = count(lambda t: len(t.steps))
    malformed = count(lambda t: sum(step.action.malformed is not None for step in t.steps))
    calls = count(lambda t: sum(len(step.results) for step in t.steps))
    errors = count(lambda t: sum(result.error is not None for step in t.steps for result in step.results))

    def mean(value: Value) -> Estimate:
        return _mean(list(_by_question(trajectories, value).values()))

    ended = [trajectory for trajectory in trajectories if trajectory.stop != "error"]

    def official(value: Value) -> Estimate:
        known = _by_question(ended, value)
        strata = None if macro is None else [questions[task_id][0].task.meta.get(macro) for task_id in known]
        return _mean(list(known.values()), strata)

    estimates = {
        "outcome": official(lambda t: t.outcome),
        "process": mean(process_score),
        "malformed": share(malformed, actions),
        "tool_errors": share(errors, calls),
        "steps": bootstrap(list(_by_question(ended, lambda t: float(len(t.steps))).values())),
    }
    named = {id(trajectory): metrics(trajectory) for trajectory in trajectories}
    names = list(next(iter(named.values()), {}))

    def metric_of(name: str) -> Value:
        return lambda t: named[id(t)][name]

    return {
        "n": len(questions),
        "trajectories": len(trajectories),
        **{name: asdict(estimate) for name, estimate in estimates.items()},
        "metrics": {name: asdict(official(metric_of(name))) for name in names},
        "stops": dict(Counter(trajectory.stop for trajectory in trajectories)),
        "unknown": sum(s.verdict is None or s.verdict.score is None for t in trajectories for s in t.steps),
    }


def paired_difference(before: Sequence[Trajectory], after: Sequence[Trajectory], value: Value) -> Estimate:
    """Mean of after - before over the same questions, with its bootstrap interval; a question with an unknown is left out."""
    old, new = _by_question(before, value), _by_question(after, value)
    return bootstrap([new[task_id] - old[task_id] for task_id in new if task_id in old])
