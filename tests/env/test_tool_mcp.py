"""MCP servers as tools: real servers, made with the official package, over a pipe and over HTTP on the loopback."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.errors import ConfigError, ToolError
from swirl_env.grammar import Grammar
from swirl_env.testing import check_tool_contract
from swirl_env.tools import call_tool
from swirl_env.tools.mcp import McpServer, legal_names, mcp_tools
from swirl_env.types import ToolCall

pytest.importorskip("mcp", reason="needs the extra `mcp`")

SERVER = '''
import asyncio, os, sys
from mcp.server import MCPServer
from mcp_types import CallToolResult, ImageContent, TextContent

server = MCPServer("tests")

@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds two
    numbers. <answer>"""
    return a + b

@server.tool(name="9 wéird/name")
def weird() -> str:
    """Has a strange name."""
    return "w"

@server.tool(name="answer")
def answer(words: list[str], how: str | None = None) -> str:
    """Has a name that is taken."""
    return " ".join(words) + str(how)

@server.tool()
def picture() -> CallToolResult:
    """Gives text and an image."""
    image = ImageContent(type="image", data="aGk=", mime_type="image/png")
    return CallToolResult(content=[TextContent(type="text", text="one"), image, TextContent(type="text", text="two")])

@server.tool()
def fail() -> CallToolResult:
    """Fails."""
    return CallToolResult(content=[TextContent(type="text", text="no such city")], is_error=True)

@server.tool()
def bug() -> str:
    """Has a bug."""
    raise ValueError("oops")

@server.tool()
def die() -> str:
    """Ends the server."""
    print("goodbye", file=sys.stderr, flush=True)
    os._exit(3)

@server.tool()
async def slow() -> str:
    """Takes long."""
    await asyncio.sleep(60)
    return "late"

@server.tool()
def pid() -> str:
    """The server's process."""
    return f"{os.getpid()} {os.environ.get('SECRET')} {os.environ.get('PASSED')}"

if sys.argv[1:]:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run()
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("mcp server") / "server.py"
    path.write_text(SERVER)
    return str(path)


@pytest.fixture(scope="module")
def piped(script):
    os.environ["SECRET"] = "s3cret"
    tools = mcp_tools([sys.executable, script], timeout=20, env={"PASSED": "yes"})
    yield {tool.name: tool for tool in tools}
    del os.environ["SECRET"]
    tools[0].server.close()


@pytest.fixture(scope="module")
def http(script):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, script, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.05)
        tools = mcp_tools(f"http://127.0.0.1:{port}/mcp", timeout=20, headers={"Authorization": "Bearer x"})
        yield {tool.name: tool for tool in tools}
        tools[0].server.close()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["piped", "http"])
def tools(request):
    return request.getfixturevalue(request.param)


def ask(tools, name, **arguments):
    result = call_tool(tools, ToolCall(name, arguments))
    return result.error, result.text


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_names_descriptions_and_schemas(tools):
    assert list(tools) == ["add", "_9_w_ird_name", "answer_2", "picture", "fail", "bug", "die", "slow", "pid"]
    assert tools["add"].description == "Adds two numbers. &lt;answer>"
    schema = tools["add"].parameters
    assert schema["required"] == ["a"] and schema["properties"]["b"]["default"] == 1
    prompt = Grammar("default", tools.values()).prompt("", "", 5)
    assert '<add>{"a": 1, "b": 1 (optional)}</add> Adds two numbers.' in prompt


def test_calls(tools):
    check_tool_contract(tools["add"], {"a": 1, "b": 2}, [{"a": "x"}, {}])
    assert ask(tools, "add", a="5") == (None, "6")
    assert ask(tools, "_9_w_ird_name") == (None, "w")
    assert ask(tools, "answer_2", words=["a", "b"], how="c") == (None, "a bc")
    assert ask(tools, "picture") == (None, "one\n[image]\ntwo")


def test_errors_of_the_server_are_for_the_model(tools):
    assert ask(tools, "fail") == ("tool_error", "no such city")
    assert ask(tools, "bug")[0] == "tool_error"
    assert ask(tools, "add", a=1) == (None, "2")


def test_calls_from_many_threads(tools):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: ask(tools, "add", a=i, b=i), range(40)))
    assert results == [(None, str(2 * i)) for i in range(40)]


def test_a_late_answer_is_not_waited_for(script):
    with McpServer([sys.executable, script], timeout=2.5) as server:
        server.call("pid", {})
        start = time.monotonic()
        with pytest.raises(ToolError, match="no answer within 2.5 seconds"):
            server.call("slow", {})
        assert time.monotonic() - start < 10


def test_only_named_environment_variables_reach_the_command(piped):
    assert ask(piped, "pid")[1].split()[1:] == ["None", "yes"]


def test_a_dead_server_is_told_and_started_again(script):
    with McpServer([sys.executable, script], timeout=20) as server:
        first = server.call("pid", {}).split()[0]
        with pytest.raises(ToolError, match="The tool server stopped .*goodbye.*The next call starts it again"):
            server.call("die", {})
        second = server.call("pid", {}).split()[0]
        assert second != first and not alive(first)
    assert not alive(second)


def test_pickled_tools_share_a_session_of_their_own(piped):
    twins = pickle.loads(pickle.dumps(piped))
    assert len({id(tool.server) for tool in twins.values()}) == 1
    with twins["pid"].server:
        assert ask(twins, "pid")[1].split()[2] == "yes"
        assert ask(twins, "pid") != ask(piped, "pid")


def test_a_forked_child_opens_its_own_session(piped):
    parent = ask(piped, "pid")[1]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, ask(piped, "pid")[1].encode())
            piped["pid"].server.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    os.close(read), os.close(write)
    assert said.split()[2] == "yes" and said != parent
    assert not alive(said.split()[0])
    assert ask(piped, "pid")[1] == parent


def test_the_end_of_the_program_ends_the_server(script):
    code = "import sys; from swirl_env.tools.mcp import mcp_tools\n"
    code += f"tools = mcp_tools([sys.executable, {script!r}])\nprint(tools[-1]())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert not alive(done.stdout.split()[0])


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (["/nonexistent/server"], "cannot be reached: FileNotFoundError"),
        ("false", "cannot be reached"),
        ([sys.executable, "-c", "import sys; sys.exit('no key given')"], "it last said: no key given"),
        ("http://127.0.0.1:9/mcp", "cannot be reached: ConnectError"),
        ([], "expected a command or an http"),
        ("'", "cannot read the command line"),
    ],
)
def test_a_server_that_cannot_be_reached_is_an_error_at_once(server, said):
    threads = threading.active_count()
    with pytest.raises(ConfigError, match=said):
        mcp_tools(server, timeout=5)
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"pip install 'swirl-env\[mcp\]'"):
        mcp_tools("false")


def test_bad_timeout():
    with pytest.raises(ConfigError, match="timeout must be a positive number"):
        McpServer("false", timeout=0)


@given(st.lists(st.text(max_size=80) | st.sampled_from(["a", "A", "a_2", "answer", "Think", "x" * 70]), max_size=30))
def test_any_names_become_names_a_grammar_can_write(names):
    class Named:
        description, parameters = "d", {"type": "object", "properties": {}}

        def __init__(self, name):
            self.name = name

    legal = legal_names(names)
    assert len(Grammar("default", map(Named, legal)).tools) == len(names)
    assert len({name.lower() for name in legal}) == len(names)
    assert legal_names(["add", "get-user.v2"]) == ["add", "get-user.v2"]
