"""The arrows between a run's files: generate, judge, filter. Each appends to its file and goes on where it stopped."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
from swirl_agents.rollout import rollout
from tqdm import tqdm

from swirl_algos.filters import Kept, keep
from swirl_env.errors import SwirlError
from swirl_env.io import Writer, read
from swirl_env.judges import ask, views
from swirl_env.types import STRICT, Judge, Policy, Trajectory

UNKNOWN_LIMIT = 0.2
"""Share of unknown verdicts above which commands stop."""
ENOUGH_STEPS = 50
"""Judged steps from which on the share of unknown verdicts is held against its limit; at the end it is in any case."""
MAX_THREADS = 256
BATCH_STEPS = 64
"""Steps that a judge in this process is asked about at once."""


class JudgeError(SwirlError, RuntimeError):
    """A judge that leaves too much unknown."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A step without a verdict."""

    __pydantic_config__ = STRICT

    task: str
    sample: int
    round: int
    step: int
    judge: str
    reason: str


def bar(total: int, name: str, unit: str, done: int = 0, delay: float = 0) -> tqdm:
    """A progress bar on standard error, with rate and time left; shown after `delay` seconds, and not at all with `SWIRL_QUIET=1`."""
    quiet = bool(os.environ.get("SWIRL_QUIET"))
    return tqdm(
        total=total, desc=name, unit=unit, initial=done, dynamic_ncols=True, mininterval=0.5, delay=delay, disable=quiet
    )


def generate(
    make_env: Callable[[], gym.Env], policy: Policy, task_ids: Sequence[str], path: Path, *, samples: int = 1, seed: int = 0,
    batch_size: int = 32, round: int = 0, name: str = "generate",
) -> list[Trajectory]:  # fmt: skip
    """Trajectories of (task, sample) pairs; those already in the file are not made again, but for those that an error ended.

    Returns:
        all of them, in the order of `task_ids`.
    """
    found = list(read(path, Trajectory))
    done = {trajectory.key: trajectory for trajectory in found if trajectory.stop != "error"}
    if len(done) < len(found):
        rewrite(path, done.values())
    jobs = [(task_id, sample) for task_id in task_ids for sample in range(samples)]
    missing = [(task_id, sample) for task_id, sample in jobs if (task_id, sample, round) not in done]
    if missing:
        with Writer[Trajectory](path) as out, bar(len(jobs), name, "episode", len(jobs) - len(missing)) as progress:
            for trajectory in rollout(make_env, policy, missing, seed=seed, round=round, batch_size=batch_size):
                out.write(trajectory)
                done[trajectory.key] = trajectory
                progress.update()
    return [done[task_id, sample, round] for task_id, sample in jobs]


def judge(trajectories: Iterable[Trajectory], judge: Judge, path: Path, unknown_limit: float = 1.0) -> list[Trajectory]:
    """The trajectories with the judge's verdicts, in the same order; those that this judge judged already are not judged
    again, but for unknown verdicts, which are asked for anew. Steps that stay unknown are listed beside `judged.jsonl` in
    `failures.jsonl` (beside NAME.jsonl in NAME.failures.jsonl).

    Args:
        trajectories: recorded ones.
        judge: a judge that says `concurrency` is asked about so many trajectories at once, in threads; they are written as they
            come.
        path: where the judged trajectories are kept.
        unknown_limit: share of unknown verdicts above which judging stops.

    Raises:
        JudgeError: more than that is unknown, after `ENOUGH_STEPS` or at the end. What was judged is kept.
    """
    trajectories = list(trajectories)
    made = {trajectory.key: trajectory for trajectory in trajectories}
    found = {trajectory.key: trajectory for trajectory in read(path, Trajectory)}
    done = {
        key: trajectory
        for key, trajectory in found.items()
        if all(step.verdict is not None and step.verdict.judge == judge.name for step in trajectory.steps)
        and not _unknown(trajectory)
        and (key not in made or same_episode(made[key], trajectory))  # one that an error ended is made anew
    }
    if len(done) < len(found):
        rewrite(path, done.values())
    missing = [trajectory for trajectory in trajectories if trajectory.key not in done]
    steps, unknown, reason = sum(len(t.steps) for t in trajectories if t.key in done), 0, ""
    try:
        with (
            Writer[Trajectory](path) as out,
            bar(
                len(trajectories), f"judge ({judge.name})", "trajectory", len(trajectories) - len(missing), 1
            ) as progress,
        ):
            for judged in _judged(judge, missing):
                out.write(judged)
                done[judged.key] = judged
                progress.update()
                steps += len(judged.steps)
                unknown += len(failures := _unknown(judged))
                reason = failures[0].reason if failures else reason
                if steps >= ENOUGH_STEPS and unknown > unknown_limit * steps:
                    break
        if unknown > unknown_limit * steps:
            raise JudgeError(
                f"{unknown} of {steps} verdicts of {judge.name} are unknown, over the limit of "
                f"{unknown_limit:.0%}. The last reason: {reason}{'' if reason.endswith(('.', '?')) else '.'} What was judged is kept "
                f"in {path}; mend the judge and give the same command again."
            )
    finally:
        failures_file = "failures.jsonl" if path.stem == "judged" else f"{path.stem}.failures.jsonl"
        rewrite(path.with_name(failures_file), [failure for one in done.values() for failure in _unknown(one)])
    return [done[trajectory.key] for trajectory in trajectories]


def same_episode(one: Trajectory, other: Trajectory) -> bool:
    """Whether the same was done and seen, whatever was thought of it."""

    def acted(trajectory: Trajectory) -> tuple[Any, ...]:
        return trajectory.stop, *(
            (step.action.text, [result.text for result in step.results]) for step in trajectory.steps
        )

    return acted(one) == acted(other)


def _judged(judge: Judge, trajectories: Sequence[Trajectory]) -> Iterator[Trajectory]:
    """Each with its verdicts: in batches, or as they come from threads where the judge says how many it bears (a step that is
    retried for long holds up no other)."""
    threads = min(getattr(judge, "concurrency", 1), MAX_THREADS)
    if threads <= 1:
        for group in _groups(trajectories):
            yield from _with_verdicts(judge, group)
        return
    pool = ThreadPoolExecutor(threads, "swirl-judge")
    waiting = iter(trajectories)
    try:
        running = {pool.submit(_with_verdicts, judge, [one]) for one in islice(waiting, 2 * threads)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_with_verdicts, judge, [one]) for one in islice(waiting, len(done))}
            for future in done:
                yield from future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _groups(trajectories: Sequence[Trajectory]) -> Iterator[list[Trajectory]]:
    """Trajectories of about `BATCH_STEPS` steps together."""
    group: list[Trajectory] = []
    for trajectory in trajectories:
        group.append(trajectory)
        if sum(len(one.steps) for one in group) >= BATCH_STEPS:
            yield group
            group = []
    if group:
        yield group


def _with_verdicts(judge: Judge, trajectories: list[Trajectory]) -> list[Trajectory]:
    verdicts = iter(ask(judge, [view for trajectory in trajectories for view in views(trajectory)]))
    return [
        replace(trajectory, steps=tuple(replace(step, verdict=next(verdicts)) for step in trajectory.steps))
        for trajectory in trajectories
    ]


def _unknown(trajectory: Trajectory) -> list[Failure]:
    return [
        Failure(*trajectory.key, i, step.verdict.judge, step.verdict.reason)
        for i, step in enumerate(trajectory.steps)
        if step.verdict is not None and step.verdict.score is None
    ]


def rewrite(path: Path, records: Iterable) -> None:
    """The file anew, whole or not at all; none where there is no record."""
    if kept := list(records):
        _write_whole(path, kept)
    else:
        path.unlink(missing_ok=True)


def _write_whole(path: Path, records: Iterable) -> None:
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with Writer[Any](part) as out:
        for record in records:
            out.write(record)
    part.replace(path)


def filter_by(name: str, trajectories: Iterable[Trajectory], path: Path) -> Kept:
    """Keep by name, and write what was kept."""
    result = keep(name, trajectories)
    _write_whole(path, result.kept)
    return result
