"""What a verdict costs: `swirl bench speed --only judge`.

The server is the loopback one of the tests, in this process: it speaks the real protocol, has no model, and takes a fixed time
to reply. One call at a time is timed against 64 in flight, a recorded run judged over a server of which a fifth of the replies
fails (429 with Retry-After 1, 500, no answer, half of the JSON, wrong JSON) against the same run over one that never fails, and a
verdict out of the cache against one of the `rules`.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_agents.testing_server import ChatServer

from swirl_benchmarks import evaluate
from swirl_benchmarks.judging import rejudge
from swirl_benchmarks.timing import show, spread
from swirl_env.client import ChatClient
from swirl_env.io import Writer
from swirl_env.judges import RulesJudge, ask, views
from swirl_env.judges.cache import Cached
from swirl_env.judges.model import ModelJudge
from swirl_env.types import Judge, StepView, Trajectory

IN_FLIGHT, FAULTS = 64, 0.2
LEAST_OVERLAP, MOST_SLOWDOWN, MOST_CACHED = 20.0, 1.6, 100.0
"""Times faster with `IN_FLIGHT`, times slower with faults, microseconds of a cached verdict: limits that we hold ourselves to."""


def judge_figures(steps: int = 1000, rounds: int = 5, fast: float = 0.05, slow: float = 0.5) -> dict[str, Any]:
    """Costs of verdicts, each beside its comparison in the same run.

    Args:
        steps: of the recorded run, at least (whole episodes).
        rounds: how often calls in flight and the cache are timed.
        fast: seconds that the server takes to reply, for calls in flight.
        slow: likewise for the recorded run, which has 16 in flight and a timeout of 4 x this.

    Returns:
        `in_flight`: `milliseconds` a verdict, `alone_milliseconds` and `ratio` (times faster); `faults`: `steps`, `seconds`,
        `clean_seconds`, `ratio` (times slower), `unknown` (verdicts), `met` (faults, counted) and `second_run_calls`;
        `cached`: `microseconds`, `rules_microseconds` and `ratio`. Spreads are median, low and high quartile.
    """
    recorded = _recorded(steps)
    shown = [view for trajectory in recorded for view in views(trajectory)]
    return {
        "in_flight": _in_flight(shown, rounds, fast),
        "faults": _faults(recorded, slow),
        "cached": _cached(shown[:256], rounds),
    }


def _recorded(steps: int) -> list[Trajectory]:
    """Whole oracle episodes of bundled GSM8K tasks, of at least so many steps together if there are so many."""
    episodes = []
    for split in ("train", "test"):
        make = _maker(split)
        base: Any = make().unwrapped
        episodes.append(rollout(make, oracle(base), [(task_id, 0) for task_id in base.task_set.tasks]))
    chosen: list[Trajectory] = []
    for trajectory in chain(*episodes):
        chosen.append(trajectory)
        if sum(len(one.steps) for one in chosen) >= steps:
            break
    return chosen


def _maker(split: str) -> Callable[[], Any]:
    return lambda: evaluate.make("swirl/GSM8K-v0", split=split, judge=None, reward="outcome")


def _judge(server: ChatServer, concurrency: int, timeout: float = 60.0) -> ModelJudge:
    return ModelJudge(ChatClient(server.url, concurrency=concurrency, timeout=timeout))


def _seconds(judge: Judge, shown: list[StepView]) -> float:
    """A verdict, asked about all at once."""
    start = time.perf_counter()
    ask(judge, shown)
    return (time.perf_counter() - start) / len(shown)


def _in_flight(shown: list[StepView], rounds: int, reply_seconds: float) -> dict[str, Any]:
    with ChatServer("It follows.\nGOOD", seconds=reply_seconds) as server:
        alone, together = _judge(server, 1), _judge(server, IN_FLIGHT)
        _seconds(together, shown[:IN_FLIGHT])  # connects
        times = np.array([(_seconds(together, shown), _seconds(alone, shown[:20])) for _ in range(rounds)])
    return {
        "milliseconds": spread(times[:, 0] * 1e3),
        "alone_milliseconds": spread(times[:, 1] * 1e3),
        "ratio": spread(times[:, 1] / times[:, 0]),
    }


def _faults(recorded: list[Trajectory], reply_seconds: float) -> dict[str, Any]:
    seconds, report = {}, {}
    for share in (0.0, FAULTS):
        with (
            tempfile.TemporaryDirectory() as folder,
            ChatServer("It follows.\nGOOD", seconds=reply_seconds, faults=share) as server,
        ):
            with Writer[Trajectory](Path(folder) / "trajectories.jsonl") as out:
                for trajectory in recorded:
                    out.write(trajectory)
            judge = Cached(_judge(server, 16, 4 * reply_seconds), Path(folder) / "verdicts.db")
            start = time.perf_counter()
            [figures] = rejudge(Path(folder), [judge])["judges"].values()
            seconds[share], calls = time.perf_counter() - start, len(server.bodies)
            for path in Path(folder).glob("judged-*"):  # so that it is the cache that knows them
                path.unlink()
            rejudge(Path(folder), [judge])
            report = {"steps": figures["steps"], "unknown": figures["unknown"], "met": dict(server.met)}
            report["second_run_calls"] = len(server.bodies) - calls
    return report | {
        "seconds": round(seconds[FAULTS], 2),
        "clean_seconds": round(seconds[0.0], 2),
        "ratio": round(seconds[FAULTS] / seconds[0.0], 3),
    }


def _cached(shown: list[StepView], rounds: int) -> dict[str, Any]:
    rules = RulesJudge()
    with tempfile.TemporaryDirectory() as folder, ChatServer("It follows.\nGOOD") as server:
        cached = Cached(_judge(server, IN_FLIGHT), Path(folder) / "verdicts.db")
        ask(cached, shown)
        each = [[view] for view in shown]
        times = np.array(
            [
                [sum(_seconds(judge, one) for one in each) / len(each) for judge in (cached, rules)]
                for _ in range(rounds)
            ]
        )
    return {
        "microseconds": spread(times[:, 0] * 1e6),
        "rules_microseconds": spread(times[:, 1] * 1e6),
        "ratio": spread(times[:, 0] / times[:, 1]),
    }


def print_judge(figures: dict[str, Any], console: Console) -> None:
    """The figures as a table; one over its limit is marked."""
    flight, faults, cached = (figures[name] for name in ("in_flight", "faults", "cached"))
    table = Table(title="What a verdict costs, median [quartiles]", title_justify="left")
    for heading in ("what", "ours", "beside", "theirs", "ratio", "limit"):
        table.add_column(heading, justify="left" if heading in ("what", "beside") else "right")

    def over(bad: bool) -> str:
        return " (over)" if bad else ""

    table.add_row(
        f"ms, {IN_FLIGHT} in flight", show(flight["milliseconds"], 2), "one at a time", show(flight["alone_milliseconds"]),
        show(flight["ratio"]), f"at least {LEAST_OVERLAP:.0f} times faster{over(flight['ratio']['median'] < LEAST_OVERLAP)}",
    )  # fmt: skip
    table.add_row(
        f"s, {faults['steps']} steps, {FAULTS:.0%} faults", f"{faults['seconds']:.1f}", "no faults", f"{faults['clean_seconds']:.1f}",
        f"{faults['ratio']:.2f}", f"at most {MOST_SLOWDOWN} times slower{over(faults['ratio'] > MOST_SLOWDOWN)}",
    )  # fmt: skip
    table.add_row(
        "µs, from the cache", show(cached["microseconds"]), "rules", show(cached["rules_microseconds"]),
        show(cached["ratio"], 2), f"{MOST_CACHED:.0f} µs{over(cached['microseconds']['median'] > MOST_CACHED)}",
    )  # fmt: skip
    console.print(table)
    console.print(
        f"Of {faults['steps']} steps over the faulty server {faults['unknown']} stayed unknown; judging the run again made "
        f"{faults['second_run_calls']} calls."
    )
