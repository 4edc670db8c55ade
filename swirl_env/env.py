"""`ToolEnv`: one Gymnasium environment runs every task set.

An action is a string: a thought, tool calls or an answer in the env's grammar. The observation is the text so far with
tool results appended; `info["transcript"]` is the same as messages. Each step earns the judge's process reward.
A malformed action, an unknown tool, wrong arguments or a tool error is an observation that says what to write instead.
"""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.error import ResetNeeded

from swirl_env.errors import ConfigError, UnknownArgumentError, UnknownNameError, near
from swirl_env.grammar import Grammar
from swirl_env.judges import ask, make_judge
from swirl_env.names import name_of
from swirl_env.spaces import Unicode
from swirl_env.syntax import function_schema
from swirl_env.tasks import load_tasks, options_of
from swirl_env.tools import call_tool, make_tool, named_tools
from swirl_env.tools.search import make_search
from swirl_env.transport import without_credentials
from swirl_env.types import (
    Action,
    EnvRecord,
    Judge,
    Message,
    Step,
    StepView,
    StopReason,
    Task,
    Tool,
    ToolResult,
    Transcript,
    Verdict,
)

REWARDS = ("process", "outcome", "both")


class Taken(NamedTuple):
    """An action read, carried out and judged, but not yet part of the episode."""

    text: str
    action: Action
    results: tuple[ToolResult, ...]
    verdict: Verdict | None


class ToolEnv(gym.Env[str, str]):
    """Question answering with tools. All arguments are JSON, so that `env.spec` survives; live objects come by wrapper.

    Args:
        tasks: the task set, such as `gsm8k` (set by the registered id).
        split: `train` or `test`.
        path: an official file of the task set; `None`: the bundled tasks.
        tools: names (`calculator`, `search`, ...) or `"module:attribute"`.
        judge: `"rules"`, `"gold-steps"`, `"outcome"`, `"model:URL"`, `"module:attribute"`, a dict (see `judges.make_judge`), or
            `None` for no process reward.
        reward: `process` (each step's score), `outcome` (the official metric, at the end) or `both`
            (`outcome_weight` x outcome + (1 - `outcome_weight`) x process).
        outcome_weight: in [0, 1], for `reward="both"`.
        grammar: `default`, `paper`, `search-r1`, `hermes`, `openai` or `react`.
        search: `{"backend": "bm25", "k": 1, "corpus": FILE}`, each optional; a string is the back end.
        instruction: first sentence of the prompt; `None`: the task set's own.
        metric: which of the task set's metrics is the outcome; `None`: the official one.
        max_steps: actions an episode may take; every action counts, malformed ones too.
        malformed_limit: malformed actions after which the episode is truncated; `None`: no limit.
        render_mode: `None` or `ansi`.
        options: arguments of the task set itself, such as `operations=3` of `swirl/Arithmetic-v0`.

    Raises:
        ConfigError: a value that cannot work; `UnknownArgumentError` names the near match of a misspelt keyword.
        DataError: the file at `path` is missing or broken, with the place.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        tasks: str,
        *,
        split: str = "train",
        path: str | Path | None = None,
        tools: Sequence[str] = (),
        judge: str | dict[str, Any] | None = "rules",
        reward: str = "process",
        outcome_weight: float = 0.5,
        grammar: str = "default",
        search: dict[str, Any] | str | None = None,
        instruction: str | None = None,
        metric: str | None = None,
        max_steps: int = 5,
        malformed_limit: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ):
        for key in set(options) - set(known := options_of(tasks)):
            raise UnknownArgumentError(f"{key!r} is no argument of this environment.{near(key, [*_KWARGS, *known])}")
        if reward not in REWARDS:
            raise UnknownNameError(f"reward={reward!r} is not known.{near(reward, REWARDS)}")
        if reward != "outcome" and judge is None:
            raise ConfigError(f"reward={reward!r} needs a judge: give judge='rules', or reward='outcome'.")
        for name, text in (("split", split), ("grammar", grammar), ("metric", metric or "")):
            if not isinstance(text, str):
                raise ConfigError(f"{name} must be a name, got {text!r}.")
        if (
            isinstance(outcome_weight, bool)
            or not isinstance(outcome_weight, (int, float))
            or not 0 <= outcome_weight <= 1
        ):
            raise ConfigError(f"outcome_weight must lie in [0, 1], got {outcome_weight!r}.")
        if not isinstance(tools, (list, tuple)) or not all(isinstance(name, str) for name in tools):
            raise ConfigError(
                f"tools must be a list of names, such as ['search', 'module:attribute'], got {tools!r}. A live tool comes in by "
                "wrapper: AddTool(env, tool)."
            )
        path = str(path) if isinstance(path, Path) else path
        if path is not None and (not isinstance(path, str) or not path):
            raise ConfigError(f"path must name a file, or be None for the bundled tasks; got {path!r}.")
        for name, value in (("max_steps", max_steps), ("malformed_limit", malformed_limit)):
            if (value is not None or name == "max_steps") and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"render_mode must be None or 'ansi', got {render_mode!r}.")
        self.observation_space, self.action_space = Unicode(), Unicode()
        self.render_mode, self.reward, self.outcome_weight = render_mode, reward, outcome_weight
        self.max_steps, self.malformed_limit = max_steps, malformed_limit
        self.task_set = load_tasks(tasks, split, path, instruction=instruction, metric=metric, **options)
        self.judge = None if judge is None else make_judge(judge)
        self.grammar = Grammar(grammar, [tool for name in tools for tool in named_tools(name, search)])
        if search is not None and "search" not in tools:
            make_search(search)  # a setting that cannot work is told, used or not
        self._task_ids = list(self.task_set.tasks)
        self._kwargs = copy.deepcopy({
            "split": split, "path": path, "tools": list(tools), "judge": judge, "reward": reward,
            "outcome_weight": outcome_weight, "grammar": grammar, "search": search, "instruction": instruction,
            "metric": metric, "max_steps": max_steps, "malformed_limit": malformed_limit, **options,
        })  # fmt: skip
        self._done = True
        self._taken: Taken | None = None
        self.judge_name = None if judge is None else json.dumps(judge, sort_keys=True)
        """What the judge was made from, as JSON; `None` for a live object."""
        self.next_task: str | None = None
        """The task of the next reset, unless its options name one."""
        self.task: Task | None = None
        self.steps: list[Step] = []
        self.stop: StopReason | None = None
        """Why the last episode ended."""

    @property
    def tools(self) -> dict[str, Tool]:
        """The live tools by name."""
        return self.grammar.tools

    def set_tools(self, tools: Sequence[Any]) -> None:
        """Offer these tools (`Tool`s or typed, documented functions). An episode that is running is given up: reset."""
        self.grammar = Grammar(self.grammar.dialect.name, map(make_tool, tools))
        self._done = True

    def set_judge(self, judge: str | dict[str, Any] | Judge | None) -> None:
        """Ask another judge from the next step on: by name, as JSON, a live object, or none."""
        named = isinstance(judge, (str, dict))
        self.judge_name = json.dumps(judge, sort_keys=True) if named else None
        self.judge = make_judge(judge) if isinstance(judge, (str, dict)) else judge
        self._kwargs["judge"] = judge if named or judge is None else name_of(judge)

    @property
    def running(self) -> bool:
        """Whether an episode has begun and not ended."""
        return not self._done

    @property
    def record(self) -> EnvRecord:
        """What a trajectory says of this environment."""
        schemas = tuple(function_schema(tool) for tool in self.tools.values())
        name = self.spec.id if self.spec is not None else self.task_set.name
        kwargs = json.loads(without_credentials(json.dumps(self._kwargs, default=str)))
        return EnvRecord(name, kwargs, self.grammar.dialect.name, schemas)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode: a task drawn from the env's own generator, or `options={"task_id": ...}`.

        Raises:
            UnknownNameError: no task has that id, or an option is not known.
        """
        super().reset(seed=seed)
        options = options or {}
        if set(options) - {"task_id"}:
            raise UnknownNameError(f"reset() takes the option 'task_id', got {', '.join(map(repr, options))}.")
        task_id = options.get("task_id", self.next_task)
        if task_id is None:
            task_id = self._task_ids[int(self.np_random.integers(len(self._task_ids)))]
        if not isinstance(task_id, str) or task_id not in self.task_set.tasks:
            raise UnknownNameError(
                f"No task has the id {task_id!r}. There are {len(self._task_ids)}, such as {self._task_ids[0]!r}; "
                "all are in env.unwrapped.task_set.tasks."
            )
        self.task = self.task_set.tasks[task_id]
        for tool in self.tools.values():
            if hasattr(tool, "bind"):
                tool.bind(self.task_set.documents(task_id))  # type: ignore[attr-defined]
        prompt = self.grammar.prompt(self.task_set.instruction, self.task.question, self.max_steps)
        self.transcript = Transcript((Message("user", prompt),), self.grammar.stop)
        self._text = prompt
        self.steps, self.stop, self._done, self._malformed, self._taken = [], None, False, 0, None
        return self._text, {"task_id": task_id, "transcript": self.transcript, "step": None}

    def view(self, action: Action, results: tuple[ToolResult, ...]) -> StepView:
        """What a judge is asked about an action at this state."""
        if self._done or self.task is None:
            raise ResetNeeded("The episode is over (or has not begun): call reset() before step().")
        left = self.max_steps - len(self.steps) - 1
        if not getattr(self.judge, "uses_gold", False):
            return StepView(self.task.question, tuple(self.steps), action, left)
        return StepView(self.task.question, tuple(self.steps), action, left, self.task, results)

    def prepare(self, taken: Taken) -> None:
        """The next `step` with this text uses what a vector environment has read, carried out and judged for it."""
        self._taken = taken

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action. Whatever the string holds, this returns; what is wrong with it stands in the observation."""
        if self._done or self.task is None:
            raise ResetNeeded("The episode is over (or has not begun): call reset() before step().")
        taken, self._taken = self._taken, None
        if taken is not None and taken.text is action:
            _, parsed, results, verdict = taken
        else:
            parsed = self.grammar.parse(action)
            results = tuple([call_tool(self.tools, call) for call in parsed.calls])
            verdict = None if self.judge is None else ask(self.judge, [self.view(parsed, results)])[0]
        left = self.max_steps - len(self.steps) - 1
        self._malformed += parsed.malformed is not None
        if parsed.answer is not None:
            self.stop = "answered"
        elif crashed := [result.text for result in results if result.error == "crash"]:
            self.stop = "error"
            warnings.warn(
                f"{crashed[0]} (the episode ends; raise ToolError for what the model should read)",
                RuntimeWarning,
                stacklevel=2,
            )
        elif self._malformed == self.malformed_limit:
            self.stop = "malformed_limit"
        elif left == 0:
            self.stop = "step_limit"
        self._done = self.stop is not None
        observation = "" if self._done else self.grammar.observation(parsed, results, left)
        self.steps.append(Step(parsed, results, observation))
        said: tuple[Message, ...] = (Message("assistant", parsed.text),)
        self._text = f"{self._text}\n{parsed.text}"
        if not self._done:
            said += (Message("user", observation),)
            self._text = f"{self._text}\n{observation}"
        self.transcript = Transcript(self.transcript.messages + said, self.grammar.stop)
        info = {
            "task_id": self.task.id,
            "transcript": self.transcript,
            "step": Step(parsed, results, observation, verdict),
        }
        process = 0.0 if verdict is None or verdict.score is None else verdict.score
        outcome: float | None = 0.0
        if self._done:
            # a tool that broke down says nothing of the policy
            outcome = None if self.stop == "error" else self.task_set.outcome(self.task, parsed.answer)
            info["outcome"] = outcome
        if self.reward == "process":
            reward = process
        elif self.reward == "outcome":
            reward = outcome or 0.0
        else:
            reward = self.outcome_weight * (outcome or 0.0) + (1 - self.outcome_weight) * process
        terminated = self.stop == "answered"
        return self._text, float(reward), terminated, self._done and not terminated, info

    def render(self) -> str | None:  # type: ignore[override]
        """The transcript as text, in `ansi` mode."""
        return self._text if self.render_mode == "ansi" and self.task is not None else None


_KWARGS = [name for name in ToolEnv.__init__.__kwdefaults__ or () if name != "render_mode"]
