"""A verifiers taskset (0.4, `verifiers.v1`) over any of the environments.

verifiers loads a taskset by the name of a module that exports one, so write a module of your own, `swirl_tasks.py`:

    from swirl_env.adapters.verifiers import SwirlTaskset

    __all__ = ["SwirlTaskset"]

and name the environment where the taskset is configured:

    PYTHONPATH=. vf-eval swirl_tasks --env.taskset.env swirl/GSM8K-v0 -n 4 -m MODEL --client.base-url http://127.0.0.1:8000/v1 \\
        --env.agent.harness.id null --env.agent.runtime.type subprocess --no-push

A harness plays the episodes by native tool calls; the tools are an MCP server that all rollouts share. When one is over, its
conversation is replayed through the environment (see `calls`): rewards `outcome` and `process`, metrics `steps` and `unknown`, and in
`trace.info["turn_rewards"]` the reward of each step (`null`: the judge could not tell). A reward that is unknown is left out.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from pydantic import Field

from swirl_env.adapters.calls import ERROR, call, json_kwargs, make_env, prompt, replay, tool_env

try:
    import verifiers.v1 as vf
    from mcp.types import CallToolResult, TextContent, Tool
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swirl_env.adapters.verifiers needs verifiers: pip install 'swirl-env[verifiers]'.", name=error.name
    ) from None

MAX_EPISODES = 1024
"""Episodes whose tools the server remembers; the one that was used longest ago is begun anew when it is asked for."""


class SwirlState(vf.State):
    """What the tool server must know of a rollout."""

    task_id: str = ""
    rollout: str = ""


class SwirlToolsetConfig(vf.SharedToolsetConfig):
    """Where the tools run; `env` and `kwargs` are filled in from the taskset."""

    env: str = ""
    kwargs: str = "{}"


class SwirlTaskConfig(vf.TaskConfig):
    """How a rollout is scored."""

    outcome_weight: float = 1.0
    """Of the official metric."""
    process_weight: float = 1.0
    """Of the mean verdict of the steps."""


class SwirlConfig(vf.TasksetConfig):
    """Which tasks are loaded."""

    env: str = "swirl/GSM8K-v0"
    """A registered Gymnasium id."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Of `gym.make`, without `grammar`: split, path, tools, judge, search, max_steps, ..."""
    task: SwirlTaskConfig = SwirlTaskConfig()
    tools: SwirlToolsetConfig = SwirlToolsetConfig()


class SwirlData(vf.TaskData):
    """A task, and the environment that it belongs to."""

    env: str
    kwargs: str
    max_steps: int


class SwirlTask(vf.Task[SwirlData, SwirlState, SwirlTaskConfig]):
    """One question."""

    @property
    def key(self) -> str:
        return f"{self.data.env}/{self.data.id}"

    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        trace.state.task_id, trace.state.rollout = self.data.id, trace.id

    @vf.stop
    async def step_limit(self, trace: vf.Trace) -> bool:
        """The environment takes no further step."""
        return trace.num_turns >= self.data.max_steps

    @vf.reward
    async def episode(self, trace: vf.Trace) -> dict[str, float]:
        """Records `outcome` and `process`, each with its own weight."""
        env = make_env(self.data.env, self.data.kwargs)
        conversation = [_openai(message.model_dump()) for message in trace.branches[-1].messages] if trace.nodes else []
        [played] = await asyncio.to_thread(replay, [env], [self.data.id], [conversation])
        weights = {"outcome": self.config.outcome_weight, "process": self.config.process_weight}
        for name, weight in weights.items():
            if (score := getattr(played, name)) is not None:
                trace.record_reward(name, score, weight)
        trace.record_metrics({"steps": len(played.steps), "unknown": played.unknown})
        trace.info |= {"turn_rewards": list(played.rewards), "stop": played.stop}
        return {}


class SwirlToolset(vf.Toolset[SwirlToolsetConfig, SwirlState]):
    """The tools of an environment over MCP, under their own names."""

    TOOL_PREFIX = None

    async def setup(self) -> None:
        self._episodes: OrderedDict[str, gym.Env] = OrderedDict()
        self._spare = make_env(self.config.env, self.config.kwargs)

    def register(self, mcp: Any) -> None:
        # the schemas are the tools' own, so the handlers are replaced in place of functions being added
        mcp.list_tools, mcp.call_tool = self.list_tools, self._with_state(self.call_tool)

    async def list_tools(self) -> list[Tool]:
        tools = tool_env(self._spare).tools.values()
        return [Tool(name=tool.name, description=tool.description, input_schema=tool.parameters) for tool in tools]

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> CallToolResult:
        env = self._episode(self.state.rollout, self.state.task_id)
        text = await asyncio.to_thread(call, tool_env(env), name, arguments)
        return CallToolResult(content=[TextContent(type="text", text=text)], is_error=text.startswith(ERROR))

    def _episode(self, rollout: str, task_id: str) -> gym.Env:
        if rollout not in self._episodes:
            while len(self._episodes) >= MAX_EPISODES:
                self._episodes.popitem(last=False)[1].close()
            env = self._episodes[rollout] = make_env(self.config.env, self.config.kwargs)
            env.reset(options={"task_id": task_id})
        self._episodes.move_to_end(rollout)
        return self._episodes[rollout]


class SwirlTaskset(vf.Taskset[SwirlTask, SwirlConfig]):
    """The tasks of an environment, in its order."""

    @classmethod
    def toolsets(cls, config: SwirlConfig) -> list[vf.Toolset]:
        chosen = {"env": config.env, "kwargs": json_kwargs(config.kwargs)}
        return [SwirlToolset(config.tools.model_copy(update=chosen))]

    def load(self) -> Iterator[SwirlTask]:
        env_id, kwargs = self.config.env, json_kwargs(self.config.kwargs)
        base = tool_env(make_env(env_id, kwargs))
        for task_id, task in base.task_set.tasks.items():
            data = SwirlData(
                id=task_id, name=task_id, prompt=prompt(base, task), env=env_id, kwargs=kwargs, max_steps=base.max_steps
            )
            yield SwirlTask(data, self.config.task)


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a trace in OpenAI's form."""
    calls = [
        {"id": one["id"], "type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}}
        for one in message.get("tool_calls") or []
    ]
    content = message.get("content")
    text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or [])
    return message | {"content": text, "tool_calls": calls}


if __name__ == "__main__":  # how verifiers starts a tool server
    SwirlToolset.run()
