"""The adapter against the installed skyrl-gym: its registry makes the environments, its protocol plays them."""

import json

import pytest

from swirl_env.errors import ConfigError

skyrl_gym = pytest.importorskip("skyrl_gym", reason="needs the extra `skyrl`")
import gymnasium as gym  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from skyrl_gym.envs.base_text_env import BaseTextEnv  # noqa: E402
from skyrl_gym.envs.registration import deregister, load_env_creator  # noqa: E402
from skyrl_gym.metrics import default_aggregate_metrics  # noqa: E402
from swirl_agents.rollout import rollout  # noqa: E402
from swirl_agents.scripted import oracle, random_policy  # noqa: E402

from swirl_env.adapters import skyrl  # noqa: E402
from swirl_env.registration import ENVS  # noqa: E402


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is forgotten."""
    before = set(skyrl_gym.registry)
    yield
    for name in set(skyrl_gym.registry) - before:
        deregister(name)


def play(env, row, actions):
    """As SkyRL's generator does: init with the row's prompt, then steps until done."""
    conversation, _ = env.init(row["prompt"])
    outputs = []
    for action in actions:
        output = env.step(action)
        outputs.append(output)
        conversation = [*conversation, {"role": "assistant", "content": action}, *output["observations"]]
        if output["done"]:
            break
    return conversation, outputs


@pytest.mark.parametrize("env_id", ENVS)
@pytest.mark.parametrize("make_policy", [oracle, random_policy], ids=["oracle", "random"])
def test_an_episode_is_that_of_gymnasium(env_id, make_policy):
    inner = gym.make(env_id)
    row = skyrl.rows(env_id)[0]
    one = next(rollout(lambda: inner, make_policy(inner.unwrapped), [(row["task_id"], 0)]))
    env = skyrl_gym.make(skyrl.register(env_id), env_config={}, extras=row)
    assert isinstance(env, BaseTextEnv) and env.max_turns == inner.unwrapped.max_steps
    conversation, outputs = play(env, row, [step.action.text for step in one.steps])
    assert conversation[0]["content"] == row["prompt"][0]["content"] == one.prompt[0].content
    assert [output["reward"] for output in outputs] == [step.verdict.score or 0.0 for step in one.steps]
    assert [output["done"] for output in outputs] == [False] * (len(one.steps) - 1) + [True]
    observed = [message["content"] for message in conversation[1:] if message["role"] == "user"]
    assert observed == [step.observation for step in one.steps[:-1]]
    assert outputs[-1]["metadata"]["outcome"] == one.outcome
    scores = [step.verdict.score for step in one.steps if step.verdict.score is not None]
    metrics = env.get_metrics()
    assert metrics["steps"] == len(one.steps) and metrics["outcome"] == one.outcome
    assert metrics["process"] == pytest.approx(sum(scores) / len(scores))
    assert default_aggregate_metrics([metrics, metrics])["outcome"] == one.outcome
    env.close()


def test_settings_come_from_everywhere():
    name = skyrl.register("swirl/HotPotQA-v0", "brief", grammar="search-r1", max_steps=4)
    assert skyrl.register("swirl/HotPotQA-v0", "brief", grammar="search-r1", max_steps=4) == name  # again
    row = json.loads(json.dumps(skyrl.rows("swirl/HotPotQA-v0", name, split="test")[3]))
    assert row["env_class"] == "brief" and row["reward_spec"]["ground_truth"]
    config = OmegaConf.create({"kwargs": {"split": "test", "search": {"k": 2}}})
    env = skyrl_gym.make(name, env_config=config, extras=row | {"max_turns": 2})
    conversation, outputs = play(env, row, ["<search>a film</search>"] * 3)
    assert "between <information> and </information>" in conversation[0]["content"]
    assert "at most 2 turns" in conversation[0]["content"] and env.max_turns == 2
    assert [output["done"] for output in outputs] == [False, True]
    assert load_env_creator(skyrl_gym.spec(name).entry_point) is skyrl.SkyEnv
    assert skyrl_gym.spec(name).to_json()


def test_what_cannot_work_is_told():
    name = skyrl.register("swirl/GSM8K-v0")
    with pytest.raises(ConfigError, match="A row needs a task_id; got prompt"):
        skyrl_gym.make(name, env_config={}, extras={"prompt": []})
    with pytest.raises(ConfigError, match="registered for .*give another name="):
        skyrl.register("swirl/GSM8K-v0", max_steps=2)
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        skyrl.register("swirl/GSM8K-v0", "other", max_step=2)
    with pytest.raises(ConfigError, match="over ToolEnv"):
        skyrl.register("CartPole-v1")
    with pytest.raises(ConfigError, match="No task has the id 'x'"):
        skyrl_gym.make(name, env_config={}, extras={"task_id": "x"}).init([])


def test_the_page_runs(page, capsys):
    [(_, code)] = page("skyrl-gym")
    exec(code, {})
    said = capsys.readouterr().out
    assert said.startswith("<information>") and "False" in said
