"""Procedural word problems of several steps: the CartPole of this toolkit.

A running amount changes sentence by sentence, so the problem is a chain of known length and its program is known.
`meta["solution"]` writes it as GSM8K does (`<<12+5=17>>`), `meta["program"]` as expressions. Every problem is made from
its own number, so any of them can be made alone; train and test never share a question.
"""

import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from swirl_env import answers
from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.types import Task

INSTRUCTION = "Solve the math problem."
METRICS = {"accuracy": answers.numeric_equal}
SPLITS = {"train": 0, "test": 1}

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Leo")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "lamps", "pens", "shells", "stamps")
_SENTENCES = {
    "+": ("{name} buys {n} more.", "{name} finds {n} more.", "A friend brings {name} {n} more."),
    "-": ("{name} gives away {n}.", "{name} loses {n}.", "{name} sells {n}."),
    "*": ("By trading, {name} ends up with {n} times as many.", "Then {name} has {n} times as many as before."),
    "/": ("{name} splits them evenly into {n} bags and keeps one bag.", "{name} keeps one of {n} equal shares."),
}
_ASIDES = ("{other} has {n} {things}.", "{other} is {n} years old.", "It is {n} degrees outside.")


def generate(
    split: str,
    *,
    operations: int | tuple[int, int] = (2, 4),
    largest: int = 20,
    operators: str = "+-*/",
    asides: int = 0,
    count: int = 1000,
) -> "Problems":
    """The problems of a split.

    Args:
        split: `train` or `test`.
        operations: how many steps, or the least and the most.
        largest: the largest number a sentence of sums holds (factors and divisors: 5).
        operators: which of + - * / may occur.
        asides: sentences with a number that does not matter.
        count: how many problems.

    Raises:
        ConfigError: a value that cannot work.
    """
    span = (operations, operations) if isinstance(operations, int) else operations
    ends = span if isinstance(span, tuple) and len(span) == 2 else (None, None)
    if not all(_whole(end, 1, 50) for end in ends) or span[0] > span[1]:
        raise ConfigError(
            f"operations must be a whole number from 1 to 50, or the least and the most of them; got {operations!r}."
        )
    for name, value, low, high in (
        ("largest", largest, 5, 10**9), ("asides", asides, 0, 10), ("count", count, 1, 100_000),
    ):  # fmt: skip
        if not _whole(value, low, high):
            raise ConfigError(f"{name} must be a whole number from {low} to {high:,}, got {value!r}.")
    if not isinstance(operators, str) or not operators or set(operators) - set("+-*/"):
        raise ConfigError(f"operators must be some of '+-*/', got {operators!r}.")
    if split not in SPLITS:
        raise UnknownNameError(f"arithmetic has no split {split!r}.{near(split, SPLITS)}")
    return Problems(split, span, largest, operators, asides, count)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


class Problems(Mapping[str, Task]):
    """id -> task; each is made when asked for, always the same."""

    def __init__(self, split: str, span: tuple[int, int], largest: int, operators: str, asides: int, count: int):
        self._split, self._span, self._largest, self._operators = split, span, largest, operators
        self._asides, self._count = asides, count
        self._prefix = f"arithmetic-{split}-"
        self._make = lru_cache(maxsize=4096)(self._draw)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (f"{self._prefix}{index}" for index in range(self._count))

    def __getitem__(self, task_id: str) -> Task:
        number = task_id.removeprefix(self._prefix)
        if not task_id.startswith(self._prefix) or not number.isdecimal() or int(number) >= self._count:
            raise KeyError(task_id)
        return self._make(int(number))

    def _draw(self, index: int) -> Task:
        attempt = 0
        while True:
            draw = np.random.default_rng((index, attempt, SPLITS[self._split]))
            question, program, value = self._problem(draw)
            # the question's own checksum says to which split it belongs
            if (zlib.crc32(question.encode()) % 4 == 0) == (self._split == "test"):
                break
            attempt += 1
        solution = "\n".join(f"<<{expression}={result}>>" for expression, result in program)
        meta = {
            "solution": solution,
            "hops": len(program),
            "type": "".join(sorted({c for expression, _ in program for c in expression if c in "+-*/"})),
            "program": [expression for expression, _ in program],
        }
        return Task(f"{self._prefix}{index}", question, (str(value),), meta)

    def _problem(self, draw: np.random.Generator) -> tuple[str, list[tuple[str, int]], int]:
        def pick(options):
            return options[int(draw.integers(len(options)))]

        name, things = pick(_NAMES), pick(_THINGS)
        value, steps = self._chain(draw, int(draw.integers(self._span[0], self._span[1] + 1)))
        sentences, program = [f"{name} has {value} {things}."], []
        for operator, n in steps:
            sentences.append(pick(_SENTENCES[operator]).format(name=name, n=n))
            expression = f"{value}{operator}{n}"
            value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[operator]
            program.append((expression, value))
        for _ in range(self._asides):
            other = pick([person for person in _NAMES if person != name])
            aside = pick(_ASIDES).format(other=other, n=int(draw.integers(2, self._largest + 1)), things=things)
            sentences.insert(int(draw.integers(1, len(sentences) + 1)), aside)
        return f"{' '.join(sentences)} How many {things} does {name} have now?", program, value

    def _chain(self, draw: np.random.Generator, length: int) -> tuple[int, list[tuple[str, int]]]:
        """The first amount and each (operator, number), so that every amount is whole and positive."""
        value, steps = int(draw.integers(2, self._largest + 1)), []
        if set(self._operators) <= set("-/"):  # from the end, where these two always fit
            for _ in range(length):
                operator = self._operators[int(draw.integers(len(self._operators)))]
                n = int(draw.integers(2, 6)) if operator == "/" else int(draw.integers(1, self._largest + 1))
                value = value * n if operator == "/" else value + n
                steps.append((operator, n))
            return value, steps[::-1]
        first = value
        for _ in range(length):
            operator, n = self._step(draw, value)
            value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[operator]
            steps.append((operator, n))
        return first, steps

    def _step(self, draw: np.random.Generator, value: int) -> tuple[str, int]:
        """An operator and a number that keep the amount whole, positive and, unless only * may grow it, below 50 x `largest`."""
        divisors = [n for n in (2, 3, 4, 5) if value % n == 0 and value > n]
        possible = {"+": True, "-": value > 2, "*": value * 5 <= 50 * self._largest, "/": bool(divisors)}
        choices = [operator for operator in self._operators if possible[operator]]
        choices = choices or [operator for operator in self._operators if operator in "+*"]
        operator = choices[int(draw.integers(len(choices)))]
        if operator == "+":
            return operator, int(draw.integers(2, self._largest + 1))
        if operator == "-":
            return operator, int(draw.integers(1, min(value - 1, self._largest) + 1))
        if operator == "*":
            return operator, int(draw.integers(2, 6))
        return operator, divisors[int(draw.integers(len(divisors)))]
