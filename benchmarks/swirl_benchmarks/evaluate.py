"""Evaluate a policy on the test tasks of an environment."""

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table
from swirl_agents.endpoint import EndpointPolicy
from swirl_agents.scripted import SCRIPTED, make_scripted

import swirl_env  # noqa: F401  registers the ids
from swirl_benchmarks.metrics import Estimate, summary
from swirl_env.client import PREFIX, open_endpoint
from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, SwirlError, UnknownNameError, near
from swirl_env.io import write_text
from swirl_env.registration import ENVS
from swirl_env.transport import without_credentials
from swirl_env.types import Policy, Trajectory

ROWS = {
    "outcome": "outcome (official metric)",
    "process": "process score",
    "malformed": "malformed actions",
    "tool_errors": "tool errors",
    "steps": "steps",
}


def make(env_id: str, **kwargs: Any) -> gym.Env:
    """`gym.make` with the near match of an unknown id."""
    if env_id not in gym.registry and ":" not in env_id:
        raise UnknownNameError(f"No environment is called {env_id!r}.{near(env_id, ENVS)}")
    try:
        return gym.make(env_id, disable_env_checker=True, **kwargs)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{env_id!r}: {error}. Write MODULE:ID with an importable module.") from error
    except TypeError as error:
        if isinstance(error, SwirlError) or env_id in ENVS:
            raise
        raise ConfigError(
            f"{env_id!r} is not an environment of this toolkit ({error}). Known: {', '.join(ENVS)}."
        ) from error


def read_kwargs(text: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of an environment, written as JSON; `flags` are those that are given otherwise. Raises `ConfigError`."""
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f'--kwargs must be JSON such as \'{{"search": {{"k": 2}}}}\', got {text!r} ({error}).'
        ) from None
    if not isinstance(kwargs, dict):
        raise ConfigError(f'--kwargs must be a JSON object such as \'{{"grammar": "paper"}}\', got {text!r}.')
    if given := set(kwargs) & set(flags):
        raise ConfigError(f"--kwargs cannot hold {min(given)!r}: the command sets it (see --help).")
    return kwargs


def make_policy(
    name: str, env: gym.Env, *, temperature: float, max_new_tokens: int, seed: int, concurrency: int = 64
) -> Policy:
    """`oracle`, `random`, `replay:FILE`, `endpoint:URL` or `endpoint:URL#MODEL`, `{"endpoint": URL, ...}` with settings of
    `ChatClient`, or a model's name or folder."""
    base = env.unwrapped
    assert isinstance(base, ToolEnv)
    if name.partition(":")[0] in SCRIPTED:
        return make_scripted(name, base)
    if name.startswith((PREFIX, "{")):
        client = open_endpoint(
            name,
            "--model",
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            concurrency=max(concurrency, 64),
        )
        client.check()
        return EndpointPolicy(client, base.grammar)
    from swirl_agents.models import load_model

    model, tokenizer = load_model(name)
    from swirl_agents.local import LocalPolicy

    return LocalPolicy(model, tokenizer, name=name, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


def choose(task_ids: list[str], n: int | None, seed: int) -> list[str]:
    """The first `n` of a seeded shuffle; `None`: all, in file order."""
    if n is None:
        return task_ids
    return [task_ids[i] for i in np.random.default_rng(seed).permutation(len(task_ids))[:n]]


def report(env: gym.Env, model: str, trajectories: list[Trajectory]) -> dict[str, Any]:
    """The JSON of an evaluation."""
    base = env.unwrapped
    assert isinstance(base, ToolEnv) and env.spec is not None
    task_set = base.task_set
    figures = summary(trajectories, lambda t: task_set.metrics(t.task, t.answer), task_set.macro)
    return {"env": env.spec.id, "model": model, **figures}


def print_table(title: str, columns: dict[str, dict[str, Any]], console: Console | None = None) -> None:
    """Evaluations side by side, one column each, every figure with its interval."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in ROWS.items():
        table.add_row(label, *(str(Estimate(**figures[key])) for figures in columns.values()))
    extra = {name for figures in columns.values() for name in list(figures["metrics"])[1:]}
    for name in sorted(extra):
        table.add_row(name, *(str(Estimate(**figures["metrics"][name])) for figures in columns.values()))
    table.add_row("questions", *(str(figures["n"]) for figures in columns.values()))
    (console or Console(width=None)).print(table)


def check_target(path: str | None) -> None:
    """Raise `ConfigError` now if a file could not be written later."""
    if path is not None and (Path(path).is_dir() or not os.access(_nearest(Path(path).absolute().parent), os.W_OK)):
        raise ConfigError(f"{path} cannot be written: it is a folder, or its folder is closed. Give another file.")


def _nearest(folder: Path) -> Path:
    return folder if folder.exists() else _nearest(folder.parent)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, without_credentials(json.dumps(data, indent=1, ensure_ascii=False)) + "\n")
