"""The `gold-steps` judge: a verifiable process reward from the gold path of a task, without a model.

It sees the task with its gold answers and what each call returned (`uses_gold`), and asks one thing: does this step bring
the episode further along a path that is known to be right? Sources: HotPotQA's supporting facts, MuSiQue's
`question_decomposition`, BeerQA's gold paragraphs, CofCA's sub-questions, GSM8K's `<<48/2=24>>` annotations.

Malformed      0.
Answer         1 or 0: right or wrong by exact match (math: by number), the maximum over the accepted forms.
Thought        0.5 as the first step and right after a step that made progress, else 0.
Calls          the share of the action's calls whose result makes progress, so that many guesses in one action do not pay.
On paragraphs  a result makes progress if it holds a gold paragraph (title and the beginning of its text) that no earlier
               result held, or the answer of the first sub-question whose answer no earlier result held (as whole words;
               answers that stand in the question do not count). In any order, once each.
On math        a result makes progress if it is a value of the worked solution that has not been produced as often as the
               solution produces it, rounded as written there, and is not merely a number that the call was given.
Last step      0 unless it is an answer.

Unknown (`None`) where the task says nothing: a thought or call without a gold path, an answer without gold answers; and a search whose
result was not shown (an action sampled in stage 2 is never executed; a calculation is worked out here). Nothing can be had twice, so the rewards of an episode are bounded: one for each gold step, half of one for each thought between, one for the
answer. What it cannot see: whether a query was reasonable that found nothing, and other right paths than the gold one.
"""

import re
from collections import Counter
from collections.abc import Iterable

from swirl_env import answers
from swirl_env.errors import ToolError
from swirl_env.tasks.paragraphs import shows, supporting
from swirl_env.tools.calculator import evaluate, show
from swirl_env.types import Action, Step, StepView, Task, ToolCall, ToolResult, Verdict

NAME = "gold-steps@1"

_VALUE = re.compile(r"<<[^<>]*=\s*\$?(-?[\d,]*\.?\d+)%?\s*>>")
Shown = tuple[ToolCall, ToolResult]
"""A call that worked, and what it returned."""

_LITERAL = re.compile(r"\d+\.?\d*|\.\d+")


def _verdict(score: float | None, reason: str) -> Verdict:
    return Verdict(score, reason, NAME)


class GoldSteps:
    """Rewards each step that brings the episode further along the gold path. Deterministic and stateless.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/GSM8K-v0", judge="gold-steps")
        >>> text, info = env.reset(seed=0)  # ... if Darius scored 10 points? Marius 3 more, Matt 5 more
        >>> for action in ("<calculator>10+3</calculator>", "<calculator>10*3</calculator>", "<answer>38</answer>"):
        ...     verdict = env.step(action)[4]["step"].verdict
        ...     print(verdict.score, verdict.reason)
        1.0 brings the value 13
        0.0 brings nothing new of the gold path
        1.0 the gold answer
    """

    name = NAME
    uses_gold = True

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        return [_judge(view) for view in views]


def _judge(view: StepView) -> Verdict:
    action, task = view.action, view.task
    if action.malformed is not None:
        return _verdict(0.0, f"malformed: {action.malformed}")
    if task is None:
        return _verdict(None, "the task was not shown, and this judge goes by its gold steps")
    if action.answer is not None:
        if not task.answers:
            return _verdict(None, "the task has no gold answer")
        right = rightness(task, action.answer)
        return _verdict(right, "the gold answer" if right else "not the gold answer")
    if view.steps_left == 0:
        return _verdict(0.0, "the last step, and not an answer")
    if not _known(task):
        return _verdict(None, "the task has no gold steps")
    if not action.calls:
        if view.steps and not _gains(task, view.steps[:-1], view.steps[-1]):
            return _verdict(0.0, "a thought after a step that made no progress")
        return _verdict(0.5, "a thought")
    results = _worked_out(action) if view.results is None else view.results
    if results is None:
        return _verdict(None, "the results of the calls were not shown")
    gains = _gains(task, view.steps, Step(action, results))
    share = len(gains) / len(action.calls)
    return _verdict(share, f"brings {', '.join(gains)}" if gains else "brings nothing new of the gold path")


def _worked_out(action: Action) -> tuple[ToolResult, ...] | None:
    """What the calls of an action that was not executed would return: known of calculations alone."""
    if any(call.name != "calculator" for call in action.calls):
        return None
    return tuple(_calculated(str(call.arguments.get("expression", ""))) for call in action.calls)


def _calculated(expression: str) -> ToolResult:
    try:
        return ToolResult(show(evaluate(expression)))
    except ToolError as error:
        return ToolResult(str(error), "tool_error")


def rightness(task: Task, answer: str) -> float:
    """1.0 or 0.0: the maximum over the gold forms, by exact match, or by number where there is a worked solution."""
    metric = answers.numeric_equal if "solution" in task.meta else answers.exact_match
    return max(metric(answer, gold) for gold in task.answers)


def _known(task: Task) -> bool:
    return any(task.meta.get(key) for key in ("supporting", "steps", "solution"))


def _gains(task: Task, earlier: Iterable[Step], step: Step) -> list[str]:
    """What of the gold path each call of a step brings for the first time; calls that bring nothing are left out."""
    seen = [pair for before in earlier for pair in _shown(before)]
    brings = _value_gain if "solution" in task.meta else _paragraph_gain
    gains = []
    for pair in _shown(step):
        if gain := brings(task, seen, pair):
            gains.append(gain)
        seen.append(pair)  # a repeat inside one action is a repeat
    return gains


def _shown(step: Step) -> list[Shown]:
    return [pair for pair in zip(step.action.calls, step.results, strict=True) if pair[1].error is None]


def _paragraph_gain(task: Task, seen: list[Shown], new: Shown) -> str | None:
    text, before = new[1].text, [result.text for _, result in seen]
    for paragraph in supporting(task.meta):
        if shows(text, paragraph) and not any(shows(other, paragraph) for other in before):
            return f"the paragraph {paragraph[0]!r}"
    asked = _plain(task.question)
    known = asked + "".join(map(_plain, before))
    for step in task.meta.get("steps", ()):
        answer = _plain(step["answer"])
        if answer.strip() and answer not in known:
            return f"the sub-answer {step['answer']!r}" if answer in _plain(text) else None
    return None


def _plain(text: str) -> str:
    """Normalised as for exact match, between blanks: whole words can be found in it."""
    return f" {answers.normalize(text)} "


def _value_gain(task: Task, seen: list[Shown], new: Shown) -> str | None:
    call, result = new
    if any(call == other for other, _ in seen) or (value := _number(result)) is None:
        return None
    given = _LITERAL.findall(" ".join(map(str, call.arguments.values())))
    wanted = Counter(written.replace(",", "") for written in _VALUE.findall(task.meta["solution"]))
    wanted |= Counter({gold.replace(",", ""): 1 for gold in task.answers if answers.parse_number(gold) is not None})
    for written, times in wanted.items():
        made = sum((other := _number(r)) is not None and _rounds_to(other, written) for _, r in seen)
        if _rounds_to(value, written) and made < times and not any(_rounds_to(float(n), written) for n in given):
            return f"the value {written}"
    return None


def _number(result: ToolResult) -> float | None:
    number = answers.parse_number(result.text)
    return None if number is None or abs(number) > 10**300 else float(number)


def _rounds_to(value: float, written: str) -> bool:
    """Whether a value is a decimal, rounded to the places that this shows."""
    gold = answers.parse_number(written)
    places = len(written.partition(".")[2])
    return gold is not None and abs(value - float(gold)) <= 0.5 * 10.0**-places * (1 + 1e-9)
