"""Environment x policy -> trajectories, many at once.

A policy with a `session` (a local model's) takes states as they come: an episode whose tool has answered goes on at once, while
the others are still decoding. While steps take over a millisecond (a slow tool, a judge) they run in threads beside it. Any other
policy is asked about all episodes that wait for it in one batch. The draw at each state has its own seed, from (seed, task,
sample, step), so order and batching change nothing but rounding.
"""

import hashlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym

from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError
from swirl_env.types import Completion, Message, Policy, Step, Trajectory, Transcript

SLOW_SECONDS = 0.001
"""Steps run in threads while one of the last `RECENT` took longer than this."""
RECENT = 32
"""Many, as a slow step outside a thread holds everyone up, and a quick one in a thread costs little."""
MAX_THREADS = 64


def draw_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed of its own for each draw."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(eq=False)
class _Episode:
    env: gym.Env
    task_id: str
    sample: int
    transcript: Transcript
    prompt: tuple[Message, ...]
    steps: list[Step] = field(default_factory=list)
    outcome: float | None = None
    stop: str | None = None

    def state(self, seed: int, round: int) -> Transcript:
        """The transcript with the sampled ids of its actions and the seed of the draw that comes next."""
        messages = list(self.transcript.messages)
        said = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for i, step in zip(said, self.steps, strict=True):
            if step.tokens is not None:
                messages[i] = replace(messages[i], ids=step.tokens.action_ids)
        draw = draw_seed(seed, self.task_id, self.sample, round, len(self.steps))
        return replace(self.transcript, messages=tuple(messages), seed=draw)

    def timed(self, completion: Completion | None) -> float:
        """Seconds that it took to act."""
        began = time.perf_counter()
        self.act(completion)
        return time.perf_counter() - began

    def act(self, completion: Completion | None) -> None:
        if completion is None:
            self.stop = "token_limit"
            return
        if completion.finish == "error":
            self.stop = "error"
            warnings.warn(f"{self.task_id}: {completion.text} (the episode ends)", RuntimeWarning, stacklevel=4)
            return
        _, _, terminated, truncated, info = self.env.step(completion.text)
        self.transcript = info["transcript"]
        self.steps.append(replace(info["step"], tokens=completion.tokens))
        if terminated or truncated:  # by a wrapper, perhaps, of which the environment knows nothing
            self.outcome, self.stop = info.get("outcome"), self.env.unwrapped.stop or "step_limit"  # type: ignore[attr-defined]


def rollout(
    make_env: Callable[[], gym.Env],
    policy: Policy,
    tasks: Iterable[tuple[str, int]],
    *,
    seed: int = 0,
    round: int = 0,
    batch_size: int = 32,
) -> Generator[Trajectory]:
    """Play episodes and yield each as it ends; `batch_size` run at once, and a finished one makes room for the next.

    Args:
        make_env: makes one environment over a `ToolEnv`, a new one at each call; called at most `batch_size` times. What it made
            is closed when the rollout ends, fails or is closed itself, after steps that are under way.
        policy: acts at every state; a list without a completion means that the state is longer than its context, and
            one with `finish="error"` ends its episode (`stop="error"`, with a warning that says why).
        tasks: (task id, sample number) pairs; each is taken when there is room for it. One that has none for now may have more later:
            it is asked again as long as episodes run.
        seed: of all draws.
        round: recorded in the trajectories.
    """
    if not callable(make_env):
        raise ConfigError(f"rollout() takes a function that makes an environment, got {type(make_env).__name__}.")
    waiting = iter(tasks)
    free: list[gym.Env] = []
    session = policy.session() if hasattr(policy, "session") else _Asked(policy)
    together = ALL_COMPLETED if isinstance(session, _Asked) else FIRST_COMPLETED
    running = 0
    with ExitStack() as made, closing(_Steps(min(batch_size, MAX_THREADS))) as steps, closing(session):
        while True:
            while running < batch_size and (job := next(waiting, None)) is not None:
                if not isinstance(job, tuple) or len(job) != 2:
                    raise ConfigError(
                        f"rollout() takes (task id, sample number) pairs, such as ('gsm8k-train-0', 0); got {job!r}."
                    )
                if not free:
                    free.append(make_env())
                    made.callback(free[-1].close)
                env = free.pop()
                _, info = env.reset(seed=draw_seed(seed, *job) >> 32, options={"task_id": job[0]})
                episode = _Episode(env, *job, info["transcript"], info["transcript"].messages)
                session.add(episode, episode.state(seed, round), 1)
                running += 1
            if not running:
                return
            for episode, completions in session.poll() if len(session) else ():
                steps.take(episode, completions[0] if completions else None)
            for episode in steps.done(None if len(session) else together):
                if episode.stop is None:
                    session.add(episode, episode.state(seed, round), 1)
                else:
                    running -= 1
                    free.append(episode.env)
                    yield _record(episode, policy.name, seed, round)


class _Asked:
    """The session of a policy that has none: all waiting states in one call."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self._waiting: list[tuple[Any, Transcript]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Any, transcript: Transcript, n: int) -> None:
        self._waiting.append((key, transcript))

    def poll(self) -> list[tuple[Any, list[Completion]]]:
        asked, self._waiting = self._waiting, []
        answers = self.policy([transcript for _, transcript in asked], 1)
        return [(key, answer) for (key, _), answer in zip(asked, answers, strict=True)]

    def close(self) -> None:
        self._waiting = []


class _Steps:
    """Takes the steps of episodes, in threads while some are slow."""

    def __init__(self, threads: int):
        self.threads = threads
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds
        self._pool: ThreadPoolExecutor | None = None
        self._done: list[_Episode] = []
        self._flying: dict[Future, _Episode] = {}

    def take(self, episode: _Episode, completion: Completion | None) -> None:
        if max(self._recent, default=0.0) > SLOW_SECONDS:
            self._pool = self._pool or ThreadPoolExecutor(self.threads, "swirl-steps")
            self._flying[self._pool.submit(episode.timed, completion)] = episode
        else:
            self._recent.append(episode.timed(completion))
            self._done.append(episode)

    def done(self, until: str | None) -> list[_Episode]:
        """Episodes whose step is taken; waits for the first or for all, if told to. Raises what a step raised."""
        done, self._done = self._done, []
        if self._flying:
            if until == ALL_COMPLETED or until and not done:
                wait(self._flying, return_when=until)
            for future in [future for future in self._flying if future.done()]:
                done.append(self._flying.pop(future))
                self._recent.append(future.result())
        return done

    def close(self) -> None:
        """Waits for the steps that are under way."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _record(episode: _Episode, policy: str, seed: int, round: int) -> Trajectory:
    env: ToolEnv = episode.env.unwrapped  # type: ignore[assignment]
    assert env.task is not None
    outcome = episode.outcome
    if outcome is None and episode.stop != "error":  # a policy that failed says nothing of the outcome: unknown, not 0
        outcome = env.task_set.outcome(env.task, None)
    return Trajectory(
        env.task, env.record, episode.prompt, tuple(episode.steps), episode.stop,  # type: ignore[arg-type]
        outcome, policy, seed, episode.sample, round,
    )  # fmt: skip
