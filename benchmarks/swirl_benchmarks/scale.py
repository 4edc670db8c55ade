"""What more machines, and more requests in flight, bring: `swirl bench scale`.

A Ray cluster of several nodes on this machine plays episodes with the oracle behind a model that takes 200 ms; then again, with a node and
a worker killed midway. Episodes behind a server that takes 2 s a reply are timed against latency x requests / requests in flight, and the
memory of ten thousand episodes is looked at.
"""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import Console
from rich.table import Table
from swirl_agents.endpoint import EndpointPolicy
from swirl_agents.fleet import Work, spread
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_algos import stages

import swirl_env  # noqa: F401
from swirl_env.client import ChatClient
from swirl_env.types import Completion, Policy, Trajectory, Transcript

SPEEDUP_GOAL, WALL_GOAL = 2.5, 1.11
BATCH = 8
"""Episodes that a worker plays at once."""


class Slow:
    """A policy behind a model that takes so many seconds for all states that it is asked about at once."""

    def __init__(self, policy: Policy, seconds: float):
        self.policy, self.seconds, self.name = policy, seconds, policy.name

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        time.sleep(self.seconds)
        return self.policy(transcripts, n)


def make_env(**kwargs: Any) -> gym.Env:
    return gym.make("swirl/GSM8K-v0", judge=None, reward="outcome", disable_env_checker=True, **kwargs)


def player(seconds: float, seen: str | None = None) -> Work:
    """What a worker does; it leaves its process's number in the folder `seen`."""
    if seen is not None:
        Path(seen, str(os.getpid())).touch()
    policy = Slow(oracle(make_env().unwrapped), seconds)  # type: ignore[arg-type]
    return partial(rollout, make_env, policy, batch_size=BATCH)


def jobs_of(episodes: int) -> dict[Any, stages.Job]:
    """(task, sample, round) -> (task, sample), five samples a task."""
    tasks = list(make_env().unwrapped.task_set.tasks)[: -(-episodes // 5)]  # type: ignore[attr-defined]
    jobs = [(task, sample) for sample in range(5) for task in tasks][:episodes]
    return {(*job, 0): job for job in jobs}


@contextmanager
def cluster_of(nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    """(Ray's cluster on this machine, its nodes of one CPU each), and a connection to it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        found = [cluster.add_node(num_cpus=1) for _ in range(nodes)]
        ray.init(cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster, found
    finally:
        ray.shutdown()
        cluster.shutdown()


def play(
    episodes: int, seconds: float, workers: int, at: Callable[[int, str], None] = lambda done, seen: None
) -> dict[str, Any]:
    """Play on the cluster that this process is connected to; `at(episodes done, folder of process numbers)` is called after each."""
    jobs = jobs_of(episodes)
    keys, times, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as seen:
        for one in spread(partial(player, seconds, seen), jobs, address="auto", workers=workers, room=2 * BATCH):
            keys.append(one.key)
            times.append(time.monotonic())
            at(len(keys), seen)
    return {
        "workers": workers, "episodes": len(keys), "exactly_once": sorted(keys) == sorted(jobs),
        "seconds": round(times[-1] - began, 2), "begun_after": round(times[0] - began, 2),
        "episodes_per_second": round((len(times) - 1) / (times[-1] - times[0]), 2),
    }  # fmt: skip


def cluster_figures(episodes: int = 500, seconds: float = 0.2, nodes: int = 3) -> dict[str, Any]:
    """Throughput at 1 and at `nodes` nodes, from the first episode's end to the last's, and what deaths do."""
    with cluster_of(nodes) as (cluster, found):
        one, several = play(episodes, seconds, 1), play(episodes, seconds, nodes)

        def kill(done: int, seen: str) -> None:
            if done == episodes // 3:
                cluster.remove_node(found[0], allow_graceful=False)
            if done == 2 * episodes // 3:
                os.kill(next(filter(_alive, map(int, os.listdir(seen)))), signal.SIGKILL)

        lost = play(episodes, seconds, nodes, kill)
    ratio = several["episodes_per_second"] / one["episodes_per_second"]
    return {
        "one": one,
        "several": several,
        "ratio": round(ratio, 2),
        "goal": SPEEDUP_GOAL,
        "node_and_worker_killed": lost,
    }


def _alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@contextmanager
def served(reply: str, seconds: float) -> Iterator[str]:
    """Address of a server in a process of its own, each of whose replies takes so long."""
    command = [sys.executable, "-m", "swirl_agents.testing_server", "--reply", reply, "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def wall_figures(episodes: int = 1000, flying: int = 256, seconds: float = 2.0, steps: int = 5) -> dict[str, Any]:
    """Wall time of episodes of so many steps, `flying` at once, against requests x latency / concurrency."""
    make = partial(make_env, max_steps=steps)
    with served("<think>Let me see.</think>", seconds) as url:
        policy = EndpointPolicy(ChatClient(url, "test", concurrency=flying), make().unwrapped.grammar)  # type: ignore[attr-defined]
        began = time.monotonic()
        requests = sum(len(one.steps) for one in rollout(make, policy, jobs_of(episodes).values(), batch_size=flying))
        wall = time.monotonic() - began
    ideal = requests * seconds / flying
    return {
        "episodes": episodes, "in_flight": flying, "latency": seconds, "requests": requests, "seconds": round(wall, 2), "ideal": ideal,
        "ratio": round(wall / ideal, 3), "goal": WALL_GOAL, "errors": policy.client.usage.failures,
    }  # fmt: skip


def memory_figures(episodes: int = 10_000, flying: int = 256) -> dict[str, Any]:
    """Resident megabytes of this process over episodes that `stages.record` writes to a file."""
    import psutil

    process, sizes = psutil.Process(), []
    tasks = list(make_env().unwrapped.task_set.tasks)  # type: ignore[attr-defined]
    jobs = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(episodes)]

    def watched(played: Iterator[Trajectory]) -> Generator[Trajectory]:
        for done, one in enumerate(played, 1):
            yield one
            if done % (episodes // 10) == 0:
                gc.collect()
                sizes.append(round(process.memory_info().rss / 1e6, 1))

    with served("<answer>42</answer>", 0) as url, tempfile.TemporaryDirectory() as folder:
        policy = EndpointPolicy(ChatClient(url, "test", concurrency=flying), make_env().unwrapped.grammar)  # type: ignore[attr-defined]
        began = time.monotonic()
        stages.record(
            lambda some: watched(rollout(make_env, policy, some, batch_size=flying)), jobs, Path(folder) / "t.jsonl"
        )
        seconds = time.monotonic() - began
    return {
        "episodes": episodes, "seconds": round(seconds, 1), "megabytes": sizes, "growth": round(sizes[-1] - sizes[0], 1),
        "errors": policy.client.usage.failures,
    }  # fmt: skip


def print_scale(report: dict[str, Any], console: Console) -> None:
    table = Table("", "measured", "goal", title="Scale", title_justify="left")
    if "cluster" in report:
        figures = report["cluster"]
        one, several, lost = figures["one"], figures["several"], figures["node_and_worker_killed"]
        table.add_row(
            f"{several['workers']} nodes beside 1, {one['episodes']} episodes",
            f"{figures['ratio']} times ({one['episodes_per_second']} and {several['episodes_per_second']} episodes/s)", f">= {SPEEDUP_GOAL}",
        )  # fmt: skip
        table.add_row(
            "a node and a worker killed", f"{lost['episodes']} episodes in {lost['seconds']} s, each once: {lost['exactly_once']}", "each once"
        )  # fmt: skip
    if "wall" in report:
        wall = report["wall"]
        table.add_row(
            f"{wall['requests']:,} requests of {wall['latency']} s, {wall['in_flight']} in flight",
            f"{wall['seconds']} s, {wall['ratio']} times the ideal", f"<= {WALL_GOAL}",
        )  # fmt: skip
    if "memory" in report:
        memory = report["memory"]
        table.add_row(
            f"memory over {memory['episodes']:,} episodes",
            f"{memory['megabytes'][0]} to {memory['megabytes'][-1]} MB from the first tenth on ({memory['seconds']} s)", "flat",
        )  # fmt: skip
    console.print(table)
