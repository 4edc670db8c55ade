"""One client for every server that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, Ollama, hosted ones).

Judges and policies share it; `swirl_env.session` says what is sent when. Nothing that a server does raises: a request that
failed for good is a completion with `finish="error"` and the reason.
"""

import copy
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from swirl_env.errors import ConfigError, UnknownArgumentError, near
from swirl_env.session import ChatSession, Part
from swirl_env.transport import Exchange, Failure, Transport
from swirl_env.types import Completion, Tokens, Transcript

PREFIX = "endpoint:"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds. A retry waits for a time drawn between 0 and `FIRST_PAUSE` x 2^tries (full jitter), on top of Retry-After."""
_OWN_FIELDS = {"model", "messages", "n", "stream"}


@dataclass(slots=True)
class Usage:
    """What a client has asked for so far."""

    calls: int = 0
    """HTTP requests sent."""
    retries: int = 0
    """Of these, those that asked again after a failure."""
    failures: int = 0
    """Requests given up."""
    prompt_tokens: int | None = None
    """As counted by the server; `None`: it never said."""
    completion_tokens: int | None = None
    seconds: float = 0.0
    """Sum over calls; they overlap."""

    def _add(self, exchange: Exchange) -> None:
        self.calls, self.seconds = self.calls + (exchange.begun is not None), self.seconds + exchange.seconds
        said = exchange.outcome.get("usage") if isinstance(exchange.outcome, dict) else None
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(said, dict) and isinstance(said.get(name), int):
                setattr(self, name, (getattr(self, name) or 0) + said[name])


def content_of(message: dict[str, Any]) -> str:
    """The text of a reply's message; empty if there is none."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


class ChatClient:
    """A model behind a server, as a `Policy`.

    Args:
        url: where the API begins, such as `http://127.0.0.1:8000/v1`. A user and password in it are used, never shown.
        model: which of the server's models; `None`: its only one, which the server is asked for at once.
        temperature: of sampling.
        max_new_tokens: cap of one completion, in tokens.
        stop: strings to stop after; `None`: each transcript's own.
        top_logprobs: candidates whose log-probs are asked for at each token; 0: none.
        seed: for transcripts that carry none; `None`: the server's own. Sample i of a transcript has seed + i where it
            is asked for alone.
        concurrency: requests in flight at once.
        timeout: seconds for one attempt, from connecting to the reply's last byte.
        deadline: seconds for all attempts and pauses of one transcript, from its first on.
        retries: further attempts after 429, 5xx, a timeout, a lost connection or a reply that is none.
        api_key_env: environment variable with the key, read when used; if it is not set, OPENAI_API_KEY.
        extra: more fields of the request's body, such as `{"top_p": 0.9}`; a field set to `None` is left out, such as
            `{"max_tokens": None, "max_completion_tokens": 512}` for a server that wants the newer name.

    Raises:
        ConfigError: a value that cannot work, or no model given and the server does not name just one.
    """

    def __init__(
        self, url: str, model: str | None = None, *, temperature: float = 1.0, max_new_tokens: int = 512,
        stop: tuple[str, ...] | None = None, top_logprobs: int = 0, seed: int | None = None, concurrency: int = 64,
        timeout: float = 60.0, deadline: float = 600.0, retries: int = 5, api_key_env: str = "SWIRL_API_KEY",
        extra: dict[str, Any] | None = None,
    ):  # fmt: skip
        for name, value, least in (
            ("temperature", temperature, 0), ("max_new_tokens", max_new_tokens, 1), ("top_logprobs", top_logprobs, 0),
            ("concurrency", concurrency, 1), ("retries", retries, 0),
        ):  # fmt: skip
            if not value >= least:
                raise ConfigError(f"{name} must be at least {least}, got {value!r}.")
        for name, value in (("timeout", timeout), ("deadline", deadline)):
            if not value > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, got {value!r}.")
        if taken := _OWN_FIELDS & set(extra or {}):
            raise ConfigError(f"extra cannot hold {', '.join(sorted(taken))}: the client sets that.")
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self.stop, self.top_logprobs, self.extra = (
            None if stop is None else tuple(stop),
            top_logprobs,
            dict(extra or {}),
        )
        self.concurrency, self.timeout, self.deadline, self.retries = concurrency, timeout, deadline, retries
        self._transport = Transport(url, api_key_env, concurrency)
        self._usage = Usage()
        self._most: int | None = None  # choices that the server gives at most
        self._prepare()
        self.model = self._only_model() if model is None else model
        self.name = f"{PREFIX}{self.model}"

    def _prepare(self) -> None:
        """What belongs to one process: threads and locks."""
        self._lock, self._workers = threading.Lock(), ThreadPoolExecutor(self.concurrency, "swirl-client")
        self._random = random.Random()
        _clients.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_workers", "_random")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __repr__(self) -> str:
        return f"ChatClient({self.url!r}, model={self.model!r})"

    @property
    def url(self) -> str:
        """The address without credentials."""
        return self._transport.url

    @property
    def parameters(self) -> dict[str, Any]:
        """What, beside the messages, its completions depend on."""
        names = ("url", "model", "temperature", "max_new_tokens", "stop", "top_logprobs", "seed", "extra")
        return {name: getattr(self, name) for name in names}

    @property
    def usage(self) -> Usage:
        """Counts so far (a copy)."""
        with self._lock:
            return replace(self._usage)

    # -- before the first call

    def check(self) -> None:
        """Ask for one token, so that what would fail every request is told now.

        Raises:
            ConfigError: the server cannot be reached, refuses the key or the request, or has no such model.
        """
        body = self._body({"messages": [{"role": "user", "content": "Hi"}]}, 1, 0)
        cap = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        try:
            self._insist(Exchange({**body, cap: 1}, self.timeout))
        except Failure as failure:
            known = ""
            if failure.kind == "context":  # one token is too few for some models
                return
            if failure.kind == "model":
                try:
                    known = near(self.model, self._models())
                except Failure:
                    pass
            raise ConfigError(f"{failure.reason}{known}") from None

    def load_adapter(self, name: str, path: str) -> "ChatClient":
        """Have the server load a LoRA adapter, and return a client that asks it (vLLM with `--enable-lora` and
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; SGLang's path is the same).

        Args:
            name: that the adapter gets; one that is loaded already stays, so other weights need another name.
            path: its folder, as the server sees it.

        Raises:
            ConfigError: the server cannot be reached, does not do this, or does not find or take the adapter.
        """
        try:
            body = {"lora_name": name, "lora_path": path}
            self._insist(Exchange(body, self.timeout, "/load_lora_adapter", plain=True))
        except Failure as failure:
            if "already been loaded" not in failure.reason:
                raise ConfigError(
                    f"{self.url} did not load the adapter in {path}: {failure.reason} vLLM needs --enable-lora, a --max-lora-rank that is "
                    "not below the adapter's, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and to see this folder under this path."
                ) from None
        other = copy.copy(self)
        other.model, other.name, other._usage = name, f"{PREFIX}{name}", Usage()
        return other

    def unload_adapter(self, name: str) -> None:
        """Have the server forget an adapter; it is no failure if it cannot."""
        try:
            self._insist(Exchange({"lora_name": name}, self.timeout, "/unload_lora_adapter", plain=True))
        except Failure:
            pass

    def _only_model(self) -> str:
        """The name of the server's one model. Raises `ConfigError`."""
        try:
            models = self._models()
        except Failure as failure:
            hint = f" Name its model, as in {PREFIX}{self.url}#MODEL." if failure.kind == "passing" else ""
            raise ConfigError(failure.reason + hint) from None
        if len(models) != 1:
            raise ConfigError(
                f"{self.url} lists {len(models)} models ({', '.join(models[:8]) or 'none'}): name the one to ask, as in "
                f"{PREFIX}{self.url}#MODEL."
            )
        return models[0]

    def _models(self) -> list[str]:
        listed = self._insist(Exchange(None, self.timeout, "/models")).get("data")
        if not isinstance(listed, list):
            raise Failure(f"{self.url}/models lists no models: is it an OpenAI-compatible server?", "url")
        return [self._transport.safe(model["id"], 100) for model in listed if isinstance(model, dict) and "id" in model]

    def _insist(self, exchange: Exchange) -> dict[str, Any]:
        """The reply to one request, asked again while that may help. Raises `Failure`."""
        began = time.monotonic()
        for tries in range(self.retries + 1):
            attempt = replace(exchange)
            timer = threading.Timer(attempt.limit, attempt.cut)
            timer.start()
            self._transport.run(attempt)
            timer.cancel()
            with self._lock:
                self._usage._add(attempt)
            if not isinstance(failure := attempt.outcome, Failure):
                assert failure is not None
                return failure
            pause = self._pause(failure, tries)
            late = time.monotonic() + pause > began + self.deadline
            if failure.kind != "passing" or tries == self.retries or late:
                raise failure
            time.sleep(pause)
        raise AssertionError

    def _pause(self, failure: Failure, tries: int) -> float:
        return (failure.after or 0.0) + self._random.uniform(0.0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**tries))

    # -- completions

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        """`n` completions for each transcript, in order. Its messages are sent as they are."""
        return self.chat(
            [
                {
                    "messages": [{"role": m.role, "content": m.content} for m in transcript.messages],
                    "stop": transcript.stop if self.stop is None else self.stop,
                    "seed": transcript.seed,
                }
                for transcript in transcripts
            ],
            n,
        )

    def chat(
        self, requests: list[dict[str, Any]], n: int = 1, read: Callable[[dict[str, Any]], str] = content_of
    ) -> list[list[Completion]]:
        """`n` completions for each request, in order.

        Args:
            requests: fields of the body: `messages`, and where wanted `stop`, `seed`, `tools`, ...
            n: samples of each.
            read: the text of a reply's message; an empty one counts as no reply.
        """
        session = self.session(read)
        for key, request in enumerate(requests):
            session.add(key, request, n)
        done: dict[int, list[Completion]] = {}
        with closing(session):
            while len(session):
                done.update(session.poll(60.0))
        return [done[key] for key in range(len(requests))]

    def session(self, read: Callable[[dict[str, Any]], str] = content_of) -> ChatSession:
        """Requests that come as they come, and are answered as they are."""
        return ChatSession(self, read)

    def _split(self, part: Part) -> list[Part]:
        """As many requests as the server's number of choices makes necessary."""
        size = self._most or max(part.n, 1)
        end = part.first + part.n
        return [Part(part.request, i, min(size, end - i), part.tries) for i in range(part.first, end, size)]

    def _body(self, request: dict[str, Any], n: int, first: int) -> dict[str, Any]:
        seed = self.seed if request.get("seed") is None else request["seed"]
        body = {
            "model": self.model,
            **request,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "stop": list(request.get("stop") or ()) or None,
            "seed": None if seed is None else (seed + first) % 2**31,
            "n": n if n > 1 else None,
            "logprobs": True if self.top_logprobs else None,
            "top_logprobs": self.top_logprobs or None,
            **self.extra,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _completions(
        self, reply: dict[str, Any], part: Part, stop: tuple[str, ...], read: Callable
    ) -> list[Completion]:
        """At least one completion, at most as many as were asked for. Raises `Failure` if there is none."""
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices:
            raise Failure(f"{self.url} answered without choices: is it an OpenAI-compatible server?")
        if len(choices) < part.n:
            self._most = min(self._most or part.n, len(choices))
        found, spent, thought = [], False, False
        for choice in choices[: part.n]:
            message = choice.get("message") if isinstance(choice, dict) else None
            if not isinstance(message, dict):
                raise Failure(f"{self.url} answered with a choice that holds no message.")
            text, reason = read(message), choice.get("finish_reason")
            if reason == "content_filter":
                found.append(Completion(f"{self.url} withheld the reply (content filter).", None, "error"))
            elif text:
                ended, finish = _ended(text, stop, choice)
                # what is cut off here was sampled, but not acted on
                tokens = _tokens(choice) if ended.startswith(text) else None
                found.append(Completion(ended, tokens, finish, _alternatives(choice)))
            else:
                spent |= reason == "length"
                thought |= bool(message.get("reasoning_content") or message.get("reasoning"))
        if not found and spent:
            raise Failure(
                f"{self.url} spent all {self.max_new_tokens} tokens without a reply: raise max_new_tokens.", "refused"
            )
        if not found and thought:
            raise Failure(
                f"{self.url} sent a thought (reasoning) and no reply after it. Turn the model's thinking off."
            )
        if not found:
            raise Failure(f"{self.url} answered with an empty reply. Does the model's chat template fit?")
        return found


def open_endpoint(name: str, flag: str, **settings: Any) -> ChatClient:
    """The client of `endpoint:URL`, `endpoint:URL#MODEL`, or JSON as `{"endpoint": URL, "extra": {"seed": null}}`, whose settings go before
    these. `flag` is where the name was given, for messages. Raises as `make_endpoint`."""
    own: dict[str, Any] = {"endpoint": name}
    if name.startswith("{"):
        try:
            own = json.loads(name)
        except ValueError as error:
            raise ConfigError(f"{flag} begins like JSON, but is not JSON: {error}.") from None
    if not isinstance(own.get("endpoint"), str):
        raise ConfigError(
            f'{flag} as JSON is like {{"endpoint": "http://127.0.0.1:8000/v1", "extra": {{"seed": null}}}}.'
        )
    try:
        return make_endpoint(own.pop("endpoint"), **settings | own)
    except TypeError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{flag} has a setting of a wrong type: {error}.") from error


_clients: "weakref.WeakSet[ChatClient]" = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._transport.connect()
        client._prepare()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _ended(text: str, stop: tuple[str, ...], choice: dict[str, Any]) -> tuple[str, Any]:
    """(text up to and with its first stop string, how it ended).

    Servers strip the string they stopped at; it is put back where it is known: from vLLM's `stop_reason` or SGLang's
    `matched_stop`, else if it is the only stop string `</tag>` whose `<tag>` stands open.
    """
    ends = [text.find(string) + len(string) for string in stop if string and string in text]
    if ends:
        return text[: min(ends)], "stop"
    if choice.get("finish_reason") == "length":
        return text, "length"
    if choice.get("finish_reason") == "stop":
        named = [choice[key] for key in ("stop_reason", "matched_stop") if key in choice]
        hit = [string for string in stop if string in named] if named else _open(text, stop)
        if len(hit) == 1:
            return text + hit[0], "stop"
    return text, "eos"


def _open(text: str, stop: tuple[str, ...]) -> list[str]:
    """The stop strings `</tag>` whose `<tag>` was opened; none of them stands in the text."""
    tags = [(string, re.fullmatch(r"</(.+)>", string)) for string in stop]
    return [string for string, tag in tags if tag and f"<{tag[1]}>" in text]


def _tokens(choice: dict[str, Any]) -> Tokens | None:
    """What was sampled, where the server tells (vLLM: `return_token_ids` and `logprobs`, as fields of `extra`): the action's tokens
    alone. The log-probs are those that the server gives; vLLM's are under the sampled distribution with
    `--logprobs-mode processed_logprobs`. `None` for a message that the server took apart: its text is not the tokens'."""
    ids, message = choice.get("token_ids"), choice["message"]
    if not ids or message.get("tool_calls") or message.get("reasoning_content") or message.get("reasoning"):
        return None
    try:
        logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        found = Tokens(np.asarray(ids, np.int32), np.ones(len(ids), bool), np.asarray(logprobs, np.float32))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if found.ids.shape == found.logprobs.shape else None


def _alternatives(choice: dict[str, Any]) -> tuple[dict[str, float], ...] | None:
    """Per token: the sampled one first, then the other candidates."""
    try:
        return tuple(
            {entry["token"]: float(entry["logprob"])}
            | {other["token"]: float(other["logprob"]) for other in entry.get("top_logprobs") or ()}
            for entry in choice["logprobs"]["content"]
        ) or None  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None


def make_endpoint(name: str, **settings: Any) -> ChatClient:
    """The client of `endpoint:URL` or `endpoint:URL#MODEL`, such as `endpoint:http://127.0.0.1:8000/v1#qwen3`.

    Args:
        name: as above.
        settings: of `ChatClient`.

    Raises:
        ConfigError: the name holds no address. Call `check` on the client to ask the server.
        UnknownArgumentError: a setting that `ChatClient` does not take.
    """
    known = set(ChatClient.__init__.__kwdefaults__ or ())
    if unknown := set(settings) - known:
        raise UnknownArgumentError(f"An endpoint has no setting {min(unknown)!r}.{near(min(unknown), known)}")
    url, _, model = name.removeprefix(PREFIX).partition("#")
    return ChatClient(url, model or None, **settings)
