"""Intervals against closed forms, and paired differences by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swirl_benchmarks.metrics import _mean, bootstrap, paired_difference, process_score, summary, wilson

from swirl_env.types import Action, EnvRecord, Message, Step, Task, ToolResult, Trajectory, Verdict


def trajectory(task, scores, outcome=1.0, malformed=0, errors=0, sample=0):
    steps = [
        Step(
            Action("x", malformed="bad" if i < malformed else None),
            (ToolResult("r", "tool_error" if i < errors else None),),
            verdict=Verdict(score, "", "j"),
        )
        for i, score in enumerate(scores)
    ]
    env = EnvRecord("e", {}, "default", ())
    return Trajectory(
        Task(task, "q", ("a",)), env, (Message("user", "q"),), tuple(steps), "answered", outcome, "p", 0, sample
    )


def test_wilson_by_hand():
    # n = 10, p = 0.2: Wilson (1927) gives [0.0567, 0.5098]
    estimate = wilson(2, 10)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.2, 0.0567, 0.5098), abs=1e-4)
    assert wilson(0, 10).high > 0.2
    assert wilson(10, 10).low < 0.8


def test_bootstrap_of_many_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_bootstrap_of_a_ratio():
    estimate = bootstrap([1, 0, 3], [2, 4, 4])
    assert estimate.mean == pytest.approx(0.4)
    assert bootstrap([0, 0], [0, 0]).mean is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_interval_holds_the_mean(values):
    estimate = bootstrap(values)
    assert estimate.low - 1e-9 <= estimate.mean <= estimate.high + 1e-9


def test_summary_by_hand():
    recorded = [
        trajectory("a", [1.0, 0.0], 1.0, malformed=1),
        trajectory("b", [1.0, None, 1.0, 1.0], 0.0, errors=3),
    ]
    figures = summary(recorded, lambda t: {"em": t.outcome})
    assert figures["n"] == figures["trajectories"] == 2
    assert figures["outcome"]["mean"] == 0.5
    assert figures["process"]["mean"] == (0.5 + 1.0) / 2  # within a trajectory, then across
    assert figures["malformed"]["mean"] == pytest.approx(1 / 6)
    assert figures["tool_errors"]["mean"] == pytest.approx(3 / 6)
    assert figures["steps"]["mean"] == 3.0
    assert summary([trajectory(f"q{i}", [1.0]) for i in range(9)], lambda t: {})["steps"]["low"] == 1.0
    assert figures["unknown"] == 1
    assert figures["metrics"]["em"]["mean"] == 0.5
    assert process_score(trajectory("c", [None])) is None


def test_an_episode_that_an_error_ended_says_nothing_of_the_policy():
    lost = replace(trajectory("b", [1.0], 0.0), stop="error")
    figures = summary([trajectory("a", [1.0, 1.0], 1.0), lost], lambda t: {"em": t.outcome})
    assert figures["outcome"]["mean"] == figures["metrics"]["em"]["mean"] == 1.0
    assert (figures["steps"]["mean"], figures["stops"]) == (2.0, {"answered": 1, "error": 1})
    assert summary([lost], lambda t: {"em": t.outcome})["outcome"]["mean"] is None


def test_samples_of_one_question_are_one_unit():
    many = [trajectory(f"q{i}", [score], sample=s) for i, score in enumerate([0.1, 0.9, 0.4]) for s in range(8)]
    few = [trajectory(f"q{i}", [score]) for i, score in enumerate([0.1, 0.9, 0.4])]
    a, b = (summary(group, lambda t: {}) for group in (many, few))
    assert (a["n"], a["trajectories"]) == (3, 24)
    assert a["process"] == b["process"]
    assert a["steps"] == b["steps"]


def test_a_single_question_has_no_interval_and_a_zero_rate_has_one():
    assert bootstrap([0.3]).low is None
    assert str(bootstrap([0.3])) == "0.300"
    figures = summary([trajectory(f"q{i}", [1.0]) for i in range(40)], lambda t: {})
    assert figures["malformed"]["mean"] == 0.0
    assert 0.05 < figures["malformed"]["high"] < 0.15
    assert paired_difference([trajectory("a", [0.1])], [trajectory("a", [0.2])], process_score).low is None


def test_pairs_by_hand():
    before = [trajectory("a", [0.2]), trajectory("b", [0.5]), trajectory("c", [None])]
    after = [trajectory("b", [0.6]), trajectory("a", [0.4]), trajectory("c", [1.0]), trajectory("d", [1.0])]
    estimate = paired_difference(before, after, process_score)
    assert estimate.mean == pytest.approx(0.15)  # a +0.2, b +0.1; c and d have no pair
    assert paired_difference([], after, process_score).mean is None


def test_a_macro_average_weighs_sources_alike():
    estimate = _mean([1.0, 1.0, 1.0, 0.0, 0.5], ["a", "a", "a", "a", "b"])
    assert estimate.mean == pytest.approx((0.75 + 0.5) / 2)
    assert estimate.low < estimate.mean < estimate.high
    assert _mean([1.0, 0.0], ["a", "a"]) == _mean([1.0, 0.0])
