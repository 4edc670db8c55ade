"""The gold-steps judge: it follows the gold path, pays each part of it once, and is not farmable."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swirl_agents.rollout import rollout
from swirl_agents.scripted import Scripted, oracle, random_policy

from swirl_env import io
from swirl_env.env import ToolEnv
from swirl_env.judges import ask, make_judge, views
from swirl_env.judges.gold import GoldSteps
from swirl_env.testing import check_judge_contract
from swirl_env.types import Action, Step, StepView, Task, ToolCall, ToolResult, Trajectory

JUDGE = GoldSteps()
SETS = ("gsm8k", "hotpotqa", "musique", "beerqa", "cofca")


def make(name):
    math = name == "gsm8k"
    tools, limit = (["calculator"], 10) if math else (["search"], 5)
    return lambda: ToolEnv(name, split="test", tools=tools, max_steps=limit, judge="gold-steps")


@cache
def played(name, policy):
    env = make(name)()
    act = (
        {"oracle": oracle, "random": random_policy}[policy](env) if policy in ("oracle", "random") else POLICIES[policy]
    )
    return tuple(rollout(make(name), act, [(task_id, 0) for task_id in list(env.task_set.tasks)[:30]]))


def mean_score(recorded):
    return float(np.mean([np.mean([step.verdict.score for step in trajectory.steps]) for trajectory in recorded]))


def question(transcript):
    return transcript.messages[0].content.rpartition("\n\n")[2]


def tags(transcript):
    return "calculator" if "<calculator>" in transcript.messages[0].content else "search"


def shotgun(transcript):
    tag = tags(transcript)
    words = question(transcript).split()
    if len(transcript.messages) > 1:
        return "<answer>x</answer>"
    return "".join(f"<{tag}>{word if tag == 'search' else f'{n}+{n}'}</{tag}>" for n, word in enumerate(words[:8]))


def always_call(transcript):
    tag = tags(transcript)
    taken = len(transcript.messages) // 2
    return f"<{tag}>{question(transcript) if tag == 'search' else f'{taken}+7'}</{tag}>"


def alternate(transcript):
    return always_call(transcript) if len(transcript.messages) // 2 % 2 else "<think>Let me think about it.</think>"


POLICIES = {
    "think": Scripted("think", lambda _: "<think>Let me think about it.</think>"),
    "call": Scripted("call", always_call),
    "alternate": Scripted("alternate", alternate),
    "shotgun": Scripted("shotgun", shotgun),
    "answer": Scripted("answer", lambda _: "<answer>yes</answer>"),
}


@pytest.mark.parametrize("name", SETS)
def test_the_oracle_follows_the_gold_path(name):
    assert mean_score(played(name, "oracle")) >= (0.9 if name == "gsm8k" else 0.99)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("policy", ["random", *POLICIES])
def test_farming_scores_far_below_the_oracle(name, policy):
    assert mean_score(played(name, policy)) < 0.5 * mean_score(played(name, "oracle"))


@pytest.mark.parametrize("name", SETS)
def test_judging_afterwards_gives_the_verdicts_of_stepping(name, tmp_path):
    recorded = [*played(name, "oracle"), *played(name, "random")]
    with io.Writer(tmp_path / "trajectories.jsonl") as out:
        for trajectory in recorded:
            out.write(trajectory)
    for trajectory in io.read(tmp_path / "trajectories.jsonl", Trajectory):
        assert ask(JUDGE, views(trajectory)) == [step.verdict for step in trajectory.steps]


def test_the_contract():
    assert make_judge("gold-steps").name == "gold-steps@1"
    check_judge_contract(JUDGE)
    check_judge_contract(JUDGE, [view for name in SETS for view in views(played(name, "oracle")[0])])


# -- by hand

TASK = Task(
    "1", "Where was the director of Big Fish born?", ("Burbank", "Burbank, California"),
    {
        "supporting": ["Big Fish", "Tim Burton"],
        "openings": ["Big Fish is a film by Tim <b>", None],
        "steps": [
            {"question": "Who directed Big Fish?", "answer": "Tim Burton", "title": "Big Fish"},
            {"question": "Where was Tim Burton born?", "answer": "Burbank", "title": "Tim Burton"},
        ],
    },
)  # fmt: skip
FILM = "Big Fish\nBig Fish is a film by Tim &lt;b> Burton."
OTHER_FISH = "Big Fish\nA fish that is big."
MAN = "Tim Burton\nHe grew up in California."
TOWN = "Burbank\nA city. Tim Burton was born here."
BLANK = "Aquarium\nNothing of it."


def call(*texts, tool="search", key="query"):
    calls = tuple(ToolCall(tool, {key: str(n)}) for n, _ in enumerate(texts))
    return Step(Action("", calls=calls), tuple(ToolResult(text) for text in texts))


def score(*steps, task=TASK, left=3):
    *earlier, last = steps
    return JUDGE([StepView(task.question, tuple(earlier), last.action, left, task, last.results)])[0].score


THINK = Step(Action("", "hm"))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([call(FILM)], 1.0),
        ([call(FILM), call(FILM)], 0.0),  # only the first time
        ([call(FILM), call(BLANK), call(f"{FILM}\n\n{BLANK}")], 0.0),
        ([call(OTHER_FISH)], 0.0),  # the title alone is not the paragraph
        ([call(BLANK)], 0.0),
        ([call(MAN)], 1.0),  # in any order
        ([call(MAN), call(FILM)], 1.0),
        ([call(f"{BLANK}\n\n{FILM}")], 1.0),
        ([call("Ed Wood\nTim Burton made it.")], 1.0),  # the first sub-answer, from another paragraph
        ([call("Ed Wood\nTim Burtons made it.")], 0.0),  # whole words
        ([call("Ed Wood\nTim Burton made it."), call("Ed\nTim Burton again.")], 0.0),
        ([call("Ed Wood\nTim Burton made it."), call(TOWN)], 1.0),  # then the second
        ([call("Town\nBurbank is one.")], 0.0),  # the first sub-question comes first
        ([call(FILM, BLANK)], 0.5),  # a share of the calls
        ([call(FILM, MAN)], 1.0),
        ([call(FILM, FILM)], 0.5),
        ([call(FILM, *[BLANK] * 7)], 0.125),
        ([THINK], 0.5),
        ([THINK, THINK], 0.0),
        ([call(FILM), THINK], 0.5),
        ([call(BLANK), THINK], 0.0),
        ([call(FILM), THINK, THINK], 0.0),
        ([Step(Action("", answer="burbank"))], 1.0),
        ([Step(Action("", answer="Burbank, California."))], 1.0),
        ([Step(Action("", answer="in Burbank"))], 0.0),
        ([Step(Action("", malformed="no tag"))], 0.0),
        ([Step(Action("", calls=(ToolCall("search", {}),)), (ToolResult(FILM, "tool_error"),))], 0.0),
    ],
)
def test_paragraphs(steps, expected):
    assert score(*steps) == expected


def test_the_last_step_is_for_an_answer():
    assert score(call(FILM), left=0) == score(THINK, left=0) == 0.0
    assert score(Step(Action("", answer="Burbank")), left=0) == 1.0


def test_unknown_is_none():
    bare = Task("1", "Why?", ())
    for step in (call(FILM), THINK, Step(Action("", answer="x"))):
        assert score(step, task=bare) is None
    assert score(Step(Action("", answer="x")), task=Task("1", "Why?", ("x",))) == 1.0
    verdict = JUDGE([StepView("Why?", (), call(FILM).action)])[0]
    assert verdict.score is None
    assert "not shown" in verdict.reason


MATH = Task(
    "1", "48 clips, half of it in May, ...", ("72",), {"solution": "<<48/2=24>>24 ... <<10/3=3.33>> <<48+24=72>>"}
)


def math(*pairs):
    calls = tuple(ToolCall("calculator", {"expression": expression}) for expression, _ in pairs)
    return Step(Action("", calls=calls), tuple(ToolResult(result) for _, result in pairs))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([math(("48/2", "24"))], 1.0),
        ([math(("48*0.5", "24"))], 1.0),  # another way to the same value
        ([math(("48/2", "24")), math(("48/2", "24"))], 0.0),
        ([math(("48/2", "24")), math(("12*2", "24"))], 0.0),  # the solution has it once
        ([math(("10/3", "3.333333333"))], 1.0),
        ([math(("48+1", "49"))], 0.0),
        ([math(("24*1", "24"))], 0.0),  # it was given the value
        ([math(("48/2", "24"), ("48+24", "72"))], 1.0),
        ([math(("48/2", "24"), ("1+1", "2"))], 0.5),
        ([Step(Action("", answer="$72.0"))], 1.0),
        ([Step(Action("", answer="24"))], 0.0),
    ],
)
def test_math(steps, expected):
    assert score(*steps, task=MATH) == expected


@given(st.lists(st.sampled_from([FILM, MAN, TOWN, BLANK, OTHER_FISH, None]), max_size=12))
def test_an_episode_pays_each_part_of_the_path_once(texts):
    steps = [THINK if text is None else call(text) for text in texts]
    scores = [score(*steps[: n + 1], left=99) for n in range(len(steps))]
    calls = sum(s for s, text in zip(scores, texts, strict=True) if text is not None)
    assert calls <= 2 + 2  # two paragraphs, two sub-answers
    assert sum(scores) - calls <= 0.5 * (calls + 1)


@pytest.mark.parametrize(
    ("expressions", "expected"),
    [(["48/2"], 1.0), (["48*2"], 0.0), (["48/2", "1/0"], 0.5), (["import os"], 0.0), ([], 0.5)],
)
def test_a_calculation_that_was_not_executed_is_worked_out(expressions, expected):
    """Stage 2 samples actions and never executes them."""
    executed = math(*[(expression, "") for expression in expressions]).action
    [verdict] = JUDGE([StepView(MATH.question, (), executed, task=MATH)])
    assert verdict.score == expected


def test_a_search_that_was_not_executed_is_unknown_even_beside_a_calculation():
    calls = ToolCall("calculator", {"expression": "48/2"}), ToolCall("search", {"query": "clips"})
    [verdict] = JUDGE([StepView(MATH.question, (), Action("", calls=calls), task=MATH)])
    assert verdict.score is None
