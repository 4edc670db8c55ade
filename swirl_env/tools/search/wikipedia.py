"""Live Wikipedia through `wikipedia-api`: a query finds pages, a page gives its title and introduction.

Below the library stands an HTTP transport of our own. It keeps every sound answer in an SQLite file of the cache folder,
so that a repeated query costs no request (delete the file to ask anew); it spaces requests evenly; and after 429, 5xx,
timeouts and garbage it asks again, with exponential back-off and jitter or as late as `Retry-After` says, until the
deadline of the search. A server that stays down is a sentence for the model, and the episode goes on.

Left out: several processes do not know of each other's requests; each keeps its own pace.
"""

import json
import os
import random
import sqlite3
import threading
import time
import warnings
from contextlib import closing
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import wikipediaapi
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential

from swirl_env.cache import cache_folder
from swirl_env.errors import ConfigError, ToolError
from swirl_env.types import Document

MAX_QUERY_CHARACTERS = 300
"""What MediaWiki's search takes."""
MAX_TEXT_CHARACTERS = 1_500
"""Longer introductions are cut at a word."""
_JITTER = random.Random()  # its own: the global random state is the user's


class Wikipedia:
    """Searches Wikipedia, or any MediaWiki with the TextExtracts extension. Safe to share between threads.

    Args:
        language: of Wikipedia, such as `en`.
        api: address of another MediaWiki's `api.php`; `None`: Wikipedia's.
        contact: a mail address or page where the operators find you, for the user agent (their policy asks for it).
        requests_per_second: at most, evenly spaced, over all threads of the process.
        deadline_seconds: of one search with all its requests and pauses.
    """

    def __init__(
        self,
        language: str = "en",
        api: str | None = None,
        contact: str | None = None,
        requests_per_second: float = 5.0,
        deadline_seconds: float = 20.0,
    ):
        texts = {"language": language, "api": api, "contact": contact}
        for name, text in texts.items():
            if text is not None and (
                not isinstance(text, str) or not text.isascii() or not text.isprintable() or not text
            ):
                raise ConfigError(f"search: {name} must be plain text, got {text!r}.")
        for name, value in {"requests_per_second": requests_per_second, "deadline_seconds": deadline_seconds}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"search: {name} must be a positive number, got {value!r}.")
        address = api or f"https://{language}.wikipedia.org/w/api.php"
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"search: api must be the address of an api.php, such as https://..., got {address!r}.")
        self._seconds = float(deadline_seconds)
        self._transport = _Transport(httpx.URL(address), 1 / requests_per_second)
        agent = f"swirl-env/{version('swirl-env')}" + (f" ({contact})" if contact else "")
        self._wiki = wikipediaapi.Wikipedia(agent, language, max_retries=0, transport=self._transport)

    def search(self, query: str, k: int) -> list[Document]:
        """Introductions of up to `k` pages, best first; none where nothing was found.

        Raises:
            ToolError: the server did not answer in time, or not in its language.
        """
        call = self._transport.call
        call.deadline, call.fresh = time.monotonic() + self._seconds, {}
        found = {}
        try:
            asked = query.encode(errors="replace").decode()[:MAX_QUERY_CHARACTERS]
            for page in self._wiki.search(asked, limit=k).pages.values():
                text = self._wiki.extracts(page, exintro=1).strip()
                if text:
                    found[page.title] = Document(page.title, _cut(text))  # two hits may lead to one page
        except (wikipediaapi.WikipediaException, LookupError, TypeError, AttributeError, ValueError) as error:
            call.fresh = {}  # what was not understood is not kept
            raise _unavailable(f"a strange answer, {type(error).__name__}") from error
        finally:
            for url, body in call.fresh.items():
                self._transport.store.put(url, body)
        return list(found.values())


@lru_cache(maxsize=8)
def _open(folder: Path, settings: tuple[tuple[str, Any], ...]) -> Wikipedia:
    del folder
    return Wikipedia(**dict(settings))


def open_wikipedia(**settings: Any) -> Wikipedia:
    """One `Wikipedia` for all environments of a process with the same settings: they share its pace."""
    return _open(cache_folder(), tuple(sorted(settings.items())))


@lru_cache(maxsize=2)
def _client(process: int) -> httpx.Client:
    """Connections, kept open; a forked process has its own. Proxies of the environment are used."""
    del process
    return httpx.Client()


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text
    return text[:MAX_TEXT_CHARACTERS].rpartition(" ")[0] + " ..."


def _unavailable(reason: str) -> ToolError:
    return ToolError(f"The search server does not answer now ({reason}). Go on with what you know, or try again later.")


class _Again(Exception):
    """An answer after which the same request may succeed; `after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


_BACK_OFF = wait_exponential(multiplier=0.25, max=8)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(getattr(error, "after", 0.0), _BACK_OFF(state) * _JITTER.uniform(1, 1.5))


class _Transport(httpx.BaseTransport):
    """Answers from the cache, else from `api` (whatever host the library names), politely and until the deadline."""

    def __init__(self, api: httpx.URL, gap_seconds: float):
        self.api, self._gap = api, gap_seconds
        self.store = _Store(cache_folder() / "search" / "wikipedia.sqlite3")
        self.call = threading.local()
        """Of the search that runs in this thread: `deadline` (monotonic seconds) and `fresh`, answers not yet kept."""
        self._lock, self._free = threading.Lock(), 0.0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = str(self.api.copy_with(query=request.url.query))
        body = self.store.get(url)
        if body is None:
            left = self.call.deadline - time.monotonic()
            retrying = Retrying(
                retry=retry_if_exception_type(_Again), wait=_pause, stop=stop_before_delay(left), reraise=True
            )
            try:
                body = self.call.fresh[url] = retrying(self._fetch, url, request.headers["User-Agent"])
            except _Again as failure:
                raise _unavailable(str(failure)) from failure
        return httpx.Response(200, content=body)

    def _fetch(self, url: str, agent: str) -> bytes:
        with self._lock:
            start = max(time.monotonic(), self._free)
            left = self.call.deadline - start
            if left <= 0:
                raise _Again("the deadline passed")
            self._free = start + self._gap
        time.sleep(max(0.0, start - time.monotonic()))
        body = bytearray()
        try:
            with _client(os.getpid()).stream("GET", url, headers={"User-Agent": agent}, timeout=left) as answer:
                if answer.status_code == 429 or answer.status_code >= 500:
                    after = answer.headers.get("Retry-After", "")
                    raise _Again(f"status {answer.status_code}", float(after) if after.isdecimal() else 0.0)
                if answer.status_code != 200:
                    raise _unavailable(f"status {answer.status_code}")
                for chunk in answer.iter_bytes():
                    body += chunk
                    if time.monotonic() > self.call.deadline:
                        raise _Again("too slow")
        except httpx.HTTPError as error:
            raise _Again(type(error).__name__) from error
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise _Again("an answer that is not JSON") from None
        if not isinstance(data, dict) or "error" in data or not isinstance(data.get("query"), dict):
            raise _Again("an answer without a result")
        return bytes(body)


class _Store:
    """Answers by address in an SQLite file, which several processes may use. A file that cannot be used is no cache."""

    def __init__(self, path: Path):
        self._path = path

    def _run(self, statement: str, *values: Any) -> Any:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=10)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS answers (url TEXT PRIMARY KEY, body BLOB)")
                return connection.execute(statement, values).fetchone()
        except (OSError, sqlite3.Error) as error:
            warnings.warn(f"{self._path} keeps no answers ({error}); delete it.", RuntimeWarning, stacklevel=2)
            return None

    def get(self, url: str) -> bytes | None:
        row = self._run("SELECT body FROM answers WHERE url = ?", url)
        return None if row is None else row[0]

    def put(self, url: str, body: bytes) -> None:
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?)", url, body)
