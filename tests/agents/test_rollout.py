"""What a rollout makes it closes, when no step runs any more; and steps run in threads only while some are slow."""

import threading
from concurrent.futures import FIRST_COMPLETED

import gymnasium as gym
import pytest
from swirl_agents import rollout as rollout_module
from swirl_agents.rollout import RECENT, rollout
from swirl_agents.scripted import Scripted

import swirl_env  # noqa: F401
from swirl_env.types import Completion

TASKS = [(task, 0) for task in list(gym.make("swirl/GSM8K-v0").unwrapped.task_set.tasks)[:6]]


class Watched(gym.Wrapper):
    """Notes when it was closed, and whether a step was under way."""

    def __init__(self, seconds):
        super().__init__(gym.make("swirl/GSM8K-v0", max_steps=3))
        self.seconds, self.inside, self.closed = seconds, False, []

    def step(self, action):
        assert not self.closed
        self.inside = True
        threading.Event().wait(self.seconds)
        self.inside = False
        return self.env.step(action)

    def close(self):
        self.closed.append(self.inside)
        super().close()


@pytest.fixture
def made():
    return []


@pytest.fixture
def make_env(made):
    """The first environment takes 5 ms a step, the others 200."""

    def make():
        made.append(Watched(0.2 if made else 0.005))
        return made[-1]

    return make


class Quick:
    """A policy with a session, which answers whatever is asked at once."""

    name = "quick"

    def session(self):
        return self

    def __init__(self):
        self.waiting = []

    def __len__(self):
        return len(self.waiting)

    def add(self, key, transcript, n=1):
        self.waiting.append(key)

    def poll(self):
        asked, self.waiting = self.waiting, []
        return [(key, [Completion("<answer>1</answer>", None, "eos")]) for key in asked]

    def close(self):
        self.waiting = []


thinker = Scripted("thinker", lambda transcript: "<think>hm</think>")


def test_what_a_rollout_made_is_closed_at_its_end(make_env, made):
    assert len(list(rollout(make_env, Quick(), TASKS, batch_size=2))) == 6
    assert [env.closed for env in made] == [[False]] * 2


def test_a_consumer_that_stops_closes_environments_after_their_step(make_env, made):
    playing = rollout(make_env, Quick(), TASKS, batch_size=3)
    next(playing)
    assert [env.inside for env in made] == [False, True, True]
    playing.close()
    assert [env.closed for env in made] == [[False]] * 3


def test_a_step_that_raises_closes_all_after_their_step(make_env, made):
    def step(self, action):
        raise RuntimeError("broken tool")

    def make():
        env = make_env()
        if len(made) == 3:
            env.seconds = 0.05
            env.env = type("Broken", (gym.Wrapper,), {"step": step})(env.env)
        return env

    with pytest.raises(RuntimeError, match="broken tool"):
        list(rollout(make, Quick(), TASKS, batch_size=3))
    assert [env.closed for env in made] == [[False]] * 3


def test_an_environment_that_cannot_be_made_closes_the_others(make_env, made):
    def make():
        if len(made) == 2:
            raise OSError("no such file")
        return make_env()

    with pytest.raises(OSError, match="no such file"):
        list(rollout(make, thinker, TASKS))
    assert [env.closed for env in made] == [[False]] * 2


class Taken:
    """An episode whose step takes so many seconds, by its own account."""

    def __init__(self, seconds):
        self.seconds = seconds

    def timed(self, completion):
        self.in_thread = threading.current_thread() is not threading.main_thread()
        return self.seconds


def test_a_slow_step_sends_only_the_next_ones_to_threads():
    steps = rollout_module._Steps(2)

    def in_thread(seconds):
        steps.take(episode := Taken(seconds), None)
        assert steps.done(FIRST_COMPLETED) == [episode]
        return episode.in_thread

    assert not in_thread(1.0)  # it warms up, say
    assert all(in_thread(0.0) for _ in range(RECENT))
    assert not in_thread(0.0)
    assert not in_thread(1.0)
    assert all(in_thread(second % 7) for second in range(3 * RECENT))
    steps.close()
