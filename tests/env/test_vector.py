"""Vector environments: one way or another, the same episodes; tools side by side; the judge asked once."""

import functools
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import flatten, flatten_space
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import swirl_env  # noqa: F401
from swirl_env.errors import ConfigError
from swirl_env.registration import ENVS
from swirl_env.spaces import Unicode
from swirl_env.testing import check_vector_contract
from swirl_env.types import Verdict
from swirl_env.vector import ToolVectorEnv
from swirl_env.wrappers import AddTool, JudgeReward, StepPenalty, ToolBudget

ACTIONS = [
    ("<think>a thought about é and 🦓</think>", "<calculator>1+1</calculator>", "nonsense \ud800"),
    ("<answer>3</answer>", "<search>a film</search>", "<answer>x</answer>"),
    ("<think>never seen by a reset one</think>", "<answer>yes</answer>", "<calculator>2+2</calculator>"),
    ("<calculator>2+3</calculator>", "<calculator>2+4</calculator>", "<answer>7</answer>"),
]


def play(envs, seed=5):
    trace = [envs.reset(seed=seed)]
    for actions in ACTIONS:
        trace.append(envs.step(actions))
    envs.close()
    return trace


def same(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key])
    elif isinstance(left, (tuple, list)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        same(left.tolist(), right.tolist())
    else:
        assert left == right


@pytest.mark.parametrize("env_id", ENVS)
def test_our_mode_and_sync_give_the_same(env_id):
    ours = gym.make_vec(env_id, num_envs=3, vectorization_mode="vector_entry_point")
    assert isinstance(ours, ToolVectorEnv)
    assert ours.spec.id == env_id
    same(play(ours), play(gym.make_vec(env_id, num_envs=3, vectorization_mode="sync")))


@pytest.mark.parametrize("shared_memory", [True, False])
def test_async_gives_the_same(shared_memory):
    kwargs = {"vector_kwargs": {"shared_memory": shared_memory}}
    far = gym.make_vec("swirl/GSM8K-v0", num_envs=3, vectorization_mode="async", **kwargs)
    trace = play(far)
    assert all(isinstance(step[0], tuple) for step in trace)
    same(trace, play(gym.make_vec("swirl/GSM8K-v0", num_envs=3)))


def test_async_with_started_processes():
    envs = AsyncVectorEnv([lambda: gym.make("swirl_env:swirl/GSM8K-v0")] * 2, context="spawn")
    texts, _ = envs.reset(seed=0)
    assert len(texts) == 2
    assert "<calculator>" in texts[1]
    envs.close()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_autoreset_modes(mode):
    ours = gym.make_vec("swirl/GSM8K-v0", num_envs=2, autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda: gym.make("swirl/GSM8K-v0")] * 2, autoreset_mode=gym.vector.AutoresetMode(mode))
    for envs in (ours, theirs):
        envs.reset(seed=1)
    ended = [envs.step(("<answer>3</answer>", "<think>a first thought here</think>")) for envs in (ours, theirs)]
    same(*ended)
    if mode == "SameStep":
        assert ended[0][4]["final_info"]["step"][0].action.answer == "3"
    if mode == "Disabled":
        mask = {"reset_mask": np.array([True, False])}
        same(ours.reset(options=dict(mask)), theirs.reset(options=dict(mask)))
    actions = ("<calculator>5+6</calculator>", "<calculator>1+6</calculator>")
    same(ours.step(actions), theirs.step(actions))


def slow(x: str) -> str:
    """Takes its time.

    Args:
        x: Anything.
    """
    time.sleep(0.1)
    return x


class Counting:
    name, uses_gold = "counting@1", False

    def __init__(self):
        self.batches = []

    def __call__(self, views):
        self.batches.append(len(views))
        return [Verdict(0.5, "counted", self.name) for _ in views]


def test_slow_tools_run_side_by_side_and_the_judge_is_asked_once():
    judge = Counting()

    def one():
        return StepPenalty(JudgeReward(AddTool(gym.make("swirl/GSM8K-v0"), slow), judge), 0.1)

    envs = ToolVectorEnv([one] * 16)
    envs.reset(seed=0)
    envs.step(
        ["<slow>a</slow>", *["<think>warm up with a thought</think>"] * 15]
    )  # the first call tells that it is slow
    start = time.perf_counter()
    texts, rewards, *_ = envs.step([f"<slow>{i}</slow>" for i in range(16)])
    assert time.perf_counter() - start < 0.8  # one after the other: 1.6 s
    assert all(text.endswith(f"<result>{i}</result>") for i, text in enumerate(texts))
    assert rewards.tolist() == pytest.approx([0.4] * 16)
    assert judge.batches == [16, 16]
    envs.close()


def test_judges_by_name_are_asked_once(monkeypatch):
    from swirl_env import vector

    sizes = []
    real = vector.ask
    monkeypatch.setattr(vector, "ask", lambda judge, views: sizes.append(len(views)) or real(judge, views))
    envs = gym.make_vec("swirl/GSM8K-v0", num_envs=4)
    envs.reset(seed=0)
    envs.step(["<think>a thought here</think>"] * 4)
    assert sizes == [4]


@pytest.mark.parametrize("env_id", ENVS)
def test_the_kit_passes_on_what_we_ship(env_id):
    check_vector_contract(env_id, grammar="paper")


class Shout(gym.ActionWrapper):
    def action(self, action):
        return action.upper()


class Twice(gym.Wrapper):
    def step(self, action):
        return self.env.step(action.replace("one", "two"))


@pytest.mark.parametrize("wrapper", [Shout, Twice])
def test_wrappers_that_change_the_action_still_count(wrapper):
    calls = []

    def note(x: str) -> str:
        """Notes.

        Args:
            x: Anything.
        """
        calls.append(x)
        return x

    envs = ToolVectorEnv([lambda: wrapper(AddTool(gym.make("swirl/GSM8K-v0"), note))] * 2)
    envs.reset(seed=0)
    envs.step(["<note>one</note>"] * 2)
    assert calls == ["ONE" if wrapper is Shout else "two"] * 2  # once each, and as the wrapper left it


def test_budgets_hold_in_every_env():
    envs = ToolVectorEnv([lambda: ToolBudget(gym.make("swirl/GSM8K-v0"), 1)] * 3)
    envs.reset(seed=0)
    errors = []
    for i in range(2):
        *_, info = envs.step([f"<calculator>{i}+2</calculator>"] * 3)
        errors.append([step.results[0].error for step in info["step"]])
    assert errors == [[None] * 3, ["tool_error"] * 3]


def test_task_ids_for_each():
    envs = gym.make_vec("swirl/GSM8K-v0", num_envs=2)
    _, info = envs.reset(options={"task_id": ["gsm8k-train-3", "gsm8k-train-1"]})
    assert info["task_id"].tolist() == ["gsm8k-train-3", "gsm8k-train-1"]
    _, info = envs.reset(options={"task_id": "gsm8k-train-5"})
    assert info["task_id"].tolist() == ["gsm8k-train-5"] * 2
    with pytest.raises(ConfigError, match="holds 1 ids for 2"):
        envs.reset(options={"task_id": ["gsm8k-train-3"]})
    envs.reset(seed=1)
    assert envs.reset(seed=2)[1]["task_id"].tolist() != ["gsm8k-train-3", "gsm8k-train-1"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ToolVectorEnv([]), "at least one"),
        (lambda: ToolVectorEnv([gym.make("swirl/GSM8K-v0")]), "functions that make environments"),
        (
            lambda: ToolVectorEnv([functools.partial(lambda env: env, gym.make("swirl/GSM8K-v0"))] * 2),
            "one and the same",
        ),
        (lambda: ToolVectorEnv([lambda: gym.make("CartPole-v1")]), "over ToolEnv"),
        (lambda: gym.make_vec("swirl/GSM8K-v0", num_envs=1, autoreset_mode="sometimes"), "autoreset_mode is one of"),
        (lambda: gym.make_vec("swirl/GSM8K-v0", num_envs=2).step(["x"]), "takes 2 actions"),
    ],
)
def test_bad_use_is_told(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_text_needs_no_flattening():
    space = Unicode()
    assert flatten_space(space) == space
    assert flatten(space, "é") == "é"
