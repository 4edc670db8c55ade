"""BM25 in process: Lucene's variant (k1 = 1.5, b = 0.75) over titles and texts, indexed by the library `bm25s`.

A title's words count three times. On training questions (500 of HotPotQA over 12,000 paragraphs, 100 of MuSiQue over 6,088) this
took recall@2 from 0.638 to 0.670 and from 0.403 to 0.427, recall@5 from 0.803 to 0.812 and from 0.497 to 0.536; four times
was like three, and neither stemming nor leaving out function words helped.

For every word the index holds the documents that have it (ascending) and what it adds to their scores. A query adds up
the lists of its words, rare ones first; once no other document can reach the best k, frequent words are looked up for
those in the race alone (MaxScore: Turtle and Flood, "Query evaluation: strategies and optimizations", 1995), which is
exact. For a corpus file the index is built once, kept in the cache folder and memory-mapped from then
on, the vocabulary too, so that opening it costs milliseconds at any size.

Chosen by measurement beside tantivy 0.27 (`swirl bench speed --only search`; processor time of a query, 2 busy cores): at
12,000 paragraphs 0.49 against 0.66 ms, at 1,000,000 9.4 against 22.1 ms; tantivy needs less memory (250 against 637 MB
resident, 0.35 against 4.0 GB to build) and builds faster (169 against 298 s).
"""

import logging
import re
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from importlib import import_module
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from swirl_env.cache import build_once
from swirl_env.tools.search.corpus import FORMAT, Corpus
from swirl_env.tools.search.ranking import top
from swirl_env.types import Document


def _library() -> Any:
    """bm25s without JAX: where that is installed, bm25s runs it once as it is imported, which takes three quarters of a GPU's memory."""
    modules: dict[str, Any] = sys.modules
    known = modules.get("jax")
    modules["jax"] = None  # an import of it now fails, and bm25s goes on without
    try:
        return import_module("bm25s")
    finally:
        del modules["jax"]
        if known is not None:
            modules["jax"] = known


bm25s = _library()
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and tells of every index

_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+)")  # kana and Chinese characters
TITLE_WEIGHT = 3
"""How often a title's words count."""
_WORD = re.compile(r"\w+")
_FEW = 200_000
"""Entries of all lists of a query that are simply added up."""
_SHORT = 50_000
"""Documents in a list that is short enough to take a bound from."""
_ROUNDING = 1e-4
"""More than float32 sums of scores can be off."""
_PARTS = ("data", "indices", "indptr")


def words(text: str) -> list[str]:
    """Lower-case words: what BM25 counts. Where a script writes no blanks, each two neighbours are one."""
    if text.isascii():
        return _WORD.findall(text.lower())
    found: list[str] = []
    for word in _WORD.findall(unicodedata.normalize("NFC", text).lower()):
        for part in filter(None, _UNSPACED.split(word)):
            pairs = len(part) > 1 and _UNSPACED.fullmatch(part)
            found += [part[i : i + 2] for i in range(len(part) - 1)] if pairs else [part]
    return found


class Bm25:
    """BM25 over the titles and texts of some documents; of a `Corpus` the index is kept on disk."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = documents
        self._lists: dict[str, np.ndarray]
        self._vocabulary: dict[str, int] | _Vocabulary
        if isinstance(documents, Corpus):
            folder = documents.folder.parent / f"bm25-{FORMAT}-{bm25s.__version__}"
            build_once(folder, self._write)
            self._lists = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _PARTS}
            self._vocabulary = _Vocabulary(folder)
        else:
            self._lists, self._vocabulary = _index(documents)

    def _write(self, folder: Path) -> None:
        lists, vocabulary = _index(self.documents)
        for name in _PARTS:
            np.save(folder / f"{name}.npy", lists[name])
        _Vocabulary.write(folder, vocabulary)

    def rank(self, query: str, k: int) -> list[int]:
        """Positions of up to `k` documents that share a word with the query, best first; ties keep the order."""
        lists = sorted(self._found(query), key=lambda found: len(found[0]))
        scores_N, done = np.zeros(len(self.documents), np.float32), 0
        if sum(len(ids) for ids, _ in lists) <= _FEW:
            for ids, gains in lists:
                np.add.at(scores_N, ids, gains)
            kept = np.flatnonzero(scores_N)
            return kept[top(scores_N[kept], k)].tolist()
        # what the lists from here on can still add to any document
        rest = np.cumsum([0.0, *(gains.max() for _, gains in reversed(lists))])[::-1] + _ROUNDING
        bound = 0.0
        while done < len(lists) and bound <= rest[done]:
            ids, gains = lists[done]
            np.add.at(scores_N, ids, gains)
            done += 1
            if k <= len(ids) <= _SHORT:  # the k-th best of these is a lower bound of the k-th best of all
                bound = max(bound, float(np.partition(scores_N[ids], -k)[-k]))
        kept = np.flatnonzero(scores_N > max(0.0, bound - rest[done]))
        scores = scores_N[kept]
        for j in range(done, len(lists)):  # frequent words: only for the documents that are still in the race
            ids, gains = lists[j]
            at = np.minimum(np.searchsorted(ids, kept), len(ids) - 1)
            scores += np.where(ids[at] == kept, gains[at], np.float32(0))
            bound = max(bound, float(np.partition(scores, -k)[-k]))
            racing = scores > bound - rest[j + 1]
            kept, scores = kept[racing], scores[racing]
        return kept[top(scores, k)].tolist()

    def _found(self, query: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(documents, what the word adds to each) of each word of the query that the index knows."""
        for word in words(query):
            at = self._vocabulary.get(word)
            if at is not None:
                part = slice(self._lists["indptr"][at], self._lists["indptr"][at + 1])
                yield self._lists["indices"][part], self._lists["data"][part]

    def search(self, query: str, k: int) -> list[Document]:
        """The documents of `rank`."""
        return [self.documents[i] for i in self.rank(query, k)]


def _index(documents: Sequence[Document]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(what each word adds to which documents, the number of each word)."""
    quiet = not isinstance(documents, Corpus) or len(documents) < 50_000
    vocabulary: dict[str, int] = {}
    tokens = [
        [vocabulary.setdefault(word, len(vocabulary)) for word in words(f"{d.title} " * TITLE_WEIGHT + d.text) or [""]]
        for d in tqdm(documents, "index", unit="paragraph", disable=quiet, mininterval=1)
    ]
    index = bm25s.BM25()
    index.index((tokens, vocabulary), create_empty_token=False, show_progress=not quiet)
    return index.scores, vocabulary


class _Vocabulary:
    """Word -> number, memory-mapped: the words in order of their bytes, found by bisection."""

    def __init__(self, folder: Path):
        with (folder / "words.bin").open("rb") as file:
            self._bytes = mmap(file.fileno(), 0, access=ACCESS_READ)
        self._ends = memoryview(np.load(folder / "word_ends.npy", mmap_mode="r"))
        self._numbers = memoryview(np.load(folder / "word_numbers.npy", mmap_mode="r"))

    @staticmethod
    def write(folder: Path, vocabulary: dict[str, int]) -> None:
        ordered = sorted((word.encode(errors="surrogatepass"), number) for word, number in vocabulary.items())
        # one byte more: an empty file cannot be mapped
        (folder / "words.bin").write_bytes(b"".join(word for word, _ in ordered) + b"\0")
        np.save(folder / "word_ends.npy", np.cumsum([len(word) for word, _ in ordered]))
        np.save(folder / "word_numbers.npy", np.array([number for _, number in ordered], np.int32))

    def _word(self, at: int) -> bytes:
        return self._bytes[self._ends[at - 1] if at else 0 : self._ends[at]]

    def get(self, word: str) -> int | None:
        key = word.encode(errors="surrogatepass")
        at = bisect_left(range(len(self._ends)), key, key=self._word)
        return self._numbers[at] if at < len(self._ends) and self._word(at) == key else None
