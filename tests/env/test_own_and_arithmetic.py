"""Your own questions, and problems made on the spot."""

import json
import pickle
import re

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import swirl_env  # noqa: F401
from swirl_env.errors import ConfigError, DataError, UnknownArgumentError, UnknownNameError
from swirl_env.tasks import load_tasks
from swirl_env.tools.calculator import evaluate, show


@given(
    index=st.integers(0, 999),
    operations=st.integers(1, 8),
    largest=st.integers(5, 100),
    operators=st.text("+-*/", min_size=1, max_size=4),
    asides=st.integers(0, 3),
    split=st.sampled_from(["train", "test"]),
)
def test_every_program_leads_to_the_gold(index, operations, largest, operators, asides, split):
    tasks = load_tasks(
        "arithmetic", split, operations=operations, largest=largest, operators=operators, asides=asides
    ).tasks
    task = tasks[f"arithmetic-{split}-{index}"]
    assert task == tasks[task.id]
    assert task.meta["hops"] == operations == len(task.meta["program"])
    value = re.search(r"\d+", task.question)[0] if not asides else task.meta["program"][0].partition("+")[0]
    for expression in task.meta["program"]:
        assert expression.startswith(re.match(r"\d+", value)[0])
        value = show(evaluate(expression))
        assert re.fullmatch(r"\d+", value)
    assert task.answers == (value,)
    if asides == 0:
        assert len(re.findall(r"\d+", task.question)) == operations + 1


SENTENCES = [
    (r"(?P<name>\w+) has (\d+) \w+\.", lambda value, n: n),
    (r"{name} (?:buys|finds) (\d+) more\.|A friend brings {name} (\d+) more\.", lambda value, n: value + n),
    (r"{name} (?:gives away|loses|sells) (\d+)\.", lambda value, n: value - n),
    (
        r"By trading, {name} ends up with (\d+) times as many\.|Then {name} has (\d+) times as many as before\.",
        lambda value, n: value * n,
    ),
    (
        r"{name} splits them evenly into (\d+) bags and keeps one bag\.|{name} keeps one of (\d+) equal shares\.",
        lambda value, n: value // n,
    ),
]


@given(
    index=st.integers(0, 999), operators=st.sampled_from(["+-*/", "-", "/", "-/", "*", "+*"]), asides=st.integers(0, 4)
)
def test_the_question_alone_leads_to_the_gold(index, operators, asides):
    task = load_tasks("arithmetic", "train", operations=5, operators=operators, asides=asides).tasks[
        f"arithmetic-train-{index}"
    ]
    name = re.search(r"does (\w+) have now", task.question)[1]
    value, used = None, ""
    for sentence in re.findall(r"[^.?]+\.", task.question):
        for pattern, step in SENTENCES:
            found = re.fullmatch(pattern.replace("{name}", name), sentence.strip())
            if found and (found.groupdict().get("name", name) == name):
                value = step(value, int(next(filter(str.isdigit, filter(None, found.groups())))))
    assert str(value) == task.answers[0]
    used = {c for expression in task.meta["program"] for c in expression if c in "+-*/"}
    assert used <= set(operators)


def test_splits_share_no_question():
    small = {"operations": 1, "largest": 5, "count": 2000}
    train, test = (
        {task.question for task in load_tasks("arithmetic", s, **small).tasks.values()} for s in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


def test_difficulty_is_a_keyword_of_make():
    env = gym.make("swirl/Arithmetic-v0", operations=[5, 6], operators="+-", asides=1)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert gym.make(spec).reset(seed=0) == env.reset(seed=0)
    assert env.unwrapped.task.meta["hops"] in (5, 6)
    assert env.unwrapped.record.kwargs["operations"] == [5, 6]
    twin = pickle.loads(pickle.dumps(env.unwrapped))
    assert twin.reset(seed=4) == env.unwrapped.reset(seed=4)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"operation": 3}, UnknownArgumentError, "Did you mean 'operations'"),
        ({"operations": 0}, ConfigError, "operations must be"),
        ({"operations": [4, 2]}, ConfigError, "operations must be"),
        ({"operations": "many"}, ConfigError, "operations must be"),
        ({"largest": 1}, ConfigError, "largest must be a whole number from 5"),
        ({"largest": 20.5}, ConfigError, "largest must be"),
        ({"largest": 10**30}, ConfigError, "largest must be"),
        ({"count": True}, ConfigError, "count must be"),
        ({"operations": {"a": 1}}, ConfigError, "arithmetic takes text, numbers and lists"),
        ({"operators": "^"}, ConfigError, "operators must be"),
        ({"split": "dev"}, UnknownNameError, "no split 'dev'"),
        ({"path": "x.json"}, ConfigError, "leave out path"),
    ],
)
def test_bad_difficulty_is_told(kwargs, error, says):
    with pytest.raises(error, match=says):
        gym.make("swirl/Arithmetic-v0", **kwargs)


def own(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_questions(tmp_path):
    path = own(
        tmp_path,
        {"question": "Who?", "answer": "Ada", "documents": [{"title": "A", "text": "Ada did."}]},
        {"id": 7, "question": "How many?", "answers": [4, "four"], "meta": {"from": "me"}},
        {"question": "Unknown?"},
    )
    env = gym.make("swirl/Tasks-v0", path=path, instruction="Say it.", tools=["search"])
    text, _ = env.reset(options={"task_id": "questions-0"})
    assert text.startswith("Say it. ")
    assert "Ada did." in env.step("<search>Who did</search>")[0]
    assert env.step("<answer>ada</answer>")[4]["outcome"] == 1.0
    env.reset(options={"task_id": "7"})
    assert env.step("<answer>Four.</answer>")[4]["outcome"] == 1.0
    env.reset(options={"task_id": "questions-2"})
    *_, info = env.step("<answer>x</answer>")
    assert info["outcome"] is None
    env.reset(options={"task_id": "7"})
    assert env.step("<answer>4.0 apples</answer>")[4]["outcome"] == 1.0
    env.reset(options={"task_id": "7"})
    assert env.step("<answer>-4</answer>")[4]["outcome"] == 0.0
    numbers = gym.make("swirl/Tasks-v0", path=path, metric="accuracy")
    numbers.reset(options={"task_id": "7"})
    assert numbers.step("<answer>4.0 apples</answer>")[4]["outcome"] == 1.0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "q", "awnser": "x"}, "Did you mean 'answer'"),
        ({"question": "q", "answer": "x", "answers": ["x"]}, "not both"),
        ({"question": "q", "answers": "x"}, "expected 'answers' as a list"),
        ({"question": "q", "answer": " "}, "an accepted answer is empty"),
        ({"question": "q", "documents": ["text"]}, "expected 'documents'"),
        ({"question": "q", "documents": [{"title": "a", "text": 5}]}, "expected 'documents'"),
        ({"question": "q", "meta": 5}, "'meta' as an object"),
        ({"answer": "x"}, "expected a text field 'question'"),
    ],
)
def test_broken_questions_are_told_with_their_line(tmp_path, row, says):
    path = own(tmp_path, {"question": "fine", "answer": "x"}, row)
    with pytest.raises(DataError, match=rf"questions.jsonl:2: .*{re.escape(says)}"):
        gym.make("swirl/Tasks-v0", path=path)


def test_metrics_are_checked():
    with pytest.raises(UnknownNameError, match="Did you mean 'em'"):
        gym.make("swirl/Tasks-v0", metric="emm")


def test_an_edited_file_and_another_folder_are_read_anew(tmp_path, monkeypatch):
    for folder, question in (("a", "One?"), ("b", "Two?")):
        (tmp_path / folder).mkdir()
        own(tmp_path / folder, {"question": question, "answer": "x"})
    monkeypatch.chdir(tmp_path / "a")
    env = gym.make("swirl/Tasks-v0", path="questions.jsonl")
    assert "One?" in env.reset()[0]
    own(tmp_path / "a", {"question": "Changed?", "answer": "x"})
    assert "Changed?" in gym.make("swirl/Tasks-v0", path="questions.jsonl").reset()[0]
    pickled = pickle.dumps(gym.make("swirl/Tasks-v0", path="questions.jsonl").unwrapped)
    monkeypatch.chdir(tmp_path / "b")
    assert "Two?" in gym.make("swirl/Tasks-v0", path="questions.jsonl").reset()[0]
    assert "Changed?" in pickle.loads(pickled).reset()[0]
