"""Intervals against closed forms, and paired differences by hand."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap
from swirl_benchmarks import metrics
from swirl_benchmarks.metrics import (
    _mean,
    bootstrap,
    by_group,
    macro_difference,
    majority,
    of_cost,
    of_samples,
    of_tools,
    paired_difference,
    pass_at_k,
    process_score,
    summary,
    wilson,
)

from swirl_env.tasks import load_tasks
from swirl_env.types import Action, EnvRecord, Message, Step, Task, ToolCall, ToolResult, Trajectory, Verdict


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


@given(st.lists(st.floats(0, 1), min_size=8, max_size=40), st.booleans())
@settings(max_examples=10)
def test_intervals_are_those_of_scipy(values, weighted):
    weights = [1.0 + (i % 3) * weighted for i in range(len(values))]

    def ratio(top, below, axis=-1):
        return top.sum(axis) / below.sum(axis)

    other = scipy_bootstrap(
        (values, weights), ratio, paired=True, vectorized=True, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    mine, near = bootstrap(values, weights), 0.08 * np.std(values) + 1e-9  # two draws of 10,000 differ by that at most
    assert (mine.low, mine.high) == pytest.approx((other.low, other.high), abs=near)


def test_strata_keep_their_sizes_as_in_scipy():
    rng = np.random.default_rng(2)
    sets = [rng.normal(0, 1, 12).tolist(), rng.normal(4, 0.3, 5).tolist()]
    other = scipy_bootstrap(
        sets, lambda a, b, axis=-1: (a.mean(axis) + b.mean(axis)) / 2, vectorized=True, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval  # fmt: skip
    mine = _mean(sets[0] + sets[1], ["a"] * 12 + ["b"] * 5)
    assert (mine.low, mine.high) == pytest.approx((other.low, other.high), abs=0.05)  # without strata it is 2 wider


def test_many_units_are_drawn_in_parts(monkeypatch):
    values = np.random.default_rng(3).random(40)
    whole = bootstrap(values)
    monkeypatch.setattr(metrics, "DRAWN", 1_000)
    assert bootstrap(values) == whole


def test_a_change_that_is_the_same_everywhere_is_not_certain():
    before, after = (
        [trajectory(f"q{i}", [1.0], 1.0) for i in range(8)],
        [trajectory(f"q{i}", [1.0], 0.0) for i in range(8)],
    )
    worse, same = (paired_difference(before, other, lambda t: t.outcome) for other in (after, before))
    assert (worse.mean, worse.low) == (-1.0, -1.0) and worse.high == pytest.approx(-1 + 0.3244, abs=1e-3)
    assert same.mean == 0 and same.high == -same.low == pytest.approx(0.3244, abs=1e-3)


def test_pass_at_k_is_the_share_of_all_draws():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([1] * right + [0] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def said(task, sample, answer, outcome):
    one = trajectory(task, [1.0], outcome, sample=sample)
    return replace(one, steps=(replace(one.steps[0], action=Action("x", answer=answer)),))


def test_majority_counts_answers_as_the_official_metric_does():
    math, text = load_tasks("gsm8k", "test"), load_tasks("hotpotqa", "test")
    first = next(iter(math.tasks.values()))
    gold = first.answers[0]
    group = [
        said(first.id, i, *pair)
        for i, pair in enumerate([("1", 0.0), (f"${gold}.00", 1.0), ("none", 0.0), (gold, 1.0)])
    ]
    assert majority(math, group) == f"${gold}.00"
    assert majority(text, [said("q", i, one, 0.0) for i, one in enumerate(["b", "The Cat", "a cat!"])]) == "The Cat"
    assert majority(text, [said("q", 0, None, 0.0)]) is None
    figures = of_samples(math, [replace(one, task=first) for one in group])
    assert figures["pass"]["1"]["mean"] == 0.5
    assert figures["pass"]["4"]["mean"] == figures["majority"]["4"]["mean"] == 1.0
    assert figures["majority"]["1"]["mean"] == 0.0


def test_tools_and_cost_by_hand():
    call, other = ToolCall("search", {"query": "x"}), ToolCall("search", {"query": "y"})
    results = (ToolResult("r", None, 1.0), ToolResult("r", "tool_error", 3.0), ToolResult("r", None, 2.0))
    one = trajectory("a", [1.0])
    step = replace(one.steps[0], action=Action("x", calls=(call, other, call)), results=results)
    one = replace(one, steps=(step,))
    assert of_tools([one, one])["search"] == pytest.approx(
        {"calls": 6, "errors": 1 / 3, "repeated": 1 / 3, "seconds": 2.0}
    )
    assert of_cost([one]) == {"actions": 1, "calls": 3, "tokens": None, "judge_tokens": 0}


def test_groups_and_sets_weigh_as_told():
    hops = [replace(one, task=replace(one.task, meta={"hops": h})) for one, h in
            [(trajectory("a", [1.0], 1.0), 2), (trajectory("b", [1.0], 0.0), 2), (trajectory("c", [1.0], 1.0), 3)]]  # fmt: skip
    groups = by_group(hops, "hops", lambda t: t.outcome)
    assert {key: (one["n"], one["mean"]) for key, one in groups.items()} == {"2": (2, 0.5), "3": (1, 1.0)}
    before, after = [trajectory(t, [1.0], 0.0) for t in "abc"], [trajectory(t, [1.0], 1.0) for t in "abc"]
    pairs = {"x": (before, after), "y": (before[:1], before[:1])}
    assert macro_difference(pairs, lambda t: t.outcome).mean == 0.5
