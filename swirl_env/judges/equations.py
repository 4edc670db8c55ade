"""What a written solution states about numbers, read as equations: `3 boxes * $4/box = $12`, `\\frac{153}{2} = 76.5`,
`half of 20 is 10`, `2x + 6 = 20`, and whether one holds.

A text is first put into one notation (LaTeX, signs and words for + - * /), then cut into tokens, and each `=` (or `is`,
after an operation) asks for the value of what stands on both sides. A side is a number, or a linear form of letters (`2x + 6`).
Units are read over; a side that holds anything else is opaque, and nothing is said about it.

Not read: powers beyond small whole ones, products of letters, times of day, ratios (3:5), mixed units (`2 hours 5 minutes`), and
words between numbers (`5 more than 12`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from swirl_env.numerals import WORDS

Form = dict[str, Fraction]
"""A linear form: letter -> coefficient; "" -> the constant."""

MAX_CHARACTERS = 10_000
MAX_TOKENS = 120
"""Of a clause; a longer one is not read, so that hostile text costs little."""

_LATEX = [
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox|operatorname|boxed|bf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" ((\1)/(\2))"),
    (re.compile(r"\^\{([^{}]*)\}"), r"^(\1)"),
    (re.compile(r"_\{\s*(\w+)\s*\}"), r"_\1"),
]
_SIGNS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])|[×·⋅∙✕✖]"), " * "),
    (re.compile(r"\\div(?![a-z])|[÷∕⁄]"), " / "),
    (re.compile(r"\\approx(?![a-z])|≈|\\sim(?![a-z])"), " ≈ "),
    (re.compile(r"\\(?:left|right|big|Big|displaystyle)(?![a-z])|\{,\}(?=\d)|\\[,;:! ]|[{}&]"), " "),
    (re.compile(r"\\(?:implies|Rightarrow|rightarrow|to|quad|qquad|therefore|because|newline)(?![a-z])|\\\\|[→⇒]"), " ; "),
    (re.compile(r"\\[\[\]()]|\$\$"), " \n "),
    (re.compile(r"\\(?=[$%#])"), ""),
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"(?<=[\d)%])[ \t]*[xX][ \t]*(?=[$(]?\s?\d)"), " * "),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|`|\*\*(?=\d[\d,.]*\*\*)"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b(?= times \$?\d)", re.I), lambda match: f"{WORDS[match[0].lower()]:g}"),
    (re.compile(r"\bmultiplied by\b|\btimes(?= \$?\d)", re.I), " * "),
    (re.compile(r"\bdivided by\b|\bdivided into\b", re.I), " / "),
    (re.compile(r"\bplus\b", re.I), " + "),
    (re.compile(r"\bminus\b", re.I), " - "),
    (re.compile(r"\bhalf(?= of\b| \$?\d)", re.I), "1/2"),
    (re.compile(r"\b(?:twice|double)(?= \$?\d)", re.I), "2 *"),
    (re.compile(r"\bone[- ]third(?= of\b)", re.I), "1/3"),
    (re.compile(r"\bone[- ](?:quarter|fourth)(?= of\b)", re.I), "1/4"),
    (re.compile(r"\btwo[- ]thirds(?= of\b)", re.I), "2/3"),
    (re.compile(r"\bthree[- ](?:quarters|fourths)(?= of\b)", re.I), "3/4"),
    (re.compile(r"\s*\n\s*(?=[=≈])|(?<=[=≈])\s*\n\s*"), " "),
    (re.compile(r"(?:\b(?:which|that|this|it) )?\b(?:is equal to|is equivalent to|equals|equal to)\b", re.I), " = "),
    (re.compile(r"(?:\b(?:which|that|this|it) )?\b(?:is|are|gives us|gives|makes|leaves|would be|will be|comes to)\b", re.I), " ~ "),
]  # fmt: skip
_TOKEN = re.compile(
    r"(?P<time>\d+:\d+|\d+(?:st|nd|rd|th)\b|\b0\d{3}\b)"
    r"|(?P<number>\d{1,3}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?|\d+\.\d+|\d+|\.\d+)"
    r"|(?P<percent>%|\bpercent\b)"
    r"|(?P<word>(?<![A-Za-z])[A-Za-z]_\w+|[A-Za-z]+(?:['’-][A-Za-z]+)*|(?<=\d)-[A-Za-z][A-Za-z-]+)"
    r"|(?P<relation>[=≈~])"
    r"|(?P<operator>[-+*/^()\[\]])"
    r"|(?P<blank>[ \t$€£¢#_|°]+)"
    r"|(?P<stop>.)",
    re.S,
)


def _set(words: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", words))


_LEADS = _set("the her his their its those these all our my your that")
_BLOCKS = _set("than as times twice half double triple the thirds third quarter quarters fourth fifth fifths by from")
_JOINS = _set("and so then if but where when that because since with or thus therefore hence while we")
_LEANS = _set("more less fewer times older younger greater higher lower longer shorter taller away out of off")


class _Opaque(Exception):
    """What stands here is not arithmetic."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    tight: bool
    """No blank before it."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of an equation."""

    text: str
    form: Form
    operations: int
    literals: tuple[str, ...]
    """The numbers as written, without separators."""
    units: frozenset[str]
    percent: bool

    @property
    def value(self) -> Fraction | None:
        return self.form.get("", Fraction(0)) if not self.form.keys() - {""} else None


@dataclass(frozen=True, slots=True)
class Equation:
    left: Side | None
    """`None`: it is words, or something else that cannot be read."""
    right: Side
    label: str
    """The words before the first `=` of a chain, in lower case: `total cost`; empty where there are none."""
    about: bool
    """Written as approximate."""

    def __str__(self) -> str:
        return f"{self.left.text if self.left else self.label} = {self.right.text}"


def plain(text: str) -> str:
    """A text in one notation: LaTeX and words for operations as + - * / ^, `is` as ~."""
    if "\\" in text:
        for _ in range(4):  # nested
            before = text
            for pattern, replacement in _LATEX:
                text = pattern.sub(replacement, text)
            if text == before:
                break
    for pattern, replacement in _SIGNS:
        text = pattern.sub(replacement, text)
    return text


@lru_cache(maxsize=512)
def equations(text: str) -> tuple[Equation, ...]:
    """Every equation of a text whose right side can be read, in order."""
    text = text[:MAX_CHARACTERS]
    return tuple(equation for segment in _segments(plain(text)) for equation in _in_segment(segment))


def _segments(text: str) -> Iterator[list[_Token]]:
    """Runs of tokens without a full stop, comma or line end between them."""
    run: list[_Token] = []
    tight = False
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        if kind == "blank":
            tight = False
            continue
        if kind == "stop":
            if run:
                yield from _clauses(run)
            run, tight = [], False
            continue
        run.append(_Token(kind, match[0], tight))
        tight = True
    if run:
        yield from _clauses(run)


def _clauses(run: list[_Token]) -> Iterator[list[_Token]]:
    """A run cut at each `and`, `so`, `then` ... that stands between two relations."""
    start = 0
    cut: int | None = None
    related = False
    for i, token in enumerate(run):
        if token.kind == "relation":
            if related and cut is not None:
                yield run[start:cut]
                start = cut
            related, cut = True, None
        elif token.kind == "word" and token.text.lower() in _JOINS:
            cut = i + 1
    yield run[start:]


def _in_segment(tokens: list[_Token]) -> Iterator[Equation]:
    cuts = [i for i, token in enumerate(tokens) if token.kind == "relation"]
    if not cuts or len(tokens) > MAX_TOKENS:
        return
    about = any(token.text in ("about", "approximately", "roughly") for token in tokens)
    bounds = [-1, *cuts, len(tokens)]
    pieces = [tokens[a + 1 : b] for a, b in zip(bounds, bounds[1:], strict=False)]
    first = [token for token in pieces[0] if token.kind != "operator" or token.text not in "()"]
    label = " ".join(t.text.lower() for t in first) if all(t.kind == "word" for t in first) and len(first) < 12 else ""
    for i, cut in enumerate(cuts):
        soft = tokens[cut].text == "~"
        left = _last_side(pieces[i]) if i == 0 or tokens[cuts[i - 1]].text == "~" else _whole_side(pieces[i])
        ends = i + 1 == len(cuts) or tokens[cuts[i + 1]].text == "~"
        right = _first_side(pieces[i + 1]) if ends else _whole_side(pieces[i + 1])
        if right is None or (soft and (left is None or not left.operations or right.operations or left.value is None)):
            continue
        yield Equation(left, right, "" if soft else label, about or tokens[cut].text == "≈")


def _whole_side(tokens: list[_Token]) -> Side | None:
    reader = _Reader(tokens)
    side = reader.side(0)
    return side if side is not None and reader.at == len(tokens) else None


def _first_side(tokens: list[_Token]) -> Side | None:
    """The side at the beginning of a piece that goes on in prose."""
    reader = _Reader(tokens)
    side = reader.side(0)
    if side is None or reader.at == len(tokens):
        return side
    rest = tokens[reader.at]
    return None if rest.kind in ("operator", "percent", "time", "number") else side


def _last_side(tokens: list[_Token]) -> Side | None:
    """The side at the end of a piece that begins in prose: the longest that can be read."""
    for start, token in enumerate(tokens):
        if (token.kind == "word" and not _Reader._single(token)) or (
            token.kind == "operator" and start and token.text not in "(["
        ):
            continue
        if start:
            before = tokens[start - 1]
            if before.kind != "word":
                continue
            lean = before if before.text != "of" or start < 2 else tokens[start - 2]
            if lean.kind != "word" or lean.text.lower() in _BLOCKS:
                return None
        reader = _Reader(tokens)
        side = reader.side(start)
        if side is not None and reader.at == len(tokens):
            return side
    return None


class _Reader:
    """Recursive descent over tokens; `None` where a side cannot be read."""

    def __init__(self, tokens: list[_Token]):
        self.tokens = tokens
        self.at = 0
        self.operations = 0
        self.literals: list[str] = []
        self.units: set[str] = set()
        self.percent = False

    def side(self, start: int) -> Side | None:
        self.at = start
        try:
            form = self._sum(0)
        except (_Opaque, ZeroDivisionError):
            return None
        text = " ".join(token.text for token in self.tokens[start : self.at])
        return Side(text, form, self.operations, tuple(self.literals), frozenset(self.units), self.percent)

    def _peek(self, ahead: int = 0) -> _Token | None:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else None

    def _operator(self, texts: str) -> str | None:
        token = self._peek()
        return token.text if token is not None and token.kind == "operator" and token.text in texts else None

    def _sum(self, depth: int) -> Form:
        form = self._product(depth)
        while sign := self._operator("+-"):
            self.at += 1
            other = self._product(depth)
            self.operations += 1
            form = _add(form, other, 1 if sign == "+" else -1)
        return form

    def _product(self, depth: int) -> Form:
        form = self._power(depth)
        while True:
            token = self._peek()
            if sign := self._operator("*/"):
                self.at += 1
            elif token is not None and token.text == "(" and token.tight and self._opens_number():
                sign = "*"
            elif token is not None and token.kind == "word" and self._is_letter(token):
                sign = "*"  # 2x
            elif token is not None and token.text == "of" and self._share() and self._of():
                sign = "*"
            else:
                return form
            other = self._power(depth)
            self.operations += 1
            form = _times(form, other) if sign == "*" else _over(form, other)

    def _opens_number(self) -> bool:
        token = self._peek(1)
        return token is not None and (token.kind in ("number",) or token.text in "(-" or self._single(token))

    @staticmethod
    def _single(token: _Token) -> bool:
        return token.kind == "word" and token.text not in "aIA" and (len(token.text) == 1 or "_" in token.text)

    def _is_letter(self, token: _Token) -> bool:
        if token.kind != "word" or (len(token.text) != 1 and "_" not in token.text):
            return False
        return token.tight or token.text[0] in "xyzn" or (token.text[0].isupper() and token.text not in "AI")

    def _share(self) -> bool:
        """Whether what stands before is a percentage or a fraction."""
        before = self.tokens[self.at - 1]
        return before.kind == "percent" or before.text == ")" or (self.at > 1 and self.tokens[self.at - 2].text == "/")

    def _of(self) -> bool:
        """Step over `of`, `of the` before a number."""
        ahead = 1
        while (token := self._peek(ahead)) is not None and token.kind == "word" and token.text.lower() in _LEADS:
            ahead += 1
        if token is None or not (token.kind == "number" or token.text == "("):
            raise _Opaque
        self.at += ahead
        return True

    def _power(self, depth: int) -> Form:
        form = self._factor(depth)
        if self._operator("^"):
            self.at += 1
            exponent = self._factor(depth).get("", Fraction(0))
            value = form.get("", Fraction(0))
            if form.keys() - {""} or exponent.denominator != 1 or not 0 <= exponent <= 12 or abs(value) > 10**9:
                raise _Opaque
            self.operations += 1
            return {"": value ** int(exponent)}
        return form

    def _factor(self, depth: int) -> Form:
        token = self._peek()
        if token is None or depth > 30:
            raise _Opaque
        if token.kind == "operator" and token.text in "+-":
            self.at += 1
            form = self._factor(depth + 1)
            return form if token.text == "+" else _times(form, {"": Fraction(-1)})
        if token.kind == "operator" and token.text in "([":
            self.at += 1
            form = self._sum(depth + 1)
            if not self._operator(")]"):
                raise _Opaque
            self.at += 1
            return self._unit(form)
        if token.kind == "number":
            self.at += 1
            digits = token.text.replace(",", "")
            if len(digits) > 18:
                raise _Opaque
            self.literals.append(digits)
            value = Fraction(digits)
            below = [self._peek(k) for k in range(3)]
            if (
                below[0] is not None and below[0].kind == "number" and not below[0].tight
                and below[1] is not None and below[1].text == "/" and below[1].tight
                and below[2] is not None and below[2].kind == "number" and below[2].tight
                and "." not in digits
            ):  # 3 1/2  # fmt: skip
                value += Fraction(below[0].text.replace(",", "")) / Fraction(below[2].text.replace(",", ""))
                self.at += 3
            elif (
                below[0] is not None and below[0].text == "/" and below[0].tight
                and below[1] is not None and below[1].kind == "number" and below[1].tight
                and (not token.tight or self.at == 1) and "." not in token.text + below[1].text
                and (value < Fraction(below[1].text.replace(",", "")))
            ):  # a fraction, as in 25 / 1/3; no operation  # fmt: skip
                value /= Fraction(below[1].text.replace(",", ""))
                self.at += 2
            return self._unit({"": value})
        if self._single(token):
            self.at += 1
            return {token.text: Fraction(1)}
        raise _Opaque

    def _unit(self, form: Form) -> Form:
        """Step over what a number counts: `3 boxes`, `$4/box`, `5 apples per day`, `16 (all eggs)`, `20%`."""
        while (token := self._peek()) is not None:
            after = self._peek(1)
            if token.kind == "percent":
                self.percent = True
                form = _times(form, {"": Fraction(1, 100)})
            elif token.kind == "word" and (token.text.lower() == "of" or self._is_letter(token)):
                return form
            elif token.kind == "word":
                if token.text.lower() in _LEANS and self.at and self.tokens[self.at - 1].kind in ("number", "percent"):
                    raise _Opaque
                self.units.add(token.text.lower())
            elif token.text == "/" and after is not None and after.kind == "word" and not self._single(after):
                self.at += 1
                self.units.add(after.text.lower())
            elif token.text == "(" and after is not None and after.kind == "word" and not self._single(after):
                while (inside := self._peek()) is not None and inside.text != ")":
                    self.at += 1
                if inside is None:
                    raise _Opaque
            else:
                return form
            self.at += 1
        return form


def _add(left: Form, right: Form, sign: int) -> Form:
    return {letter: left.get(letter, Fraction(0)) + sign * right.get(letter, Fraction(0)) for letter in left | right}


def _times(left: Form, right: Form) -> Form:
    if right.keys() - {""}:
        left, right = right, left
    if right.keys() - {""}:
        raise _Opaque
    factor = right.get("", Fraction(0))
    return {letter: coefficient * factor for letter, coefficient in left.items()}


def _over(left: Form, right: Form) -> Form:
    if right.keys() - {""}:
        raise _Opaque
    return _times(left, {"": 1 / right.get("", Fraction(0))})


# -- whether an equation holds

_SCALES = {"dozen": 12, "dozens": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "k": 1000}
_FACTORS = tuple(map(Fraction, (60, 3600, 24, 7, 12, 16, 36, 1000, 3, 4, 30, 52, 365, 5280)))


def holds(equation: Equation) -> bool | None:
    """Whether an equation between numbers is true, allowing for rounding as written; `None` where nothing is claimed."""
    left, right = equation.left, equation.right
    if left is None or (a := left.value) is None or right.value is None or not left.operations:
        return None
    if _close(a, right, equation.about):
        return True
    factors = [Fraction(value) for unit, value in _SCALES.items() if unit in left.units | right.units]
    if left.percent or right.percent or (left.units | right.units) & {"cents", "cent", "percent"}:
        factors.append(Fraction(100))
    if left.units and right.units and not left.units & right.units:
        factors += _FACTORS
    if any(_close(value, right, equation.about) for factor in factors for value in (a * factor, a / factor)):
        return True
    # run on: 5 + 3 = 8 * 2 = 16
    return bool(right.operations and right.literals) and _near(a, Fraction(right.literals[0]))


def _close(value: Fraction, side: Side, about: bool) -> bool:
    """Whether a side may stand for a value: a lone number rounded up, down or to nearest at the
    places it shows, an operation within 0.5 %."""
    wanted = side.value or Fraction(0)
    if value == wanted:
        return True
    if about and abs(value - wanted) <= max(abs(value) / 20, Fraction(1)):
        return True
    if side.operations:
        return _near(value, wanted)
    grid = 10 ** len(side.literals[0].partition(".")[2]) * (100 if side.percent else 1) if side.literals else 1
    return (value * grid).denominator != 1 and abs(value - wanted) * grid < 1


def _near(a: Fraction, b: Fraction) -> bool:
    return a == b or abs(a - b) <= abs(b) / 200 and (a.denominator != 1 or b.denominator != 1)
