"""A server that speaks OpenAI's chat completions over HTTP without a model, and fails on purpose: for tests of clients.

    python -m swirl_agents.testing_server --reply "<answer>42</answer>" --faults 0.2

A token is a word with the blanks before it. What a real server checks, this one does: key, model, context length, stop
strings (stripped, as servers do), `n`, `max_tokens`, log-probs, token ids, `stream` (a whole message in one event). Adapters are loaded
and unloaded as vLLM 0.33 does it.
"""

import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

FAULTS = ("429", "500", "hang", "truncated", "wrong")
"""Too many requests with `Retry-After: 1`, a crash, no answer, half of the JSON, JSON that is no completion. There are also
`drip` (a byte each tenth of a second), `close` (in the middle of the reply) and `empty` (no text)."""


class ChatServer:
    """The server, in threads of this process while the `with` block runs.

    Args:
        reply: the text of each reply, or a function of the request's body that gives a text or a message.
        seconds: that a reply takes.
        faults: share of requests that fail, drawn from `FAULTS`; or what happens to the first, second, ... request, a
            name or `None` each, and nothing after the last.
        models: that it offers.
        key: that it asks for; `None`: none.
        context: tokens of prompt and reply together.
        most: choices in one reply at most (many servers give one, whatever `n` says).
        stops: whether it heeds stop strings.
        names_stop: whether it says which it met, as vLLM does.
        refuses: fields of a request that it does not take.
        adapters: whether it loads LoRA adapters.
        retry_after: what it sends with a 429.
        port: 0 for a free one.
        seed: of the faults.
    """

    def __init__(
        self, reply: str | Callable[[dict[str, Any]], str | dict[str, Any]] = "<answer>42</answer>", *,
        seconds: float = 0.0, faults: float | Iterable[str | None] = 0.0, models: tuple[str, ...] = ("test",),
        key: str | None = None, context: int = 100_000, most: int = 1_000, stops: bool = True, names_stop: bool = False,
        refuses: tuple[str, ...] = (), adapters: bool = False, retry_after: str = "1", port: int = 0, seed: int = 0,
    ):  # fmt: skip
        self.reply, self.seconds, self.models, self.key, self.context = reply, seconds, models, key, context
        self.most, self.stops, self.names_stop, self.retry_after = most, stops, names_stop, retry_after
        self.refuses = refuses
        self.adapters: dict[str, str] | None = {} if adapters else None
        """Name -> folder of those loaded now; `None`: it loads none."""
        self._faults = _drawn(faults, Random(seed)) if isinstance(faults, float) else iter(faults)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.bodies: list[dict[str, Any]] = []
        """Every request to /chat/completions, in order of arrival."""
        self.headers: list[dict[str, str]] = []
        self.met: dict[str, int] = {}
        """How often each fault happened."""
        self.flying = self.peak = 0
        """Requests being answered now, and at most at once."""
        self.connections: list[socket.socket] = []
        """Every connection that a client made."""
        handler = type("_Bound", (_Handler,), {"chat": self})
        self._http = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the server's end."""
        self._closing.wait(seconds)

    def arrive(self, body: dict[str, Any], headers: dict[str, str]) -> str | None:
        """Write a request down. Returns the fault that it meets."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.flying += 1
            self.peak = max(self.peak, self.flying)
            fault = next(self._faults, None)
            if fault:
                self.met[fault] = self.met.get(fault, 0) + 1
            return fault

    def leave(self) -> None:
        with self._lock:
            self.flying -= 1

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Status and message for what this server cannot answer."""
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            return 400, "messages: a list of messages is needed."
        if body.get("model") not in (*self.models, *(self.adapters or ())):
            return 404, f"The model `{body.get('model')}` does not exist."
        if refused := [field for field in self.refuses if field in body]:
            return 400, f"Unsupported parameter: '{refused[0]}' is not supported with this model."
        asked = _size(body) + (body.get("max_tokens") or 0)
        if asked > self.context:
            return 400, (
                f"This model's maximum context length is {self.context} tokens. However, you requested {asked} tokens."
            )
        return None

    def change_adapters(self, load: bool, body: dict[str, Any]) -> tuple[int, str]:
        """Status, and what is said: plain text of a success, as vLLM has it."""
        name, path = body.get("lora_name"), body.get("lora_path")
        if self.adapters is None:
            return 404, "Not Found"
        if load and name in self.adapters:
            return (
                400,
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.",
            )
        if load and not Path(str(path), "adapter_config.json").is_file():
            return 404, f"Loading lora {name} failed: No adapter found for {path}"
        if not load and name not in self.adapters:
            return 404, f"The lora adapter '{name}' cannot be found."
        if load:
            self.adapters[str(name)] = str(path)
        else:
            del self.adapters[str(name)]
        return 200, f"Success: LoRA adapter '{name}' {'added' if load else 'removed'} successfully."

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(i, body) for i in range(min(body.get("n") or 1, self.most))]
        written = sum(len(_tokens(choice["message"]["content"] or "")) for choice in choices)
        read = _size(body)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {
            "id": f"chatcmpl-{len(self.bodies)}", "object": "chat.completion", "created": int(time.time()),
            "model": body["model"], "choices": choices, "usage": usage,
        }  # fmt: skip

    def _choice(self, index: int, body: dict[str, Any]) -> dict[str, Any]:
        said = self.reply(body) if callable(self.reply) else self.reply
        if isinstance(said, dict):
            why = "tool_calls" if said.get("tool_calls") else "stop"
            return {"index": index, "message": {"role": "assistant", "content": None} | said, "finish_reason": why}
        tokens = _tokens(said)
        text, finish = "".join(tokens[: body.get("max_tokens")]), "stop"
        if len(text) < len(said):
            finish = "length"
        stop = body.get("stop") or []
        ends = {text.find(string): string for string in ([stop] if isinstance(stop, str) else stop) if string in text}
        met = ends[min(ends)] if ends and self.stops else None
        if met is not None:
            text, finish = text[: min(ends)], "stop"
        choice: dict[str, Any] = {
            "index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": None,
        }  # fmt: skip
        if self.names_stop:
            choice["stop_reason"] = met
        if body.get("return_token_ids"):
            choice["token_ids"] = [zlib.crc32(token.encode()) % 50_000 for token in _tokens(text)]
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [_logprob(token, body.get("top_logprobs", 0)) for token in _tokens(text)]}
        return choice


def _drawn(share: float, random: Random) -> Iterator[str | None]:
    while True:
        yield random.choice(FAULTS) if random.random() < share else None


def _tokens(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def _size(body: dict[str, Any]) -> int:
    return sum(len(_tokens(str(message.get("content") or ""))) for message in body["messages"])


def _logprob(token: str, top: int) -> dict[str, Any]:
    others = [{"token": f"{token}{'~' * i}", "logprob": -0.25 * (i + 1)} for i in range(top)]
    return {"token": token, "logprob": -0.25, "bytes": list(token.encode()), "top_logprobs": others}


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 1024

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1
    chat: ChatServer

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        with self.chat._lock:
            self.chat.connections.append(self.connection)

    def _say(self, status: int, value: Any, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        content = json.dumps(value).encode()
        content = content if cut is None else content[:cut]
        self._head(status, len(content), headers)
        self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(length),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._say(status, {"error": {"message": message, "type": "error", "param": None, "code": status}}, headers)

    def _welcome(self) -> bool:
        if self.chat.key is not None and self.headers.get("Authorization") != f"Bearer {self.chat.key}":
            self._refuse(401, f"Incorrect API key provided: {self.headers.get('Authorization', '')[7:] or 'none'}.")
            return False
        return True

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._say(404, {"detail": "Not Found"})
        elif self._welcome():
            models = [{"id": model, "object": "model", "created": 0, "owned_by": "test"} for model in self.chat.models]
            self._say(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            if self._welcome():
                status, said = self.chat.change_adapters("unload" not in self.path, json.loads(content))
                if status == 200:
                    self._head(status, len(said), {"Content-Type": "text/plain"})
                    self.wfile.write(said.encode())
                else:
                    self._refuse(status, said)
        elif self.path != "/v1/chat/completions":
            self._say(404, {"detail": "Not Found"})
        elif self._welcome():
            body = json.loads(content)
            fault = self.chat.arrive(body, dict(self.headers))
            try:
                self._answer(body, fault)
            finally:
                self.chat.leave()

    def _answer(self, body: dict[str, Any], fault: str | None) -> None:
        if refusal := self.chat.refusal(body):
            return self._refuse(*refusal)
        if fault == "429":
            return self._refuse(429, "Rate limit reached.", {"Retry-After": self.chat.retry_after})
        if fault == "500":
            return self._refuse(500, "The server crashed.")
        if fault == "hang":
            self.close_connection = True
            return self.chat.wait(3600)
        if self.chat.seconds:
            self.chat.wait(self.chat.seconds)
        value = self.chat.completion(body)
        if fault == "truncated":
            return self._say(200, value, cut=len(json.dumps(value)) // 2)
        if fault == "wrong":
            return self._say(200, {"unexpected": True})
        if fault == "empty":
            for choice in value["choices"]:
                choice["message"]["content"] = ""
        if fault in ("drip", "close"):
            return self._trickle(json.dumps(value).encode(), fault)
        if body.get("stream"):
            return self._stream(value)
        return self._say(200, value)

    def _stream(self, value: dict[str, Any]) -> None:
        """Server-sent events: a chunk with every message, one that says why each ended, one with the usage, the end."""
        head = value | {"object": "chat.completion.chunk"}
        said, ended = [], []
        for choice in value["choices"]:
            delta = choice["message"] | {}
            if calls := delta.get("tool_calls"):
                delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(calls)]
            said.append({"index": choice["index"], "delta": delta, "finish_reason": None})
            ended.append({"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]})
        chunks = [
            head | {"choices": said, "usage": None},
            head | {"choices": ended, "usage": None},
            head | {"choices": []},
        ]
        content = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self._head(200, len(content.encode()), {"Content-Type": "text/event-stream"})
        self.wfile.write(content.encode())

    def _trickle(self, content: bytes, fault: str) -> None:
        self.close_connection = True
        self._head(200, len(content))
        if fault == "close":
            self.wfile.write(content[:20])
            return
        for i in range(len(content)):
            self.wfile.write(content[i : i + 1])
            self.wfile.flush()
            self.chat.wait(0.1)


def main(
    reply: str = "<answer>42</answer>", port: int = 0, seconds: float = 0.0, faults: float = 0.0, seed: int = 0
) -> None:
    """Serve on 127.0.0.1 until stopped.

    Args:
        reply: text of every reply.
        port: 0 for a free one; the address is printed.
        seconds: that a reply takes.
        faults: share of requests that fail.
        seed: of the faults.
    """
    with ChatServer(reply, seconds=seconds, faults=faults, port=port, seed=seed) as server:
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
