"""Advantages, losses, filters: closed forms and small cases drawn by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swirl_algos.advantages import advantages, leave_one_out, returns
from swirl_algos.filters import FILTERS, keep
from swirl_algos.losses import adapted, kl_loss, policy_loss, token_weights

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


def test_a_penalty_is_not_divided_by_the_spread_of_the_rewards():
    penalty = np.array([0.2, 0.0, 0.1])
    level = advantages(np.array([0.5, 0.5, 0.5]), "group", normalise=True, penalty_G=penalty)
    np.testing.assert_allclose(level, [-0.1, 0.1, 0.0], atol=1e-12)
    rewards = np.array([1.0, NAN, 0.0])
    plain = advantages(rewards, "leave_one_out", penalty_G=penalty)
    np.testing.assert_allclose(plain, leave_one_out(rewards - penalty))


def test_swirls_loss_against_the_closed_form():
    # two actions of 2 and 1 tokens, advantages 0.5 and -0.5, L_max 10, N = 2, beta 0.1
    logprobs, kl = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.2, 0.4, 0.6])
    advantages = torch.tensor([0.5, 0.5, -0.5])
    weights = token_weights("constant", np.array([2, 1]), 10, 2, 3)[[0, 0, 1]]
    parts_n = policy_loss(logprobs, advantages) + 0.1 * kl_loss("exact", kl, logprobs, logprobs)
    policy = -(0.5 * -3.0 + -0.5 * -0.5) / 10 / 2
    assert float((torch.tensor(weights) * parts_n).sum()) == pytest.approx(policy + 0.1 * (0.6 + 0.6) / 10 / 2)


def test_gradient_is_the_score_function():
    # d/dlogits of -A log pi(a): A (pi - onehot)
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)
    two = torch.tensor([2.0], dtype=torch.float64)
    onehot = torch.zeros(1, 5, dtype=torch.float64)
    onehot[0, 3] = 1
    for old in (None, logprobs[:, 3].detach()):  # at ratio 1 the clipped loss has the same gradient
        logits.grad = None
        policy_loss(logprobs[:, 3], two, old).backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, 2.0 * (logprobs.exp().detach() - onehot))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "moves"),
    [
        (1.0, 1.1, -1.1, True),
        (1.0, 1.5, -1.2, False),  # far enough: no gradient
        (1.0, 0.5, -0.5, True),
        (-1.0, 0.9, 0.9, True),
        (-1.0, 0.5, 0.8, False),
        (-1.0, 1.5, 1.5, True),
    ],
)
def test_clipping_by_hand(advantage, ratio, loss, moves):
    logprob = torch.tensor([float(np.log(ratio))], requires_grad=True)
    value = policy_loss(logprob, torch.tensor([advantage]), torch.zeros(1), clip=0.2)
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(loss)
    assert (float(logprob.grad) != 0) is moves


def test_kl_estimators_mean_the_kl():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(6, generator=draw, dtype=torch.float64), -1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * kl_loss("k3", p, p, q)).sum() == pytest.approx(float(exact))  # its mean under pi is the KL
    # the gradient of k2, taken on samples of pi, is that of the KL; k1's is 0
    logits = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)

    def gradient(terms):
        return torch.autograd.grad(
            (torch.softmax(logits, -1).detach() * terms(torch.log_softmax(logits, -1))).sum(), logits
        )[0]

    whole = torch.autograd.grad((torch.softmax(logits, -1) * (torch.log_softmax(logits, -1) - q)).sum(), logits)[0]
    torch.testing.assert_close(gradient(lambda p: kl_loss("k2", p, p, q)), whole)
    torch.testing.assert_close(gradient(lambda p: p - q), torch.zeros_like(whole), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="exact, k2 or k3"):
        kl_loss("k1", p, p, q)


def test_what_a_token_counts():
    lengths = np.array([2, 8])
    assert token_weights("constant", lengths, 10, 2, 10).tolist() == [0.05, 0.05]
    assert token_weights("action", lengths, 10, 2, 10).tolist() == [0.25, 0.0625]
    assert token_weights("token", lengths, 10, 2, 10).tolist() == [0.1, 0.1]
    for kind in ("action", "token"):  # both weigh all tokens to 1
        assert (token_weights(kind, lengths, 10, 2, 10) * lengths).sum() == pytest.approx(1)


def test_the_weight_of_the_kl_follows_its_target():
    assert adapted(0.1, 5.0, None) == 0.1
    assert adapted(0.1, 0.2, 0.1) == pytest.approx(0.102)  # over: up by at most 2 %
    assert adapted(0.1, 0.0, 0.1) == pytest.approx(0.098)
    beta = 0.1
    for _ in range(1000):  # KL = 0.01 / beta: settles at the target
        beta = adapted(beta, 0.01 / beta, 0.05)
    assert beta == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(
    ("rewards", "discount", "expected"),
    [([1, 2, 3], 0, [1, 2, 3]), ([1, 2, 3], 1, [6, 5, 3]), ([1, 2, 4], 0.5, [3, 4, 4]), ([1, NAN, 4], 0.5, [NAN, NAN, 4]), ([], 1, [])],
)  # fmt: skip
def test_returns_by_hand(rewards, discount, expected):
    np.testing.assert_allclose(returns(np.array(rewards, float), discount), expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_baselines_agree_up_to_scale_and_normalise(scores):
    scores = np.array(scores)
    group = advantages(scores, "group")
    np.testing.assert_allclose(group * len(scores) / (len(scores) - 1), leave_one_out(scores), atol=1e-9)
    if scores.std() > 1e-3:
        assert advantages(scores, "group", normalise=True).std() == pytest.approx(1, rel=1e-2)


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
