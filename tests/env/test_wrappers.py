"""Wrappers: what each changes, that they add up, and that specs keep them."""

import copy
import importlib
import json
import sqlite3
import sys

import gymnasium as gym
import pytest
from gymnasium.error import ResetNeeded

import swirl_env  # noqa: F401
from swirl_env.errors import ConfigError, ToolError, UnknownNameError
from swirl_env.io import read
from swirl_env.judges import ask, make_judge, views
from swirl_env.tools.python import isolation
from swirl_env.tools.search import make_search
from swirl_env.types import Trajectory, Verdict
from swirl_env.wrappers import AddTool, JudgeReward, RecordTrajectories, RemoveTool, StepPenalty, ToolBudget

MINE = '''
from swirl_env.types import Verdict

def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: Where.
    """
    return f"sunny in {city}"

class Brief:
    name, uses_gold = "brief@1", False
    def __call__(self, views):
        return [Verdict(float(len(view.action.text) < 40), "length", self.name) for view in views]
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_wrapped.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("mine_wrapped")
    sys.modules.pop("mine_wrapped")


def make(env_id="swirl/HotPotQA-v0", **kwargs):
    return gym.make(env_id, **kwargs)


def test_an_added_tool_reaches_the_prompt_and_answers(mine):
    env = AddTool(make(), mine.weather)
    text, _ = env.reset(seed=0)
    assert "<weather>city</weather> Tells the weather." in text
    assert env.step("<weather>Rome</weather>")[0].endswith("<result>sunny in Rome</result>")
    assert env.unwrapped.record.tools[-1]["function"]["name"] == "weather"


def test_tools_by_name():
    env = AddTool(make(), "calculator")
    env.reset(seed=0)
    assert "<result>4</result>" in env.step("<calculator>2+2</calculator>")[0]
    env = RemoveTool(env, "search")
    assert "<search>" not in env.reset(seed=0)[0]


def test_a_database_and_code_by_name(tmp_path):
    file = tmp_path / "towns of.db"
    with sqlite3.connect(file) as db:
        db.execute("create table towns (name text, people int)")
        db.execute("insert into towns values ('Burbank', 107337)")
    db.close()
    try:
        isolation()
        tools = ["python", f"sql:{file}"]
    except ConfigError:  # no namespaces here
        tools = [f"sql:{file}"]
    env = make("swirl/Tasks-v0", tools=tools)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    env = gym.make(spec)
    assert "towns(name, people)" in env.reset(seed=0)[0]
    assert "107337" in env.step("<sql>select people from towns</sql>")[4]["step"].results[0].text
    if "python" in tools:
        assert env.step("<python>sum(range(5))</python>")[4]["step"].results[0].text == "10"


def test_names_clash_loudly():
    with pytest.raises(ConfigError, match="Two tools are called 'search'"):
        make(tools=["search", "search"])


@pytest.mark.parametrize(
    ("wrap", "error", "says"),
    [
        (lambda env: AddTool(env, "search"), ConfigError, "There is a tool 'search' already"),
        (lambda env: AddTool(env, 5), ConfigError, "Expected a tool"),
        (lambda env: RemoveTool(env, "serch"), UnknownNameError, "Did you mean 'search'"),
        (lambda env: ToolBudget(env, {"serch": 1}), UnknownNameError, "Did you mean 'search'"),
        (lambda env: ToolBudget(env, {"search": -1}), ConfigError, "whole number from 0 on"),
        (lambda env: ToolBudget(env, "search"), ConfigError, "calls must be a number"),
        (lambda env: JudgeReward(env, 5), ConfigError, "Expected a judge"),
        (lambda env: JudgeReward(env, "ruls"), UnknownNameError, "Did you mean 'rules'"),
        (lambda env: StepPenalty(env, "x"), ConfigError, "penalty must be a number"),
        (lambda env: AddTool(gym.make("CartPole-v1"), "search"), ConfigError, "over ToolEnv"),
    ],
)
def test_bad_arguments_are_told(wrap, error, says):
    with pytest.raises(error, match=says):
        wrap(make())


def test_budget_is_told_kept_and_renewed():
    env = ToolBudget(make("swirl/GSM8K-v0"), {"calculator": 2})
    for _ in range(2):
        text, _ = env.reset(seed=0)
        assert "(at most 2 calls)" in text
        steps = [env.step(f"<calculator>{i}+1</calculator>")[4]["step"] for i in range(3)]
        assert [step.results[0].error for step in steps] == [None, None, "tool_error"]
        assert "may be called 2 times" in steps[2].observation


def test_a_budget_keeps_the_documents_of_search():
    env = ToolBudget(make(), 1)
    env.reset(seed=0)
    title = env.unwrapped.task_set.documents(env.unwrapped.task.id)[0].title
    assert env.step(f"<search>{title}</search>")[4]["step"].results[0].error is None


def test_judge_and_penalty(mine):
    env = StepPenalty(JudgeReward(make(reward="outcome"), mine.Brief()), 0.25)
    env.reset(seed=0)
    assert env.step("<think>short</think>")[1] == 0.75
    assert env.step(f"<think>{'long ' * 20}</think>")[1] == -0.25
    assert env.step("short and no action")[1] == -0.25  # malformed scores 0, whatever the judge thinks
    env = JudgeReward(make(), "rules")
    assert env.unwrapped.judge.name == "rules@2"


def test_specs_keep_wrappers(mine):
    env = StepPenalty(ToolBudget(JudgeReward(AddTool(make(), mine.weather), mine.Brief()), {"weather": 1}), 0.5)
    spec = env.spec.to_json()
    assert json.loads(spec)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(spec))
    for _ in range(2):
        assert again.reset(seed=3) == env.reset(seed=3)
        assert again.step("<weather>Rome</weather>") == env.step("<weather>Rome</weather>")


def test_live_objects_work_without_a_name():
    def here(x: str) -> str:
        """Echoes."""
        if x == "no":
            raise ToolError("Not that.")
        return x

    class Judge:
        name, uses_gold = "mean@1", False

        def __init__(self, score):
            self.score = score

        def __call__(self, batch):
            return [Verdict(self.score, "always", self.name) for _ in batch]

    env = JudgeReward(AddTool(make(), here), Judge(0.3))
    env.reset(seed=0)
    assert env.step("<here>no</here>")[:2][1] == 0.3
    assert env.unwrapped.record.kwargs["judge"] is None


def test_recorded_episodes_read_back_and_judge_the_same(tmp_path):
    path = tmp_path / "episodes.jsonl"
    for round_ in range(2):
        env = RecordTrajectories(make("swirl/GSM8K-v0", max_steps=3), path, policy="me")
        for answer in ("<answer>4</answer>", "<think>a new thought about it</think>"):
            env.reset(seed=0, options={"task_id": "gsm8k-train-0"})
            env.step("<calculator>1+1</calculator>")
            env.step("nonsense")
            env.step(answer)
        env.reset(seed=1)
        env.step("<calculator>2+2</calculator>")  # never ended, so not recorded
        env.close()
        env.close()
        assert round_ in (0, 1)
    found = list(read(path, Trajectory))
    assert [t.key for t in found] == [("gsm8k-train-0", i, 0) for i in range(4)]
    assert [t.stop for t in found] == ["answered", "step_limit"] * 2
    assert found[0].policy == "me"
    for trajectory in found:
        assert ask(make_judge("rules"), views(trajectory)) == [step.verdict for step in trajectory.steps]


def test_a_bound_tool_belongs_to_one_env():
    search = make_search({"k": 1})
    envs = [AddTool(make(tools=[]), search) for _ in range(2)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
    for env in envs:
        titles = [document.title for document in env.unwrapped.task_set.documents(env.unwrapped.task.id)]
        found = env.step(f"<search>{titles[0]}</search>")[4]["step"].results[0]
        assert found.error is None
        assert found.text.partition("\n")[0] in titles


def test_new_tools_begin_with_the_next_episode():
    env = make()
    env.reset(seed=0)
    env = AddTool(env, "calculator")
    with pytest.raises(ResetNeeded):
        env.step("<calculator>1+1</calculator>")


def test_a_copy_of_a_recorder_writes_to_its_own_file(tmp_path):
    env = RecordTrajectories(make("swirl/GSM8K-v0"), tmp_path / "r.jsonl")
    twin = copy.deepcopy(env)
    env.close()
    with (tmp_path / "precious.txt").open("w") as other:
        other.write("my notes")
        twin.reset(seed=0)
        twin.step("<answer>1</answer>")
    twin.close()
    assert (tmp_path / "precious.txt").read_text() == "my notes"
    assert len(list(read(tmp_path / "r.jsonl", Trajectory))) == 1
    env.reset(seed=0)
    with pytest.raises(ValueError, match="is closed"):
        env.step("<answer>1</answer>")
