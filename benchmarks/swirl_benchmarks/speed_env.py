"""What a step costs: `swirl bench speed --only env`.

Each contestant takes the same number of steps in every round, one after the other within the round, so a busy moment hits
all of them; figures are medians over rounds with the quartiles, ratios are taken round by round. Every calculation is of an
expression not seen before. aviary's GSM8K `calculator` step, the closest peer, joins where `aviary.gsm8k` is installed.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

import swirl_env  # noqa: F401
from swirl_benchmarks.timing import show, spread

WIDE = 64
"""Environments of the vector figures."""
LIMITS = {
    "think": 30.0,
    "answer": 150.0,
    "calculator": 150.0,
    f"think, ToolVectorEnv({WIDE})": 20.0,
}
"""Microseconds a step that we hold ourselves to."""

Round = Callable[[int], float]
"""Take n steps; returns the seconds they took."""


def env_figures(rounds: int = 25, steps: int = 192) -> list[dict[str, Any]]:
    """Microseconds a step (rules judge on, one environment unless said), each with its comparison.

    Args:
        rounds: how often each is timed.
        steps: steps a round.

    Returns:
        for each figure `what`, `microseconds` (median, low and high quartile), `limit`, and where there is a comparison
        `against`, its `against_microseconds` and the `ratio` (median, low, high; below 1: we are faster).
    """
    contestants: dict[str, Round] = {
        "think": _single(lambda n: f"<think>Number {n} is what matters in this question.</think>"),
        "answer": _single(lambda n: f"<answer>{n}</answer>"),
        "calculator": _single(lambda n: f"<calculator>{n}+{n + 7}*3</calculator>"),
        f"think, ToolVectorEnv({WIDE})": _vector("vector_entry_point"),
        f"think, SyncVectorEnv({WIDE})": _vector("sync"),
    }
    against = {f"think, ToolVectorEnv({WIDE})": f"think, SyncVectorEnv({WIDE})"}
    if (aviary := _aviary()) is not None:
        contestants["calculator of aviary.gsm8k"] = aviary
        against["calculator"] = "calculator of aviary.gsm8k"
    for contestant in contestants.values():  # imports, caches
        contestant(steps)
    seconds = {name: np.zeros(rounds) for name in contestants}
    gc.collect()
    gc.freeze()  # what the imports of all contestants left is not walked again in everyone's steps
    try:
        for i in range(rounds):
            for name, contestant in contestants.items():
                seconds[name][i] = contestant(steps) / steps
    finally:
        gc.unfreeze()
    figures = []
    for name in LIMITS:
        figure = {"what": name, "microseconds": spread(seconds[name] * 1e6), "limit": LIMITS[name]}
        if other := against.get(name):
            figure |= {
                "against": other,
                "against_microseconds": spread(seconds[other] * 1e6),
                "ratio": spread(seconds[name] / seconds[other]),
            }
        figures.append(figure)
    return figures


def _numbers() -> Iterator[int]:
    return itertools.count(1000)


def _single(action: Callable[[int], str]) -> Round:
    env, numbers = gym.make("swirl/GSM8K-v0", disable_env_checker=True), _numbers()
    seeds = itertools.count()

    def run(n: int) -> float:
        spent = done = 0.0
        while done < n:
            env.reset(seed=next(seeds))
            for _ in range(9):  # the step limit is 10
                text = action(next(numbers))
                start = time.perf_counter()
                *_, terminated, truncated, _ = env.step(text)
                spent += time.perf_counter() - start
                done += 1
                if terminated or truncated:
                    break
        return spent * n / done

    return run


def _vector(mode: str) -> Round:
    envs, numbers = gym.make_vec("swirl/GSM8K-v0", WIDE, mode), _numbers()

    def run(n: int) -> float:
        spent = done = 0.0
        while done < n:
            envs.reset(seed=0)
            for _ in range(3):
                actions = [f"<think>Number {next(numbers)} is what matters in this question.</think>"] * WIDE
                start = time.perf_counter()
                envs.step(actions)
                spent += time.perf_counter() - start
                done += WIDE
        return spent * n / done

    return run


def _aviary() -> Round | None:
    """Its calculator step, from a tool request message to the response; `None` where it is not installed."""
    try:
        from aviary.core import ToolCall, ToolRequestMessage
        from aviary.envs.gsm8k.env import CalculatorEnv
    except ImportError:
        return None
    numbers = _numbers()
    env = CalculatorEnv("0", "How many?", 4.0)

    async def steps(n: int) -> float:
        await env.reset()
        spent = 0.0
        for _ in range(n):
            number = next(numbers)
            call = ToolCall.from_name("calculator", expr=f"{number}+{number + 7}*3")
            message = ToolRequestMessage(tool_calls=[call])
            start = time.perf_counter()
            await env.step(message)
            spent += time.perf_counter() - start
        return spent

    return lambda n: asyncio.run(steps(n))


def print_env(figures: list[dict[str, Any]], console: Console) -> None:
    """The figures as a table; one over its limit is marked."""
    table = Table(title="Microseconds a step, median [quartiles]", title_justify="left")
    for heading in ("step", "ours", "limit", "beside", "theirs", "ours / theirs"):
        table.add_column(heading, justify="left" if heading in ("step", "beside") else "right")
    for figure in figures:
        over = " (over)" if figure["microseconds"]["median"] > figure["limit"] else ""
        cells = [show(figure["microseconds"]) + over, f"{figure['limit']:.0f}"]
        if "against" in figure:
            cells += [figure["against"], show(figure["against_microseconds"]), show(figure["ratio"], 2)]
        table.add_row(figure["what"], *cells)
    console.print(table)
    if not any("aviary" in figure.get("against", "") for figure in figures):
        console.print("For the comparison with aviary: pip install aviary.gsm8k")
