"""Judges made of judges, the outcome judge, judges by name and JSON."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.errors import ConfigError, UnknownNameError
from swirl_env.judges import ask, make_judge
from swirl_env.judges.combine import Combine, Outcome
from swirl_env.testing import check_judge_contract
from swirl_env.types import Action, StepView, Task, Verdict


class Fixed:
    uses_gold = False

    def __init__(self, name, scores):
        self.name, self.scores, self.asked = name, scores, []

    def __call__(self, views):
        self.asked.append(len(views))
        return [Verdict(self.scores[int(view.action.text)], "why", self.name, tokens=1) for view in views]


def views(n):
    return [StepView("Why?", (), Action(str(i), "a"), 3) for i in range(n)]


A, B = [1.0, 0.2, None, 0.0, 0.6], [0.4, 0.8, 0.8, None, None]


@pytest.mark.parametrize(
    ("how", "weights", "expected", "asked"),
    [
        ("mean", None, [0.7, 0.5, None, None, None], 5),
        ("mean", [3, 1], [0.85, 0.35, None, None, None], 5),
        ("min", None, [0.4, 0.2, None, 0.0, None], 4),
        ("first", None, [1.0, 0.2, 0.8, 0.0, 0.6], 1),
        ("gate", None, [0.4, 0.2, None, 0.0, None], 2),
    ],
)
def test_ways_to_combine(how, weights, expected, asked):
    a, b = Fixed("a", A), Fixed("b", B)
    verdicts = ask(Combine([a, b], how, weights), views(5))
    assert [v.score for v in verdicts] == [None if e is None else pytest.approx(e) for e in expected]
    assert (a.asked, b.asked) == ([5], [asked])
    assert all(v.reason and v.parts["a"] == A[i] for i, v in enumerate(verdicts))
    assert verdicts[0].tokens == len(verdicts[0].parts)


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=4), st.sampled_from(["mean", "min", "first", "gate"]))
def test_scores_stay_in_range_and_unknown_is_never_zero(scores, how):
    judges = [Fixed(str(i), [score]) for i, score in enumerate(scores)]
    score = ask(Combine(judges, how), views(1))[0].score
    assert score is None or min(s for s in scores if s is not None) <= score + 1e-9
    if None not in scores and how in ("mean", "min"):
        assert score is not None
    if score == 0.0:
        assert 0.0 in scores


def test_outcome():
    task = Task("t", "q", ("Paris", "paris, France"))

    def judged(answer, left=3, task=task):
        return ask(Outcome(), [StepView("q", (), Action("x", "x", (), answer), left, task, ())])[0].score

    assert [judged("the Paris"), judged("Rome"), judged(None), judged(None, 0)] == [1.0, 0.0, 0.5, 0.0]
    assert judged("x", task=Task("t", "q", ())) is None
    number = Task("t", "q", ("72",), {"solution": ""})
    assert judged("72.0", task=number) == 1.0


def test_gold_reaches_a_part_through_the_whole():
    judge = Combine([Outcome()], "mean")
    assert judge.uses_gold
    check_judge_contract(Combine([make_judge("rules"), make_judge("rules")], "min"))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("rules", "rules@2"),
        ("rules+gold-steps", "gate(rules@2,gold-steps@1)"),
        ({"combine": ["rules", "outcome"], "how": "mean", "weights": [1, 3]}, "mean(1*rules@2,3*outcome@1)"),
        (
            {"combine": ["rules", {"combine": ["outcome", "rules"], "how": "first"}], "how": "min"},
            "min(rules@2,first(outcome@1,rules@2))",
        ),
    ],
)
def test_by_name_and_json(spec, name):
    assert make_judge(spec).name == name


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("ruls", UnknownNameError, "Did you mean 'rules'"),
        (5, ConfigError, "judge= takes a name"),
        ({}, ConfigError, "A judge as JSON is"),
        ({"modle": "http://127.0.0.1:9/v1"}, ConfigError, "Did you mean 'model'"),
        ({"model": 5}, ConfigError, "A model is named as in model:http"),
        ("model:smollm2-135m", ConfigError, 'takes a model\'s address, such as .*not "smollm2-135m".*JudgeReward'),
        ({"model": "http://127.0.0.1:9/v1#m", "timeout": "8"}, ConfigError, 'a wrong type .*"timeout": "8"'),
        ({"combine": ["rules"], "weights": ["a"]}, ConfigError, "a wrong type"),
        ('{"combine": ["rules"], "cache": "/dev/null/v.db"}', OSError, "dev/null"),
        ({"combine": "rules"}, ConfigError, "takes a list"),
        ({"combine": []}, ConfigError, "at least one judge"),
        ({"combine": ["rules"], "hwo": "min"}, UnknownNameError, "Did you mean 'how'"),
        ({"combine": ["rules"], "how": "max"}, UnknownNameError, "not combined by 'max'"),
        ({"combine": ["rules"], "weights": [1, 2]}, ConfigError, "weights must be 1"),
        ({"combine": ["rules", "rules"], "how": "min", "weights": [1, 2]}, ConfigError, "weights are for"),
    ],
)
def test_bad_specs_are_told(spec, error, says):
    with pytest.raises(error, match=says):
        make_judge(spec)
