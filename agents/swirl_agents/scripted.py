"""Policies without a model: `oracle` writes gold demonstrations, `replay` repeats a recording, `random` draws.

The oracle knows the gold solution but acts through the environment like anyone else, so its tool results are real and
it writes only what a reader of the transcript could: it calculates with numbers that are shown, and searches with words
that are shown wherever some such query finds the paragraph.
"""

import copy
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from swirl_env import numerals
from swirl_env.answers import numeric_equal, parse_number
from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, ToolError, UnknownNameError, near
from swirl_env.grammar import Grammar
from swirl_env.io import read
from swirl_env.judges.rules import content
from swirl_env.tasks.paragraphs import shows, supporting
from swirl_env.tools.calculator import evaluate, show, tidy
from swirl_env.tools.search import Search, words
from swirl_env.types import Action, Completion, Task, ToolCall, Trajectory, Transcript


class Scripted:
    """A policy made of a function from transcript to action text."""

    def __init__(self, name: str, act: Callable[[Transcript], str]):
        self.name = name
        self._act = act

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        return [[Completion(self._act(transcript), None, "eos") for _ in range(n)] for transcript in transcripts]


def replay(path: str | Path) -> Scripted:
    """Repeats the actions of recorded trajectories, state by state.

    Args:
        path: file of trajectories, such as the `trajectories.jsonl` of a run folder.

    Raises:
        ConfigError: the file holds no trajectory. While acting: a state that was not recorded.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_agents.scripted import replay
        >>> from swirl_env.wrappers import RecordTrajectories
        >>> with RecordTrajectories(gym.make("swirl/GSM8K-v0"), "recorded.jsonl") as env:
        ...     text, info = env.reset(seed=0)
        ...     first = info["transcript"]
        ...     text, *_ = env.step("<answer>38</answer>")
        >>> replay("recorded.jsonl")([first])[0][0].text
        '<answer>38</answer>'
    """
    if not Path(path).is_file():
        raise ConfigError(f"replay: there is no file {str(path)!r}. Give the trajectories.jsonl of a run.")
    actions: dict[tuple[str, ...], str] = {}
    for trajectory in read(path, Trajectory):
        for state, step in zip(trajectory.states(), trajectory.steps, strict=True):
            actions.setdefault(tuple(message.content for message in state.messages), step.action.text)
    if not actions:
        raise ConfigError(f"replay: {path} holds no trajectory. Give the trajectories.jsonl of a run.")

    def act(transcript: Transcript) -> str:
        state = tuple(message.content for message in transcript.messages)
        if state not in actions:
            raise ConfigError(f"replay: {path} has no action for this state: ...{transcript.text[-200:]!r}")
        return actions[state]

    return Scripted("replay", act)


def random_policy(env: ToolEnv) -> Scripted:
    """Draws a thought, a call or an answer made of words of the prompt; seeded by the transcript's seed. The floor to compare with.

    Args:
        env: whose tools and grammar it uses (`env.unwrapped`).

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_agents.rollout import rollout
        >>> from swirl_agents.scripted import random_policy
        >>> env = gym.make("swirl/GSM8K-v0")
        >>> policy = random_policy(env.unwrapped)
        >>> trajectory = next(rollout(lambda: gym.make("swirl/GSM8K-v0"), policy, [("gsm8k-train-0", 0)]))
        >>> trajectory.stop, trajectory.outcome
        ('answered', 0.0)
    """

    def act(transcript: Transcript) -> str:
        draw = np.random.default_rng(transcript.seed or 0)
        vocabulary = words(transcript.messages[0].content.rpartition("\n\n")[2]) or ["nothing"]
        text = " ".join(draw.choice(vocabulary, size=draw.integers(1, 5)))
        kind = draw.choice(["think", "call", "answer"])
        if kind == "answer":
            return env.grammar.render(Action("", answer=text))
        if kind == "think" and env.grammar.dialect.think:
            return env.grammar.render(Action("", text))
        name = str(draw.choice(list(env.tools)))
        argument = next(iter(env.tools[name].parameters["properties"]))
        return env.grammar.render(Action("", calls=(ToolCall(name, {argument: text}),)))

    return Scripted("random", act)


def oracle(env: ToolEnv) -> Scripted:
    """The gold demonstration of each task of `env`: calculations of the worked solution, or searches for the supporting
    paragraphs, then the gold answer.

    Args:
        env: whose gold answers and steps it reads (`env.unwrapped`).

    Raises:
        ConfigError: the task set has no gold answers, or neither worked solutions nor supporting paragraphs.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_agents.scripted import oracle
        >>> env = gym.make("swirl/GSM8K-v0")
        >>> policy, (text, info) = oracle(env.unwrapped), env.reset(seed=0)
        >>> policy([info["transcript"]])[0][0].text
        '<calculator>10+3</calculator>'
    """
    grammar, task_set = env.grammar, env.task_set
    planners = {"solution": _solve, "supporting": _look_up}
    first = next(iter(task_set.tasks.values()))
    if not any(task.answers and set(planners) & set(task.meta) for task in task_set.tasks.values()):
        raise ConfigError(
            f"oracle: tasks of {task_set.name} have no gold answer or gold steps (meta: {', '.join(first.meta)})."
        )
    prompts: dict[str, Task] = {}
    unread, reading = iter(task_set.tasks.values()), threading.Lock()  # tasks may be many, and made when asked for

    def find(prompt: str) -> Task:
        with reading:
            while prompt not in prompts:
                if (task := next(unread, None)) is None:
                    raise UnknownNameError("oracle: this transcript is of no task of its environment.")
                prompts[grammar.prompt(task_set.instruction, task.question, env.max_steps)] = task
            return prompts[prompt]

    def act(transcript: Transcript) -> str:
        task = find(transcript.messages[0].content)
        if not task.answers:
            raise ConfigError(f"oracle: the task {task.id} has no gold answer.")
        planner = next((planners[key] for key in planners if key in task.meta), _answer)
        return grammar.render(planner(env, task, transcript))

    return Scripted("oracle", act)


def make_scripted(name: str, env: ToolEnv) -> Scripted:
    """`oracle`, `random` or `replay:FILE`."""
    if name.startswith("replay:"):
        return replay(name.removeprefix("replay:"))
    makers = {"oracle": oracle, "random": random_policy}
    if name not in makers:
        raise UnknownNameError(f"No scripted policy is called {name!r}.{near(name, [*makers, 'replay:FILE'])}")
    return makers[name](env)


SCRIPTED = {"oracle": oracle, "random": random_policy, "replay": replay}
"""name -> what makes the policy."""


def _answer(env: ToolEnv, task: Task, transcript: Transcript) -> Action:
    return Action("", answer=task.answers[0])


# -- GSM8K: the worked solution's calculations


def _call(name: str, argument: str, text: str) -> Action:
    return Action("", calls=(ToolCall(name, {argument: text}),))


def _solve(env: ToolEnv, task: Task, transcript: Transcript) -> Action:
    taken = sum(message.role == "assistant" for message in transcript.messages)
    plan = calculations(task.question, task.meta["solution"], task.answers[0])
    # more calculations than steps: the first ones share an action
    surplus = max(0, len(plan) - (env.max_steps - 1))
    groups = [plan[: surplus + 1], *([expression] for expression in plan[surplus + 1 :])] if plan else []
    if taken < len(groups) and env.max_steps - taken > 1:
        return Action("", calls=tuple(ToolCall("calculator", {"expression": text}) for text in groups[taken]))
    return Action("", answer=task.answers[0])


_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_EQUATION = re.compile(
    r"([\d.,()$%\s+*/x×÷-]*[\d)]%?\s*[-+*/x×÷]\s*[\d($.][\d.,()$%\s+*/x×÷-]*)=\s?\$?(-?\d[\d,]*\.?\d*)"
)


@lru_cache(maxsize=4096)
def calculations(question: str, solution: str, gold: str) -> tuple[str, ...]:
    """The expressions that lead from the question to the gold answer.

    They are the solution's `<<...>>` annotations in order. Where the last one is not the gold (5 % of the train file) or
    there are none (1 %), equations written in the text are added, then one operation on known numbers is sought that
    gives the gold; where a number comes from nowhere, one that gives it. Lone numbers and repeats are left out. If the
    gold is still not reached, the list ends where the solution does.
    """
    known = {key: key for key in numerals.mentioned(question) | numerals.implied(question) | {1.0, 2.0}}
    plan: list[str] = []
    results: list[float] = []

    def add(expression: str) -> bool:
        try:
            value = float(evaluate(expression))
        except (ToolError, OverflowError):
            return False
        text = tidy(expression).replace("**", "^").replace(" ", "")
        literals = [float(literal) for literal in re.findall(r"\d+\.?\d*|\.\d+", text)]
        if text in plan or len(literals) < 2:
            return False
        for literal in literals:
            shown = any(abs(literal - other) <= 0.01 * abs(other) for other in [*known, *results])
            if not shown and (step := bridge(literal, [*known, *results])) and step not in plan:
                plan.append(step)
                results.append(literal)
        plan.append(text)
        results.append(value)
        return True

    def done() -> bool:
        return bool(results) and numeric_equal(show(evaluate(plan[-1])), gold) == 1.0

    for expression, _ in _ANNOTATION.findall(solution):
        add(expression)
    if not done():
        tail = solution[[match.end() for match in _ANNOTATION.finditer(solution)][-1] if "<<" in solution else 0 :]
        for expression, _ in _EQUATION.findall(_ANNOTATION.sub("", tail)):
            add(expression.strip(" .,$"))
    if not done():
        goal = float(parse_number(gold) or 0)
        last = results[-1:]
        step = (
            bridge(goal, last, [*known, *results])
            or bridge(goal, [*results], [*known, *results])
            or bridge(goal, known)
        )
        if step and step not in plan:
            plan.append(step)
        else:
            reached = [i for i, expression in enumerate(plan) if numeric_equal(show(evaluate(expression)), gold) == 1.0]
            plan = plan[: reached[-1] + 1] if reached else plan
    return tuple(plan)


def bridge(goal: float, left, right=None) -> str | None:
    """One operation `a op b` that gives the goal, or `None`; whole numbers come first."""
    left, right = list(left), list(right if right is not None else left)
    pairs = sorted(
        ((a, b) for a in left for b in right if a != b or len(left) > 1),
        key=lambda pair: (sum(value != int(value) for value in pair), max(map(abs, pair))),
    )
    for a, b in pairs:
        for x, y in permutations((a, b)):
            for sign, value in (("+", x + y), ("-", x - y), ("*", x * y), ("/", x / y if y else None)):
                if value is not None and value == goal and goal not in (x, y) and x > 0 and y > 0:
                    return f"{x:.12g}{sign}{y:.12g}"
    return None


# -- questions over paragraphs: the supporting ones


def _look_up(env: ToolEnv, task: Task, transcript: Transcript) -> Action:
    taken = sum(message.role == "assistant" for message in transcript.messages)
    search: Any = env.tools.get("search")
    search = getattr(search, "tool", search)  # below a budget
    if isinstance(search, Search) and env.max_steps - taken > 1:
        finder = copy.copy(search)  # what it is bound to is the episode's
        finder.bind(env.task_set.documents(task.id))
        queries = [str(call.arguments.get("query", "")) for call in _calls(env.grammar, transcript)]
        results = [text for query in queries if (text := _found(finder, query))]
        missing = [
            paragraph for paragraph in supporting(task.meta) if not any(shows(text, paragraph) for text in results)
        ]
        if missing and (query := _best_query(task, finder, missing, queries, "\n".join(results))):
            return _call("search", "query", query)
    return Action("", answer=task.answers[0])


def _found(finder: Search, query: str) -> str:
    """What a search shows; empty where it finds nothing."""
    try:
        return finder(query=query)
    except ToolError:
        return ""


def _calls(grammar: Grammar, transcript: Transcript) -> list[ToolCall]:
    return [call for m in transcript.messages if m.role == "assistant" for call in grammar.parse(m.content).calls]


def _best_query(
    task: Task, finder: Search, missing: list[tuple[str, str | None]], queries: list[str], evidence: str
) -> str | None:
    """A query that finds a missing paragraph: in words already shown if there is one, else by its title."""
    known = content(task.question) | content(evidence)
    options = []
    for paragraph in missing:
        title = paragraph[0]
        found = (f"{d.title}\n{d.text}" for d in finder.documents if d.title == title)
        text = next((text for text in found if shows(text, paragraph)), "")
        rest = [word for word in dict.fromkeys(words(text)) if word in content(text)]
        shared = [word for word in dict.fromkeys(words(task.question)) if word in rest]
        linked = [word for word in dict.fromkeys(words(title)) if word in known]
        options += [title, " ".join(linked), " ".join(dict.fromkeys([*linked, *shared])), " ".join(shared)]
        # where other paragraphs rank higher: the title with more and more words of its paragraph, known ones first
        more = sorted((word for word in rest if word not in content(title)), key=lambda word: word not in known)
        options += [" ".join([title, *more[:count]]) for count in (1, 2, 3, 4, 6, 8, 12)]
    options.append(task.question)

    def new(query: str) -> bool:
        return bool(content(query)) and not any(content(query) <= content(other) for other in queries)

    def finds(query: str) -> bool:
        return any(shows(_found(finder, query), paragraph) for paragraph in missing)

    useful = [query for query in dict.fromkeys(options) if new(query) and finds(query)]
    tied = [query for query in useful if len(content(query) & known) >= len(content(query)) / 2]
    return next(iter(tied + useful), None)
