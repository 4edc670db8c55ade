"""The tools of any MCP server (Model Context Protocol, modelcontextprotocol.io), through the official `mcp` package.

A server is a command, spoken to over its standard input and output, or an http(s) address (streamable HTTP). Its session
lives on an event loop in a thread of its own, so calls are plain and may come from several threads. A server that
dies is a `ToolError` in the call that found out; the next call starts it again. What is left out: resources, prompts, and
questions that a server asks back.
"""

import asyncio
import json
import os
import re
import shlex
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from swirl_env.errors import ConfigError, ToolError
from swirl_env.grammar import escape

MAX_DESCRIPTION_CHARACTERS = 500
CLOSE_SECONDS = 10.0
"""A server that has not ended by then is left behind."""
_TAKEN = ("think", "answer", "result", "error")


class McpServer:
    """One session with an MCP server, opened when first needed. Pickles as its settings.

    Args:
        server: a command as a list, a command line, or an http(s) address.
        timeout: seconds that connecting, or one call, may take.
        env: environment variables of the command, beside PATH, HOME and the like: nothing else is passed on.
        headers: HTTP headers, for an address.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ConfigError(f"mcp: timeout must be a positive number of seconds, got {timeout!r}.")
        self.settings = (server, timeout, env, headers)
        self.url = server if isinstance(server, str) and server.startswith(("http://", "https://")) else None
        try:
            self.command = [] if self.url else shlex.split(server) if isinstance(server, str) else list(server)
        except ValueError as error:
            raise ConfigError(f"mcp: cannot read the command line {server!r}: {error}.") from None
        if not self.url and (not self.command or not all(isinstance(part, str) and part for part in self.command[:1])):
            raise ConfigError(f"mcp: expected a command or an http(s) address, got {server!r}.")
        self.timeout, self.env, self.headers = timeout, dict(env or {}), dict(headers or {})
        self._lock = threading.Lock()
        self._said: deque[str] = deque(maxlen=20)
        """Last lines of the command's error output."""
        self._session: _Session | None = None

    def list_tools(self) -> list[Any]:
        """The server's own descriptions of its tools, all pages."""
        tools, cursor = [], None
        for _ in range(100):
            page = self._do("list_tools", cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        return tools

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The text of a tool's result. Raises `ToolError` with the server's own words where it failed."""
        result = self._do("call_tool", name, arguments)
        text = "\n".join(map(_text, result.content))
        if not text and result.structured_content is not None:
            text = json.dumps(result.structured_content, ensure_ascii=False)
        if result.is_error:
            raise ToolError(text or f"{name} failed and did not say why.")
        return text or "(The result is empty.)"

    def close(self) -> None:
        """End the session, and the command with it; a later call begins a new one."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> "McpServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return McpServer, self.settings

    def __repr__(self) -> str:
        return f"McpServer({self.url or shlex.join(self.command)!r})"

    def _do(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the session. Raises `ToolError` for whatever goes wrong."""
        session = self._connected()
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        late = f"The tool server gave no answer within {self.timeout:g} seconds."
        try:
            return session.do(method, self.timeout + 1, *arguments, **keywords)
        except TimeoutError:
            raise ToolError(late) from None
        except MCPError as error:
            if error.code == REQUEST_TIMEOUT:
                raise ToolError(late) from None
            if error.code != CONNECTION_CLOSED:
                raise ToolError(str(error)) from None
            reason = str(error)
        except Exception as error:
            reason = _innermost(error)
        session.close()
        raise ToolError(f"The tool server stopped ({reason}{self._last_words()}). The next call starts it again.")

    def _connected(self) -> "_Session":
        with self._lock:
            if self._session is None or not self._session.open:
                try:
                    from mcp import Client
                except ImportError as error:
                    raise ConfigError(
                        f"Tools of an MCP server need the package mcp ({error}): `pip install 'swirl-env[mcp]'`."
                    ) from None
                self._said.clear()
                client = Client(
                    _http(self.url, self.headers) if self.url else _command(self.command, self.env, self._said),
                    read_timeout_seconds=self.timeout,
                )
                try:
                    self._session = _Session(client)
                except Exception as error:
                    reason = _innermost(error)
                    raise ToolError(f"{self!r} cannot be reached: {reason}{self._last_words()}.") from error
                weakref.finalize(self, self._session.close)  # also at the end of the program
            return self._session

    def _last_words(self) -> str:
        said = [line.strip() for line in list(self._said) if line.strip()]
        return f"; it last said: {said[-1][:300]}" if said else ""


class McpTool:
    """One tool of a server, under a name that every grammar can write."""

    def __init__(self, server: McpServer, remote: str, name: str, description: str, parameters: dict[str, Any]):
        self.server, self.remote = server, remote
        self.name, self.description, self.parameters = name, description, parameters

    def __call__(self, **arguments: Any) -> str:
        return self.server.call(self.remote, arguments)

    def __repr__(self) -> str:
        return f"tool({self.name} of {self.server!r})"


def mcp_tools(
    server: str | Sequence[str],
    timeout: float = 30.0,
    env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> list[McpTool]:
    """The tools of an MCP server. They share one session; `tools[0].server.close()` ends it, as does the program's end.

    Args:
        server: a command as a list, a command line, or an http(s) address.
        timeout: seconds that connecting, or one call, may take.
        env: environment variables of the command, beside PATH, HOME and the like: nothing else is passed on.
        headers: HTTP headers, for an address.

    Raises:
        ConfigError: the package `mcp` is missing, or the server cannot be reached or offers no tool.

    Examples:
        >>> server = '''
        ... from mcp.server import MCPServer
        ... server = MCPServer("weather")
        ... @server.tool()
        ... def temperature(city: str) -> str:
        ...     'Tells the temperature in a city.'
        ...     return {"Bern": "12 degrees"}.get(city, "unknown")
        ... server.run()
        ... '''
        >>> written = open("weather.py", "w").write(server)
        >>> import sys, gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/Tasks-v0", tools=[f"mcp:{sys.executable} weather.py"])
        >>> text, info = env.reset(seed=0)
        >>> text, *_, info = env.step("<temperature>Bern</temperature>")
        >>> print(info["step"].observation)
        <result>12 degrees</result>
    """
    session = McpServer(server, timeout, env, headers)
    try:
        listed = session.list_tools()
        if not listed:
            raise ToolError(f"{session!r} offers no tool.")
    except ToolError as error:
        session.close()
        raise ConfigError(f"mcp: {error}") from error
    names = legal_names([tool.name for tool in listed])
    return [
        McpTool(session, tool.name, name, _described(tool), dict(tool.input_schema))
        for tool, name in zip(listed, names, strict=True)
    ]


def legal_names(names: Sequence[str]) -> list[str]:
    """Names that a grammar can write (`[A-Za-z_][A-Za-z0-9_.-]{0,63}`, none twice in any case), nearest to the given ones."""
    legal: list[str] = []
    taken = set(_TAKEN)
    for name in names:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:60] or "tool"
        name = name if name[0].isalpha() or name[0] == "_" else f"_{name}"
        numbered, number = name, 2
        while numbered.lower() in taken:
            numbered, number = f"{name[:56]}_{number}", number + 1
        taken.add(numbered.lower())
        legal.append(numbered)
    return legal


def _described(tool: Any) -> str:
    text = escape(" ".join((tool.description or tool.title or tool.name).split()))
    return text if len(text) <= MAX_DESCRIPTION_CHARACTERS else f"{text[:MAX_DESCRIPTION_CHARACTERS]}..."


def _text(block: Any) -> str:
    """What the model reads of a content block: text as it is, anything else by its name."""
    if block.type == "text":
        return block.text
    if block.type == "resource":
        return getattr(block.resource, "text", None) or f"[resource {block.resource.uri}]"
    return f"[{block.type} {block.uri}]" if block.type == "resource_link" else f"[{block.type}]"


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".rstrip(": .")


class _Session:
    """A client, held open on an event loop in a thread of its own."""

    def __init__(self, client: Any):
        self._pid, self._closed, self._lock = os.getpid(), False, threading.Lock()
        self.client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swirl-mcp", daemon=True)
        self._thread.start()
        self._stop = asyncio.Event()
        opened: Future[None] = Future()
        self._held = asyncio.run_coroutine_threadsafe(self._hold(opened), self._loop)
        try:
            opened.result()
        except BaseException:
            self.close()
            raise

    async def _hold(self, opened: Future[None]) -> None:
        try:
            async with self.client:
                opened.set_result(None)
                await self._stop.wait()
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error)

    def do(self, method: str, seconds: float, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the client. Raises `TimeoutError`."""
        asked = asyncio.run_coroutine_threadsafe(getattr(self.client, method)(*arguments, **keywords), self._loop)
        try:
            return asked.result(seconds)
        except TimeoutError:
            asked.cancel()
            raise

    @property
    def open(self) -> bool:
        """False once closed, and in a forked child: its thread did not come along."""
        return not self._closed and os.getpid() == self._pid

    def close(self) -> None:
        """End the session and its thread; a second time nothing is done."""
        with self._lock:
            if not self.open:
                return
            self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        try:
            self._held.result(CLOSE_SECONDS)
        except Exception:  # the server is gone already
            pass
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@asynccontextmanager
async def _http(url: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    waits = httpx2.Timeout(30, read=None)  # answers are waited for by the session
    async with (
        httpx2.AsyncClient(headers=headers, timeout=waits) as http,
        streamable_http_client(url, http_client=http) as streams,
    ):
        yield streams


@asynccontextmanager
async def _command(command: list[str], env: dict[str, str], said: deque[str]) -> AsyncIterator[Any]:
    from mcp import StdioServerParameters, stdio_client

    read, write = os.pipe()
    threading.Thread(target=_drain, args=(read, said), name="swirl-mcp-stderr", daemon=True).start()
    with os.fdopen(write, "w") as errors:
        parameters = StdioServerParameters(command=command[0], args=command[1:], env=env)
        async with stdio_client(parameters, errlog=errors) as streams:
            yield streams


def _drain(read: int, said: deque[str]) -> None:
    with os.fdopen(read, errors="replace") as lines:
        said.extend(lines)
