"""The contract with the installed OpenEnv: `swirl serve` as a real process, asked by OpenEnv's own clients and by raw sockets."""

import asyncio
import contextlib
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest
import requests
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

pytest.importorskip("openenv", reason="needs the extra `openenv`: make test-adapters")

from openenv.cli._validation import validate_running_environment  # noqa: E402
from openenv.core.generic_client import GenericEnvClient  # noqa: E402
from swirl_agents.rollout import rollout  # noqa: E402
from swirl_agents.scripted import make_scripted  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from swirl_env.adapters.openenv import ServedEnv, SwirlClient, TextAction, from_openenv  # noqa: E402
from swirl_env.errors import ConfigError  # noqa: E402

ID = "swirl/GSM8K-v0"
TOKEN = "a-token-of-the-tests"
ACTIONS = ("<think>First the sum.</think>", "<calculator>3*3</calculator>", "no tag", "<nosuch>1</nosuch>", "\ud83d", "<answer>5</answer>")  # fmt: skip
ECHO = """
import socket, uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Said(Action):
    message: str

class Heard(Observation):
    echoed: str = ""

class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **_):
        return Heard(echoed="ready")

    def step(self, action, timeout_s=None, **_):
        return Heard(echoed=action.message, reward=0.5, done=action.message == "bye")

    @property
    def state(self):
        return State()

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
print(f"http://127.0.0.1:{listener.getsockname()[1]} echoes", flush=True)
uvicorn.Server(uvicorn.Config(create_fastapi_app(Echo, Said, Heard, max_concurrent_envs=4), log_level="error")).run([listener])
"""


@contextmanager
def process(*command, **env):
    """A server as a process, its `address` read from what it prints; ended as Ctrl-C does, `said` is its standard error."""
    child = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | env,
    )  # fmt: skip
    try:
        found = re.match(r"http://\S+", child.stdout.readline())
        assert found, child.stderr.read()
        child.address = found.group()
        yield child
    finally:
        child.send_signal(signal.SIGINT)
        child.said = child.communicate(timeout=30)[1]


def serve(*flags, **env):
    return process("-m", "swirl_benchmarks.cli", "serve", ID, "--port", 0, *flags, **env)


@pytest.fixture(scope="module")
def url():
    """An ordinary server; that OpenEnv's variable asks for its web page changes nothing."""
    with serve(ENABLE_WEB_INTERFACE="true") as child:
        yield child.address
    assert child.returncode == 0
    assert "Traceback" not in child.said


@pytest.fixture(scope="module")
def tight():
    """Wants a token, has room for two sessions, and ends them after a second of silence."""
    with serve("--max-sessions", 2, "--idle", 1, SWIRL_SERVE_TOKEN=TOKEN) as child:
        yield child.address
    assert child.returncode == 0


AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def socket_of(url):
    return url.replace("http", "ws", 1) + "/ws"


def ask(connection, kind, **data):
    connection.send(json.dumps({"type": kind} | ({} if kind == "state" else {"data": data})))
    return json.loads(connection.recv(timeout=20))


def test_openenvs_own_client_plays_what_the_local_environment_plays(url):
    local = gym.make(ID)
    oracle = make_scripted("oracle", local.unwrapped)
    with GenericEnvClient(url).sync() as client:
        for task_id in list(local.unwrapped.task_set.tasks)[:3]:
            text, info = local.reset(options={"task_id": task_id})
            result = client.reset(task_id=task_id)
            assert (result.observation["text"], result.reward, result.done) == (text, None, False)
            while not result.done:
                action = oracle([info["transcript"]], 1)[0][0].text
                text, reward, terminated, truncated, info = local.step(action)
                result = client.step({"text": action})
                seen = result.observation
                assert (seen["text"], result.reward, seen["terminated"], seen["truncated"]) == (
                    text,
                    reward,
                    terminated,
                    truncated,
                )
            assert result.observation["outcome"] == info["outcome"] == 1.0


def test_the_typed_client_gives_types(url):
    with SwirlClient(url).sync() as client:
        assert client.reset(seed=1, episode_id="mine").observation.messages[0]["role"] == "user"
        result = client.step("<calculator>2*3</calculator>")
        assert result.observation.step["results"][0]["text"] == "6"
        state = client.state()
        assert (state.episode_id, state.step_count, state.env, state.stop_reason) == ("mine", 1, ID, None)
        assert client.step(TextAction(text="<answer>1</answer>")).done
        assert client.state().stop_reason == "answered"


def test_a_remote_environment_is_the_local_one_step_by_step(url):
    remote, local = from_openenv(url), gym.make(ID)
    for seed in (3, None):
        assert remote.reset(seed=seed) == local.reset(seed=seed)
        for action in ACTIONS:
            expected = local.step("?" if action == "\ud83d" else action)  # which has no form in UTF-8
            assert remote.step(action) == expected
        with pytest.raises(ResetNeeded):
            remote.step("<answer>5</answer>")
        assert remote.unwrapped.stop == "answered"
        assert remote.unwrapped.task == local.unwrapped.task
    assert [*remote.unwrapped.task_set.tasks] == [*local.unwrapped.task_set.tasks]
    check_env(remote.unwrapped, skip_render_check=True)
    assert pickle.loads(pickle.dumps(remote.unwrapped)).reset(seed=3) == local.reset(seed=3)
    remote.close()


def test_rollouts_of_a_remote_environment_are_those_of_the_local_one(url):
    local = gym.make(ID)
    jobs = [(task_id, 0) for task_id in list(local.unwrapped.task_set.tasks)[:4]]
    policy = make_scripted("oracle", local.unwrapped)
    there, here = (
        {one.id: one for one in rollout(make, policy, jobs)}
        for make in (lambda: from_openenv(url), lambda: gym.make(ID))
    )
    assert {key: replace(one, env=here[key].env) for key, one in there.items()} == here
    assert there[f"{jobs[0][0]}/0/0"].env.kwargs == {"url": url}


def test_sessions_do_not_mix(url):
    tasks = list(gym.make(ID).unwrapped.task_set.tasks)[:8]
    with ExitStack() as stack:
        clients = [stack.enter_context(GenericEnvClient(url).sync()) for _ in tasks]
        for client, task_id in zip(clients, tasks, strict=True):
            client.reset(task_id=task_id)
        for i in range(1, 4):
            for number, client in enumerate(clients):
                seen = client.step({"text": f"<calculator>{number}+{i}</calculator>"}).observation
                assert seen["task_id"] == tasks[number]
                assert seen["step"]["results"][0]["text"] == str(number + i)
                assert len(seen["messages"]) == 1 + 2 * i


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        *[
            ({name: value}, f"A remote reset takes seed and task_id (and episode_id, a name of yours), got '{name}'.")
            for name, value in {
                "path": "/etc/passwd", "tools": ["python"], "judge": "os:system", "kwargs": {"split": "test"}, "env": ID,
                "options": {"task_id": "x"}, "module": "os",
            }.items()
        ],
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1."),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"task_id": 5}, "task_id must be the id of a task, got 5."),
        ({"task_id": "../x"}, "No task has the id '../x'."),
        ({"episode_id": "x" * 256}, "episode_id must be text of up to 255 characters"),
    ],
)  # fmt: skip
def test_a_reset_takes_a_seed_and_a_task_and_says_so(url, asked, said):
    with connect(socket_of(url)) as connection:
        refused = ask(connection, "reset", **asked)
        assert refused["type"] == "error"
        assert said in refused["data"]["message"]
        assert ask(connection, "reset", seed=0)["type"] == "observation"  # the session goes on
    if "seed" not in asked and "episode_id" not in asked:  # these two OpenEnv itself looks at
        answer = requests.post(f"{url}/reset", json=asked, timeout=20)
        assert answer.status_code == 422
        assert said in answer.text


def test_a_step_is_text_and_follows_a_reset(url):
    with connect(socket_of(url)) as connection:
        assert "Reset first." in ask(connection, "step", text="x")["data"]["message"]
        ask(connection, "reset", seed=0)
        for wrong in ({}, {"text": 5}, {"text": "x", "path": "/etc"}):
            assert ask(connection, "step", **wrong)["data"]["code"] == "VALIDATION_ERROR"
        connection.send("{")
        assert "Invalid JSON" in connection.recv(timeout=20)
        assert ask(connection, "step", text="<think>x</think>")["type"] == "observation"
    assert requests.post(f"{url}/step", json={"action": {"text": "x"}}, timeout=20).status_code == 422


def test_no_gold_leaves_before_the_end():
    served = ServedEnv(lambda: gym.make(ID, judge="gold-steps"))
    served.reset(task_id="gsm8k-train-170")  # 38; 10+3 = 13
    seen = served.step(TextAction(text="<calculator>10+3</calculator>"))
    assert seen.reward == 1.0
    assert seen.step["verdict"]["reason"] == "not told while the episode runs"  # else: brings the value 13
    assert (served.state.task["answers"], served.state.task["meta"], seen.outcome) == ([], {}, None)
    over = served.step(TextAction(text="<answer>38</answer>"))
    assert (over.step["verdict"]["reason"], over.outcome, served.state.task["answers"]) == (
        "the gold answer",
        1.0,
        ["38"],
    )
    assert all(set(row) == {"id", "question"} for row in served.list_tasks("train"))
    served.close()


def test_what_is_no_text_is_not_served():
    with pytest.raises(ConfigError, match="An environment of text can be served"):
        ServedEnv(lambda: gym.make("CartPole-v1")).reset()


def test_openenvs_own_validation_passes(url):
    report = validate_running_environment(url)
    assert report["passed"], report
    assert requests.get(f"{url}/web", timeout=20).status_code == 404


def test_only_this_machine_by_its_own_name_is_asked(url):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "["}):
        answer = requests.get(f"{url}/health", headers=headers, timeout=20)
        assert (answer.status_code, list(answer.json())) == (403, ["detail"])
    assert requests.get(f"{url}/health", headers={"Origin": "http://localhost:1"}, timeout=20).ok
    with pytest.raises(InvalidStatus) as refused:
        connect(socket_of(url), origin="http://evil.example")
    assert refused.value.response.status_code == 403
    assert b"no web page of elsewhere" in refused.value.response.body


def test_a_token_is_wanted_over_http_and_websocket(tight, monkeypatch):
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
    ):
        for path in ("health", "schema", "docs"):
            answer = requests.get(f"{tight}/{path}", headers=headers, timeout=20)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        with pytest.raises(InvalidStatus) as refused:
            connect(socket_of(tight), additional_headers=headers)
        assert refused.value.response.status_code == 401
        assert b"wants its token" in refused.value.response.body
    proxied = AUTHORIZED | {"Host": "envs.example", "Origin": "https://envs.example"}
    assert requests.get(f"{tight}/health", headers=proxied, timeout=20).ok
    with pytest.raises(ConfigError, match="wants its token"):
        from_openenv(tight)
    monkeypatch.setenv("MINE", TOKEN)
    env = from_openenv(tight, token_env="MINE")
    env.reset(seed=0)
    assert TOKEN not in repr(env.unwrapped.record)
    env.close()


def opened(url):
    """A session, as soon as there is room: a socket that was closed is let go a moment later."""
    deadline = time.monotonic() + 10
    while True:
        connection = connect(socket_of(url), additional_headers=AUTHORIZED).__enter__()
        if (answer := ask(connection, "reset", seed=0))["type"] == "observation":
            return connection
        connection.close()
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def test_a_session_too_many_is_told_and_a_disconnect_makes_room(tight):
    first, second = opened(tight), opened(tight)
    with connect(socket_of(tight), additional_headers=AUTHORIZED) as third:
        told = json.loads(third.recv(timeout=20))["data"]
        assert (told["code"], told["max_sessions"]) == ("CAPACITY_REACHED", 2)
    first.socket.shutdown(socket.SHUT_RDWR)  # gone without a word
    opened(tight).close()
    second.close()


def test_a_silent_session_ends(tight):
    with opened(tight) as connection:
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=20)
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "no message for 1 s")


def test_what_is_too_large_is_refused(tight):
    with opened(tight) as connection:
        connection.send(json.dumps({"type": "step", "data": {"text": "x" * (1 << 20)}}))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=20)
        assert closed.value.rcvd.code == 1009
    answer = requests.post(f"{tight}/reset", data=b" " * (1 << 20) + b"{}", headers=AUTHORIZED, timeout=20)
    assert answer.status_code == 413
    opened(tight).close()


def test_a_foreign_environment_by_its_one_field_of_text(tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    with process(tmp_path / "echo.py") as child:
        env = from_openenv(child.address)
        assert env.reset(seed=0)[0] == "ready"
        assert env.step("hé")[:4] == ("hé", 0.5, False, False)
        assert env.step("bye") == ("bye", 0.5, True, False, {"observation": {"metadata": {}, "echoed": "bye"}})
        with pytest.raises(ConfigError, match="does not play an environment of this toolkit"):
            env.unwrapped.task  # noqa: B018
        env.close()
        with pytest.raises(ConfigError, match=r"text fields \['message'\]: name one as action="):
            from_openenv(child.address, action="text")
    with pytest.raises(ConfigError, match="No OpenEnv server answers"):
        from_openenv(child.address)


def test_a_server_that_dies_loses_the_episode_with_a_sentence():
    with serve() as child:
        env = from_openenv(child.address)
        env.reset(seed=0)
        child.kill()
        child.wait()
        with pytest.raises(ConnectionError, match="The episode is lost"):
            env.step("<think>x</think>")
        with pytest.raises(ResetNeeded):
            env.step("<think>x</think>")


def test_the_page_on_serving_runs_as_printed(url, capsys):
    page = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "serve.md").read_text()
    printed = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(printed) == 3
    for block in printed:
        exec(block.replace("http://127.0.0.1:8000", url), {})
    assert "answered 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("swirl/GMS8K-v0",), "Did you mean 'swirl/GSM8K-v0'?"),
        ((ID, "--kwargs", "{"), "--kwargs must be JSON"),
        ((ID, "--kwargs", '{"splitt": "test"}'), "'splitt' is no argument"),
        (("CartPole-v1",), "An environment of text can be served"),
        ((ID, "--host", "0.0.0.0"), "0.0.0.0 is reached from elsewhere, so clients need a token"),
        ((ID, "--max-sessions", "0"), "--max-sessions must be at least 1"),
        ((ID, "--port", "99999"), "Port 99999 of 127.0.0.1 cannot be opened"),
        ((ID, "--port", "TAKEN"), "is in use"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(words, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        command = [
            sys.executable,
            "-m",
            "swirl_benchmarks.cli",
            "serve",
            *(() if "--port" in words else ("--port", "0")),
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("token", ["", "two words", "schlüssel"])
def test_a_token_that_cannot_be_sent_is_told(token):
    command = [sys.executable, "-m", "swirl_benchmarks.cli", "serve", ID, "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"SWIRL_SERVE_TOKEN": token}
    )
    assert done.returncode == 2
    assert "must hold a token of visible ASCII characters" in done.stderr


@pytest.mark.slow
def test_a_client_that_opens_2000_sessions_is_bounded_and_others_are_served():
    async def flood(url):
        from websockets.asyncio.client import connect as connecting

        told, held = [], []

        async def one():
            try:
                connection = await connecting(socket_of(url), open_timeout=60)
                held.append(connection)  # and never closed by us
                with contextlib.suppress(ConnectionClosed):  # what was said before is read all the same
                    await connection.send(json.dumps({"type": "reset", "data": {"seed": 0}}))
                answer = json.loads(await asyncio.wait_for(connection.recv(), 60))
                told.append(answer["data"].get("code", "session"))
            except InvalidStatus as refused:
                told.append(refused.response.status_code)
            except (OSError, ConnectionClosed) as lost:
                told.append(type(lost).__name__)

        room = asyncio.Semaphore(400)  # more at once than the server takes connections

        async def when_there_is_room():
            async with room:
                await one()

        await asyncio.gather(*(when_there_is_room() for _ in range(2000)))
        return told, held

    with serve("--max-sessions", 16) as child, GenericEnvClient(child.address, message_timeout_s=60).sync() as other:
        other.reset(seed=0)

        async def meanwhile():
            told, held = await flood(child.address)
            done = await asyncio.to_thread(other.step, {"text": "<calculator>1+1</calculator>"})
            descriptors = len(os.listdir(f"/proc/{child.pid}/fd"))
            await asyncio.gather(*(one.close() for one in held))
            return told, done, descriptors

        told, done, descriptors = asyncio.run(meanwhile())
        kinds = Counter(told)
        assert set(kinds) == {"session", "CAPACITY_REACHED", 503}  # each was told
        assert (kinds.total(), kinds["session"]) == (2000, 15)
        assert kinds["CAPACITY_REACHED"] > kinds[503]
        assert done.observation["step"]["results"][0]["text"] == "2"
        assert descriptors < 16 + 256 + 200
        opened(child.address).close()
    assert child.returncode == 0


@pytest.mark.slow
def test_clients_that_say_nothing_are_cut_off():
    with serve("--max-sessions", 1) as child:
        host, port = re.match(r"http://(.*):(\d+)", child.address).groups()
        silent = [socket.create_connection((host, int(port))) for _ in range(400)]  # there is room for 1 + 256
        silent[0].sendall(b"GET /health HTTP/1.1\r\nHost:")  # and never more
        time.sleep(4)
        crowded = requests.get(f"{child.address}/health", timeout=20)
        assert (crowded.status_code, crowded.text) == (
            503,
            "This server has 257 connections already. Try again later.\n",
        )
        time.sleep(30)
        assert requests.get(f"{child.address}/health", timeout=20).json() == {"status": "healthy"}
        for one in silent:
            one.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            one.close()


def frame(text):
    """A client's message as it goes over the wire, its mask zero."""
    assert len(text) < 126
    return b"\x81" + bytes([0x80 | len(text)]) + bytes(4) + text.encode()


@pytest.mark.slow
def test_a_client_that_does_not_read_loses_its_session():
    with serve("--max-sessions", 1) as child:
        host, port = re.match(r"http://(.*):(\d+)", child.address).groups()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
            + frame('{"type": "reset"}')
        )
        deaf.setblocking(False)
        asked, full = 0, 0
        while full < 20:  # until nothing more goes either way
            try:
                deaf.send(frame('{"type": "state"}'))
                asked, full = asked + 1, 0
            except BlockingIOError:
                full += 1
                time.sleep(0.1)
        assert asked > 1000
        with connect(socket_of(child.address)) as connection:
            assert json.loads(connection.recv(timeout=20))["data"]["code"] == "CAPACITY_REACHED"
        time.sleep(45)  # a ping after 20 s, and 20 s for its reply
        with connect(socket_of(child.address)) as connection:
            assert ask(connection, "reset", seed=0)["type"] == "observation"
        deaf.close()
