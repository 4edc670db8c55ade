"""A calculator for expressions as people write them: exact where numbers allow, bounded in time and size.

`numexpr` alone reads `^` as XOR, wraps integers at 64 bits, turns `1e400` into infinity and hangs on `9**9**9`. So
the expression is first tidied (`1,234`, `$5`, `50%`, `2^3`, `×`, `÷`), parsed by Python's own parser, and walked node
by node: + - * / // % ** run exactly on fractions, functions and real powers go to numexpr. Names, attributes,
other calls, deep nesting and results over 1,200 digits are refused with a sentence. Nothing is ever passed to `eval`.
"""

import ast
import math
import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numexpr

from swirl_env.errors import ToolError
from swirl_env.tools.base import tool

MAX_CHARACTERS = 400
MAX_DEPTH = 40
MAX_BITS = 4_000

Number = Fraction | float

_EXACT: dict[str, Any] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": lambda x, n=0: math.floor(Fraction(x) * Fraction(10) ** int(n) + Fraction(1, 2)) / Fraction(10) ** int(n),
    "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)),
}
_REAL = ("sqrt", "exp", "log", "log10", "sin", "cos", "tan")
_CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS = (*_EXACT, *_REAL)

_TIDY = [
    (re.compile(r"[$€£\u00a0]"), " "),
    (re.compile(r"[×·⋅∙]"), "*"),
    (re.compile(r"[÷∕⁄]"), "/"),
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"\^"), "**"),
    (re.compile(r"(?<=[\d)%.])\s*[xX]\s*(?=[\d(.])"), "*"),
    (re.compile(r"(\d+\.?\d*|\.\d+)\s*%\s*of\b"), r"(\1/100)*"),
    (re.compile(r"(\d+\.?\d*|\.\d+)\s*%(?!\s*[\d.(A-Za-z])"), r"(\1/100)"),
    (re.compile(r"(?<![\w.])0+(?=\d)"), ""),
    (re.compile(r"\s*=\s*$"), ""),
]
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_HAS_LIST = re.compile(r"\b(?:min|max|round)\s*\(")


_PLAIN = re.compile(r"[\d\s.()+*/-]*", re.A)
_LEADING_ZERO = re.compile(r"(?<![\d.])0\d", re.A)


@lru_cache(maxsize=4096)
def tidy(expression: str) -> str:
    """The expression in Python's notation."""
    if _PLAIN.fullmatch(expression) and not _LEADING_ZERO.search(expression):
        return expression.strip()
    if _HAS_LIST.search(expression) and _THOUSANDS.search(expression):
        raise ToolError(
            "Inside min, max and round, write numbers without thousands separators and put a blank after commas."
        )
    expression = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression)
    for pattern, replacement in _TIDY:
        expression = pattern.sub(replacement, expression)
    return expression.strip()


@lru_cache(maxsize=1024)
def parse(expression: str) -> ast.expr:
    """Syntax tree of a tidied expression; not to be changed. Raises `ToolError` where it is too long or not arithmetic."""
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"The expression has {len(expression):,} characters; at most {MAX_CHARACTERS} are allowed.")
    text = " ".join(tidy(expression).split())
    if not text:
        raise ToolError("The expression is empty. Write one such as 48/2.")
    if "=" in text:
        raise ToolError("Write only the expression to calculate, without '='.")
    try:
        if not text.isascii():  # places in the tree count bytes
            raise ValueError(text)
        tree = ast.parse(text, mode="eval").body
        for node in ast.walk(tree) if set(text) & set(".eE") else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, float):
                node.exact = _decimal(text[node.col_offset : node.end_col_offset])  # type: ignore[attr-defined]
        return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(
            f"Cannot read {expression[:80]!r} as arithmetic. Use numbers, + - * / ** and brackets."
        ) from None


def _decimal(text: str) -> Fraction:
    """A decimal exactly as written."""
    exponent = text.lower().partition("e")[2]
    if exponent and abs(int(exponent)) > 300:
        raise ToolError("A number in the expression is too large or too small.")
    return Fraction(text)


def value_of(node: ast.expr, depth: int = 0) -> Number:
    """Value of a syntax tree: a `Fraction` where exact, else a float. Raises `ToolError` for what is refused."""
    if depth > MAX_DEPTH:
        raise ToolError(f"The expression is nested more than {MAX_DEPTH} deep. Split it.")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(Fraction(number) if isinstance(number, int) else node.exact)  # type: ignore[attr-defined]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = value_of(operand, depth + 1)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_binary(op, value_of(left, depth + 1), value_of(right, depth + 1)))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(_function(name, [value_of(argument, depth + 1) for argument in arguments]))
        case ast.Name(id=name):
            raise ToolError(f"{name[:40]!r} is not a number. Write numbers only, without units or names.")
        case ast.Call(func=ast.Name(id=name)):
            raise ToolError(f"{name[:40]!r} cannot be called like this. Functions: {', '.join(FUNCTIONS)}.")
        case ast.Call(func=ast.Constant() | ast.BinOp()):
            raise ToolError("Write the multiplication sign: 2*(3+4), not 2(3+4).")
    raise ToolError("Only numbers, + - * / // % **, brackets and simple functions can be calculated.")


def _binary(op: ast.operator, left: Number, right: Number) -> Number:
    try:
        match op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
            case ast.FloorDiv():
                return Fraction(left // right)
            case ast.Mod():
                return left % right
            case ast.Pow():
                return _power(left, right)
    except ZeroDivisionError:
        raise ToolError("Division by zero.") from None
    except OverflowError:
        raise ToolError("The result is too large.") from None
    raise ToolError("Only + - * / // % and ** are known.")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and bits * abs(exponent) > MAX_BITS:
            raise ToolError("The power is too large: its result would have over 1,000 digits.")
        return base ** int(exponent)
    try:
        return _numexpr("x ** y", x=float(base), y=float(exponent))
    except OverflowError:
        raise ToolError("The numbers of the power are too large.") from None


def _function(name: str, values: list[Number]) -> Number:
    try:
        if name in _REAL and len(values) == 1:
            return _numexpr(f"{name}(x)", x=float(values[0]))
        if (
            name in ("min", "max")
            or len(values) == 1
            or (name == "round" and len(values) == 2 and -100 < values[1] < 100)
        ):
            result = _EXACT[name](values) if name in ("min", "max") else _EXACT[name](*values)
            return float(result) if any(isinstance(value, float) for value in values) else result
    except OverflowError:
        raise ToolError(f"The numbers are too large for {name}.") from None
    except TypeError:
        pass
    raise ToolError(f"{name} does not take {len(values)} such values.")


_LOCK = threading.Lock()  # numexpr keeps the last expression in a global


def _numexpr(expression: str, **values: float) -> float:
    with _LOCK:
        result = float(numexpr.evaluate(expression, local_dict=values, global_dict={}))
    if math.isnan(result) or result == -math.inf:
        raise ToolError("The result is not a real number.")
    return result


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise ToolError("The result is too large: it would have over 1,000 digits.")
    elif not math.isfinite(value):
        raise ToolError("The result is too large.")
    return value


def show(value: Number) -> str:
    """Integers in full; anything else with up to 12 significant digits, without trailing zeros."""
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.12g}"
    except OverflowError:
        return str(round(value))


@lru_cache(maxsize=1024)
def evaluate(expression: str) -> Number:
    """Value of an expression as people write it. Raises `ToolError` with a sentence for what is refused."""
    return value_of(parse(expression))


@tool
def calculator(expression: str) -> str:
    """Works out arithmetic such as 48/2.

    Args:
        expression: Numbers with + - * / ** and brackets.

    Raises:
        ToolError: what cannot be worked out, or would take too long, with the reason.

    Examples:
        >>> from swirl_env.tools import calculator
        >>> calculator(expression="$1,200 * 15%")
        '180'
        >>> calculator(expression="0.1 + 0.2")
        '0.3'
        >>> calculator(expression="9**9**9")
        Traceback (most recent call last):
        swirl_env.errors.ToolError: The power is too large: its result would have over 1,000 digits.
    """
    return show(evaluate(expression))
