"""What is reported of trajectories, each figure with a 95 % interval.

Questions are the unit: intervals come from resampling questions with all of their samples (percentile bootstrap, 10,000
resamples, fixed seed). A mean of zeros and ones gets Wilson's interval, which stays honest where all values are equal.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np

from swirl_env.tasks.base import TaskSet
from swirl_env.types import Trajectory

RESAMPLES = 10_000
DRAWN = 4_000_000
"""Units that are drawn at once: a set of thousands of questions needs no gigabyte."""


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

    @property
    def signed(self) -> str:
        """As a difference is written."""
        if self.mean is None:
            return "unknown"
        return f"{self.mean:+z.3f}" if self.low is None else f"{self.mean:+z.3f} [{self.low:+z.3f}, {self.high:+z.3f}]"


def wilson(successes: float, n: int) -> Estimate:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    mean = successes / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = round(float(centre - half), 12), round(float(centre + half), 12)
    return Estimate(mean, max(0.0, low), min(1.0, high))


def bootstrap(
    values_N: Sequence[float],
    weights_N: Sequence[float] | None = None,
    seed: int = 0,
    strata_N: Sequence[Any] | None = None,
) -> Estimate:
    """sum(values) / sum(weights) with its percentile bootstrap interval over the N units.

    Args:
        values_N: one number a unit.
        weights_N: its denominator (how many actions it has, say); `None`: 1 each, the plain mean.
        seed: of the resampling.
        strata_N: which stratum (set, source) a unit is of: each keeps its size in every resample; `None`: all are of one.

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
    rng, sums_R2 = np.random.default_rng(seed), np.zeros((RESAMPLES, 2))
    for units in _strata(len(values), strata_N):
        rows = max(1, DRAWN // len(units))
        for start in range(0, RESAMPLES, rows):
            part = sums_R2[start : start + rows]
            draw = units[rng.integers(len(units), size=(len(part), len(units)))]
            part += np.stack([values[draw].sum(1), weights[draw].sum(1)], 1)
    above, below = sums_R2[sums_R2[:, 1] > 0].T
    low, high = np.quantile(above / below, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def _strata(n: int, strata_N: Sequence[Any] | None) -> list[np.ndarray]:
    """The places of the units of each stratum."""
    if strata_N is None:
        return [np.arange(n)]
    return [np.flatnonzero([other == stratum for other in strata_N]) for stratum in dict.fromkeys(strata_N)]


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
        weighted = [value * weight for value, weight in zip(values_N, weights, strict=True)]
        return bootstrap(weighted, weights, strata_N=strata_N)
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


def mean_of(trajectories: Sequence[Trajectory], value: Value) -> Estimate:
    """Mean over questions of the mean over their samples."""
    return _mean(list(_by_question(trajectories, value).values()))


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


def paired_difference(
    before: Sequence[Trajectory], after: Sequence[Trajectory], value: Value, macro: str | None = None
) -> Estimate:
    """Mean of after - before over the same questions, with its bootstrap interval; a question with an unknown is left out.
    Where every question changes by 0, by 1 or by -1, resampling says nothing of the others: Wilson's bound stands in.
    `macro` as in `summary`."""
    old, new = _by_question(before, value), _by_question(after, value)
    both = [task_id for task_id in new if task_id in old]
    strata = {trajectory.task.id: trajectory.task.meta.get(macro or "") for trajectory in after}
    return _difference([new[task_id] - old[task_id] for task_id in both], [strata[task_id] for task_id in both])


def _difference(changes_N: Sequence[float], strata_N: Sequence[Any]) -> Estimate:
    """Mean over strata of the mean change within each."""
    if len(changes_N) > 1 and len(set(changes_N)) == 1 and (mean := changes_N[0]) in (-1, 0, 1):
        doubt = wilson(0, len(changes_N)).high or 0.0
        return Estimate(float(mean), max(-1.0, mean - doubt), min(1.0, mean + doubt))
    sizes = Counter(strata_N)
    weights = [1 / sizes[stratum] for stratum in strata_N]
    weighted = [change * weight for change, weight in zip(changes_N, weights, strict=True)]
    return bootstrap(weighted, weights, strata_N=strata_N)


def by_group(trajectories: Sequence[Trajectory], key: str, value: Value) -> dict[str, dict[str, Any]]:
    """{value of `Task.meta[key]`: {n, mean, low, high}}; questions whose meta has no such key are left out."""
    groups: dict[Any, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        if (of := trajectory.task.meta.get(key)) is not None:
            groups[of].append(trajectory)
    known = {of: list(_by_question(groups[of], value).values()) for of in sorted(groups)}
    return {str(of): {"n": len(values), **asdict(_mean(values))} for of, values in known.items()}


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold a right one: 1 - C(n - right, k) / C(n, k), the unbiased
    estimator of Chen et al. (2021)."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(task_set: TaskSet, group: Sequence[Trajectory]) -> str | None:
    """The answer that most samples gave, the first of equals. Two answers are one where the official metric takes the one for
    the other. Samples without an answer do not vote; `None`: there is no vote."""
    answers = [trajectory.answer for trajectory in group if trajectory.answer is not None]
    return max(answers, key=lambda one: sum(task_set.same(other, one) for other in answers), default=None)


def of_samples(task_set: TaskSet, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """`pass` and `majority`: {k: {mean, low, high}} for k = 1, 2, 4, ... and all samples of a question, averaged as the outcome is.

    `pass` counts samples whose outcome is at least 0.5; `majority` is the outcome of the majority of the first k samples.
    Questions without a gold answer, or of which an error ended a sample, are left out.
    """
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in sorted(trajectories, key=lambda one: one.sample):
        groups[trajectory.task.id].append(trajectory)
    whole = [group for group in groups.values() if all(one.outcome is not None for one in group)]
    n = min(map(len, whole), default=0)
    sizes = sorted({2**i for i in range(n.bit_length())} | {n}) if n else []
    strata = None if task_set.macro is None else [group[0].task.meta.get(task_set.macro) for group in whole]
    passed, voted = {}, {}
    for k in sizes:
        right = [(len(group), sum((one.outcome or 0) >= 0.5 for one in group)) for group in whole]
        passed[str(k)] = asdict(_mean([pass_at_k(many, good, k) for many, good in right], strata))
        votes = [task_set.outcome(group[0].task, majority(task_set, group[:k])) or 0.0 for group in whole]
        voted[str(k)] = asdict(_mean(votes, strata))
    return {"pass": passed, "majority": voted}


def of_tools(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, Any]]:
    """Tool -> `calls`, `errors` (share), `repeated` (share made before in the episode with equal arguments), `seconds` (mean)."""
    calls: dict[str, list[tuple[bool, bool, float]]] = defaultdict(list)
    for trajectory in trajectories:
        made: set[tuple[str, str]] = set()
        for step in trajectory.steps:
            for call, result in zip(step.action.calls, step.results, strict=False):
                key = (call.name, json.dumps(call.arguments, sort_keys=True))
                calls[call.name].append((result.error is not None, key in made, result.seconds))
                made.add(key)
    return {
        name: {
            "calls": len(rows),
            **dict(zip(("errors", "repeated", "seconds"), np.mean(rows, 0).tolist(), strict=True)),
        }
        for name, rows in sorted(calls.items())
    }


def of_cost(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """`actions`, tool `calls`, `tokens` that were sampled (`None` where a policy tells none), and `judge_tokens`."""
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    told = [int(step.tokens.sampled.sum()) for step in steps if step.tokens is not None]
    return {
        "actions": len(steps),
        "calls": sum(len(step.results) for step in steps),
        "tokens": sum(told) if steps and len(told) == len(steps) else None,
        "judge_tokens": sum(step.verdict.tokens for step in steps if step.verdict is not None),
    }


def macro_difference(pairs: Mapping[str, tuple[Sequence[Trajectory], Sequence[Trajectory]]], value: Value) -> Estimate:
    """Mean over sets of the paired difference within each, all sets weighing the same; questions are resampled within sets.

    Args:
        pairs: set -> (before, after).
        value: of a trajectory.
    """
    changes: list[float] = []
    sets: list[str] = []
    for name, (before, after) in pairs.items():
        old, new = _by_question(before, value), _by_question(after, value)
        changes += [new[task_id] - old[task_id] for task_id in new if task_id in old]
        sets += [name] * (len(changes) - len(sets))
    return _difference(changes, sets)
