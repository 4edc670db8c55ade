"""JSON over HTTP to one server: kept-alive connections, a limit on each exchange that holds, and secrets that stay secret.

An exchange runs in a worker thread. A read timeout alone does not bound it (a server may send a byte a second), so whoever
waits for it calls `Exchange.cut` once `Exchange.ends` has passed: that shuts the socket, and the worker returns at once.
"""

import base64
import json
import math
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import MaxRetryError

from swirl_env.errors import ConfigError

MAX_REPLY_BYTES = 64 << 20
_CONNECT_SECONDS = 10.0
_QUEUED_SECONDS = 0.05
_CUT = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)

_OPTIONAL = ("seed", "stop", "top_logprobs", "logprobs", "max_tokens", "temperature")
"""Fields of a request that some servers refuse."""

Kind = Literal["passing", "unreachable", "key", "url", "model", "context", "refused"]


class Failure(Exception):
    """Why an exchange brought nothing. `passing` and `unreachable` may go better later; the others will not.

    Args:
        reason: one line with the next step to take; holds no secret.
        kind: see above.
        after: seconds that the server asks to wait (its Retry-After).
    """

    def __init__(self, reason: str, kind: Kind = "passing", after: float | None = None):
        super().__init__(reason)
        self.reason, self.kind, self.after = reason, kind, after

    @property
    def passes(self) -> bool:
        return self.kind in ("passing", "unreachable")


@dataclass(eq=False)
class Exchange:
    """One request and its reply."""

    body: dict[str, Any] | None
    """`None`: a GET."""
    limit: float
    """Seconds it may take from its begin on."""
    path: str = "/chat/completions"
    plain: bool = False
    """Whether a reply that is no JSON object will do: it is then `{}`."""
    begun: float | None = None
    seconds: float = 0.0
    outcome: "dict[str, Any] | Failure | None" = None
    """The reply's JSON object, or why there is none."""
    late: bool = False
    sock: socket.socket | None = None

    @property
    def ends(self) -> float:
        """When to cut it, on the monotonic clock; a moment from now, to look again, if no worker has taken it up."""
        if self.late:
            return math.inf
        return time.monotonic() + _QUEUED_SECONDS if self.begun is None else self.begun + self.limit

    def cut(self) -> None:
        """Make it return now."""
        self.late, sock = True, self.sock
        if sock is not None:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's: another thread is reading
            except OSError:
                pass


_current = threading.local()


class _Watched:
    """Tells the exchange which socket it waits on."""

    sock: Any

    def getresponse(self) -> Any:
        exchange = _current.exchange
        exchange.sock = self.sock
        if exchange.late:
            raise TimeoutError
        return super().getresponse()  # type: ignore[misc]


class _HTTP(HTTPConnectionPool):
    ConnectionCls = type("_HTTPConnection", (_Watched, HTTPConnectionPool.ConnectionCls), {})


class _HTTPS(HTTPSConnectionPool):
    ConnectionCls = type("_HTTPSConnection", (_Watched, HTTPSConnectionPool.ConnectionCls), {})


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTP, "https": _HTTPS}

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = {"http": _HTTP, "https": _HTTPS}
        return manager


class Transport:
    """A server's address, without what is secret in it, and the connections to it.

    The key is read from the environment at each request. A user and password inside the address are used and kept in this
    object only: they are in no pickle, message or `repr`.

    Args:
        url: `http://` or `https://`, host and path.
        key_env: name of the environment variable that holds the key; if it is not set, OPENAI_API_KEY is read.
        connections: how many are kept.

    Raises:
        ConfigError: the address or the name cannot be one.
    """

    def __init__(self, url: str, key_env: str, connections: int):
        if not re.fullmatch(r"[A-Za-z_]\w*", key_env):
            raise ConfigError("api_key_env is the name of an environment variable, such as SWIRL_API_KEY, not the key.")
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
            if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
                raise ValueError
        except ValueError:
            shown = "it" if "@" in url or "?" in url else repr(url)
            raise ConfigError(
                f"A server's address is like http://127.0.0.1:8000/v1, without ? and #; {shown} is none."
            ) from None
        place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
        self.url = f"{parts.scheme}://{place}{parts.path.rstrip('/').removesuffix('/chat/completions')}"
        """Safe to print and to record."""
        self.key_env, self.connections = key_env, connections
        self._login = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
        self.connect()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_session"} | {"_login": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.connect()

    # -- secrets

    @property
    def _key(self) -> str:
        return (os.environ.get(self.key_env) or os.environ.get("OPENAI_API_KEY") or "").strip()

    def _authorise(self, request: Any) -> Any:
        if self._login is not None:
            request.headers["Authorization"] = f"Basic {self._basic}"
        elif key := self._key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    @property
    def _basic(self) -> str:
        return base64.b64encode(":".join(self._login or ()).encode()).decode()

    def safe(self, text: Any, length: int = 300) -> str:
        """One printable line without any secret, cut to `length` characters."""
        secrets = [self._key]
        if self._login is not None:
            secrets += [self._basic, self._login[1], quote(self._login[1], safe="")]
        line = " ".join(str(text).split())
        for secret in secrets:
            if len(secret) > 3:  # a shorter one, such as `x`, hides nothing and stands in every word
                line = line.replace(secret, "***")
        line = "".join(c if c.isprintable() else "?" for c in line)
        return line if len(line) <= length else f"{line[:length]} ..."

    # -- exchanges

    def connect(self) -> None:
        """Begin with connections of this process's own; those of before a fork belong to the parent."""
        session = self._session = requests.Session()
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = _Adapter(pool_connections=2, pool_maxsize=self.connections)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        settings = session.merge_environment_settings(self.url, {}, None, None, None)
        session.proxies, session.verify, session.cert = settings["proxies"], settings["verify"], settings["cert"]
        session.trust_env = False  # it was read just now; at each request that would take longer than the rest

    def run(self, exchange: Exchange) -> None:
        """Carry it out; whatever happens is its outcome."""
        exchange.begun = time.monotonic()
        _current.exchange = exchange
        try:
            if exchange.late:
                raise Failure("It was given up before it began.", "refused")
            exchange.outcome = self._exchange(exchange)
        except Failure as failure:
            exchange.outcome = failure
        except Exception as bug:
            exchange.outcome = Failure(self.safe(f"{type(bug).__name__}: {bug}"), "refused")
        finally:
            exchange.sock = None
            exchange.seconds = time.monotonic() - exchange.begun

    def _exchange(self, exchange: Exchange) -> dict[str, Any]:
        session = self._session
        if not self._key.isascii() or not self._key.isprintable():
            raise Failure(f"The key in {self.key_env} (or OPENAI_API_KEY) holds characters that no key has.", "key")
        data = None if exchange.body is None else json.dumps(exchange.body).encode()
        request = requests.Request(
            "GET" if data is None else "POST", self.url + exchange.path, data=data, auth=self._authorise,
            headers={"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "swirl-env"},
        )  # fmt: skip
        times = (min(exchange.limit, _CONNECT_SECONDS), exchange.limit)
        try:
            prepared = session.prepare_request(request)
            with session.send(
                prepared, stream=True, timeout=times, allow_redirects=False,
                proxies=session.proxies, verify=session.verify, cert=session.cert,
            ) as response:  # fmt: skip
                status, after = response.status_code, _seconds(response.headers.get("Retry-After"))
                content = self._content(response)
        except requests.exceptions.SSLError as error:
            raise Failure(f"{self.url} has no valid certificate: {self.safe(_root(error))}", "url") from None
        except requests.RequestException as error:
            if isinstance(error.args[0] if error.args else None, MaxRetryError) and not exchange.late:
                raise Failure(
                    f"{self.url} cannot be reached ({self.safe(_root(error), 100)}). Is the server running, and the address "
                    "right?",
                    "unreachable",
                ) from None
            if exchange.late or isinstance(error, requests.Timeout) or "timed out" in str(error):
                raise Failure(f"{self.url} gave no whole reply within {exchange.limit:.3g} s.") from None
            if isinstance(error, _CUT):
                raise Failure(f"{self.url} closed the connection before its reply was whole.") from None
            raise
        return self._read(status, after, content, exchange)

    def _content(self, response: requests.Response) -> bytes:
        content = bytearray()
        for piece in response.iter_content(1 << 16):
            content += piece
            if len(content) > MAX_REPLY_BYTES:
                raise Failure(f"{self.url} sent more than {MAX_REPLY_BYTES >> 20} MB.", "refused")
        return bytes(content)

    def _read(self, status: int, after: float | None, content: bytes, exchange: Exchange) -> dict[str, Any]:
        """The JSON object of a reply. Raises `Failure` for what says that there is none."""
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if 200 <= status < 300:
            if not isinstance(value, dict):
                if exchange.plain:
                    return {}
                raise Failure(f"{self.url} answered with no JSON object: is it an OpenAI-compatible server?")
            if not value.get("error"):
                return value
            code = value["error"].get("code") if isinstance(value["error"], dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 400
        raise self._refusal(status, self.safe(_said(value, content)), after, exchange.path)

    def _refusal(self, status: int, said: str, after: float | None, path: str) -> Failure:
        said, low = said and f" {said}", said.lower()
        if status in (401, 403):
            todo = (
                f"Put a valid key into {self.key_env}." if self._key else f"No key is set: put one into {self.key_env}."
            )
            if self._login is not None:
                todo = "Check the user and password in the address."
            return Failure(f"{self.url} refuses the key ({status}).{said} {todo}", "key")
        if status in (408, 425, 429) or status >= 500:
            return Failure(f"{self.url} answered {status}.{said}", after=after)
        if 300 <= status < 400:
            return Failure(f"{self.url} redirects ({status}): give the address that it redirects to.", "url")
        if status != 404 and re.search(r"context|too long|too many tokens|max_model_len|must be <=", low):
            return Failure(
                f"The state is longer than the model's context ({status}).{said} Lower max_new_tokens, or serve the model "
                "with a longer context.",
                "context",
            )
        if re.search(
            r"model.*(not exist|not found|not available|unknown)|(unknown|invalid|no such) model|pinned to", low
        ):
            return Failure(f"{self.url} has no such model ({status}).{said}", "model")
        if status in (404, 405):
            what = "chat completions" if path == "/chat/completions" else path
            return Failure(f"{self.url} has no {what} ({status}).{said} The address mostly ends in /v1.", "url")
        field = next((field for field in _OPTIONAL if re.search(rf"\b{field}\b", low)), None)
        todo = f" Leave that field out with extra={{{field!r}: None}} (null in JSON)." if field else ""
        return Failure(f"{self.url} refuses the request ({status}).{said}{todo}", "refused")


_LOGIN = re.compile(r"(\w+://)(?:[^/?#\s\"\\]|\\[\"\\])+@")  # up to the last @ of the host's part; JSON's escapes whole


def without_credentials(text: str) -> str:
    """A text whose addresses have lost their users and passwords: what may be written down."""
    return _LOGIN.sub(r"\1", text)


def _said(value: Any, content: bytes) -> str:
    """What an error body says: OpenAI's `error.message`, FastAPI's `detail`, or the text itself."""
    while isinstance(value, dict):
        value = next((value[key] for key in ("error", "message", "detail") if value.get(key)), "")
    return str(value) if value else content[:300].decode(errors="replace")


def _seconds(header: str | None) -> float | None:
    """Retry-After: seconds, or a date (RFC 9110, section 10.2.3)."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _root(error: BaseException) -> str:
    """What lies at the bottom of a library's chain of errors."""
    while error.__context__ is not None:
        error = error.__context__
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
