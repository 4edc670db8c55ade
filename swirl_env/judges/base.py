"""How a judge is asked, and shown a recorded trajectory."""

import math
import warnings
from dataclasses import replace
from typing import Any

from swirl_env import io
from swirl_env.types import Judge, StepView, Trajectory, Verdict


def ask(judge: Judge, batch: list[StepView]) -> list[Verdict]:
    """The judge's verdicts, checked. A malformed action scores 0 and costs no call. A judge that crashes or breaks its
    promise yields unknown, never 0, and a warning."""
    if any(view.action.malformed is not None for view in batch):
        well = iter(ask(judge, [view for view in batch if view.action.malformed is None]))
        return [
            next(well) if view.action.malformed is None
            else Verdict(0.0, f"malformed: {view.action.malformed}", judge.name)
            for view in batch
        ]  # fmt: skip
    if not batch:
        return []
    allowed = batch
    if not getattr(judge, "uses_gold", False):
        allowed = [
            view
            if view.task is None and view.results is None
            else StepView(view.question, view.steps, view.action, view.steps_left)
            for view in batch
        ]
    try:
        verdicts = judge(allowed)
        if not isinstance(verdicts, list) or len(verdicts) != len(batch):
            came = f"{len(verdicts)}" if isinstance(verdicts, list) else type(verdicts).__name__
            raise TypeError(
                f"a judge returns a list with one Verdict a view; for {len(batch)} views it returned {came}"
            )
    except Exception as error:
        if len(batch) > 1:  # one view that breaks the judge must not blind it to the others
            return [verdict for view in batch for verdict in ask(judge, [view])]
        verdict = Verdict(None, f"the judge failed: {type(error).__name__}: {error}", judge.name)
        warnings.warn(f"{judge.name}: {verdict.reason} (this step is unscored)", RuntimeWarning, stacklevel=2)
        return [verdict]
    return [verdict if _valid(verdict) else _unknown(verdict, judge.name) for verdict in verdicts]


def _valid(verdict: Any) -> bool:
    if not isinstance(verdict, Verdict):
        return False
    score = verdict.score
    return score is None or (isinstance(score, (int, float)) and math.isfinite(score) and 0 <= score <= 1)


def _unknown(verdict: Any, name: str) -> Verdict:
    warnings.warn(
        f"{name}: expected a Verdict with a score in [0, 1] or None, got {verdict!r}"[:300],
        RuntimeWarning,
        stacklevel=3,
    )
    return Verdict(None, f"expected a Verdict with a score in [0, 1] or None, got {verdict!r}"[:300], name)


def key_of(judge: Judge, view: StepView) -> tuple[Any, ...]:
    """All that a judge's verdict depends on, for a cache: what the judge says it is, else its name and the whole view, but for how
    long tools took."""
    if hasattr(judge, "key"):
        return judge.key(view)
    steps = tuple(replace(step, results=_timeless(step.results)) for step in view.steps)
    return judge.name, io.dumps(replace(view, steps=steps, results=_timeless(view.results)))


def _timeless(results: Any) -> Any:
    return None if results is None else tuple(replace(result, seconds=0.0) for result in results)


def views(trajectory: Trajectory) -> list[StepView]:
    """What a judge was shown at each step, rebuilt from the record: judging now and then gives equal verdicts."""
    bare = tuple(replace(step, verdict=None, tokens=None) for step in trajectory.steps)
    limit = trajectory.env.kwargs.get("max_steps")
    return [
        StepView(
            trajectory.task.question, bare[:i], step.action,
            None if limit is None else limit - i - 1,
            trajectory.task, step.results,
        )
        for i, step in enumerate(bare)
    ]  # fmt: skip
