"""Hybrid retrieval: BM25 and dense ranks joined by reciprocal rank fusion.

Each ranking gives a document weight / (5 + rank), ranks from 1, and the sums are sorted (Cormack, Clarke and Buettcher,
"Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009; their constant is 60 and
their weights are equal). The constant and the double weight of the dense ranking were chosen on the bundled training questions
of HotPotQA, MuSiQue and BeerQA: of 4 constants and 4 weights the only pair that was at least as good as the better
part in recall@2 and @5 on all three.
"""

from collections.abc import Sequence

from swirl_env.tools.search.bm25 import Bm25
from swirl_env.tools.search.dense import Dense
from swirl_env.tools.search.ranking import Index
from swirl_env.types import Document

DEPTH = 100
"""How far down each ranking is read."""
CONSTANT = 5
WEIGHTS = (1.0, 2.0)
"""Of the BM25 and the dense ranking."""


def fuse(rankings: Sequence[Sequence[int]], weights: Sequence[float] = WEIGHTS) -> list[int]:
    """One ranking out of several, best first; ties keep the order of the positions."""
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, position in enumerate(ranking, 1):
            scores[position] = scores.get(position, 0.0) + weight / (CONSTANT + rank)
    return sorted(scores, key=lambda position: (-scores[position], position))


class Hybrid:
    """Reciprocal rank fusion of `Bm25` and `Dense`; the arguments are those of `Dense`."""

    def __init__(self, documents: Sequence[Document], model: str | None = None):
        self.documents = documents
        self.parts: tuple[Index, ...] = (Bm25(documents), Dense(documents, model))

    def rank(self, query: str, k: int) -> list[int]:
        """Positions of up to `k` documents, best first."""
        return fuse([part.rank(query, max(k, DEPTH)) for part in self.parts])[:k]
