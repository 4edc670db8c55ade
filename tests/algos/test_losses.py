"""Advantages, losses, filters: closed forms and small cases drawn by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swirl_algos.advantages import leave_one_out
from swirl_algos.filters import FILTERS, keep
from swirl_algos.losses import swirl_loss

from swirl_env.errors import UnknownNameError
from swirl_env.types import Action, EnvRecord, Message, Step, Task, Trajectory, Verdict

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.0], [1.0, -1.0]),
        ([1.0, 0.0, 0.5], [0.75, -0.75, 0.0]),
        ([1.0, NAN, 0.0], [1.0, NAN, -1.0]),
        ([1.0, NAN], [NAN, NAN]),
        ([0.3], [NAN]),
        ([NAN, NAN], [NAN, NAN]),
        ([0.5, 0.5, 0.5], [0.0, 0.0, 0.0]),
    ],
)
def test_leave_one_out_by_hand(scores, expected):
    np.testing.assert_allclose(leave_one_out(np.array(scores)), expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_leave_one_out_properties(scores):
    advantages = leave_one_out(np.array(scores))
    assert abs(advantages.sum()) < 1e-9  # the mean of the others' means is the mean
    assert np.argmax(advantages) == np.argmax(scores) or np.isclose(max(scores), scores[np.argmax(advantages)])
    for g in range(len(scores)):
        others = scores[:g] + scores[g + 1 :]
        assert advantages[g] == pytest.approx(scores[g] - np.mean(others))


def test_loss_against_the_closed_form():
    # two actions of 2 and 1 tokens, advantages 0.5 and -0.5, L_max 10, N = 2, beta 0.1
    logprobs, kl = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.2, 0.4, 0.6])
    advantages = torch.tensor([0.5, 0.5, -0.5])
    policy = -(0.5 * -3.0 + -0.5 * -0.5) / 10 / 2
    whole = swirl_loss(logprobs, kl, advantages, beta=0.1, max_tokens=10, actions=2)
    assert float(whole) == pytest.approx(policy + 0.1 * (0.6 + 0.6) / 10 / 2)
    parts = [swirl_loss(logprobs[n], kl[n], advantages[n], beta=0.1, max_tokens=10, actions=2) for n in ([0], [1, 2])]
    assert float(sum(parts)) == pytest.approx(float(whole))


def test_gradient_is_the_score_function():
    # d/dlogits of -A log pi(a): A (pi - onehot), divided by L_max N
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)
    two = torch.tensor([2.0], dtype=torch.float64)
    swirl_loss(logprobs[:, 3], torch.zeros_like(two), two, beta=0.0, max_tokens=4, actions=5).backward()
    onehot = torch.zeros(1, 5, dtype=torch.float64)
    onehot[0, 3] = 1
    torch.testing.assert_close(logits.grad, 2.0 * (logprobs.exp().detach() - onehot) / 20)


def trajectory(scores, outcome):
    steps = tuple(Step(Action("x"), verdict=None if s == "none" else Verdict(s, "", "j")) for s in scores)
    env = EnvRecord("e", {}, "default", ())
    return Trajectory(Task("t", "q", ("a",)), env, (Message("user", "q"),), steps, "answered", outcome, "p", 0)


@pytest.mark.parametrize(
    ("scores", "outcome", "kept_by"),
    [
        ([1.0, 0.5], 1.0, {"none", "process", "outcome", "both"}),
        ([1.0, 0.5], 0.0, {"none", "process"}),
        ([1.0, 0.4], 1.0, {"none", "outcome"}),
        ([0.0, 0.4], 0.0, {"none"}),
    ],
)
def test_filters_by_hand(scores, outcome, kept_by):
    assert {name for name in FILTERS if keep(name, [trajectory(scores, outcome)]).kept} == kept_by


def test_unknown_is_set_aside_and_counted():
    unknown, good = trajectory([1.0, None], 1.0), trajectory([1.0], 1.0)
    result = keep("process", [unknown, good, trajectory([0.0], 1.0), trajectory(["none"], 1.0)])
    assert (result.kept, result.dropped, result.unknown) == ([good], 1, 2)
    assert keep("outcome", [unknown, replace(good, outcome=None)]).unknown == 1
    assert keep("none", [unknown]).unknown == 0


def test_filter_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'process'"):
        keep("proces", [])
