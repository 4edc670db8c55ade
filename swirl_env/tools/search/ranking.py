"""What an index promises, and how the best of many scores are found."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from swirl_env.types import Document


class Index(Protocol):
    """Documents that can be ranked for a query."""

    documents: Sequence[Document]

    def rank(self, query: str, k: int) -> list[int]:
        """Positions of up to `k` documents, best first; ties keep the order of the documents."""
        ...


def top(scores_N: np.ndarray, k: int) -> list[int]:
    """Positions of the `k` highest scores, best first; ties keep the order. O(N), not a sort of everything."""
    kept = np.arange(len(scores_N))
    if k < len(scores_N):
        kept = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])
    return kept[np.argsort(-scores_N[kept], kind="stable")][:k].tolist()
