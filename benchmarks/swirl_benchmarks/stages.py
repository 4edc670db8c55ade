"""The arrows between a run's files: generate, judge, filter. Each appends to its file and goes on where it stopped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
from swirl_agents.rollout import rollout
from swirl_algos.filters import Kept, keep
from tqdm import tqdm

from swirl_env.io import Writer, read
from swirl_env.judges import ask, views
from swirl_env.types import Judge, Policy, Trajectory


def bar(total: int, name: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar on standard error, with rate and time left."""
    return tqdm(total=total, desc=name, unit=unit, initial=done, dynamic_ncols=True, mininterval=0.5)


def generate(
    make_env: Callable[[], gym.Env], policy: Policy, task_ids: Sequence[str], path: Path, *, samples: int = 1, seed: int = 0,
    batch_size: int = 32, name: str = "generate",
) -> list[Trajectory]:  # fmt: skip
    """Trajectories of (task, sample) pairs; those already in the file are not made again.

    Returns:
        all of them, in the order of `task_ids`.
    """
    done = {trajectory.key: trajectory for trajectory in read(path, Trajectory)}
    jobs = [(task_id, sample) for task_id in task_ids for sample in range(samples)]
    missing = [(task_id, sample) for task_id, sample in jobs if (task_id, sample, 0) not in done]
    if missing:
        with Writer[Trajectory](path) as out, bar(len(jobs), name, "episode", len(jobs) - len(missing)) as progress:
            for trajectory in rollout(make_env, policy, missing, seed=seed, batch_size=batch_size):
                out.write(trajectory)
                done[trajectory.key] = trajectory
                progress.update()
    return [done[task_id, sample, 0] for task_id, sample in jobs]


def judge(trajectories: Iterable[Trajectory], judge: Judge, path: Path) -> list[Trajectory]:
    """The trajectories with the judge's verdicts, in the same order; those that this judge judged already are
    not judged again."""
    trajectories = list(trajectories)
    done = {
        trajectory.key: trajectory
        for trajectory in read(path, Trajectory)
        if all(step.verdict is not None and step.verdict.judge == judge.name for step in trajectory.steps)
    }
    missing = [trajectory for trajectory in trajectories if trajectory.key not in done]
    if missing:
        with Writer[Trajectory](path) as out:
            for trajectory in tqdm(
                missing, desc=f"judge ({judge.name})", unit="trajectory", disable=len(missing) < 100
            ):
                verdicts = ask(judge, views(trajectory))
                steps = [
                    replace(step, verdict=verdict) for step, verdict in zip(trajectory.steps, verdicts, strict=True)
                ]
                done[trajectory.key] = replace(trajectory, steps=tuple(steps))
                out.write(done[trajectory.key])
    return [done[trajectory.key] for trajectory in trajectories]


def filter_by(name: str, trajectories: Iterable[Trajectory], path: Path) -> Kept:
    """Keep by name, and write what was kept."""
    result = keep(name, trajectories)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with Writer[Trajectory](part) as out:
        for trajectory in result.kept:
            out.write(trajectory)
    part.replace(path)
    return result
