"""Episodes that another trainer plays by native tool calls: what the adapters of TRL and verifiers share.

There the trainer owns the loop. The model writes assistant messages, the trainer carries their tool calls out and appends tool
messages, and asks for rewards once the conversation is over. So an adapter lends it the environment's tools (`call`), and when the
conversation is there, `replay` takes it through the environment step by step: an assistant message is an action of the `openai`
grammar, what its tools answered is taken from the conversation (nothing is called twice), and the judge is asked once a step about
all conversations together. Rewards, outcome, step limit and stop reason are the environment's own.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym

import swirl_env  # noqa: F401  registers the ids
from swirl_env.env import Taken, ToolEnv
from swirl_env.errors import ConfigError
from swirl_env.judges import ask
from swirl_env.tools import call_tool
from swirl_env.types import Action, Step, StopReason, Task, ToolCall, ToolResult

ERROR = "error: "
"""What a tool's answer begins with where the tool refused; verifiers' own harness writes its refusals so too."""


class Played(NamedTuple):
    """What came of a conversation."""

    steps: tuple[Step, ...]
    """The actions taken, with results and verdicts; messages after the end of the episode are none."""
    rewards: tuple[float | None, ...]
    """The environment's reward of each step; `None`: the judge could not tell."""
    outcome: float | None
    """The official metric, in [0, 1]; `None`: the task has no gold answer."""
    stop: StopReason | None
    """`None`: the conversation ended before the episode did."""

    @property
    def process(self) -> float | None:
        """Mean of the known verdicts; `None` where none is known."""
        known = [step.verdict.score for step in self.steps if step.verdict and step.verdict.score is not None]
        return sum(known) / len(known) if known else None

    @property
    def unknown(self) -> int:
        """Steps that were not scored."""
        return sum(step.verdict is None or step.verdict.score is None for step in self.steps)


def json_kwargs(kwargs: Mapping[str, Any]) -> str:
    """The arguments of an environment as JSON, so that they travel to other processes.

    Raises:
        ConfigError: an argument is no JSON, or is the grammar.
    """
    if "grammar" in kwargs:
        raise ConfigError("grammar= cannot be chosen here: the trainer's chat template writes the tool calls.")
    try:
        return json.dumps(kwargs, sort_keys=True, default=os.fspath)
    except TypeError as error:
        raise ConfigError(
            f"The arguments of an environment must be JSON, so that other processes can make it: {error}. Name tools and judges as "
            '"module:attribute".'
        ) from None


def make_env(env_id: str, kwargs: str) -> gym.Env:
    """A registered environment whose actions are assistant messages.

    Args:
        env_id: such as `swirl/GSM8K-v0`; wrappers come in by an id of your own (`additional_wrappers` of `gym.register`).
        kwargs: what `json_kwargs` gave.

    Raises:
        ConfigError: no environment over `ToolEnv`.
    """
    return make(env_id, grammar="openai", **json.loads(kwargs))


def make(env_id: str, **kwargs: Any) -> gym.Env:
    """A registered environment over `ToolEnv`. Raises `ConfigError` for another one."""
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if isinstance(env.unwrapped, ToolEnv):
            return env
    except TypeError as error:  # an argument that it does not take
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"Expected an environment over ToolEnv, such as 'swirl/GSM8K-v0'; {env_id!r} is none.")


def tool_env(env: gym.Env) -> ToolEnv:
    """The `ToolEnv` below the wrappers."""
    base = env.unwrapped
    assert isinstance(base, ToolEnv)
    return base


def prompt(env: ToolEnv, task: Task) -> str:
    """The first user message. The trainer's chat template describes the tools."""
    return (
        f"{env.task_set.instruction} Take one step each turn, at most {env.max_steps}: call tools, or write only the final answer."
        f"\n\n{task.question}"
    )


def call(env: ToolEnv, name: str, arguments: Mapping[str, Any]) -> str:
    """Carry a call out. Whatever happens is text for the model; a refusal begins with `ERROR`."""
    result = call_tool(env.tools, ToolCall(name, dict(arguments)))
    return result.text if result.error is None else ERROR + result.text


def replay(envs: Sequence[gym.Env], task_ids: Sequence[str], conversations: Sequence[Sequence[Any]]) -> list[Played]:
    """Take finished conversations through their environments.

    Args:
        envs: one each, made alike: the judge of the first is asked about all.
        task_ids: of each conversation.
        conversations: chat messages as dicts (assistant and tool ones count), OpenAI's form.
    """
    turns = [_turns(conversation) for conversation in conversations]
    bases = [tool_env(env) for env in envs]
    rewards: list[list[float | None]] = [[] for _ in envs]
    steps: list[list[Step]] = [[] for _ in envs]
    outcomes: dict[int, float | None] = {}
    for env, task_id in zip(envs, task_ids, strict=True):
        env.reset(options={"task_id": task_id})
    playing = list(range(len(envs)))
    for k in range(max(map(len, turns), default=0)):
        playing = [i for i in playing if k < len(turns[i])]
        actions = [bases[i].grammar.parse(turns[i][k].text) for i in playing]
        results = [_results(action, turns[i][k].answers) for i, action in zip(playing, actions, strict=True)]
        views = [bases[i].view(action, made) for i, action, made in zip(playing, actions, results, strict=True)]
        judge = bases[0].judge
        verdicts = [None] * len(views) if judge is None else ask(judge, views)
        going = []
        for i, action, made, verdict in zip(playing, actions, results, verdicts, strict=True):
            bases[i].prepare(Taken(turns[i][k].text, action, made, verdict))
            _, reward, terminated, truncated, info = envs[i].step(turns[i][k].text)
            unknown = bases[i].reward != "outcome" and (verdict is None or verdict.score is None)
            rewards[i].append(None if unknown else float(reward))
            steps[i].append(info["step"])
            if terminated or truncated:
                outcomes[i] = info.get("outcome")
            else:
                going.append(i)
        playing = going
    played = []
    for i, base in enumerate(bases):
        assert base.task is not None
        outcome = outcomes[i] if i in outcomes else base.task_set.outcome(base.task, None)
        stop = (base.stop or "step_limit") if i in outcomes else None
        played.append(Played(tuple(steps[i]), tuple(rewards[i]), outcome, stop))
    return played


class _Turn(NamedTuple):
    text: str
    """The assistant message as JSON."""
    answers: list[str]
    """What the tools said."""


def _turns(conversation: Sequence[Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    for message in conversation:
        if message["role"] == "assistant":
            kept = {key: message[key] for key in ("content", "reasoning_content", "tool_calls") if message.get(key)}
            turns.append(_Turn(json.dumps({"role": "assistant", "content": ""} | kept, ensure_ascii=False), []))
        elif message["role"] == "tool" and turns:
            turns[-1].answers.append(str(message["content"]))
    return turns


def _results(action: Action, answers: list[str]) -> tuple[ToolResult, ...]:
    """A result for each call; a trainer that ran out of room did not make the last ones."""
    missing = [ERROR + "the call was not made."] * (len(action.calls) - len(answers))
    return tuple(
        ToolResult(said[len(ERROR) :], "tool_error") if said.lower().startswith(ERROR) else ToolResult(said)
        for said in [*answers, *missing][: len(action.calls)]
    )
