"""Acting while learning: episodes of the current policy in a vector environment, for `reinforce` and `grpo`."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from swirl_agents.local import LocalPolicy
from swirl_agents.rendering import Renderer
from swirl_agents.rollout import draw_seed

from swirl_algos.configs import OnlineConfig
from swirl_algos.diagnostics import WINDOW, alarm, flat, of_actions, repeats, warn_of_rewriting
from swirl_algos.policy_gradient import PolicyGradient
from swirl_algos.trainer import Trainer, TrainingError
from swirl_algos.tree import State
from swirl_env.env import ToolEnv
from swirl_env.types import Step, Transcript
from swirl_env.vector import ToolVectorEnv


@dataclass(frozen=True, slots=True)
class Act:
    """One action of an episode."""

    task: str
    episode: int
    """Which of the update's episodes of this question."""
    state: int
    """Index of the step."""
    update: int
    text: str
    reward: float | None
    """As the environment gave it; `None`: its judge could not tell."""
    score: float | None
    """Of the judge, if there is one."""
    finish: str
    tokens: int
    malformed: bool
    repeated: bool


@dataclass(slots=True)
class Episode:
    """What was seen, done and earned."""

    task: str
    states: list[Transcript] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    """int32[A] of each action."""
    acts: list[Act] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outcome: float | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def rewards(self) -> np.ndarray:
        """float[S], NaN where unknown."""
        return np.array([np.nan if act.reward is None else act.reward for act in self.acts])

    def tree(self, renderer: Renderer) -> list[State]:
        """The episode for an update: each state with the action taken there."""
        return [
            State(renderer.encode(state).ids, [ids])
            for state, ids in zip(self.states, self.ids, strict=True)
        ]  # fmt: skip


class Player:
    """Plays episodes with a policy, in one vector environment of as many as it takes.

    Args:
        make_env: makes one environment over `ToolEnv`, wrapped or not; its rewards are what is learned from.
        policy: the model in training.
        seed: of all draws.
    """

    def __init__(self, make_env: Callable[[], gym.Env], policy: LocalPolicy, seed: int):
        self.make_env, self.policy, self.seed = make_env, policy, seed
        self._envs: ToolVectorEnv | None = None

    def play(self, numbers: Sequence[tuple[str, int]], update: int) -> list[Episode]:
        """An episode of each (task, its number among the update's episodes of this task)."""
        if not numbers:
            return []
        envs = self._sized(len(numbers))
        bases = [env.unwrapped for env in envs.envs if isinstance(env.unwrapped, ToolEnv)]
        _, info = envs.reset(
            seed=draw_seed(self.seed, update) >> 32, options={"task_id": [task for task, _ in numbers]}
        )
        episodes = [Episode(task) for task, _ in numbers]
        shown: list[Transcript] = list(info["transcript"])
        stop = shown[0].stop
        live = list(range(len(numbers)))
        while live:
            for i in live:
                episodes[i].states.append(self._state(shown[i], episodes[i], stop, numbers[i], update))
            completions = self.policy([episodes[i].states[-1] for i in live], 1)
            said = {i: found[0] for i, found in zip(live, completions, strict=True) if found}
            for i in live:
                if i not in said:  # no room in the context
                    episodes[i].states.pop()
                    episodes[i].outcome = _unanswered(bases[i])
            if not said:
                break
            envs.skip([i for i in range(len(numbers)) if i not in said])
            actions = [said[i].text if i in said else "" for i in range(len(numbers))]
            _, rewards, terminated, truncated, info = envs.step(actions)
            live = []
            for i, completion in said.items():
                step: Step = info["step"][i]
                episode, verdict, kind = episodes[i], step.verdict, bases[i].reward
                assert completion.tokens is not None
                over = bool(terminated[i] or truncated[i])
                if over:
                    ended = "outcome" in info and info["_outcome"][i]  # else by a wrapper, without an answer
                    found = float(info["outcome"][i]) if ended else _unanswered(bases[i])
                    episode.outcome = None if found is None or np.isnan(found) else found
                unknown = kind != "outcome" and verdict is not None and verdict.score is None
                unknown |= kind != "process" and over and episode.outcome is None
                episode.ids.append(completion.tokens.action_ids)
                episode.acts.append(
                    Act(
                        *numbers[i], len(episode.acts), update, completion.text, None if unknown else float(rewards[i]),
                        None if verdict is None else verdict.score, completion.finish, len(completion.tokens.action_ids),
                        step.action.malformed is not None, repeats(step.action, episode.steps),
                    )
                )  # fmt: skip
                episode.steps.append(step)
                if not over:
                    shown[i] = info["transcript"][i]
                    live.append(i)
        self.policy.free()
        return episodes

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()
        self._envs = None

    def _sized(self, count: int) -> ToolVectorEnv:
        if self._envs is None or self._envs.num_envs != count:
            self.close()
            self._envs = ToolVectorEnv([self.make_env] * count)
        return self._envs

    def _state(
        self, transcript: Transcript, episode: Episode, stop: tuple[str, ...], number: tuple[str, int], update: int
    ) -> Transcript:
        """The transcript with the sampled ids of its actions and the seed of the draw that comes next."""
        said = iter(episode.ids)
        messages = tuple(replace(m, ids=next(said)) if m.role == "assistant" else m for m in transcript.messages)
        seed = draw_seed(self.seed, *number, update, len(episode.ids), "online")
        return replace(transcript, messages=messages, stop=stop, seed=seed)


def _unanswered(base: ToolEnv) -> float | None:
    """The outcome of an episode that ended without an answer."""
    assert base.task is not None
    return base.task_set.outcome(base.task, None)


def questions(tasks: Sequence[str], updates: int, batch_size: int, seed: int) -> Iterator[list[str]]:
    """The questions of each update: all in an order of their own, then all again in another."""
    draw = np.random.default_rng(seed)
    waiting: list[str] = []
    for _ in range(updates):
        while len(waiting) < batch_size:
            waiting += [tasks[i] for i in draw.permutation(len(tasks))]
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


Credit = Callable[[list[Episode], PolicyGradient], dict[str, Any]]
"""This process's episodes -> the metrics of the update that was made of them."""


def learn_online(
    trainer: Trainer, make_env: Callable[[], gym.Env], tasks: Sequence[str], config: OnlineConfig, algorithm: str, credit: Credit
) -> None:  # fmt: skip
    """Act, give credit, update, until the updates or the token budget are used up.

    Logs once an update what `PolicyGradient.update` returns and, of all processes: `outcome` and `score` (means), `score_by_step`, `unknown`,
    `malformed`, `repeated`, `cut`, `empty`, `steps` (mean), `flat_groups` (questions whose episodes all have the same outcome), `sampled_tokens`
    and their sum so far `tokens_so_far`; and `alarm` once the process score rises while the outcome falls, with a warning.

    Raises:
        TrainingError: no task, nothing to learn from (`Trainer.check_signal`), a loss that is not finite, a checkpoint of another run.
    """
    if not tasks:
        raise TrainingError("There is no question to practise.")
    gradient = PolicyGradient(trainer, config)
    player = Player(make_env, trainer.policy(config.temperature, config.max_new_tokens), trainer.seed)
    warn_of_rewriting(gradient.renderer)
    batches = list(questions(tasks, config.updates, config.batch_size, trainer.seed))
    try:
        for update in trainer.updates(len(batches), algorithm, config, tasks):
            batch = batches[update]
            first = [
                batch[:i].count(task) * config.samples for i, task in enumerate(batch)
            ]  # few tasks: one comes up again
            asked = [[(task, g + n) for n in range(config.samples)] for task, g in zip(batch, first, strict=True)]
            with trainer.acting():
                mine = player.play([number for group in trainer.mine(asked) for number in group], update)
            acts = [act for part in trainer.gather([episode.acts for episode in mine]) for act in part]
            outcomes = trainer.gather([(episode.outcome, len(episode.acts)) for episode in mine])
            trainer.record(acts)
            metrics: dict[str, Any] = _means(outcomes, config.samples) | of_actions(acts)
            so_far = trainer.kept.get("tokens_so_far", 0) + metrics["sampled_tokens"]
            trainer.kept["tokens_so_far"] = metrics["tokens_so_far"] = so_far
            if config.token_budget is not None:
                trainer.spend(so_far / config.token_budget)
            metrics |= credit(mine, gradient)
            _sound(trainer, metrics)
            trainer.log(metrics)
    finally:
        player.close()


def _means(outcomes: Sequence[tuple[float | None, int]], samples: int) -> dict[str, Any]:
    known = [outcome for outcome, _ in outcomes if outcome is not None]
    groups = [[outcome for outcome, _ in outcomes[g : g + samples]] for g in range(0, len(outcomes), samples)]
    return {
        "outcome": float(np.mean(known)) if known else None,
        "steps": float(np.mean([steps for _, steps in outcomes])) if outcomes else None,
        "flat_groups": flat(groups),
    }


def _sound(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Keep the trend of scores and outcomes, and say once where they part."""
    trend = trainer.kept.setdefault("trend", [])
    if metrics["score"] is not None and metrics["outcome"] is not None:
        trend.append([metrics["score"], metrics["outcome"]])
    if len(trend) >= 2 * WINDOW and not trainer.kept.get("alarmed") and (said := alarm(*zip(*trend, strict=True))):
        trainer.kept["alarmed"], metrics["alarm"] = True, said
        if trainer.main:
            warnings.warn(f"update {trainer.update}: {said}", stacklevel=3)
