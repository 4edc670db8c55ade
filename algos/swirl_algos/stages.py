"""The arrows between a run's files: generate, judge, filter. Each appends to its file and goes on where it stopped."""

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
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
ENOUGH_ERRORS = 64
"""Episodes in a row that end by an error, after which the rest is not tried."""
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


Job = tuple[str, int]
"""(task id, sample number)"""


def generate(
    make_env: Callable[[], gym.Env], policy: Policy, task_ids: Sequence[str], path: Path, *, samples: int = 1, seed: int = 0,
    batch_size: int = 32, round: int = 0, name: str = "generate",
) -> list[Trajectory]:  # fmt: skip
    """Trajectories of (task, sample) pairs, as `record` makes them in this process.

    Returns:
        all of them, in the order of `task_ids`.
    """
    jobs = [(task_id, sample) for task_id in task_ids for sample in range(samples)]
    play = partial(rollout, make_env, policy, seed=seed, round=round, batch_size=batch_size)
    record(play, jobs, path, round=round, name=name)
    made = {trajectory.key: trajectory for trajectory in read(path, Trajectory)}
    return [made[task_id, sample, round] for task_id, sample in jobs]


def record(
    play: Callable[[list[Job]], Generator[Trajectory]],
    jobs: Sequence[Job],
    path: Path,
    *,
    round: int = 0,
    name: str = "generate",
) -> Counter[str]:
    """Play the jobs that the file lacks, or that an error ended, and write each as it comes; none is held in memory.

    Returns:
        episodes by stop reason, over all jobs.

    Raises:
        SwirlError: `ENOUGH_ERRORS` episodes in a row were ended by an error: whoever acts is gone. What was made is kept.
    """
    stops: dict[tuple[str, int, int], str] = {one.key: one.stop for one in read(path, Trajectory)}
    if "error" in stops.values():
        rewrite(path, (one for one in read(path, Trajectory) if one.stop != "error"))
    missing = [job for job in jobs if stops.get((*job, round), "error") == "error"]
    if missing:
        failed = 0
        with (
            Writer[Trajectory](path) as out,
            bar(len(jobs), name, "episode", len(jobs) - len(missing)) as progress,
            closing(play(missing)) as played,
        ):
            for trajectory in played:
                out.write(trajectory)
                stops[trajectory.key] = trajectory.stop
                progress.update()
                failed = failed + 1 if trajectory.stop == "error" else 0
                if failed == ENOUGH_ERRORS:
                    raise SwirlError(
                        f"The last {failed} episodes were all ended by an error, told above. Mend it and give the command again: what was "
                        f"made is in {path}."
                    )
    return Counter(stops[*job, round] for job in jobs)


def judge(
    trajectories: Iterable[Trajectory], judge: Judge, path: Path, unknown_limit: float = 1.0,
    work: Callable[[list[Trajectory]], Iterator[Trajectory]] | None = None,
) -> list[Trajectory]:  # fmt: skip
    """The trajectories with the judge's verdicts, in the same order; those that this judge judged already are not judged
    again, but for unknown verdicts, which are asked for anew. Steps that stay unknown are listed beside `judged.jsonl` in
    `failures.jsonl` (beside NAME.jsonl in NAME.failures.jsonl).

    Args:
        trajectories: recorded ones.
        judge: a judge that says `concurrency` is asked about so many trajectories at once, in threads; they are written as they
            come.
        path: where the judged trajectories are kept.
        unknown_limit: share of unknown verdicts above which judging stops.
        work: gives trajectories their verdicts, as they come; `None`: `verdicts` in this process.

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
            for judged in verdicts(judge, missing) if work is None or not missing else work(missing):
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


def verdicts(judge: Judge, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
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


def _groups(trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
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
    if not _write_whole(path, records):
        path.unlink(missing_ok=True)


def _write_whole(path: Path, records: Iterable) -> int:
    """Returns how many there are."""
    part, n = path.with_name(path.name + ".part"), 0
    part.unlink(missing_ok=True)
    with Writer[Any](part) as out:
        for n, record in enumerate(records, 1):  # noqa: B007
            out.write(record)
    part.replace(path)
    return n


def filter_by(name: str, trajectories: Iterable[Trajectory], path: Path) -> Kept:
    """Keep by name, and write what was kept."""
    result = keep(name, trajectories)
    _write_whole(path, result.kept)
    return result
