"""TRL's GRPOTrainer over any of the environments (written against TRL 1.16).

    spec = trl.spec("swirl/GSM8K-v0")
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        train_dataset=spec.train_dataset,
        environment_factory=spec.environment_factory,
        reward_funcs=spec.reward_funcs,
        args=GRPOConfig(max_tool_calling_iterations=spec.max_tool_calling_iterations),
    )

TRL offers every public method of an environment's class to the model, so the class made here has the environment's tools as methods,
`reset`, and nothing else. The model answers by a message without tool calls: the text of that message is what the official metric
scores. Both rewards come from one replay of the finished conversations (see `calls`), in which the judge is asked about the whole batch
at once; TRL itself carries tool calls out one after another. `swirl_algos.integrations.trl` trains on the reward of each step.

A tool that refuses says so in text that begins with `error: `, which TRL does not count in `tools/failure_frequency`.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from swirl_env.adapters.calls import Played, call, json_kwargs, make_env, prompt, replay, tool_env
from swirl_env.errors import ConfigError
from swirl_env.types import Tool

Rewards = list[float | None]


def spec(env_id: str, **kwargs: Any) -> "Spec":
    """What GRPOTrainer needs for a registered environment.

    Args:
        env_id: such as `swirl/GSM8K-v0`.
        kwargs: of `gym.make`, all JSON, without `grammar`.

    Raises:
        ConfigError: the environment cannot be made so, or a tool has a name that TRL keeps for itself.

    Examples:
        >>> from swirl_env.adapters import trl
        >>> spec = trl.spec("swirl/GSM8K-v0", max_steps=4)
        >>> env = spec.environment_factory()
        >>> env.reset(task_id="gsm8k-train-170")
        >>> env.calculator(expression="10+3")
        '13'
        >>> spec.max_tool_calling_iterations, [function.__name__ for function in spec.reward_funcs]
        (3, ['outcome', 'process'])
    """
    made = Spec(env_id, json_kwargs(kwargs))
    made.environment_factory()
    return made


@dataclass(frozen=True)
class EnvironmentFactory:
    """Makes an environment for one rollout at a time; pickles as its two fields."""

    env_id: str
    kwargs: str
    """JSON."""

    def __call__(self) -> Any:
        return _environment_class(self.env_id, self.kwargs)()


@dataclass(frozen=True)
class Spec:
    """The arguments of GRPOTrainer that an environment stands for."""

    env_id: str
    kwargs: str
    """JSON."""

    @property
    def environment_factory(self) -> EnvironmentFactory:
        return EnvironmentFactory(self.env_id, self.kwargs)

    @cached_property
    def train_dataset(self) -> Any:
        """A `datasets.Dataset` with a row a task: `prompt` (one user message) and `task_id`."""
        from datasets import Dataset

        env = tool_env(make_env(self.env_id, self.kwargs))
        return Dataset.from_list([
            {"prompt": [{"role": "user", "content": prompt(env, task)}], "task_id": task_id}
            for task_id, task in env.task_set.tasks.items()
        ])  # fmt: skip

    @cached_property
    def reward_funcs(self) -> list[Callable[..., Rewards]]:
        """`outcome`, and `process` where there is a judge; `reward_weights` of GRPOConfig weighs them."""
        judged = tool_env(make_env(self.env_id, self.kwargs)).judge is not None
        return [outcome, process] if judged else [outcome]

    @cached_property
    def max_tool_calling_iterations(self) -> int:
        """Of GRPOConfig: the last step is left for the answer."""
        return tool_env(make_env(self.env_id, self.kwargs)).max_steps - 1


def outcome(completions: Sequence[Any], environments: Sequence[Any], **_: Any) -> Rewards:
    """The official metric of each final answer, in [0, 1]; `None` where the task has no gold answer."""
    return [one and one.outcome for one in _played(completions, environments)]


def process(completions: Sequence[Any], environments: Sequence[Any], **_: Any) -> Rewards:
    """The mean of each rollout's step verdicts, in [0, 1]; `None` where the judge could tell of none."""
    return [one and one.process for one in _played(completions, environments)]


def step_rewards(environments: Sequence[Any]) -> list[list[float | None]]:
    """The reward of each step of the rollouts that `outcome` or `process` was asked about last; `None` is unknown."""
    if any(getattr(env, "_played", None) is None for env in environments):
        raise ConfigError(
            "No reward was asked for yet: give the trainer reward_funcs=spec.reward_funcs, and environments of this spec alone."
        )
    return [list(env._played.rewards) for env in environments]


class _Environment:
    """What the classes of all environments share; nothing here is public but `reset`."""

    _env_id: str
    _kwargs: str

    def __init__(self) -> None:
        self._env = make_env(self._env_id, self._kwargs)
        self._task_id: str | None = None
        self._played: Played | None = None

    def reset(self, task_id: str | None = None, **row: Any) -> None:
        """Begin the episode of a row; its prompt says everything already."""
        if task_id is None:
            raise ConfigError(
                f"A row needs a task_id, so that the rollouts of a group share their task; got {', '.join(row) or 'nothing'}. "
                "Train on the spec's train_dataset."
            )
        self._env.reset(options={"task_id": task_id})
        self._task_id, self._played = task_id, None


@lru_cache(maxsize=64)
def _environment_class(env_id: str, kwargs: str) -> type[_Environment]:
    tools = tool_env(make_env(env_id, kwargs)).tools
    for name in tools:
        if name.startswith("_") or name in ("reset", "get_reward"):
            raise ConfigError(f"TRL cannot offer a tool called {name!r}: give it another name.")
        if odd := [
            key for key in tools[name].parameters.get("properties", {}) if not key.isidentifier() or key == "self"
        ]:
            raise ConfigError(f"TRL calls tools as Python methods, so {odd[0]!r} cannot be an argument of {name!r}.")
    members = {name: _method(tool) for name, tool in tools.items()}
    name = re.sub(r"\W", "_", env_id)
    return type(name, (_Environment,), {"_env_id": env_id, "_kwargs": kwargs} | members)


_HINTS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}


def _method(tool: Tool) -> Callable[..., str]:
    """A method with the name, type hints and Google docstring that TRL reads a tool's schema from."""
    tool_name = tool.name

    def method(self: _Environment, **arguments: Any) -> str:
        return call(tool_env(self._env), tool_name, arguments)

    properties, required = tool.parameters.get("properties", {}), tool.parameters.get("required", [])
    hints = {name: _hint(entry) for name, entry in properties.items()}
    kind = inspect.Parameter
    given = [
        kind(
            name,
            kind.KEYWORD_ONLY,
            annotation=hint,
            default=kind.empty if name in required else _default(properties[name]),
        )
        for name, hint in hints.items()
    ]
    method.__name__ = method.__qualname__ = tool_name
    method.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [kind("self", kind.POSITIONAL_ONLY), *given], return_annotation=str
    )
    method.__annotations__ = hints | {"return": str}
    meanings = [f"    {name}: {_line(_meaning(name, entry))}" for name, entry in properties.items()]
    method.__doc__ = "\n".join([_line(tool.description), *(["", "Args:", *meanings] if meanings else [])])
    return method


def _hint(entry: Any) -> Any:
    return _HINTS.get(str(entry.get("type")), Any) if isinstance(entry, dict) else Any


def _default(entry: Any) -> Any:
    return entry.get("default") if isinstance(entry, dict) else None


def _meaning(name: str, entry: Any) -> str:
    described = entry.get("description") if isinstance(entry, dict) else None
    return described or name


def _line(text: str) -> str:
    return " ".join(text.split())


def _played(completions: Sequence[Any], environments: Sequence[Any]) -> list[Played | None]:
    """What came of each rollout, replayed when it is first asked for; `None` where the environment is not one of ours."""
    groups: dict[type, list[int]] = {}
    for i, env in enumerate(environments):
        if isinstance(env, _Environment) and env._played is None:
            groups.setdefault(type(env), []).append(i)
    for group in groups.values():
        envs = [environments[i] for i in group]
        played = replay([env._env for env in envs], [env._task_id for env in envs], [completions[i] for i in group])
        for env, one in zip(envs, played, strict=True):
            env._played = one
    return [env._played if isinstance(env, _Environment) else None for env in environments]
