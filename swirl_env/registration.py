"""The table of environments, and the loop that registers it with Gymnasium."""

import gymnasium as gym

ENVS = {
    "swirl/GSM8K-v0": {"tasks": "gsm8k", "tools": ["calculator"], "max_steps": 10},
    "swirl/HotPotQA-v0": {"tasks": "hotpotqa", "tools": ["search"], "max_steps": 5},
}
"""id -> what the id fixes; step limits as in the paper (section 2.1)."""


def register_all() -> None:
    """Register every id of `ENVS`; safe to call twice."""
    for env_id, kwargs in ENVS.items():
        if env_id not in gym.registry:
            gym.register(env_id, entry_point="swirl_env.env:ToolEnv", kwargs=kwargs)
