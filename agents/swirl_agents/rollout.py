"""Environment x policy -> trajectories, many at once.

All running episodes ask the policy in one batch; each then takes its own step. The draw at each state has its own seed,
from (seed, task, sample, step), so order and batching change nothing but rounding.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import gymnasium as gym

from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError
from swirl_env.types import Completion, Message, Policy, Step, Trajectory, Transcript


def draw_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed of its own for each draw."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
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

    def act(self, completion: Completion | None) -> None:
        if completion is None:
            self.stop = "token_limit"
            return
        if completion.finish == "error":
            self.stop = "error"
            warnings.warn(f"{self.task_id}: {completion.text} (the episode ends)", RuntimeWarning, stacklevel=3)
            return
        _, _, terminated, truncated, info = self.env.step(completion.text)
        self.transcript = info["transcript"]
        self.steps.append(replace(info["step"], tokens=completion.tokens))
        if terminated or truncated:
            self.outcome, self.stop = info["outcome"], self.env.unwrapped.stop  # type: ignore[attr-defined]


def rollout(
    make_env: Callable[[], gym.Env],
    policy: Policy,
    tasks: Iterable[tuple[str, int]],
    *,
    seed: int = 0,
    round: int = 0,
    batch_size: int = 32,
) -> Iterator[Trajectory]:
    """Play episodes and yield each as it ends; `batch_size` run at once, and a finished one makes room for the next.

    Args:
        make_env: makes one environment over a `ToolEnv`; called at most `batch_size` times.
        policy: acts at every state; a list without a completion means that the state is longer than its context, and
            one with `finish="error"` ends its episode (`stop="error"`, with a warning that says why).
        tasks: (task id, sample number) pairs.
        seed: of all draws.
        round: recorded in the trajectories.
    """
    if not callable(make_env):
        raise ConfigError(f"rollout() takes a function that makes an environment, got {type(make_env).__name__}.")
    jobs = list(tasks)
    if wrong := [job for job in jobs if not isinstance(job, tuple) or len(job) != 2]:
        raise ConfigError(
            f"rollout() takes (task id, sample number) pairs, such as ('gsm8k-train-0', 0); got {wrong[0]!r}."
        )
    waiting = iter(jobs)
    free: list[gym.Env] = []
    running: list[_Episode] = []
    while True:
        while len(running) < batch_size and (job := next(waiting, None)) is not None:
            if not free:
                free.append(make_env())
            env = free.pop()
            _, info = env.reset(seed=draw_seed(seed, *job) >> 32, options={"task_id": job[0]})
            running.append(_Episode(env, *job, info["transcript"], info["transcript"].messages))
        if not running:
            return
        answers = policy([episode.state(seed, round) for episode in running], 1)
        for episode, completions in zip(running, answers, strict=True):
            episode.act(completions[0] if completions else None)
        for episode in running:
            if episode.stop is not None:
                free.append(episode.env)
                yield _record(episode, policy.name, seed, round)
        running = [episode for episode in running if episode.stop is None]


def _record(episode: _Episode, policy: str, seed: int, round: int) -> Trajectory:
    env: ToolEnv = episode.env.unwrapped  # type: ignore[assignment]
    assert env.task is not None
    outcome = env.task_set.outcome(env.task, None) if episode.outcome is None else episode.outcome
    return Trajectory(
        env.task, env.record, episode.prompt, tuple(episode.steps), episode.stop,  # type: ignore[arg-type]
        outcome, policy, seed, episode.sample, round,
    )  # fmt: skip
