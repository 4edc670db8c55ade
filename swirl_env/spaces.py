"""A Gymnasium space of all Python strings.

`gymnasium.spaces.Text` keeps its character set as a table: with full Unicode it takes seconds to construct and
hundreds of microseconds to test a transcript. Here membership is a type check, and sampling draws a few words. Vector
environments work with it, `AsyncVectorEnv` with its shared memory too: texts of any length travel as files in memory.
"""

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from gymnasium.spaces import Space, flatten, flatten_space, unflatten
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory

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


class SharedTexts:
    """N strings that worker processes write and the main process reads; a deep copy is their tuple now."""

    def __init__(self, n: int):
        memory = Path("/dev/shm")
        usable = memory.is_dir() and os.access(memory, os.W_OK)
        self._folder = Path(tempfile.mkdtemp(prefix="swirl-texts-", dir=memory if usable else None))
        self._n = n
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def write(self, index: int, text: str) -> None:
        (self._folder / str(index)).write_bytes(text.encode("utf-8", "surrogatepass"))

    def __getitem__(self, index: int) -> str:
        file = self._folder / str(range(self._n)[index])
        return file.read_bytes().decode("utf-8", "surrogatepass") if file.exists() else ""

    def __len__(self) -> int:
        return self._n

    def __deepcopy__(self, memo: Any) -> tuple[str, ...]:
        return tuple(self)  # type: ignore[arg-type]  # iterates by index


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker that ends must not take the others' texts away
        shutil.rmtree(folder, ignore_errors=True)


@create_shared_memory.register(Unicode)
def _create(space: Unicode, n: int = 1, ctx: Any = None) -> SharedTexts:
    return SharedTexts(n)


@read_from_shared_memory.register(Unicode)
def _read(space: Unicode, shared_memory: Any, n: int = 1) -> Any:
    return shared_memory


@write_to_shared_memory.register(Unicode)
def _write(space: Unicode, index: int, value: Any, shared_memory: Any) -> None:
    shared_memory.write(index, value)


flatten_space.register(Unicode, lambda space: space)
flatten.register(Unicode, lambda space, x: x)
unflatten.register(Unicode, lambda space, x: x)
