"""The `wikipedia` back end against a server on the loopback that speaks the MediaWiki API, in good health and in bad."""

import json
import os
import pickle
import random
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from swirl_env.errors import ConfigError, ToolError
from swirl_env.tools import call_tool
from swirl_env.tools.search import make_search
from swirl_env.tools.search.wikipedia import _client
from swirl_env.types import ToolCall

PAGES = {
    "Big Fish": "Big Fish is a 2003 film directed by Tim Burton.",
    "Beyoncé": "Beyoncé Giselle Knowles-Carter is a singer.",
    "Østfold – 東京": "A page whose title has letters of many scripts.",
    "Long": "word " * 2_000,
    "Empty": "",
}
REDIRECTS = {"Queen B": "Beyoncé"}


class MediaWiki(ThreadingHTTPServer):
    """`faults`: what the next requests get instead of an answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.seen, self.times, self.agents = deque(), [], [], []
        self.api = f"http://127.0.0.1:{self.server_port}/w/api.php"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        asked = {key: values[0] for key, values in parse_qs(urlparse(self.path).query).items()}
        self.server.seen.append(asked)
        self.server.times.append(time.monotonic())
        self.server.agents.append(self.headers["User-Agent"])
        fault = self.server.faults.popleft() if self.server.faults else None
        if fault is not None:
            fault(self)
        else:
            self.reply(200, json.dumps(answer(asked)).encode(), {"Content-Type": "application/json"})


def answer(asked):
    if asked.get("list") == "search":
        titles = [t for t in [*PAGES, *REDIRECTS] if asked["srsearch"].lower() in t.lower()]
        if asked["srsearch"] == "ghost":
            titles = ["Ghost"]  # deleted since it was indexed
        hits = [{"ns": 0, "title": title, "pageid": 1} for title in titles[: int(asked["srlimit"])]]
        return {"batchcomplete": "", "query": {"searchinfo": {"totalhits": len(hits)}, "search": hits}}
    title = REDIRECTS.get(asked["titles"], asked["titles"])
    if title not in PAGES:
        return {"batchcomplete": "", "query": {"pages": {"-1": {"ns": 0, "title": title, "missing": ""}}}}
    return {"query": {"pages": {"7": {"pageid": 7, "ns": 0, "title": title, "extract": PAGES[title]}}}}


def status(code, **headers):
    return lambda handler: handler.reply(code, b"busy", {k.replace("_", "-"): v for k, v in headers.items()})


def body(raw):
    return lambda handler: handler.reply(200, raw)


def silence(seconds):
    return lambda handler: time.sleep(seconds) or handler.reply(200, b"{}")


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


@pytest.fixture
def wiki(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = MediaWiki()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    _client(os.getpid()).close()
    _client.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


def search_at(wiki, **settings):
    defaults = {"requests_per_second": 1000, "deadline_seconds": 8}
    return make_search({"backend": "wikipedia", "api": wiki.api, **defaults, **settings})


def test_title_and_introduction(wiki):
    assert search_at(wiki)(query="big fish") == f"Big Fish\n{PAGES['Big Fish']}"
    assert wiki.seen[1]["exintro"] == "1" and wiki.seen[1]["explaintext"] == "1"


@pytest.mark.parametrize("title", ["Beyoncé", "Østfold – 東京"])
def test_titles_of_any_script(wiki, title):
    assert search_at(wiki)(query=title) == f"{title}\n{PAGES[title]}"


def test_a_redirect_shows_the_page_it_leads_to(wiki):
    assert search_at(wiki)(query="queen b") == f"Beyoncé\n{PAGES['Beyoncé']}"


def test_k_pages_and_long_ones_are_cut(wiki):
    assert [block.split("\n")[0] for block in search_at(wiki, k=3)(query="b").split("\n\n")] == ["Big Fish", "Beyoncé"]
    long = search_at(wiki)(query="long")
    assert len(long) < 1_600 and long.endswith("word ...")


@pytest.mark.parametrize("query", ["no such thing", "ghost", "empty", "\ud800 x", "x" * 5_000])
def test_a_page_that_does_not_exist_is_an_answer(wiki, query):
    with pytest.raises(ToolError, match="Nothing was found"):
        search_at(wiki)(query=query)
    assert all(len(asked.get("srsearch", "")) <= 300 for asked in wiki.seen)


def test_a_repeated_query_costs_no_request_in_any_process(wiki):
    search = search_at(wiki)
    first = search(query="big fish")
    count = len(wiki.seen)
    assert search(query="big fish") == first
    other = search_at(wiki, requests_per_second=999)  # another client of the same cache, as in another process
    assert other(query="big fish") == first
    assert len(wiki.seen) == count


def test_user_agent(wiki):
    search_at(wiki, contact="someone@example.org")(query="big fish")
    assert wiki.agents[0].startswith("swirl-env/") and "(someone@example.org)" in wiki.agents[0]


@pytest.mark.parametrize(
    "faults",
    [
        [status(500)], [status(503)] * 3, [status(429)], [hang_up], [body(b"<html>sorry</html>")], [body(b"")],
        [body(b"[1]")], [body(b'{"error": {"code": "ratelimited"}}')], [body(b"\xff\xfe")], [body(b'{"query": []}')],
        [status(200, Content_Encoding="gzip")], [status(429, Retry_After="nonsense")],
    ],
)  # fmt: skip
def test_asks_again_after_a_fault(wiki, faults):
    wiki.faults.extend(faults)
    assert search_at(wiki)(query="big fish").startswith("Big Fish")
    assert len(wiki.seen) == len(faults) + 2


def test_retry_after_is_kept(wiki):
    wiki.faults.append(status(429, Retry_After="1"))
    search_at(wiki)(query="big fish")
    assert wiki.times[1] - wiki.times[0] >= 1.0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (status(503), "status 503"), (status(429, Retry_After="3600"), "status 429"), (silence(3), "ReadTimeout"),
        (body(b"garbage"), "not JSON"), (status(403), "status 403"), (hang_up, "Error"),
        (body(b'{"query": {"search": [{}]}}'), "strange answer"),
    ],
)  # fmt: skip
def test_a_server_that_stays_down_is_a_sentence_in_time(wiki, fault, says):
    wiki.faults.extend([fault] * 50)
    search = search_at(wiki, deadline_seconds=1)
    start = time.monotonic()
    result = call_tool({"search": search}, ToolCall("search", {"query": "big fish"}))
    assert time.monotonic() - start < 10
    assert result.error == "tool_error"
    assert says in result.text or "the deadline passed" in result.text  # a busy machine may oversleep the last pause
    assert "Go on with what you know" in result.text
    wiki.faults.clear()
    assert search_at(wiki)(query="big fish").startswith("Big Fish")  # nothing bad was kept


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path))
    search = make_search({"backend": "wikipedia", "api": "http://127.0.0.1:9/api.php", "deadline_seconds": 0.5})
    with pytest.raises(ToolError, match="ConnectError"):
        search(query="big fish")


def test_requests_are_spaced_over_all_threads(wiki):
    search = search_at(wiki, requests_per_second=20)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: call_tool({"search": search}, ToolCall("search", {"query": f"none {n}"})), range(8)))
    assert len(wiki.times) == 8
    assert max(wiki.times) - min(wiki.times) >= 7 / 20 - 0.05


def test_the_global_random_state_is_left_alone(wiki):
    wiki.faults.append(status(500))
    random.seed(5)
    state = random.getstate()
    search_at(wiki)(query="big fish")
    assert random.getstate() == state


def test_a_broken_cache_file_is_no_cache(wiki, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "wikipedia.sqlite3").write_bytes(b"this is no database" * 100)
    with pytest.warns(RuntimeWarning, match="wikipedia.sqlite3"):
        assert search_at(wiki)(query="big fish").startswith("Big Fish")


def test_pickles_with_its_settings(wiki):
    search = pickle.loads(pickle.dumps(search_at(wiki, k=2)))
    assert search.k == 2 and search(query="big fish").startswith("Big Fish")
    search.bind([])  # a task's own paragraphs change nothing
    assert search(query="big fish").startswith("Big Fish")


@pytest.mark.parametrize(
    "settings",
    [
        {"api": "ftp://x"}, {"api": 5}, {"language": ""}, {"contact": "a\r\nX: y"}, {"requests_per_second": 0},
        {"deadline_seconds": "1"}, {"deadline_seconds": True}, {"k": 0},
    ],
)  # fmt: skip
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match="search: "):
        make_search({"backend": "wikipedia", **settings})
