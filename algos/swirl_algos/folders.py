"""A folder knows the settings of what is made in it: going on with others stops and says which."""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from swirl_env.errors import ConfigError
from swirl_env.io import write_text
from swirl_env.transport import without_credentials
from swirl_env.types import Trajectory


def claim(path: Path, config: Mapping[str, Any], flag: str) -> None:
    """Write the settings to `path`, or check that those there are the same. Where nothing else is in the folder yet, others
    take their place.

    Args:
        path: `run.json` or the like, in a folder that is new, empty, or was claimed before.
        config: the settings, as JSON values.
        flag: the flag that names another folder, for the message.

    Raises:
        ConfigError: the folder holds something else, or other settings; the differences are named.
    """
    mine = json.loads(without_credentials(json.dumps(config)))
    part = path.with_name(path.name + ".part")  # left where a process was killed while it claimed
    holds = {one for one in path.parent.iterdir() if one not in (path, part)} if path.parent.exists() else set()
    if path.exists():
        flat_mine, flat_theirs = flat(mine), flat(read_claim(path, flag))
        changed = [
            f"{key}: {flat_theirs.get(key)!r} there, {flat_mine.get(key)!r} now"
            for key in sorted(flat_mine | flat_theirs)
            if flat_mine.get(key) != flat_theirs.get(key)
        ]
        if not changed:
            return
        if holds:
            raise ConfigError(
                f"{path.parent} holds a run with another config ({'; '.join(changed)}). Use another {flag}."
            )
    elif holds:
        raise ConfigError(f"{path.parent} is not empty and holds no {path.name}. Use another {flag}.")
    whole = sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"config": mine, "hash": whole}, indent=1, ensure_ascii=False) + "\n")


def read_claim(path: Path, flag: str = "--out") -> dict[str, Any]:
    """The settings in it. Raises `ConfigError` if it holds none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        assert isinstance(config, dict)
        return config
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"{path} is not a run's config. Use another folder with {flag}.") from None


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    values: dict[str, Any] = {}
    for key, value in data.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def content(trajectories: Iterable[Trajectory]) -> list[Any]:
    """Which trajectories these are, as JSON: a training goes on only with the same."""
    return [[one.id, [step.action.text for step in one.steps]] for one in trajectories]


def digest(data: Any) -> str:
    """Eight hex digits of JSON values."""
    return sha256(json.dumps(data).encode()).hexdigest()[:8]


def complete(model: Path) -> bool:
    """Whether a model folder is there (it gets its name when it is whole)."""
    return any((model / name).exists() for name in ("config.json", "adapter_config.json"))
