"""The chat client against a server over real HTTP that fails in every way: nothing lost, nothing twice, nothing told."""

import json
import multiprocessing
import pickle
import re
import socketserver
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swirl_agents.testing_server import FAULTS, ChatServer

from swirl_env.client import ChatClient, _ended, make_endpoint
from swirl_env.errors import ConfigError, UnknownArgumentError
from swirl_env.transport import _seconds, without_credentials
from swirl_env.types import Completion, Message, Transcript

STOPS = ("</search>", "</answer>")
KEY = "sk-very-secret-4711"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("SWIRL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def state(text="Go", stop=STOPS, seed=None):
    return Transcript((Message("user", text),), stop, seed)


def states(n, **kwargs):
    return [state(f"question {i}", **kwargs) for i in range(n)]


def echo(body):
    return f"<answer>{body['messages'][-1]['content']}</answer>"


def texts(answers):
    return [[completion.text for completion in completions] for completions in answers]


def only(answers) -> Completion:
    [[completion]] = answers
    return completion


# -- what is sent and what comes back


def test_a_completion_and_what_was_sent():
    with ChatServer(echo) as server:
        client = ChatClient(server.url, temperature=0.5, max_new_tokens=9, extra={"top_p": 0.9})
        conversation = Transcript(
            (Message("user", "a"), Message("assistant", "b"), Message("user", "c")), STOPS, 2**40 + 5
        )
        assert client([conversation]) == [[Completion("<answer>c</answer>", None, "stop")]]
        assert server.bodies == [
            {
                "model": "test", "temperature": 0.5, "max_tokens": 9, "stop": list(STOPS), "seed": 5, "top_p": 0.9,
                "messages": [{"role": r, "content": t} for r, t in (("user", "a"), ("assistant", "b"), ("user", "c"))],
            }
        ]  # fmt: skip
        assert client.name == "endpoint:test"
        assert client([]) == []


def test_extra_takes_fields_away_and_stop_overrides():
    with ChatServer("one two <b> three") as server:
        client = ChatClient(server.url, "test", stop=("<b>",), extra={"max_tokens": None, "max_completion_tokens": 4})
        client([state()])
        assert server.bodies[0]["stop"] == ["<b>"]
        assert "max_tokens" not in server.bodies[0]


def test_order_is_kept():
    def slow_first(body):
        time.sleep(0.2 if body["messages"][0]["content"] == "question 0" else 0.0)
        return echo(body)

    with ChatServer(slow_first) as server:
        answers = ChatClient(server.url)(states(20))
    assert texts(answers) == [[f"<answer>question {i}</answer>"] for i in range(20)]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_n_samples_also_where_a_server_gives_fewer(most):
    with ChatServer(lambda body: f"<answer>{body['seed']}</answer>", most=most) as server:
        client = ChatClient(server.url)
        answers = client([state(seed=10), state(seed=20)], 8)
    assert [len(completions) for completions in answers] == [8, 8]
    assert {body.get("n", 1) for body in server.bodies} <= {8, 5, 3, 2, 1}
    if most == 1:  # each sample is a draw of its own
        assert texts(answers) == [[f"<answer>{s + i}</answer>" for i in range(8)] for s in (10, 20)]


def test_n_samples_also_where_a_server_takes_no_n():
    with ChatServer(lambda body: f"<answer>{body.get('seed')}</answer>", refuses=("n",)) as server:
        client = ChatClient(server.url)
        assert texts(client([state(seed=5)], 3)) == [[f"<answer>{seed}</answer>" for seed in (5, 6, 7)]]
        client([state()], 2)
    assert [body.get("n") for body in server.bodies] == [3, None, None, None, None, None]
    assert client.usage.failures == 0


@pytest.mark.parametrize("field", ["seed", "stop", "logprobs", "max_tokens", "temperature"])
def test_a_field_that_a_server_does_not_take_can_be_left_out(field):
    with ChatServer(refuses=(field,)) as server:
        refused = only(ChatClient(server.url, top_logprobs=1)([state(seed=1)]))
        assert f"Leave that field out with extra={{'{field}': None}}" in refused.text
        left_out = ChatClient(server.url, top_logprobs=1, extra={field: None})
        assert only(left_out([state(seed=1)])).text == "<answer>42</answer>"


def test_a_thought_without_a_reply_is_told():
    with ChatServer(lambda body: {"content": None, "reasoning_content": "Hm, GOOD"}) as server:
        completion = only(ChatClient(server.url, retries=0)([state()]))
    assert (completion.finish, "Turn the model's thinking off" in completion.text) == ("error", True)


def test_samples_asked_for_alone_are_asked_at_once():
    with ChatServer(seconds=0.3, most=1) as server:
        ChatClient(server.url)([state()], 16)
        assert server.peak >= 8


def test_the_token_limit_and_the_models_own_end():
    with ChatServer("one two three") as server:
        assert only(ChatClient(server.url, max_new_tokens=2)([state()])) == Completion("one two", None, "length")
        assert only(ChatClient(server.url)([state()])) == Completion("one two three", None, "eos")


@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize("names", [True, False])
def test_stop_strings_stay_in_the_text(heeds, names):
    said = "<think>a</think><search>fish</search> and <answer>more</answer>"
    with ChatServer(said, stops=heeds, names_stop=names) as server:
        completion = only(ChatClient(server.url)([state()]))
    assert completion == Completion("<think>a</think><search>fish</search>", None, "stop")


@pytest.mark.parametrize(
    ("text", "choice", "expected"),
    [
        ("<search>a", {"finish_reason": "stop"}, ("<search>a</search>", "stop")),
        ("<search>a", {"finish_reason": "stop", "matched_stop": "</search>"}, ("<search>a</search>", "stop")),
        ("<search>a", {"finish_reason": "stop", "matched_stop": 2}, ("<search>a", "eos")),
        ("<search>a", {"finish_reason": "stop", "stop_reason": None}, ("<search>a", "eos")),
        ("<search>a<answer>", {"finish_reason": "stop"}, ("<search>a<answer>", "eos")),
        ("<search>a", {"finish_reason": "length"}, ("<search>a", "length")),
        ("a", {"finish_reason": "stop"}, ("a", "eos")),
        ("a</answer>b</search>", {"finish_reason": "length"}, ("a</answer>", "stop")),
    ],
)
def test_which_stop_string_was_hit(text, choice, expected):
    assert _ended(text, STOPS, choice) == expected


def test_log_probs():
    with ChatServer("GOOD step") as server:
        first, second = only(ChatClient(server.url, top_logprobs=2)([state()])).alternatives
        assert first == {"GOOD": -0.25, "GOOD~": -0.5}
        assert list(second) == [" step", " step~"]
        assert only(ChatClient(server.url)([state()])).alternatives is None


def test_sampled_tokens_where_the_server_tells():
    asks = {"return_token_ids": True, "logprobs": True}  # as vLLM has it
    with ChatServer("<search>a film</search>") as server:
        tokens = only(ChatClient(server.url, extra=asks)([state()])).tokens
        assert tokens.sampled.all() and tokens.ids.shape == (2,) and tokens.logprobs.tolist() == [-0.25, -0.25]
        for fewer in ({}, {"return_token_ids": True}, {"logprobs": True}):
            assert only(ChatClient(server.url, extra=fewer)([state()])).tokens is None
    with ChatServer(
        "<search>a film</search> and more", stops=False
    ) as server:  # it heeds no stop strings: what was cut was sampled, too
        completion = only(ChatClient(server.url, extra=asks)([state()]))
        assert (completion.text, completion.tokens) == ("<search>a film</search>", None)
    with ChatServer(lambda body: {"content": "x", "reasoning": "hm"} | {"token_ids": [1]}) as server:
        assert only(ChatClient(server.url, extra=asks)([state()])).tokens is None


def test_an_adapter_is_loaded_asked_and_forgotten(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with ChatServer(lambda body: body["model"], adapters=True) as server:
        client = ChatClient(server.url)
        tuned = client.load_adapter("round-1", str(tmp_path))
        assert server.adapters == {"round-1": str(tmp_path)}
        assert client.load_adapter("round-1", str(tmp_path)).name == tuned.name == "endpoint:round-1"
        assert [only(one([state()])).text for one in (tuned, client)] == ["round-1", "test"]
        assert (client.usage.calls, tuned.usage.calls) == (4, 1)
        client.unload_adapter("round-1")
        client.unload_adapter("round-1")
        assert server.adapters == {}
        assert "has no such model" in only(tuned([state()])).text
        with pytest.raises(
            ConfigError, match=r"did not load the adapter in /nowhere: .*No adapter found.*--enable-lora"
        ):
            client.load_adapter("round-2", "/nowhere")
    with ChatServer() as server, pytest.raises(ConfigError, match="did not load the adapter.*RUNTIME_LORA_UPDATING"):
        ChatClient(server.url).load_adapter("round-1", str(tmp_path))


# -- many at once


def test_64_in_flight_overlap():
    with ChatServer(seconds=0.05) as server:
        one, many = ChatClient(server.url, "test", concurrency=1), ChatClient(server.url, "test", concurrency=64)
        many(states(64))
        began = time.perf_counter()
        one(states(10))
        between = time.perf_counter()
        many(states(640))
        each, overlapped = (between - began) / 10, (time.perf_counter() - between) / 640
        assert each / overlapped > 10
        assert len(server.connections) <= 80, "connections are kept alive"


def test_256_in_flight_are_not_throttled():
    all_there = threading.Barrier(256)

    def reply(body):
        all_there.wait(30)
        return "<answer>1</answer>"

    with ChatServer(reply) as server:
        answers = ChatClient(server.url, "test", concurrency=256, retries=0)(states(256))
        assert server.peak == 256
    assert all(completion.finish == "stop" for [completion] in answers)


def test_several_callers_share_the_limit():
    with ChatServer(seconds=0.05) as server:
        client, got = ChatClient(server.url, "test", concurrency=8, timeout=5), []
        threads = [threading.Thread(target=lambda: got.extend(client(states(20)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 60
        assert 4 <= server.peak <= 8
        assert client.usage.calls == 60


# -- faults


def test_a_fifth_of_the_calls_fails_and_none_is_lost():
    with ChatServer(echo, seconds=0.02, faults=0.2, retry_after="0.2") as server:
        client = ChatClient(server.url, "test", concurrency=32, timeout=0.5, deadline=30)
        answers = client(states(300))
        assert set(server.met) == set(FAULTS)
    for i, [completion] in enumerate(answers):
        assert completion.text == f"<answer>question {i}</answer>" or completion.finish == "error"
    usage, failed = client.usage, sum(completion.finish == "error" for [completion] in answers)
    assert failed == usage.failures <= 3
    assert usage.calls == 300 + usage.retries == len(server.bodies)
    assert usage.retries >= sum(server.met.values()) - failed  # more where a busy machine was late by itself
    assert usage.completion_tokens == 2 * (300 - failed)
    assert usage.seconds > 300 * 0.02


@pytest.mark.parametrize("fault", [*FAULTS, "close", "empty"])
def test_each_fault_passes(fault):
    with ChatServer(echo, faults=[fault], retry_after="0") as server:
        client = ChatClient(server.url, "test", timeout=0.5)
        assert only(client([state()])).text == "<answer>Go</answer>"
        assert client.usage.retries == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "429. Rate limit reached"), ("500", "500. The server crashed"), ("hang", "no whole reply within 0.2 s"),
        ("truncated", "no JSON object"), ("wrong", "without choices"), ("close", "closed the connection"),
        ("empty", "an empty reply"), ("drip", "no whole reply within 0.2 s"),
    ],
)  # fmt: skip
def test_what_never_passes_is_an_error_of_one_line(fault, reason):
    with ChatServer(faults=[fault] * 9, retry_after="0") as server:
        client = ChatClient(server.url, "test", timeout=0.2, retries=1)
        [one, two] = client([state()], 2)[0]
    assert one == two
    assert one.finish == "error"
    assert reason in one.text.replace(" answered ", "").replace(server.url, "")
    assert "\n" not in one.text
    assert "2 tries" in one.text
    assert (client.usage.calls, client.usage.retries, client.usage.failures) == (2, 1, 1)


def test_some_fail_and_the_others_do_not():
    with ChatServer(echo, faults=[None, "500", None], retry_after="0") as server:
        answers = ChatClient(server.url, "test", retries=0, concurrency=1)(states(3))
    assert [completion.finish for [completion] in answers] == ["stop", "error", "stop"]


def test_a_server_that_drips_bytes_is_cut_off():
    with ChatServer(faults=["drip"] * 3) as server:
        client = ChatClient(server.url, "test", timeout=0.4, retries=2)
        began = time.perf_counter()
        assert only(client([state()])).finish == "error"
        assert time.perf_counter() - began < 8  # the whole reply would take half a minute each time


def test_a_server_that_drips_headers_is_cut_off():
    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            for letter in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100:
                self.request.sendall(bytes([letter]))
                time.sleep(0.1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        client = ChatClient(f"http://127.0.0.1:{server.server_address[1]}/v1", "test", timeout=0.4, retries=0)
        began = time.perf_counter()
        assert "no whole reply within 0.4 s" in only(client([state()])).text
        assert time.perf_counter() - began < 5
        server.shutdown()


def test_the_deadline_of_a_transcript_holds():
    with ChatServer(faults=["hang"] * 50) as server:
        client = ChatClient(server.url, "test", timeout=0.3, deadline=1.0, retries=50)
        began = time.perf_counter()
        completion = only(client([state()]))
        assert time.perf_counter() - began < 4
    assert completion.finish == "error"
    assert "deadline" in completion.text


def test_the_clock_of_a_transcript_starts_with_its_first_attempt():
    with ChatServer(seconds=0.1) as server:
        client = ChatClient(server.url, "test", concurrency=1, deadline=0.7)
        assert all(completion.finish == "stop" for [completion] in client(states(12)))


def test_retry_after_is_honoured():
    with ChatServer(faults=["429"], retry_after="1") as server:
        began = time.perf_counter()
        assert only(ChatClient(server.url, "test")([state()])).finish == "stop"
        assert time.perf_counter() - began >= 1


def test_a_retry_after_beyond_the_deadline_is_not_waited_for():
    with ChatServer(faults=["429"], retry_after="3600") as server:
        completion = only(ChatClient(server.url, "test", deadline=60)([state()]))
    assert completion.finish == "error"
    assert "429" in completion.text
    assert "deadline" in completion.text


def test_retry_after_is_seconds_or_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < _seconds(soon) <= 30
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [_seconds(text) for text in ("2", "0.5", "-3", "", None, "soon", "inf", "nan")] == [
        2, 0.5, 0, None, None, None, None, None,
    ]  # fmt: skip


def test_a_server_that_comes_back():
    with ChatServer() as server:
        port = int(server.url.split(":")[2].split("/")[0])
    client = ChatClient(server.url, "test", retries=8)
    revived = ChatServer(port=port)
    threading.Timer(0.3, revived.__enter__).start()
    assert only(client([state()])).finish == "stop"
    revived.__exit__()


# -- what is told at once


@pytest.mark.parametrize(
    ("settings", "path", "kwargs", "reason"),
    [
        ({"key": KEY}, "", {}, r"refuses the key \(401\).* No key is set: put one into SWIRL_API_KEY"),
        ({}, "", {"model": "tset"}, r"no such model \(404\).* does not exist"),
        ({}, "/nowhere", {"model": "test"}, r"no chat completions \(404\).*/v1"),
        ({"context": 5}, "", {}, r"longer than the model's context \(400\).*Lower max_new_tokens"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(settings, path, kwargs, reason):
    with ChatServer(**settings) as server:
        completion = only(ChatClient(server.url + path, **{"model": "test"} | kwargs)([state("one two three four")]))
    assert completion.finish == "error"
    assert completion.tokens is None
    assert re.search(reason, completion.text)
    assert len(server.bodies) <= 1


def test_check_tells_before_the_first_call():
    with ChatServer(key=KEY, models=("qwen3",)) as server, pytest.raises(ConfigError, match="refuses the key"):
        ChatClient(server.url, "qwen3").check()
    with ChatServer(models=("qwen3", "llama")) as server:
        with pytest.raises(ConfigError, match=r"Did you mean 'qwen3'\? Known: llama, qwen3"):
            ChatClient(server.url, "qwen").check()
        with pytest.raises(ConfigError, match=r"lists 2 models \(qwen3, llama\): name the one"):
            ChatClient(server.url).check()
        with pytest.raises(ConfigError, match="has no chat completions"):
            ChatClient(server.url.removesuffix("/v1"), "qwen3").check()
        client = ChatClient(server.url, "qwen3")
        client.check()
        assert server.bodies[-1]["max_tokens"] == 1
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=r"cannot be reached \(Connection refused\)"):
        client.check()
    assert time.perf_counter() - began < 3


def test_a_name_is_a_models_own():
    with ChatServer(models=("qwen3",)) as server:
        client = ChatClient(server.url)
        assert client.name == "endpoint:qwen3"
    with pytest.raises(ConfigError, match="cannot be reached"):
        ChatClient(client.url)
    json.dumps(client.parameters)


def test_check_outlasts_a_passing_fault():
    with ChatServer(faults=["500", "truncated"]) as server:
        ChatClient(server.url).check()


def test_no_server_is_an_error_of_each():
    answers = ChatClient("http://127.0.0.1:9/v1", "test", retries=0)(states(2), 2)
    assert [[completion.finish for completion in completions] for completions in answers] == [["error"] * 2] * 2


@pytest.mark.parametrize(
    ("url", "kwargs"),
    [
        ("localhost:8000", {}), ("ftp://host/v1", {}), ("http:///v1", {}), ("http://host:port/v1", {}),
        ("http://host/v1?key=1", {}), ("http://h/v1", {"timeout": 0}), ("http://h/v1", {"concurrency": 0}),
        ("http://h/v1", {"temperature": -1}), ("http://h/v1", {"extra": {"stream": True}}),
        ("http://h/v1", {"api_key_env": KEY}), ("http://user:" + KEY + "#@host/v1", {}),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(url, kwargs):
    with pytest.raises(ConfigError) as told:
        ChatClient(url, "test", **kwargs)
    assert KEY not in str(told.value)


def test_names():
    client = make_endpoint("endpoint:http://127.0.0.1:8000/v1/#org/model-7b", timeout=3)
    assert (client.url, client.model, client.timeout) == ("http://127.0.0.1:8000/v1", "org/model-7b", 3)
    assert client.name == "endpoint:org/model-7b"
    with pytest.raises(UnknownArgumentError, match="Did you mean 'timeout'"):
        make_endpoint("endpoint:http://127.0.0.1:8000/v1", timout=3)
    assert make_endpoint("endpoint:http://[::1]:80/v1/chat/completions#m").url == "http://[::1]:80/v1"


# -- secrets


def test_the_key_is_sent_and_never_told(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with ChatServer(key=KEY) as server:
        client = ChatClient(server.url, "test")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert only(client([state()])).finish == "stop"
        monkeypatch.setenv("SWIRL_API_KEY", "wrong-" + KEY[3:])
        refused = only(client([state()]))  # this server repeats the key in its error, as some do
        with pytest.raises(ConfigError) as told:
            client.check()
    assert refused.finish == "error"
    assert "Incorrect API key provided: ***" in refused.text
    for place in (
        repr(client),
        repr(client.__dict__),
        refused.text,
        str(told.value),
        caplog.text,
        pickle.dumps(client),
    ):
        assert KEY[3:] not in str(place)


def test_credentials_in_an_address_are_used_and_never_told():
    with ChatServer() as server:
        client = ChatClient(server.url.replace("//", "//me:pass%2Fword@"), "test")
        assert only(client([state()])).finish == "stop"
        assert server.headers[0]["Authorization"] == "Basic bWU6cGFzcy93b3Jk"
        assert client.url == server.url
    unreachable = only(ChatClient(client.url, "test", retries=0)([state()])).text
    for place in (repr(client), client.url, client.name, unreachable, pickle.dumps(client)):
        assert not any(secret in str(place) for secret in ("pass", "me:", "bWU6"))


def test_a_key_that_no_header_can_hold(monkeypatch):
    monkeypatch.setenv("SWIRL_API_KEY", "gehe\u00efm\nX-Evil: 1")
    with ChatServer() as server:
        completion = only(ChatClient(server.url, "test")([state()]))
    assert completion.finish == "error"
    assert "gehe" not in completion.text


# -- processes


def test_a_pickled_client_works():
    with ChatServer(echo) as server:
        client = ChatClient(server.url, temperature=0.25)
        client([state()])
        twin = pickle.loads(pickle.dumps(client))
        assert only(twin([state()])).text == "<answer>Go</answer>"
        assert twin.temperature == 0.25


def _child(client, pipe):
    pipe.send(texts(client(states(5))))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_client_works():
    with ChatServer(echo) as server:
        client = ChatClient(server.url)
        client(states(5))
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_child, args=(client, theirs))
        child.start()
        client(states(5))
        assert ours.poll(20)
        assert ours.recv() == [[f"<answer>question {i}</answer>"] for i in range(5)]
        child.join()


# -- replies from elsewhere

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "finish_reason", "logprobs", "tool_calls", "error", "usage", "text"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed():
    with ChatServer() as server:
        yield server


@given(JSON | st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"message": JSON, "logprobs": JSON}))}))
@settings(max_examples=30)
def test_no_reply_breaks_the_client(fuzzed, reply):
    fuzzed.completion = lambda body: reply
    completion = only(ChatClient(fuzzed.url, "test", retries=0, top_logprobs=1)([state()]))
    assert completion.text
    assert completion.finish in ("stop", "eos", "length", "error")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://user:pass@host:80/v1#m", "http://host:80/v1#m"),
        ('{"judge": "model:https://u:p%40@h/v1"}', '{"judge": "model:https://h/v1"}'),
        ("http://me:p@ss@host/v1", "http://host/v1"),
        ("http://me:it's@host/v1", "http://host/v1"),
        (json.dumps({"url": 'http://me:a"b\\c@host/v1'}), '{"url": "http://host/v1"}'),
        ('["http://host","me@example.org"]', '["http://host","me@example.org"]'),
        ("http://host/a@b and me@example.org", "http://host/a@b and me@example.org"),
    ],
)
def test_what_is_written_down_holds_no_credentials(text, safe):
    assert without_credentials(text) == safe
