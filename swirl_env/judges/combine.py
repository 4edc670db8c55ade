"""Judges made of judges, and the outcome as a judge."""

from collections.abc import Sequence
from typing import Any, Literal

from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.judges.base import ask, key_of
from swirl_env.judges.gold import rightness
from swirl_env.types import Judge, StepView, Verdict

How = Literal["mean", "min", "first", "gate"]
HOWS = ("mean", "min", "first", "gate")


class Combine:
    """Several judges as one.

    Args:
        judges: at least one; put the cheap ones first.
        how: `mean`: weighted; `min`: the lowest; `first`: the first that knows; `gate`: each is asked only about the steps that all
            before it call GOOD, and the last one asked decides (so that what rules refuse costs no call of a model).
        weights: of `mean`, one a judge; `None`: equal.

    `mean` and `min` are unknown where a part is unknown, except that a part of 0 settles `min`.
    `Verdict.parts` holds each judge's score.

    Raises:
        ConfigError: no judge, weights that do not fit, or a way that is none of the four.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> judge = {"combine": ["rules", "outcome"], "how": "mean", "weights": [1, 3]}
        >>> env = gym.make("swirl/GSM8K-v0", judge=judge)
        >>> text, info = env.reset(seed=0)
        >>> env.step("<calculator>10+3</calculator>")[4]["step"].verdict.parts
        {'rules@2': 1.0, 'outcome@1': 0.5}
    """

    def __init__(self, judges: Sequence[Judge], how: How = "mean", weights: Sequence[float] | None = None):
        if not judges:
            raise ConfigError("combine needs at least one judge.")
        if how not in HOWS:
            raise UnknownNameError(f"Judges are not combined by {how!r}.{near(str(how), HOWS)}")
        weights = [1.0] * len(judges) if weights is None else list(weights)
        if how != "mean" and set(weights) != {1.0}:
            raise ConfigError("weights are for how='mean'.")
        if len(weights) != len(judges) or not all(weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ConfigError(f"weights must be {len(judges)} numbers from 0 on, not all 0; got {weights}.")
        self.judges, self.how, self.weights = list(judges), how, weights
        self.uses_gold = any(getattr(judge, "uses_gold", False) for judge in judges)
        shown = ",".join(f"{w:g}*{judge.name}" for w, judge in zip(weights, judges, strict=True))
        self.name = f"{how}({shown if how == 'mean' else ','.join(judge.name for judge in judges)})"

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        given: list[list[Verdict]] = [[] for _ in views]
        for judge in self.judges:
            open_ = [i for i, verdicts in enumerate(given) if self._asks_on(verdicts)]
            for i, verdict in zip(open_, ask(judge, [views[i] for i in open_]), strict=True):
                given[i].append(verdict)
        return [self._one(verdicts) for verdicts in given]

    @property
    def concurrency(self) -> int:
        """How many threads may ask at once: what the most careful of its parts bears."""
        return min((judge.concurrency for judge in self.judges if hasattr(judge, "concurrency")), default=1)

    def key(self, view: StepView) -> tuple[Any, ...]:
        """All that a verdict depends on, for a cache: the name does not tell the address or the settings of a model."""
        return self.name, self.weights, [key_of(judge, view) for judge in self.judges]

    def _asks_on(self, verdicts: list[Verdict]) -> bool:
        if not verdicts:
            return True
        last = verdicts[-1]
        if self.how == "gate":
            return bool(last.good)
        if self.how == "first":
            return last.score is None
        return self.how == "mean" or last.score != 0

    def _one(self, verdicts: list[Verdict]) -> Verdict:
        deciding = verdicts[-1]
        if self.how == "min":
            unknown = [v for v in verdicts if v.score is None]
            zero = [v for v in verdicts if v.score == 0]
            known = sorted((v for v in verdicts if v.score is not None), key=lambda v: v.score or 0.0)
            deciding = (zero or unknown or known)[0]
        score, reason = deciding.score, f"{deciding.judge}: {deciding.reason}"
        if self.how == "mean":
            unknown = [v for v in verdicts if v.score is None]
            score = None if unknown else sum(
                weight * (v.score or 0.0) for weight, v in zip(self.weights, verdicts, strict=True)
            ) / sum(self.weights)  # fmt: skip
            reason = "; ".join(f"{v.judge}: {v.reason}" for v in unknown or verdicts)
        parts: dict[str, float | None] = {verdict.judge: verdict.score for verdict in verdicts}
        seconds, tokens = sum(v.seconds for v in verdicts), sum(v.tokens for v in verdicts)
        return Verdict(score, reason, self.name, parts, seconds, tokens)


class Outcome:
    """An answer is 1 or 0, right or wrong by exact match (math: by number); a last step without one is 0; any other step is
    0.5, since the outcome says nothing of it. Unknown where the task has no gold answer.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/GSM8K-v0", judge="outcome")
        >>> text, info = env.reset(seed=0)
        >>> [env.step(action)[1] for action in ("<calculator>10+3</calculator>", "<answer>38</answer>")]
        [0.5, 1.0]
    """

    name, uses_gold = "outcome@1", True

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        return [self._one(view) for view in views]

    def _one(self, view: StepView) -> Verdict:
        if view.task is None or not view.task.answers:
            return Verdict(None, "the task has no gold answer", self.name)
        if view.action.answer is None:
            last = view.steps_left == 0
            return Verdict(0.0 if last else 0.5, "no answer was given" if last else "not an answer", self.name)
        right = rightness(view.task, view.action.answer)
        return Verdict(right, "the gold answer" if right else "not the gold answer", self.name)
