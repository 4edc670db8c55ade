"""Contract checks for users' own environments, tools and judges; each raises `AssertionError` with what to mend."""

import json
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from gymnasium.utils.env_checker import check_env

from swirl_env.env import ToolEnv
from swirl_env.judges import ask
from swirl_env.tools import call_tool, make_tool
from swirl_env.tools.base import function_schema
from swirl_env.types import Action, Judge, StepView, ToolCall

ACTIONS = (
    "<think>Let me see.</think>",
    "",
    "nonsense",
    "<answer>",
    "<nosuchtool>x</nosuchtool>",
    "\ud800",
    "a" * 200_000,
)


def check_env_contract(env: gym.Env, answers: bool = True) -> None:
    """Gymnasium's checker without a warning, same seed same episode, JSON spec, pickling, and actions of every kind.

    Args:
        env: an environment over `ToolEnv`.
        answers: also check that every task's gold answers score 1 by its own metric.
    """
    base = env.unwrapped
    assert isinstance(base, ToolEnv), f"expected an environment over ToolEnv, got {type(base).__name__}"
    if base.judge is not None:
        base.reset(seed=0)
        verdict = base.step("<answer>x</answer>")[4]["step"].verdict
        failed = verdict.score is None and verdict.reason.startswith(("the judge failed", "expected a Verdict"))
        assert not failed, f"its judge is broken: {verdict.reason}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(base, skip_render_check=True)
    if env.spec is not None:
        json.loads(env.spec.to_json())
    twin = pickle.loads(pickle.dumps(base))
    assert twin.reset(seed=7) == base.reset(seed=7), "a pickled copy draws another episode from the same seed"
    for action in ACTIONS:
        base.reset(seed=0)
        text, reward, terminated, truncated, info = base.step(action)
        assert isinstance(text, str) and isinstance(reward, float), f"{action[:20]!r}: expected (str, float, ...)"
        assert not (terminated and truncated), f"{action[:20]!r}: terminated and truncated at once"
        assert set(info) <= {"task_id", "transcript", "step", "outcome"}, f"unknown info keys {set(info)}"
        assert ("outcome" in info) == (terminated or truncated), (
            "info has `outcome` at the end of an episode, not before"
        )
    for task in base.task_set.tasks.values() if answers else ():
        for gold in task.answers:
            assert base.task_set.outcome(task, gold) == 1.0, f"{task.id}: its own gold answer {gold!r} does not score 1"


def check_tool_contract(tool: Any, good: dict[str, Any], bad: Sequence[dict[str, Any]] = ()) -> None:
    """The tool has a name, a description and a JSON schema, answers `good` with text, and refuses each of `bad`."""
    tool = make_tool(tool)
    json.dumps(function_schema(tool))
    assert tool.description, f"{tool.name} has no description: the model cannot know what it does"
    tools = {tool.name: tool}
    result = call_tool(tools, ToolCall(tool.name, good))
    assert result.error is None, f"{tool.name}({good}) failed: {result.text}"
    for arguments in ({"no such argument": 1}, *bad):
        result = call_tool(tools, ToolCall(tool.name, arguments))
        assert result.error in ("tool_error", "bad_arguments"), (
            f"{tool.name}({arguments}) gave {result.error or 'a result'}: raise ToolError with a sentence for the model"
        )


def check_judge_contract(judge: Judge, views: Sequence[StepView] = ()) -> None:
    """Same length and order, scores in [0, 1] or None, batching and repetition change nothing."""
    assert isinstance(getattr(judge, "name", None), str), "a judge has a name with its version, such as 'mine@1'"
    assert isinstance(getattr(judge, "uses_gold", None), bool), "a judge says `uses_gold = False` (or True)"
    batch = list(views) or [
        StepView("What is 2+3?", (), Action(text, thought, (), answer), 3)
        for text, thought, answer in [
            ("", "", None),
            ("<think>add</think>", "add", None),
            ("<answer>5</answer>", "", "5"),
        ]
    ]
    verdicts = ask(judge, batch)
    assert len(verdicts) == len(batch)
    for view, verdict in zip(batch, verdicts, strict=True):
        assert verdict.score is None or 0 <= verdict.score <= 1
        assert verdict.reason, f"no reason for {view.action.text!r}"
        assert not verdict.reason.startswith(("the judge failed", "expected a Verdict")), verdict.reason
    assert ask(judge, batch[::-1]) == verdicts[::-1], "the order of a batch changes its verdicts"
    assert ask(judge, []) == [], "an empty batch gives an empty list"
