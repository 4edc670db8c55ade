"""Search over paragraphs: BM25, dense vectors, both, or live Wikipedia; no server of our own."""

from swirl_env.tools.search.bm25 import Bm25, words
from swirl_env.tools.search.tool import Search, make_search

__all__ = ["Bm25", "Search", "make_search", "words"]
