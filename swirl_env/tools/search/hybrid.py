"""Hybrid retrieval: BM25 and dense ranks joined by reciprocal rank fusion.

Each ranking gives a document 1 / (10 + rank), ranks from 1, and the sums are sorted (Cormack, Clarke and Buettcher,
"Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009). Their constant is 60;
10, which trusts the first ranks more, was chosen on training questions of HotPotQA and MuSiQue (recall@2 and @5 of 400
and 100 questions: 0.668, 0.834 and 0.439, 0.582, against 0.656, 0.819 and 0.437, 0.558 with 60).
"""

from collections.abc import Sequence

from swirl_env.tools.search.bm25 import Bm25
from swirl_env.tools.search.dense import Dense
from swirl_env.tools.search.ranking import Index
from swirl_env.types import Document

DEPTH = 100
"""How far down each ranking is read."""
CONSTANT = 10


def fuse(rankings: Sequence[Sequence[int]]) -> list[int]:
    """One ranking out of several, best first; ties keep the order of the positions."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, position in enumerate(ranking, 1):
            scores[position] = scores.get(position, 0.0) + 1 / (CONSTANT + rank)
    return sorted(scores, key=lambda position: (-scores[position], position))


class Hybrid:
    """Reciprocal rank fusion of `Bm25` and `Dense`; the arguments are those of `Dense`."""

    def __init__(self, documents: Sequence[Document], model: str | None = None):
        self.documents = documents
        self.parts: tuple[Index, ...] = (Bm25(documents), Dense(documents, model))

    def rank(self, query: str, k: int) -> list[int]:
        """Positions of up to `k` documents, best first."""
        return fuse([part.rank(query, max(k, DEPTH)) for part in self.parts])[:k]
