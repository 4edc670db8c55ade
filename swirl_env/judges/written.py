"""What a written step states that is false or comes from nowhere: checks that need no model and no gold answer.

Each check is a pure function of (question, earlier texts, text) and returns what is wrong, or `None`:

false_equation  an equation between numbers does not hold (`7995 - 2595 = 4500`), rounding as written allowed.
broken_chain    two lines give the same words two values (`Total = 3 + 4. Total = 8.`).
contradiction   linear equations between letters cannot all hold (`2x + 6 = 20`, then `2x = 26`), here or with earlier steps.
foreign         a number in a calculation is neither in the question nor written before, nor one operation away from such.
boxed           the boxed answer is a number that nothing before it came to.
doubt           the text says of itself that something is wrong (`mistake`, `wait,`, `does not make sense`).

What they cannot see: a true calculation that is not the asked one. That is most of what goes wrong in ProcessBench GSM8K, so
they find about a sixth of the first wrong steps there; see `swirl bench judges`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from swirl_env import answers, numerals
from swirl_env.judges.equations import MAX_CHARACTERS, Equation, Form, equations, holds

Check = Callable[[str, Sequence[str], str], str | None]


def false_equation(question: str, earlier: Sequence[str], text: str) -> str | None:
    """The first equation between numbers that does not hold."""
    return next((str(equation) for equation in equations(text) if holds(equation) is False), None)


def broken_chain(question: str, earlier: Sequence[str], text: str) -> str | None:
    """Two named lines in a row that give the same words an operation and another value."""
    before: Equation | None = None
    for equation in equations(text):
        if not equation.label:
            continue
        if before is not None and before.label == equation.label and not equation.right.operations:
            claim = Equation(before.right, equation.right, equation.label, equation.about)
            if holds(claim) is False:
                return f"{equation.label} = {claim}"
        before = equation
    return None


_LETTER = re.compile(r"(?<![A-Za-z'’])[B-HJ-Zb-z](?![A-Za-z'’])")
_NAMES = re.compile(r"\b(?:let|denote|assume|suppose)\b[^.]*?(?<![A-Za-z'’])([A-Za-z](?:_\w+)?)(?![A-Za-z'’])", re.I)


def contradiction(question: str, earlier: Sequence[str], text: str) -> str | None:
    """The first linear equation that cannot hold together with those before it."""
    if "=" not in text or not _LETTER.search(text):
        return None
    system = _System()
    for said in earlier:
        for equation in _linear(said, system):
            system.add(equation)
    return next(
        (
            f"{equation} (against what was written before)"
            for equation in _linear(text, system)
            if not system.add(equation)
        ),
        None,
    )


def _linear(text: str, system: "_System") -> Iterator[Equation]:
    if "=" not in text:
        return
    for letter in _NAMES.findall(text):
        system.forget(letter)
    for equation in equations(text):
        if equation.left is not None and (equation.left.form.keys() | equation.right.form.keys()) - {""}:
            yield equation


class _System:
    """Linear equations, each letter solved for at most once."""

    def __init__(self) -> None:
        self.rows: dict[str, Form] = {}
        """Leading letter -> a form that is zero and holds it with coefficient 1."""

    def forget(self, letter: str) -> None:
        """The letter is given a new meaning."""
        self.rows = {lead: row for lead, row in self.rows.items() if letter not in row}

    def add(self, equation: Equation) -> bool:
        """Take in an equation; False, and nothing is taken in, where it contradicts the others by more than 2 %."""
        assert equation.left is not None
        left, right = equation.left.form, equation.right.form
        row = _minus(left, right, Fraction(1))
        for lead, other in self.rows.items():
            row = _minus(row, other, row.get(lead, Fraction(0)))
        letters = sorted(row.keys() - {""})
        if not letters:
            size = max(map(abs, [*left.values(), *right.values()]))
            return abs(row.get("", Fraction(0))) <= size / 50
        lead = letters[0]
        row = {letter: coefficient / row[lead] for letter, coefficient in row.items()}
        for name, other in self.rows.items():
            self.rows[name] = _minus(other, row, other.get(lead, Fraction(0)))
        self.rows[lead] = row
        return True


def _minus(left: Form, right: Form, times: Fraction) -> Form:
    """left - times x right, without what cancels."""
    zero = Fraction(0)
    form = {letter: left.get(letter, zero) - times * right.get(letter, zero) for letter in left | right}
    return {letter: coefficient for letter, coefficient in form.items() if coefficient}


def foreign(question: str, earlier: Sequence[str], text: str) -> str | None:
    """The first number of a calculation that comes from nowhere."""
    read = equations(text)
    if not any(side.operations for equation in read for side in (equation.left, equation.right) if side is not None):
        return None
    known = set(
        numerals.mentioned(question) | numerals.implied(question) | numerals.implied(text) | {0.0, 1.0, 2.0, 100.0}
    )
    known = known.union(*map(numerals.mentioned, earlier))
    for equation in read:
        side = equation.left if equation.left is not None and equation.left.operations else equation.right
        if side.operations and side.value is not None:
            for literal in side.literals:
                value = numerals.key(float(literal))
                if value not in known and not _one_operation_from(value, known):
                    return f"{literal} in {equation}"
                known.add(value)
        for part in (equation.left, equation.right):
            if part is not None and abs(constant := part.form.get("", Fraction(0))) < 10**12:
                known.add(numerals.key(float(constant)))
    return None


def _one_operation_from(value: float, known: set[float]) -> bool:
    have = {round(number, 4) for number in known if 0 < abs(number) < 1e9}
    return any(
        round(other, 4) in have
        for a in have if a
        for other in (value - a, value + a, a - value, value * a, value / a, a / value if value else a)
    )  # fmt: skip


_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def boxed(question: str, earlier: Sequence[str], text: str) -> str | None:
    """A boxed number that stands nowhere before it, in dollars or in cents."""
    found = _BOXED.search(text)
    number = answers.parse_number(found[1].replace("\\", " ")) if found else None
    if found is None or number is None or abs(number) > 10**12:
        return None
    seen = frozenset().union(*map(numerals.mentioned, [*earlier, text[: found.start()], text[found.end() :]]))
    return (
        found[0]
        if seen.isdisjoint(numerals.key(float(number * factor)) for factor in (1, 100, Fraction(1, 100)))
        else None
    )


_DOUBT = re.compile(
    r"\b(?:mistakes?|incorrect|confusion|apolog\w+|sorry|impossible|not possible|errors?|misunderst\w+|correction)\b|\bmakes? sense\b"
    r"|\bcontradict|\bre-?(?:evaluate|consider|check|examine|read|calculate)\b|\bwait\b[,!.]",
    re.I,
)


def doubt(question: str, earlier: Sequence[str], text: str) -> str | None:
    """Words by which a text takes back what it says, where the question does not use such words."""
    found = _DOUBT.search(text)
    return found[0] if found and not _DOUBT.search(question) else None


STATEMENTS: tuple[Check, ...] = (false_equation, broken_chain, contradiction, foreign, boxed)
_NUMERAL = re.compile(r"\d[\d.,]*")
CHECKS: dict[str, Check] = {check.__name__: check for check in (*STATEMENTS, doubt)}


def states(text: str) -> bool:
    """Whether a text may say something false about numbers: it holds two of them, or an equals sign, or a box."""
    return "=" in text or "boxed" in text or len(_NUMERAL.findall(text)) > 1


def wrong(question: str, earlier: Sequence[str], text: str, checks: Sequence[Check] = STATEMENTS) -> str | None:
    """What the first of the checks finds, with its name; `None` where nothing is found.

    Args:
        question: of the task.
        earlier: texts of the earlier steps, and results shown, in order.
        text: the step's own.
        checks: in order.
    """
    if not states(text):
        checks = [check for check in checks if check is doubt]
    text, earlier = text[:MAX_CHARACTERS], [said[:MAX_CHARACTERS] for said in earlier]
    for check in checks:
        if (found := check(question, earlier, text)) is not None:
            return f"{check.__name__.replace('_', ' ')}: {found}"[:300]
    return None
