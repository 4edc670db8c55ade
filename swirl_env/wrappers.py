"""Wrappers: your own tools, judge and records come in here.

    env = gym.make("swirl/Tasks-v0", path="questions.jsonl")
    env = AddTool(env, population)           # a typed, documented function, a Tool, or "module:attribute"
    env = ToolBudget(env, {"search": 3})
    env = JudgeReward(env, MyJudge())        # a Judge, or its name
    env = StepPenalty(env, 0.02)
    env = RecordTrajectories(env, "episodes.jsonl")

All but the last two register on the `ToolEnv` below, so the prompt, vector environments and rollouts see them. An env's spec
keeps wrappers; it stays JSON where tools and judges are given by name or can be found again by theirs.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, ToolError, UnknownNameError, near
from swirl_env.io import Writer, read
from swirl_env.names import name_of
from swirl_env.tools import make_tool, named_tools
from swirl_env.types import Message, Step, Tool, Trajectory


def _base(env: gym.Env) -> ToolEnv:
    base = getattr(env, "unwrapped", env)
    if not isinstance(base, ToolEnv):
        raise ConfigError(
            f"This wrapper is for environments over ToolEnv, which come first; got {type(base).__name__}."
        )
    return base


class _Recorded(gym.Wrapper, RecordConstructorArgs):
    """A wrapper whose arguments an env's spec can hold."""

    def __init__(self, env: gym.Env, **arguments: Any):
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        gym.Wrapper.__init__(self, env)


class AddTool(_Recorded):
    """Offer one more tool (or all that a name such as `"sql:shop.db"` stands for); the next episode begins with it.

    Args:
        env: over `ToolEnv`.
        tool: a `Tool`, a function with type hints and a docstring, or a name as in `tools=`.

    Raises:
        ConfigError: it is no tool, or its name is taken.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.wrappers import AddTool
        >>> def population(city: str) -> str:
        ...     '''Tells how many people live in a city.'''
        ...     return {"Burbank": "107,337"}.get(city, "unknown")
        >>> env = AddTool(gym.make("swirl/HotPotQA-v0"), population)
        >>> text, info = env.reset(seed=0)
        >>> text, *_, info = env.step("<population>Burbank</population>")
        >>> print(info["step"].observation)
        <result>107,337</result>
    """

    def __init__(self, env: gym.Env, tool: Any):
        base = _base(env)
        made = named_tools(tool) if isinstance(tool, str) else [make_tool(tool)]
        made = [copy.copy(one) if hasattr(one, "bind") else one for one in made]  # what is bound belongs to one env
        for one in made:
            if one.name in base.tools:
                raise ConfigError(
                    f"There is a tool {one.name!r} already. Take it away first: RemoveTool(env, {one.name!r})."
                )
        super().__init__(env, tool=tool if isinstance(tool, str) else name_of(tool) or tool)
        base.set_tools([*base.tools.values(), *made])


class RemoveTool(_Recorded):
    """Offer a tool no longer; the next episode begins without it.

    Args:
        env: over `ToolEnv`.
        name: of the tool.

    Raises:
        UnknownNameError: there is no tool of that name.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.wrappers import RemoveTool
        >>> env = RemoveTool(gym.make("swirl/Tasks-v0"), "search")
        >>> list(env.unwrapped.tools)
        ['calculator']
    """

    def __init__(self, env: gym.Env, name: str):
        base = _base(env)
        if name not in base.tools:
            raise UnknownNameError(f"No tool is called {name!r}.{near(name, base.tools)}")
        super().__init__(env, name=name)
        base.set_tools([tool for tool in base.tools.values() if tool.name != name])


class ToolBudget(_Recorded):
    """Refuse calls of a tool beyond so many an episode; the model is told the limit and when it is reached.

    Args:
        env: over `ToolEnv`.
        calls: tool name -> calls, or one number for each tool.

    Raises:
        ConfigError: not a whole number from 0 on; `UnknownNameError`: there is no such tool.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.wrappers import ToolBudget
        >>> env = ToolBudget(gym.make("swirl/GSM8K-v0"), {"calculator": 1})
        >>> text, info = env.reset(seed=0)
        >>> for expression in ("10+3", "10+5"):
        ...     text, *_, info = env.step(f"<calculator>{expression}</calculator>")
        >>> print(info["step"].observation)
        <error>calculator may be called 1 times an episode, and was. Go on without it.</error>
    """

    def __init__(self, env: gym.Env, calls: Mapping[str, int] | int):
        base = _base(env)
        if not isinstance(calls, (int, Mapping)):
            raise ConfigError(f"calls must be a number or a dict such as {{'search': 3}}, got {calls!r}.")
        limits = dict.fromkeys(base.tools, calls) if isinstance(calls, int) else dict(calls)
        for name, limit in limits.items():
            if name not in base.tools:
                raise UnknownNameError(f"No tool is called {name!r}.{near(name, base.tools)}")
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
                raise ConfigError(f"A budget is a whole number from 0 on; got {limit!r} for {name!r}.")
        super().__init__(env, calls=calls)
        base.set_tools([_Budgeted(t, limits[t.name]) if t.name in limits else t for t in base.tools.values()])


class _Budgeted:
    """A tool that refuses after so many calls; `bind`, which an environment calls at each reset, begins anew."""

    def __init__(self, tool: Tool, limit: int):
        self.tool, self.limit, self.made = tool, limit, 0
        self.name, self.parameters = tool.name, tool.parameters
        self.description = f"{tool.description} (at most {limit} calls)"

    def bind(self, documents: Any) -> None:
        self.made = 0
        if hasattr(self.tool, "bind"):
            self.tool.bind(documents)

    def __call__(self, **arguments: Any) -> str:
        if self.made >= self.limit:
            raise ToolError(f"{self.name} may be called {self.limit} times an episode, and was. Go on without it.")
        self.made += 1
        return self.tool(**arguments)


class JudgeReward(_Recorded):
    """Reward each step by this judge.

    Args:
        env: over `ToolEnv`; one with `reward="outcome"` now rewards by process, one with `both` stays so.
        judge: a `Judge`, or its name or JSON as in `judge=`.

    Raises:
        ConfigError: it is no judge; `UnknownNameError`: no judge is called that, with the near match.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.types import Verdict
        >>> from swirl_env.wrappers import JudgeReward
        >>> class Brief:
        ...     name, uses_gold = "brief@1", False
        ...     def __call__(self, views):
        ...         return [Verdict(float(len(view.action.text) < 40), "length", self.name) for view in views]
        >>> env = JudgeReward(gym.make("swirl/GSM8K-v0"), Brief())
        >>> text, info = env.reset(seed=0)
        >>> [env.step(action)[1] for action in ("<calculator>10+3</calculator>", "<think>" + "well " * 20 + "</think>")]
        [1.0, 0.0]
    """

    def __init__(self, env: gym.Env, judge: Any):
        base = _base(env)
        named = isinstance(judge, (str, dict))
        judge = judge() if isinstance(judge, type) else judge
        if not named and (not callable(judge) or not isinstance(getattr(judge, "name", None), str)):
            raise ConfigError(f"Expected a judge (a callable with a `name`) or the name of one, got {judge!r}.")
        super().__init__(env, judge=judge if named else name_of(judge) or judge)
        base.set_judge(judge)
        base.reward = "process" if base.reward == "outcome" else base.reward


class StepPenalty(_Recorded):
    """Take a little off the reward of every step, so that a shorter way to the answer is worth more.

    Args:
        env: any environment; also one that is not over `ToolEnv`.
        penalty: taken off each reward.

    Raises:
        ConfigError: the penalty is no number.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.wrappers import StepPenalty
        >>> env = StepPenalty(gym.make("swirl/GSM8K-v0"), 0.02)
        >>> text, info = env.reset(seed=0)
        >>> env.step("<calculator>10+3</calculator>")[1]
        0.98
    """

    def __init__(self, env: gym.Env, penalty: float):
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not penalty == penalty:
            raise ConfigError(f"penalty must be a number, got {penalty!r}.")
        super().__init__(env, penalty=penalty)
        self.penalty = penalty

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text, reward, terminated, truncated, info = self.env.step(action)
        return text, float(reward) - self.penalty, terminated, truncated, info


class RecordTrajectories(_Recorded):
    """Append each finished episode to a file, as `swirl run` writes them; an existing file is continued.

    Args:
        env: over `ToolEnv`.
        path: JSONL file. One writer a file: give each environment its own.
        policy: recorded as the name of who acted.

    An episode that is reset before its end is not recorded. Repeated tasks count up the sample number.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.io import read
        >>> from swirl_env.types import Trajectory
        >>> from swirl_env.wrappers import RecordTrajectories
        >>> with RecordTrajectories(gym.make("swirl/GSM8K-v0"), "episodes.jsonl") as env:
        ...     text, info = env.reset(seed=0)
        ...     for action in ("<calculator>10+3</calculator>", "<answer>38</answer>"):
        ...         text, *_, info = env.step(action)
        >>> [(one.id, len(one.steps), one.outcome) for one in read("episodes.jsonl", Trajectory)]
        [('gsm8k-train-170/0/0', 2, 1.0)]
    """

    def __init__(self, env: gym.Env, path: str | Path, policy: str = "unknown"):
        self._env = _base(env)
        super().__init__(env, path=str(path), policy=policy)
        self._policy = policy
        self._samples = Counter(trajectory.task.id for trajectory in read(path, Trajectory))
        self._writer: Writer[Trajectory] = Writer(path)
        self._prompt: tuple[Message, ...] = ()
        self._steps: list[Step] = []

    def reset(self, **arguments: Any) -> tuple[str, dict[str, Any]]:
        text, info = self.env.reset(**arguments)
        self._prompt, self._steps = info["transcript"].messages, []
        return text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text, reward, terminated, truncated, info = self.env.step(action)
        self._steps.append(info["step"])
        if terminated or truncated:
            task, stop = self._env.task, self._env.stop or "step_limit"  # an outer TimeLimit gives no reason
            assert task is not None
            outcome = info["outcome"] if "outcome" in info else self._env.task_set.outcome(task, None)
            seed = self._env.np_random_seed or 0
            sample = self._samples[task.id]
            self._samples[task.id] += 1
            steps = tuple(self._steps)
            self._writer.write(
                Trajectory(task, self._env.record, self._prompt, steps, stop, outcome, self._policy, seed, sample)
            )
        return text, float(reward), terminated, truncated, info

    def close(self) -> None:
        self._writer.close()
        super().close()
