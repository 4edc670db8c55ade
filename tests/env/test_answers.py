"""The official metrics, drawn by hand and under attack."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.answers import exact_match, f1, normalize, numeric_equal, parse_number, precision_recall_f1
from swirl_env.tasks import load_tasks


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "score"),
    [
        ("The Beatles", "beatles", 1, 1.0),
        ("Beatles band", "The Beatles", 0, 2 / 3),
        ("yes", "yes", 1, 1.0),
        ("Yes.", "yes", 1, 1.0),
        ("yes it is", "yes", 0, 0.0),
        ("I do not know", "no", 0, 0.0),
        ("London or Paris or Rome", "Paris", 0, 1 / 3),
        ("", "Paris", 0, 0.0),
        ("x", "The The", 0, 0.0),
        ("The The", "The The", 1, 0.0),
    ],
)
def test_hotpotqa_metrics(prediction, gold, em, score):
    assert exact_match(prediction, gold) == em
    assert f1(prediction, gold) == pytest.approx(score)


def test_precision_and_recall_by_hand():
    # prediction: red green blue; gold: green blue white black; two words are common
    assert precision_recall_f1("red green blue", "green blue white black") == pytest.approx((2 / 3, 1 / 2, 4 / 7))


@pytest.mark.parametrize(
    ("prediction", "gold", "equal"),
    [
        ("72", "72", True), ("72.", "72", True), ("72.0", "72", True), ("$1,000", "1000", True), ("1,000", "1,000", True),
        ("3/4", "0.75", True), ("72 km", "72", True), ("-5", "-5", True), ("- 5", "-5", True), ("$-5", "-5", True),
        ("12 x 6 = 72", "72", True), ("50%", "50", True), ("1e3", "1000", True), (".5", "0.5", True),
        ("72 or 73", "72", False), ("", "72", False), ("I do not know", "0", False), ("7 2", "72", False),
        ("5", "-5", False), ("72.5", "72", False), ("seventy", "72", False), ("1/0", "1", False), ("172", "72", False),
        ("9" * 500, "72", False), ("1e999", "72", False), ("\u221272", "-72", True),
    ],
)  # fmt: skip
def test_numbers(prediction, gold, equal):
    assert numeric_equal(prediction, gold) == float(equal)


def test_parse_number_by_hand():
    assert parse_number("$1,234.50") == Fraction("1234.5")
    assert parse_number("two") is None


@given(st.integers(-(10**12), 10**12))
def test_however_an_integer_is_written(n):
    for text in (str(n), f"{n:,}", f"{n}.0", f"{n}.", f" {n} apples", f"x = {n}"):
        assert numeric_equal(text, str(n)) == 1.0
    assert numeric_equal(str(n + 1), str(n)) == 0.0


@given(st.text(), st.text())
def test_metrics_stay_in_range(a, b):
    for value in (exact_match(a, b), f1(a, b), numeric_equal(a, b)):
        assert 0.0 <= value <= 1.0
    assert f1(a, b) == pytest.approx(f1(b, a))
    assert normalize(normalize(a)) == normalize(a)


@pytest.mark.parametrize("name", ["gsm8k", "hotpotqa"])
@pytest.mark.parametrize(("split", "count"), [("train", 200), ("test", 100)])
def test_gold_answers_pass_their_own_checker(name, split, count):
    task_set = load_tasks(name, split)
    assert len(task_set.tasks) == count
    for task in task_set.tasks.values():
        assert set(task_set.metrics(task, task.answers[0]).values()) == {1.0}
        assert task_set.outcome(task, None) == 0.0
        assert task_set.outcome(task, "an answer to something else 123456") == 0.0


@pytest.mark.parametrize("name", ["gsm8k", "hotpotqa"])
def test_train_and_test_are_disjoint(name):
    train, test = (load_tasks(name, split).tasks.values() for split in ("train", "test"))
    assert not {t.question for t in train} & {t.question for t in test}
