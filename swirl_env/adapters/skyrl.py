"""SkyRL's text environments (skyrl-gym 0.4) over any of ours: `init` and `step`, the reward of each step as it is made.

    from swirl_env.adapters import skyrl

    skyrl.register("swirl/GSM8K-v0")          # in the process that makes environments (with Ray: in the entry point's task)
    skyrl.rows("swirl/GSM8K-v0")              # the data set: prompt, env_class, task_id, reward_spec, ...

The grammar is the environment's own, in the prompt that `init` gives; a whole model output is an action. SkyRL's `max_turns`, where it
is set, is the step limit. A step that the judge could not score has the reward 0.0, and is counted in the metric `unknown`.
"""

import json
from collections.abc import Mapping
from typing import Any

from swirl_env.adapters.calls import make, tool_env
from swirl_env.errors import ConfigError

try:
    import skyrl_gym
    from omegaconf import OmegaConf
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "swirl_env.adapters.skyrl needs skyrl-gym: pip install 'swirl-env[skyrl]'.", name=error.name
    ) from None


class SkyEnv(BaseTextEnv):
    """One episode.

    Args:
        env_config: SkyRL's settings of this environment class (a dict or OmegaConf's); its `kwargs` go to `gym.make`, over those registered.
        extras: the row of the data set: `task_id`, and `max_turns` as SkyRL adds it.
        env_id: a registered Gymnasium id.
        kwargs: of `gym.make`.

    Raises:
        ConfigError: no `task_id`, or no environment over `ToolEnv`.
    """

    def __init__(
        self,
        env_config: Mapping[str, Any] | None = None,
        extras: Mapping[str, Any] | None = None,
        *,
        env_id: str,
        kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        row, configured = extras or {}, OmegaConf.to_container(OmegaConf.create(env_config or {}), resolve=True)
        assert isinstance(configured, dict)
        chosen = dict(kwargs or {}) | (configured.get("kwargs") or {})
        if not isinstance(row.get("task_id"), str):
            raise ConfigError(f"A row needs a task_id; got {', '.join(row) or 'nothing'}. skyrl.rows(...) makes them.")
        if row.get("max_turns") is not None:
            chosen["max_steps"] = int(row["max_turns"])
        self.task_id: str = row["task_id"]
        self.env = make(env_id, **chosen)
        self.max_turns = tool_env(self.env).max_steps
        self.outcome: float | None = None
        self.scores: list[float | None] = []

    def init(self, prompt: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The environment's own prompt, whatever the data set's: tools, grammar and step limit stand in it."""
        _, info = self.env.reset(options={"task_id": self.task_id})
        self.turns, self.outcome, self.scores = 0, None, []
        messages = [{"role": message.role, "content": message.content} for message in info["transcript"].messages]
        return messages, {"task_id": self.task_id}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """One action; `metadata` says what the judge thought, and at the end what the official metric is."""
        self.turns += 1
        _, reward, terminated, truncated, info = self.env.step(action)
        step, done = info["step"], terminated or truncated
        self.scores.append(step.verdict and step.verdict.score)
        metadata = {
            "task_id": self.task_id, "score": self.scores[-1], "reason": step.verdict and step.verdict.reason,
            "malformed": step.action.malformed,
        }  # fmt: skip
        if done:
            metadata["outcome"] = self.outcome = info.get("outcome")
        said = [] if done else [{"role": "user", "content": step.observation}]
        return BaseTextEnvStepOutput(observations=said, reward=float(reward), done=done, metadata=metadata)

    def get_metrics(self) -> dict[str, Any]:
        """Of the episode: steps, unknown verdicts, and outcome and mean verdict where there are any."""
        known = [score for score in self.scores if score is not None]
        metrics: dict[str, Any] = {"steps": self.turns, "unknown": len(self.scores) - len(known)}
        if known:
            metrics["process"] = sum(known) / len(known)
        return metrics if self.outcome is None else metrics | {"outcome": self.outcome}

    def close(self) -> None:
        self.env.close()


def register(env_id: str, name: str | None = None, **kwargs: Any) -> str:
    """Make `skyrl_gym.make(name, env_config=..., extras=row)` know an environment; a second time changes nothing.

    Args:
        env_id: a registered Gymnasium id.
        name: SkyRL's `env_class`; `None`: the same.
        kwargs: of `gym.make`, JSON.

    Raises:
        ConfigError: the environment cannot be made so, or the name stands for another one.

    Returns:
        The name.
    """
    name, settings = name or env_id, {"env_id": env_id, "kwargs": kwargs}
    known = skyrl_gym.registry.get(name)
    if known is not None and known.kwargs != settings:
        raise ConfigError(f"{name!r} is registered for {json.dumps(known.kwargs, default=str)}: give another name=.")
    if known is None:
        make(env_id, **kwargs).close()
        skyrl_gym.register(name, entry_point=f"{__name__}:SkyEnv", kwargs=settings)
    return name


def rows(env_id: str, name: str | None = None, **kwargs: Any) -> list[dict[str, Any]]:
    """The tasks of an environment as rows of SkyRL's data sets (write them as JSONL or Parquet).

    Args:
        env_id: a registered Gymnasium id.
        name: SkyRL's `env_class`; `None`: the same.
        kwargs: of `gym.make`; `split="test"` for the validation set.
    """
    env = make(env_id, **kwargs)
    made = []
    for task_id, task in tool_env(env).task_set.tasks.items():
        text, _ = env.reset(options={"task_id": task_id})
        made.append(
            {
                "data_source": env_id,
                "prompt": [{"role": "user", "content": text}],
                "env_class": name or env_id,
                "task_id": task_id,
                "reward_spec": {"method": "rule", "ground_truth": list(task.answers)},
            }  # fmt: skip
        )
    return made
