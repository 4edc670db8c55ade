"""The official metrics, drawn by hand and under attack."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.answers import exact_match, f1, normalize, numeric_equal, parse_number, precision_recall_f1, token_f1
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


ATTACKS = {  # prediction, gold -> em, F1 of HotPotQA, F1 of MuSiQue, number
    ("London or Paris or Rome", "Paris"): (0, 1 / 3, 1 / 3, 0),
    ("either London or Paris or Rome", "Paris"): (0, 2 / 7, 2 / 7, 0),
    ("I do not know", "no"): (0, 0, 0, 0),
    ("no idea", "no"): (0, 0, 2 / 3, 0),
    ("yes and no", "yes"): (0, 0, 1 / 2, 0),
    ("", "Paris"): (0, 0, 0, 0),
    ("", "The The"): (0, 0, 0, 0),
    ("the", "The The"): (0, 0, 0, 0),
    ("The The", "The The"): (1, 0, 1, 0),
    ("...", "?"): (0, 0, 0, 0),
    ("$1,000", "1000"): (1, 1, 1, 1),
    ("$1,000", "1,000"): (1, 1, 1, 1),
    ("72.", "72"): (1, 1, 1, 1),
    ("72.0", "72"): (0, 0, 0, 1),  # official: text metrics drop the point
    ("3/4", "0.75"): (0, 0, 0, 1),
    ("72 km", "72"): (0, 2 / 3, 2 / 3, 1),
    ("72km", "72"): (0, 0, 0, 1),
    ("72 or 73", "72"): (0, 1 / 2, 1 / 2, 0),
    ("1 2 3 4 5 6 7", "7"): (0, 1 / 4, 1 / 4, 0),
}


@pytest.mark.parametrize(("prediction", "gold"), ATTACKS)
def test_each_metric_under_attack(prediction, gold):
    scores = [metric(prediction, gold) for metric in (exact_match, f1, token_f1, numeric_equal)]
    assert scores == pytest.approx(ATTACKS[prediction, gold])


@pytest.mark.parametrize(
    ("name", "split"), [("hotpotqa", "test"), ("musique", "test"), ("beerqa", "test"), ("gsm8k", "test")]
)
@pytest.mark.parametrize("attack", ["", " ", "I do not know", "the", "?!", "yes or no", "0"])
def test_what_says_nothing_wins_nothing(name, split, attack):
    task_set = load_tasks(name, split)
    assert all(task_set.outcome(task, attack) == 0.0 for task in task_set.tasks.values() if "0" not in task.answers)


def test_every_answer_at_once_wins_nothing():
    for name in ("hotpotqa", "musique", "beerqa", "gsm8k"):
        task_set = load_tasks(name, "test")
        attack = " or ".join({task.answers[0] for task in task_set.tasks.values()})
        assert all(max(task_set.metrics(task, attack).values()) < 0.3 for task in task_set.tasks.values())


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
        ("9" * 500, "72", False), ("1e999", "72", False), ("\u221272", "-72", True), ("1e9999999", "1", False),
        ("1/" + "9" * 5000, "0", False), ("1/1e999999999", "0", False), ("(72)", "72", True), ("**72**", "72", True),
        ("72,73", "72", False), ("72 mph", "72", True), ("$72 each", "72", True), ("72%", "72", True), ("1,0000", "10000", False), ("1,0000", "1000", False), ("100,0000", "100,000", False),
        ("1.2.3", "1.2", False), ("–5", "-5", True), ("–5", "5", False), ("72 != 80", "80", False), ("5–7", "5", False),
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
    for value in (exact_match(a, b), f1(a, b), token_f1(a, b), numeric_equal(a, b)):
        assert 0.0 <= value <= 1.0
    assert f1(a, b) == pytest.approx(f1(b, a))
    assert token_f1(a, b) == pytest.approx(token_f1(b, a))
    assert token_f1(a, b) >= f1(a, b)
    assert token_f1(a, b) == 1.0 or not exact_match(a, b)
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
