"""The `search` tool: one name for the model, four back ends by name.

A result is a paragraph's title on one line and its text on the next; results are separated by an empty line.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from swirl_env.errors import ConfigError, ToolError, UnknownNameError, near
from swirl_env.tools.base import describe
from swirl_env.tools.search.bm25 import Bm25, words
from swirl_env.tools.search.corpus import open_corpus
from swirl_env.tools.search.ranking import Index
from swirl_env.types import Document

SETTINGS: dict[str, tuple[str, ...]] = {
    "bm25": ("k", "corpus"),
    "dense": ("k", "corpus", "model"),
    "hybrid": ("k", "corpus", "model"),
    "wikipedia": ("k", "language", "api", "contact", "requests_per_second", "deadline_seconds"),
}
"""Back end -> what may be set for it."""
MAX_QUERY_CHARACTERS = 2_000
"""What follows is not read: a model that writes on and on does not search on and on."""


def make_search(settings: dict[str, Any] | str | None = None) -> "Search":
    """The tool that `search=` of an environment stands for: settings, a back end's name, or `None` for the default.

    Raises:
        UnknownNameError: no such back end, or it has no such setting; names the near match.
        ConfigError: a value that cannot work, or a package that is missing.
        DataError: the corpus file is missing or broken, with the place.
    """
    if settings is None or isinstance(settings, str):
        settings = {} if settings is None else {"backend": settings}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"search must be a back end's name or settings such as {{'k': 3}}, got {settings!r}.")
    return Search(**settings)


class Search:
    """The `search` tool.

    Args:
        k: how many paragraphs one call returns; 1 as in the paper (section 2.3: "the retrieved article").
        corpus: file of {"title", "text"} records (JSONL or a JSON array, plain or gzip); `None`: the task's own
            paragraphs. Not for `wikipedia`.
        backend: `bm25`, `dense`, `hybrid` or `wikipedia`.
        settings: `model` of `dense` and `hybrid` (see `Dense`); `language`, `api`, `contact`, `requests_per_second` and
            `deadline_seconds` of `wikipedia` (see `Wikipedia`).

    Raises:
        UnknownNameError: no such back end or setting, with the near match.
        ConfigError: a value that cannot work, or a package that is missing.
        DataError: the corpus file is missing or broken, with the place.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/HotPotQA-v0", search={"backend": "bm25", "k": 1})
        >>> text, info = env.reset(seed=0)
        >>> text, *_, info = env.step("<search>Unreal series studio</search>")
        >>> print(info["step"].observation[:100])
        <result>Digital Extremes
        Digital Extremes is a Canadian computer and video game development studio f
    """

    name = "search"

    def __init__(self, k: int = 1, corpus: str | None = None, backend: str = "bm25", **settings: Any):
        if not isinstance(backend, str) or backend not in SETTINGS:
            raise UnknownNameError(f"No search back end is called {backend!r}.{near(backend, SETTINGS)}")
        given = settings if corpus is None else {"corpus": corpus, **settings}
        for key in given:
            if key not in SETTINGS[backend]:
                raise UnknownNameError(
                    f"search= has no setting {key!r} for the back end {backend!r}."
                    f"{near(key, [*SETTINGS[backend], 'backend'])}"
                )
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ConfigError(f"search: k must be a positive whole number, got {k!r}.")
        for key in ("corpus", "model"):
            if given.get(key) is not None and (not isinstance(given[key], str) or not given[key]):
                raise ConfigError(f"search: {key} must be a name or a path, got {given[key]!r}.")
        self.k, self.corpus, self.backend, self.settings = k, corpus, backend, settings
        self.description, self.parameters = describe(self.__call__)
        self.documents: Sequence[Document] = ()
        """What is searched; empty where a corpus or Wikipedia is."""
        self._find: Callable[[str, int], list[Document]] | None = None
        if backend == "wikipedia":
            from swirl_env.tools.search.wikipedia import open_wikipedia

            self._find = open_wikipedia(**settings).search
        elif corpus is not None:
            self._find = _finder(open_index(backend, open_corpus(corpus), **settings))
        elif backend != "bm25":
            from swirl_env.tools.search.dense import load_encoder

            load_encoder(settings.get("model"))  # what is missing is told now, not in the first episode

    def bind(self, documents: Sequence[Document]) -> None:
        """Search these paragraphs from now on, unless there is a corpus or Wikipedia."""
        if self.corpus is None and self.backend != "wikipedia" and documents is not self.documents:
            self.documents, self._find = documents, None

    def __call__(self, query: str) -> str:
        """Looks up a paragraph.

        Args:
            query: Words to look for.
        """
        query = query[:MAX_QUERY_CHARACTERS]
        if not words(query):
            raise ToolError("The query holds no word. Write what to look for.")
        if self._find is None:
            if not self.documents:
                raise ToolError("There is nothing to search here.")
            self._find = _finder(open_index(self.backend, tuple(self.documents), **self.settings))
        found = self._find(query, self.k)
        if not found:
            raise ToolError(f"Nothing was found for {query[:100]!r}. Try other words.")
        return "\n\n".join(f"{document.title}\n{document.text}" for document in found)

    def __getstate__(self) -> dict[str, Any]:
        settings = {"k": self.k, "corpus": self.corpus, "backend": self.backend, **self.settings}
        return {"settings": settings, "documents": tuple(self.documents)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Search.__init__(self, **state["settings"])
        self.bind(state["documents"])


@lru_cache(maxsize=64)
def open_index(backend: str, documents: Sequence[Document], model: str | None = None) -> Index:
    """An index of a corpus or of a task's own paragraphs; kept, for tasks come again."""
    if backend == "bm25":
        return Bm25(documents)
    if backend == "dense":
        from swirl_env.tools.search.dense import Dense

        return Dense(documents, model)
    from swirl_env.tools.search.hybrid import Hybrid

    return Hybrid(documents, model)


def _finder(index: Index) -> Callable[[str, int], list[Document]]:
    return lambda query, k: [index.documents[i] for i in index.rank(query, k)]
