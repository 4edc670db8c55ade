"""A Gymnasium space of all Python strings.

`gymnasium.spaces.Text` keeps its character set as a table: with full Unicode it takes seconds to construct and
hundreds of microseconds to test a transcript. Here membership is a type check, and sampling draws a few words.
"""

from typing import Any

from gymnasium.spaces import Space

_WORDS = ("<think>", "</think>", "<answer>", "</answer>", "who", "what", "12", "+", "7", "é", "\n")


class Unicode(Space[str]):
    """Every `str`. `sample()` is a short string that mixes words and tags (often malformed on purpose)."""

    def __init__(self, seed: int | None = None):
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        del mask, probability  # a string has no parts to mask
        return " ".join(_WORDS[i] for i in self.np_random.integers(len(_WORDS), size=self.np_random.integers(1, 8)))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unicode)

    def __hash__(self) -> int:
        return hash(Unicode)

    def __repr__(self) -> str:
        return "Unicode()"
