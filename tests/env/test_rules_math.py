"""What written steps state about numbers: read in every form, true ones never called wrong, false ones found."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.errors import ConfigError
from swirl_env.judges import RulesJudge, make_judge
from swirl_env.judges.equations import equations, holds
from swirl_env.judges.written import (
    CHECKS,
    boxed,
    broken_chain,
    contradiction,
    doubt,
    false_equation,
    foreign,
    wrong,
)
from swirl_env.types import Action, Step, StepView

TRUE = [
    "3 days * 1 hour/day = 3 hours",
    r"\[ 25\% \text{ of } \$2,000.00 = 0.25 \times 2000 = \$500.00 \]",
    r"\frac{153}{2} = 76.5",
    "half of 20 is 10, and 20 percent of 50 is 10",
    "3 x 4 = 12 and 2(3+4) = 14",
    "She bought 2 pies that had 8 slices each for a total of 2*8 = 16 slices",
    "25 / 1/3 = 75 decorations",
    "3 1/2 * 4 = 14",
    "100 / 3 = 33.33",
    "33.33 * 3 = 100",
    "100 / 3 ≈ 33",
    "7 / 2 = 3 remainder 1",
    "90 minutes / 60 = 1.5 hours",
    "10 / 40 = 25%",
    "$2.50 - $2.24 = 26 cents",
    "276 / 12 = 23 dozen eggs",
    "5 + 3 = 8 * 2 = 16",
    "Since 3/4 is equal to $15, 1/4 is $15/3 = $5",
    "50 liters = 50 * 1000 = 50,000 milliliters",
    "He ran from 8:00 to 11:00, so 3 hours.",
    "The ratio is 3:5 = 0.6",
    "Total = 5 more than 3 * 4 = 17",
    "on the 1st = 5 + 6 = 11",
    "-5 + 3 = -2",
    "2^3 = 8 and 5^2 + 1 = 26",
    "**5 * 4 = 20**",
]
FALSE = [
    "7995 (total cookies) - 2595 (rainbow cookies) = 4500.",
    r"\[ \text{Total} = \$10 + \$24 + \$12 + \$14 = \$50 \]",
    r"\frac{153}{2} = 75.5",
    "half of 20 is 11",
    "three times 20 is 80",
    "5 apples/day * 3 days = 16 apples",
    r"2/5 * 4000 = 800 gallons",
    "100 / 3 = 34.5",
    "20% of $50 equals $12",
    "2 plus 2 gives 5",
    "12 divided by 4 is 4",
    "48 × 2 = 98",
]


@pytest.mark.parametrize("text", TRUE)
def test_true_equations(text):
    assert false_equation("", (), text) is None


@pytest.mark.parametrize("text", FALSE)
def test_false_equations(text):
    assert false_equation("", (), text)


NUMBERS = st.integers(1, 9999)
FORMS = [
    "{a} {o} {b} = {c}",
    "So the total is {a} {o} {b} = {c} apples.",
    "{a} apples {o} {b} = {c}",
    "${a} {o} ${b} = ${c}.",
    r"\[ {a} {l} {b} = {c} \]",
    r"\( \text{{Total}} = {a} \text{{ apples}} {l} {b} = {c} \)",
    "{a} {w} {b} is {c}.",
    "Total = {a} {o} {b}. Next, {a} {o} {b} equals {c}",
    "{a:,} {o} {b:,} = {c:,}",
    "({a} {o} {b}) = {c}, which is it",
]
OPERATIONS = {
    "+": ("+", "plus", lambda a, b: a + b),
    "-": ("-", "minus", lambda a, b: a - b),
    "*": (r"\times", "multiplied by", lambda a, b: a * b),
    "/": (r"\div", "divided by", lambda a, b: Fraction(a, b)),
}


@given(a=NUMBERS, b=NUMBERS, o=st.sampled_from(list(OPERATIONS)), form=st.sampled_from(FORMS), off=st.integers(-40, 40))
def test_in_every_form_truth_is_told_from_falsehood(a, b, o, form, off):
    latex, word, apply = OPERATIONS[o]
    if o == "/":
        a *= b  # whole
    c = int(apply(a, b))
    text = form.format(a=a, b=b, c=c + off, o=o, l=latex, w=word)
    assert bool(false_equation("", (), text)) == bool(off), text


@given(a=NUMBERS, b=NUMBERS, places=st.integers(0, 4))
def test_rounding_as_written_is_true(a, b, places):
    assert false_equation("", (), f"{a} / {b} = {a / b:.{places}f}") is None
    assert false_equation("", (), f"{a} / {b} = {a / b + 2.01:.{places}f}")


@given(st.text())
def test_any_text_can_be_read(text):
    for equation in equations(text):
        assert holds(equation) in (True, False, None)
    for check in CHECKS.values():
        assert check("How many?", [text], text) is None or isinstance(check("How many?", [text], text), str)


@pytest.mark.parametrize(
    "text",
    ["=" * 20_000, "(" * 20_000 + "1=", "1+" * 9_000 + "1=2", "\\frac{" * 5_000, "9^" * 4_000 + "9=9", "x=" * 9_000],
)
def test_hostile_texts_end(text):
    wrong("q", [], text, tuple(CHECKS.values()))


def test_chains():
    assert broken_chain("", (), "Total = 3 + 4. Total = 8.")
    assert not broken_chain("", (), "Total = 3 + 4. Total = 7.")
    assert not broken_chain("", (), "Total = 3 + 4. Rest = 8.")
    assert broken_chain("", (), r"\[ \text{Total earnings} = \$3.00 + \$1.50 \] \[ \text{Total earnings} = \$5.00 \]")


def test_contradictions():
    assert contradiction("", ["Let x be the age. 2x + 6 = 20"], "so 2x = 26")
    assert not contradiction("", ["Let x be the age. 2x + 6 = 20"], "so 2x = 14 and x = 7")
    assert contradiction("", ["S = 2B", "(S + 2) + (B + 2) = 28"], r"\[ 2B + 4 + B + 2 = 28 \]")
    assert not contradiction("", ["S = 2B", "(S + 2) + (B + 2) = 28"], "3B + 4 = 28. B = 8")
    assert not contradiction("", ["x = 5"], "Let x be another number. x = 7")
    assert not contradiction("", [r"\( J_s = 20 \), \( J_c = 5 \)"], r"\( J_s = 4J_c \)")
    assert contradiction("", [], "P + 2J + 10 = 100. P = 10. J = 30")


@given(st.integers(2, 9), st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 30))
def test_right_solutions_never_contradict(a, b, x, off):
    steps = [f"{a}x + {b} = {a * x + b}".replace("+ -", "- "), f"{a}x = {a * x}"]
    assert not contradiction("", steps, f"x = {x}")
    assert contradiction("", steps, f"x = {x + off}")


def test_numbers_from_nowhere():
    question = "A train waits 20 minutes, then half an hour."
    assert foreign(question, (), "20 + 17.3 = 37.3")
    assert not foreign(question, (), "20 + 30 = 50")
    assert not foreign(question, ["so 17.3 in all"], "20 + 17.3 = 37.3")
    assert not foreign("Tom has 3 dozen eggs.", (), "3 * 12 = 36")


def test_boxed_and_doubt():
    assert boxed("", ["40 + 2 = 42"], r"The answer is \boxed{43}.")
    assert not boxed("", ["40 + 2 = 42"], r"The answer is \boxed{\$42}.")
    assert not boxed("", ["it is $45"], r"\boxed{4500}")
    assert doubt("", (), "Wait, that cannot be.")
    assert not doubt("How many mistakes did he make?", (), "He made 3 mistakes.")


def view(text, *earlier):
    return StepView("Tom has 48 apples.", tuple(Step(Action(said, said)) for said in earlier), Action(text, text))


def test_the_two_forms_of_the_judge():
    rules, in_prose = make_judge("rules"), make_judge("rules-written")
    second = view("Then 48 / 2 = 24 each.", "First halve them.")
    assert rules([second])[0].score == 0.0  # thought after thought
    assert in_prose([second])[0].score == 1.0
    false = view("Then 48 / 2 = 25 each.")
    for judge in (rules, in_prose):
        assert judge([false])[0].score == 0.0
        assert judge([false])[0].judge == judge.name
    assert RulesJudge(off=["false_equation", "foreign"])([false])[0].good
    with pytest.raises(ConfigError, match="Did you mean 'foreign'"):
        RulesJudge(off=["foregn"])
