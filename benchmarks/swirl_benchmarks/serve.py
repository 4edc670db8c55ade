"""`swirl serve`: an environment behind OpenEnv's protocol, for clients that need not be trusted with more than episodes.

OpenEnv's own application and uvicorn do the work; this adds who may ask (a bearer token, or this machine by its own name) and what
one client can take: sessions, size of a message, time of a request, silence.
"""

import contextlib
import hmac
import os
from asyncio import timeout
from asyncio.transports import BaseTransport
from collections.abc import Callable
from urllib.parse import urlsplit

import gymnasium as gym
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from swirl_benchmarks.sockets import is_loopback, listen
from swirl_env.errors import ConfigError

MAX_MESSAGE = 1 << 20
"""Bytes of a request or of one message of a client; an action is a few hundred."""
REQUEST_SECONDS = 30.0
"""A plain request is over by then, slow headers, slow body and slow reader included."""
SPARE = 256
"""Connections beside the sessions: plain requests, and clients that are being refused."""
CROWDED_SECONDS = 2.0
"""A connection above that may wait so long for its refusal."""
PING_SECONDS = 20.0
"""Between pings of a session, and what the reply may take: a client that does not read any more is cut off."""


def serve(
    make_env: Callable[[], gym.Env],
    name: str,
    *,
    host: str,
    port: int,
    max_sessions: int,
    idle: float,
    token: str | None,
) -> None:
    """Print the address, and answer until Ctrl-C.

    Args:
        make_env: makes one environment; called once now, so that what cannot work is told, and for each session.
        name: of the environment, for the printed line.
        host: a name or address of this machine.
        port: 0 for a free one.
        max_sessions: at once.
        idle: seconds without a message after which a session ends.
        token: what clients must send as `Authorization: Bearer`; `None`: nothing, on the loopback only.

    Raises:
        ConfigError: another host without a token, a port in use, an environment that cannot be served.
    """
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"{host} is reached from elsewhere, so clients need a token: set the environment variable that --token-env names "
            "(SWIRL_SERVE_TOKEN), or leave out --host."
        )
    with listen(host, port) as listener:
        make_env().close()
        from swirl_env.adapters.openenv import make_app  # takes seconds to import

        app = make_app(make_env, max_sessions=max_sessions, idle=idle)
        config = uvicorn.Config(
            Guard(app, token, idle), http=_protocol(max_sessions + SPARE), ws=_Socket, ws_max_size=MAX_MESSAGE,
            ws_ping_interval=PING_SECONDS, ws_ping_timeout=PING_SECONDS, log_level="warning", access_log=False, backlog=128,
            timeout_graceful_shutdown=1, lifespan="on",
        )  # fmt: skip
        where = f"[{host}]" if ":" in host else host
        asked = "; clients send the token" if token is not None else ""
        print(f"http://{where}:{listener.getsockname()[1]} serves {name}{asked}; Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has ended
            uvicorn.Server(config).run(sockets=[listener])


class Guard:
    """Lets in who may ask, bounds what a request holds, and ends sessions that are silent.

    Without a token only this machine is asked for, by its own name: no web page of elsewhere, be it under a name that was made to
    point here (DNS rebinding, `Host`) or by a connection that a browser opens for it (`Origin`).
    """

    def __init__(self, app: ASGIApp, token: str | None, idle: float):
        self.app, self.idle = app, idle
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif refusal := self._refusal(Headers(scope=scope)):
            await refusal(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._session(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        if self.token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token):
                return None
            detail = "This server wants its token: send the header 'Authorization: Bearer TOKEN'."
            return _refuse(401, detail, {"WWW-Authenticate": "Bearer"})
        if not is_loopback(_host(f"//{headers.get('host', '')}")):
            return _refuse(403, "This server is asked as 127.0.0.1 or localhost; under other names it wants a token.")
        if "origin" in headers and not is_loopback(_host(headers["origin"])):
            return _refuse(403, "This server answers no web page of elsewhere.")
        return None

    async def _session(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def awaited() -> Message:
            try:
                async with timeout(self.idle):
                    return await receive()
            except TimeoutError:
                reason = f"no message for {self.idle:g} s"
                await send({"type": "websocket.close", "code": 1001, "reason": reason})
                return {"type": "websocket.disconnect", "code": 1001, "reason": reason}

        await self.app(scope, awaited, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > MAX_MESSAGE:
                await _refuse(413, f"A request may hold {MAX_MESSAGE:,} bytes.")(scope, receive, send)
                return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        async def last(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"  # one request a connection: its time is bounded
            await send(message)

        await self.app(scope, replayed, last)


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # a bracket without its other one
        return None


def _refuse(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"Connection": "close"} | (headers or {}))


def _protocol(most: int) -> type[H11Protocol]:
    """uvicorn's HTTP with a bound on connections and on the time of a request."""

    class Bounded(H11Protocol):
        def connection_made(self, transport: BaseTransport) -> None:  # type: ignore[override]
            super().connection_made(transport)  # type: ignore[arg-type]
            self.crowded = len(self.connections) > most
            if self.crowded:
                self.connections.discard(self)  # who is refused takes no room
            self.loop.call_later(CROWDED_SECONDS if self.crowded else REQUEST_SECONDS, self.expire)

        def data_received(self, data: bytes) -> None:
            if self.crowded:
                text = f"This server has {most} connections already. Try again later.\n".encode()
                head = f"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: {len(text)}\r\n"
                self.transport.write(f"{head}Content-Type: text/plain\r\n\r\n".encode() + text)
                self.transport.close()
            else:
                super().data_received(data)

        def expire(self) -> None:
            if self.transport.get_protocol() is self:  # and is no session by now
                self.transport.abort()

    return Bounded


class _Socket(WebSocketsSansIOProtocol):
    def keepalive_timeout(self) -> None:
        self.transport.abort()  # to close would wait for a client that does not read


def read_token(variable: str) -> str | None:
    """The token in an environment variable; `None` if it is not set. Raises `ConfigError` for one that cannot be sent."""
    token = os.environ.get(variable)
    if token is not None and (not token.isascii() or not token.isprintable() or not token or " " in token):
        raise ConfigError(f"The environment variable {variable} must hold a token of visible ASCII characters.")
    return token
