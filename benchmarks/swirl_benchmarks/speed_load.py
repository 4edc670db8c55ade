"""What starting costs: `swirl bench speed --only load`.

Imports and first episodes are timed in fresh processes, against Gymnasium alone; trajectories read from a run's file, against the bare
JSON parser on the same lines.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import Console
from rich.table import Table
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle

import swirl_env  # noqa: F401
from swirl_benchmarks.timing import in_turn, show, spread
from swirl_env.io import Writer, read
from swirl_env.types import Trajectory

_FIRST = "import gymnasium as gym, swirl_env; gym.make('swirl/{}').reset(seed=0)"
_PLAIN = "import gymnasium as gym; gym.make('CartPole-v1')"


def load_figures(rounds: int = 5, trajectories: int = 200) -> list[dict[str, Any]]:
    """Milliseconds of each, of its comparison, and their ratio."""

    def fresh(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    def make() -> gym.Env:
        return gym.make("swirl/HotPotQA-v0", disable_env_checker=True)

    env: Any = make().unwrapped
    ids = [(task_id, 0) for task_id in list(env.task_set.tasks)[:trajectories]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trajectories.jsonl"
        with Writer[Trajectory](path) as out:
            for trajectory in rollout(make, oracle(env), ids):
                out.write(trajectory)
        seconds = in_turn(
            {
                "import swirl_env": partial(fresh, "import swirl_env"),
                "import gymnasium": partial(fresh, "import gymnasium"),
                "first episode of GSM8K": partial(fresh, _FIRST.format("GSM8K-v0")),
                "first episode of HotPotQA": partial(fresh, _FIRST.format("HotPotQA-v0")),
                "gym.make of a class of Gymnasium's": partial(fresh, _PLAIN),
                f"read {len(ids)} trajectories": lambda: list(read(path, Trajectory)),
                "json.loads of the same lines": lambda: [json.loads(line) for line in path.open(encoding="utf-8")],
            },
            rounds,
        )
    names = list(seconds)
    pairs = [(names[0], names[1]), (names[2], names[4]), (names[3], names[4]), (names[5], names[6])]
    return [
        {
            "what": name, "against": other, "milliseconds": spread(seconds[name] * 1e3),
            "against_milliseconds": spread(seconds[other] * 1e3), "ratio": spread(seconds[name] / seconds[other]),
        }
        for name, other in pairs
    ]  # fmt: skip


def print_load(figures: list[dict[str, Any]], console: Console) -> None:
    """The figures as a table."""
    table = Table(title="Milliseconds to start, median [quartiles]", title_justify="left")
    for heading in ("what", "ours", "beside", "theirs", "ours / theirs"):
        table.add_column(heading, justify="left" if heading in ("what", "beside") else "right")
    for one in figures:
        table.add_row(
            one["what"], show(one["milliseconds"]), one["against"], show(one["against_milliseconds"]), show(one["ratio"], 2)
        )  # fmt: skip
    console.print(table)
