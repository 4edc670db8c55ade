"""Downloads against a real server on the loopback: whole, cut, resumed, refused, damaged, offline."""

import hashlib
import io
import json
import multiprocessing
import socket
import threading
import zipfile
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from swirl_env.errors import DataError, UnknownNameError
from swirl_env.tasks import download, load_tasks
from swirl_env.tasks.download import Source, fetch, listing

RECORDS = [
    {"question": f"What is {n}+1? {'x' * 2000}", "answer": f"<<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(300)
]
BODY = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PIECE = 1 << 16
"""What is written at once; of a cut download whole pieces are kept."""
SHA = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `body`; `cuts` are the bytes after which each next answer breaks off, `codes` what to say before serving."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.cuts, self.codes, self.ranges, self.type = BODY, '"v1"', [], [], True, "text/plain"
        self.asked, self.length = [], ""  # "": the true length; None: none is told

    def handle_error(self, *_):  # a client that hangs up is what some tests are about
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if server.codes:
            self.send_response(server.codes.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted, total = self.headers.get("Range"), len(server.body)
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start < total else 416)
            end = f"bytes {start}-{total - 1}/{total}" if start < total else f"bytes */{total}"
            self.send_header("Content-Range", end)
        else:
            self.send_response(200)
        rest = server.body[start:]
        if server.length is not None:
            self.send_header("Content-Length", server.length or str(len(rest)))
        self.send_header("Content-Type", server.type)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.cuts:
            self.wfile.write(rest[: server.cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(rest)
            self.close_connection = server.length != ""


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}/toy.jsonl"
        monkeypatch.setenv("SWIRL_CACHE", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(download, "WAIT_SECONDS", 0.001)
        monkeypatch.setitem(download.SOURCES, "toy", (Source("toy.jsonl", server.url, sha256=SHA),))
        server.offer = lambda **kwargs: monkeypatch.setitem(
            download.SOURCES, "toy", (Source(**{"file": "toy.jsonl", "url": server.url} | kwargs),)
        )
        server.folder = tmp_path / "data"
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_once_and_can_be_played(server):
    said = []
    assert next(where for name, _, where in listing() if name == "toy") is None
    (path,) = fetch("toy", said.append)
    assert path.read_bytes() == BODY
    assert "published" in said[0]
    assert next(where for name, _, where in listing() if name == "toy") == path
    assert len(load_tasks("gsm8k", "train", str(path)).tasks) == 300
    assert fetch("toy.jsonl", said.append) == [path]  # by the file's name
    assert len(server.asked) == 1
    assert {p.name for p in server.folder.iterdir()} == {"toy.jsonl", ".lock"}


def test_a_cut_download_goes_on_where_it_stopped(server):
    server.cuts = [5 * PIECE, 3 * PIECE, 0]
    said = []
    (path,) = fetch("toy", said.append)
    assert path.read_bytes() == BODY
    assert server.asked == [None, f"bytes={5 * PIECE}-", f"bytes={8 * PIECE}-", f"bytes={8 * PIECE}-"]
    assert sum("trying again" in line for line in said) == 3


def test_the_next_run_goes_on_where_this_one_gave_up(server):
    server.cuts = [5 * PIECE + 9, *[0] * download.ATTEMPTS]
    with pytest.raises(DataError, match="327,680 bytes are kept"):
        fetch("toy", lambda _: None)
    assert not (server.folder / "toy.jsonl").exists()
    fetch("toy", lambda _: None)
    assert server.asked[-1] == f"bytes={5 * PIECE}-"
    assert (server.folder / "toy.jsonl").read_bytes() == BODY


def test_a_whole_part_only_gets_its_name(server):
    server.folder.mkdir()
    (server.folder / "toy.jsonl.part").write_bytes(BODY)
    (server.folder / "toy.jsonl.etag").write_text('"v1"')
    server.cuts = [0]  # a second request would be seen to fail
    fetch("toy", lambda _: None)
    assert server.asked == [f"bytes={len(BODY)}-"]


@pytest.mark.parametrize("how", ["ignores ranges", "another version", "no validator", "a weak one"])
def test_where_it_cannot_go_on_it_begins_anew(server, how):
    server.folder.mkdir()
    (server.folder / "toy.jsonl.part").write_bytes(b"old" * 1000)
    if how != "no validator":
        (server.folder / "toy.jsonl.etag").write_text('"v0"' if how == "another version" else '"v1"')
    server.ranges = how != "ignores ranges"
    if how == "a weak one":
        server.etag = 'W/"v1"'
    (path,) = fetch("toy", lambda _: None)
    assert path.read_bytes() == BODY


def test_a_damaged_file_is_put_aside(server):
    server.body = BODY[:-2] + b"!\n"
    with pytest.raises(DataError, match="not the one published") as caught:
        fetch("toy", lambda _: None)
    assert "toy.jsonl.bad" in str(caught.value)
    assert not (server.folder / "toy.jsonl").exists()
    server.body = BODY
    assert fetch("toy", lambda _: None)[0].read_bytes() == BODY


def test_an_unpublished_checksum_is_recorded_and_then_held(server):
    server.offer(sha256=None)
    said = []
    (path,) = fetch("toy", said.append)
    assert "no checksum is published" in said[-1]
    assert SHA in said[-1]
    assert (server.folder / "SHA256SUMS").read_text() == f"{SHA}  toy.jsonl\n"
    fetch("toy", said.append)
    assert "recorded" in said[-1]
    path.unlink()
    server.body = BODY + b"\n"
    with pytest.raises(DataError, match="recorded in"):
        fetch("toy", said.append)
    server.body = BODY
    fetch("toy", said.append)


def test_server_errors(server):
    server.codes = [500, 503, 429]
    fetch("toy", lambda _: None)
    (server.folder / "toy.jsonl").unlink()
    server.codes = [404]
    with pytest.raises(DataError, match="404") as caught:
        fetch("toy", lambda _: None)
    assert server.url in str(caught.value)
    assert str(server.folder / "toy.jsonl") in str(caught.value)
    assert len(server.asked) == 5  # what is not there is not asked for again
    server.codes = [500] * download.ATTEMPTS
    with pytest.raises(DataError, match="500"):
        fetch("toy", lambda _: None)


def test_a_body_that_is_cut_without_a_length_is_not_taken_for_whole(server):
    server.offer()
    server.length, server.etag, server.cuts = None, "", [PIECE, 0]
    [path] = fetch("toy")
    assert path.read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_length_that_is_no_number_does_not_matter(server):
    server.offer()
    server.length = "many"
    [path] = fetch("toy")
    assert path.read_bytes() == BODY


def test_a_web_page_is_not_data(server):
    server.type = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="web page"):
        fetch("toy", lambda _: None)


def test_offline_it_says_where_the_file_is_and_where_to_put_it(server):
    with closing(socket.socket()) as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/toy.jsonl"
        server.offer(url=url)
        with pytest.raises(DataError) as caught:
            fetch("toy", lambda _: None)
    target = server.folder / "toy.jsonl"
    assert url in str(caught.value)
    assert str(target) in str(caught.value)
    target.write_bytes(BODY)  # by hand
    said = []
    assert fetch("toy", said.append) == [target]
    assert "recorded" in said[0]


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"data/{name}.jsonl", data)
            archive.writestr(f"__MACOSX/data/{name}.jsonl", b"?")
    return out.getvalue()


def test_zip_members_are_taken_out(server):
    server.body = zipped(one=BODY, two=b"{}\n", other=b"")
    server.offer(file="toy.zip", members=("one.jsonl", "two.jsonl"))
    paths = fetch("toy", lambda _: None)
    assert [path.name for path in paths] == ["one.jsonl", "two.jsonl"]
    assert paths[0].read_bytes() == BODY
    assert len(load_tasks("gsm8k", "train", str(paths[0])).tasks) == 300
    server.offer(file="toy.zip", members=("three.jsonl",))
    with pytest.raises(DataError, match="has no three.jsonl.*other.jsonl"):
        fetch("toy", lambda _: None)


def test_what_is_no_zip_file_is_said(server):
    server.offer(file="toy.zip", members=("one.jsonl",))
    with pytest.raises(DataError, match="not a zip file"):
        fetch("toy", lambda _: None)


def hold(folder, ready, done):
    with download._only_one(folder):
        ready.set()
        done.wait(30)


def test_two_processes_do_not_write_one_file(server):
    server.folder.mkdir()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(server.folder, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(DataError, match="Another process"):
            fetch("toy", lambda _: None)
    finally:
        done.set()
        other.join()
    fetch("toy", lambda _: None)


def test_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'musique'"):
        fetch("musiqe")
    with pytest.raises(DataError, match="path=FILE"):
        fetch("cofca")
    for _, source, _ in listing():
        assert source.url.startswith("http")
        assert source.sha256 is None or len(source.sha256) == 64


def test_cache_folder(monkeypatch, tmp_path):
    from swirl_env.cache import cache_folder

    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("SWIRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "swirl-env"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "swirl-env")
