"""The table of environments, and the loop that registers it with Gymnasium."""

from typing import Any

import gymnasium as gym

ENVS = {
    "swirl/GSM8K-v0": {"tasks": "gsm8k", "tools": ["calculator"], "max_steps": 10},
    "swirl/HotPotQA-v0": {"tasks": "hotpotqa", "tools": ["search"], "max_steps": 5},
    "swirl/MuSiQue-v0": {"tasks": "musique", "tools": ["search"], "max_steps": 5},
    "swirl/BeerQA-v0": {"tasks": "beerqa", "tools": ["search"], "max_steps": 5},
    "swirl/CofCA-v0": {"tasks": "cofca", "tools": ["search"], "max_steps": 5, "split": "test"},
    "swirl/Arithmetic-v0": {"tasks": "arithmetic", "tools": ["calculator"], "max_steps": 10},
    "swirl/Tasks-v0": {"tasks": "own", "tools": ["search", "calculator"], "max_steps": 10},
}
"""id -> what the id fixes; step limits as in the paper (section 2.1)."""
REMOTE = "swirl/OpenEnv-v0"
"""The environment that an OpenEnv server plays, at `url`."""


def register_all() -> None:
    """Register every id of `ENVS`; safe to call twice."""
    for env_id, kwargs in ENVS.items():
        if env_id not in gym.registry:
            gym.register(
                env_id,
                entry_point="swirl_env.env:ToolEnv",
                vector_entry_point="swirl_env.registration:make_vector",
                kwargs=kwargs,
            )
    if REMOTE not in gym.registry:
        gym.register(REMOTE, entry_point="swirl_env.adapters.openenv:RemoteEnv")


def make_vector(num_envs: int = 1, *, autoreset_mode: str = "NextStep", **kwargs: Any) -> gym.vector.VectorEnv:
    """What `gym.make_vec(id, num_envs=N)` makes: a `ToolVectorEnv` over N equal environments.

    Args:
        num_envs: N.
        autoreset_mode: `NextStep`, `SameStep` or `Disabled`.
        kwargs: of each environment.
    """
    from swirl_env.env import ToolEnv
    from swirl_env.vector import ToolVectorEnv

    env_id = next((env_id for env_id, fixed in ENVS.items() if fixed["tasks"] == kwargs.get("tasks")), None)

    def make() -> gym.Env:
        return ToolEnv(**kwargs) if env_id is None else gym.make(env_id, **{"disable_env_checker": True} | kwargs)

    return ToolVectorEnv([make] * num_envs, autoreset_mode)
