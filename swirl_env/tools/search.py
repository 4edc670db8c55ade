"""Search over paragraphs: in-process BM25, no server.

Without a corpus the index is the task's own paragraphs, made when first searched (about 1 ms for ten paragraphs).
A result is the paragraph's title on one line and its text on the next; results are separated by an empty line.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import bm25s
import numpy as np

from swirl_env.errors import ConfigError, ToolError, UnknownNameError, near
from swirl_env.io import read_official
from swirl_env.tools.base import describe
from swirl_env.types import Document

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and tells of every index

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words: what BM25 counts."""
    return _WORD.findall(text.lower())


class Bm25:
    """BM25 (Lucene's variant, k1=1.5, b=0.75) over the titles and texts of some documents."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = documents
        self._index = bm25s.BM25()
        self._index.index([words(f"{d.title} {d.text}") or [""] for d in documents], show_progress=False)

    def search(self, query: str, k: int) -> list[Document]:
        """Up to `k` documents that share a word with the query, best first; ties keep the corpus order."""
        known = [word for word in words(query) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        order = np.argsort(-scores, kind="stable")[:k]
        return [self.documents[i] for i in order if scores[i] > 0]


@lru_cache(maxsize=4)
def _corpus(path: str) -> Bm25:
    documents = []
    for where, row in read_official(path):
        if not isinstance(row, dict) or not isinstance(row.get("title"), str) or not isinstance(row.get("text"), str):
            raise ConfigError(f'{where}: a corpus record is {{"title": ..., "text": ...}}, got {str(row)[:60]}.')
        documents.append(Document(row["title"], row["text"]))
    if not documents:
        raise ConfigError(f"{path}: the corpus is empty.")
    return Bm25(documents)


class Search:
    """The `search` tool.

    Args:
        k: how many paragraphs one call returns; 1 as in the paper (section 2.3: "the retrieved article").
        corpus: JSONL file of {"title", "text"} records; `None`: the task's own paragraphs.
    """

    name = "search"

    def __init__(self, k: int = 1, corpus: str | None = None):
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ConfigError(f"search: k must be a positive whole number, got {k!r}.")
        self.k, self.corpus = k, corpus
        self.description, self.parameters = describe(self.__call__)
        self.documents: Sequence[Document] = ()
        """What is searched; empty where a corpus is."""
        self._index = None if corpus is None else _corpus(corpus)

    def bind(self, documents: Sequence[Document]) -> None:
        """Search these paragraphs from now on, unless there is a corpus."""
        if self.corpus is None and documents != self.documents:  # tasks that share their paragraphs share the index
            self.documents, self._index = documents, None

    def __call__(self, query: str) -> str:
        """Looks up a paragraph.

        Args:
            query: Words to look for.
        """
        if not words(query):
            raise ToolError("The query holds no word. Write what to look for.")
        if self._index is None:
            if not self.documents:
                raise ToolError("There is nothing to search here.")
            self._index = Bm25(self.documents)
        found = self._index.search(query, self.k)
        if not found:
            raise ToolError(f"Nothing was found for {query[:100]!r}. Try other words.")
        return "\n\n".join(f"{document.title}\n{document.text}" for document in found)

    def __getstate__(self) -> dict[str, Any]:
        return {"k": self.k, "corpus": self.corpus, "documents": tuple(self.documents)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Search.__init__(self, state["k"], state["corpus"])
        self.bind(state["documents"])


SETTINGS = ("backend", "k", "corpus")


def make_search(settings: Any = None) -> Search:
    """The search tool that the env argument `search=` stands for."""
    settings = {"backend": settings} if isinstance(settings, str) else {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(f"search must be a back end's name or settings such as {{'k': 3}}, got {settings!r}.")
    for key in set(settings) - set(SETTINGS):
        raise UnknownNameError(f"search= has no setting {key!r}.{near(key, SETTINGS)}")
    if settings.get("backend", "bm25") != "bm25":
        raise UnknownNameError(
            f"No search back end is called {settings['backend']!r}.{near(settings['backend'], ['bm25'])}"
        )
    return Search(**{key: value for key, value in settings.items() if key != "backend"})
