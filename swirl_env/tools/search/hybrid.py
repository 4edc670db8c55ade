"""Hybrid retrieval: BM25 and dense ranks joined by reciprocal rank fusion.

Each ranking gives a document 1 / (5 + rank), ranks from 1, and the sums are sorted (Cormack, Clarke and Buettcher,
"Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009). Their constant is 60; 5, which
trusts the first ranks more, was chosen on training questions: 400 of HotPotQA over 12,000 paragraphs and 100 of MuSiQue over
6,088 (recall@2 and @5: 0.671, 0.838 and 0.461, 0.613, against 0.655, 0.823 and 0.463, 0.578 with 60), and the bundled ones.
Other weights than equal ones helped on one set and hurt on another.
"""

from collections.abc import Sequence

from swirl_env.tools.search.bm25 import Bm25
from swirl_env.tools.search.dense import Dense
from swirl_env.tools.search.ranking import Index
from swirl_env.types import Document

DEPTH = 100
"""How far down each ranking is read."""
CONSTANT = 5


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
