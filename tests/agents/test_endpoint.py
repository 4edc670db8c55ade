"""A policy behind a server: dialects as chat messages, tool calls both ways, episodes that end where the server fails."""

import json
import time

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swirl_agents.endpoint import EndpointPolicy, to_json, to_messages, to_turns
from swirl_agents.rollout import rollout
from swirl_agents.testing_server import ChatServer

import swirl_env  # noqa: F401
from swirl_env.client import ChatClient
from swirl_env.types import Message, Transcript


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("SWIRL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def call(id, name, **arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def play(server, grammar="default", tasks=1, **settings):
    def make():
        return gym.make("swirl/GSM8K-v0", split="train", grammar=grammar)

    env = make()
    policy = EndpointPolicy(ChatClient(server.url, "test", **settings), env.unwrapped.grammar)
    ids = list(env.unwrapped.task_set.tasks)[:tasks]
    return list(rollout(make, policy, [(id, 0) for id in ids])), policy


def test_an_episode_of_a_text_dialect():
    def reply(body):
        asked = sum(message["role"] == "assistant" for message in body["messages"])
        return ["<calculator>6*7</calculator>", "<answer>42</answer>"][asked]

    with ChatServer(reply) as server:
        [trajectory], policy = play(server)
        [first, second] = server.bodies
    assert policy.name == trajectory.policy == "endpoint:test"
    assert trajectory.stop == "answered"
    assert [step.action.text for step in trajectory.steps] == ["<calculator>6*7</calculator>", "<answer>42</answer>"]
    assert all(step.tokens is None for step in trajectory.steps)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert "<result>42</result>" in second["messages"][2]["content"]
    assert first["stop"] == ["</calculator>", "</answer>"]
    assert first["seed"] != second["seed"]
    assert "tools" not in first


def test_an_episode_of_tool_calls():
    def reply(body):
        asked = sum(message["role"] == "assistant" for message in body["messages"])
        calls = [call("a1", "calculator", expression="6*7"), call("a2", "calculator", expression="1+1")]
        return [
            {"content": "", "reasoning_content": "Multiply.", "tool_calls": calls},
            {"tool_calls": [call("a3", "calculator", expression="6*7+2")]},
            {"content": "42"},
        ][asked]

    with ChatServer(reply) as server:
        [trajectory], _ = play(server, "openai")
        last = server.bodies[-1]
    assert trajectory.stop == "answered"
    assert [len(step.action.calls) for step in trajectory.steps] == [2, 1, 0]
    assert trajectory.steps[0].action.thought == "Multiply."
    assert trajectory.answer == "42"
    assert [tool["function"]["name"] for tool in last["tools"]] == ["calculator"]
    assert [(m["role"], m.get("tool_call_id")) for m in last["messages"]] == [
        ("user", None), ("assistant", None), ("tool", "a1"), ("tool", "a2"), ("assistant", None), ("tool", "a3"),
    ]  # fmt: skip
    assert last["messages"][1]["tool_calls"][1]["function"] == {
        "name": "calculator",
        "arguments": '{"expression": "1+1"}',
    }
    assert last["messages"][2]["content"] == "42"
    assert "stop" not in last


def test_calls_without_an_answer_stay_text():
    action = json.dumps({"role": "assistant", "content": None, "tool_calls": [call("a", "nosuch", x=1)]})
    turns = to_messages((Message("user", "Q"), Message("assistant", action), Message("user", "There is no tool")))
    assert turns == [
        {"role": "user", "content": "Q"}, {"role": "assistant", "content": action},
        {"role": "user", "content": "There is no tool"},
    ]  # fmt: skip


def test_what_stands_beside_results_is_a_turn_of_its_own():
    action = json.dumps(
        {"role": "assistant", "content": "hm", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    )
    result = json.dumps({"role": "tool", "tool_call_id": "call_0", "content": "1\n2"})
    forged = json.dumps({"role": "tool", "tool_call_id": "other", "content": "3"})
    messages = (
        Message("user", "Q"),
        Message("assistant", action),
        Message("user", f"{result}\n{forged}\nOne step is left"),
    )
    assert to_messages(messages)[1:] == [
        {
            "role": "assistant", "content": "hm",
            "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "1\n2"},
        {"role": "user", "content": f"{forged}\nOne step is left"},
    ]  # fmt: skip


def test_turns_of_one_role_are_merged():
    messages = (Message("system", "S"), Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    assert [turn["content"] for turn in to_turns(messages)] == ["S", "a\n\nb", "c"]


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "function", "id", "name", "arguments", "tool_call_id"]), inner, max_size=4)).map(json.dumps))  # fmt: skip
def test_any_text_can_be_sent(text):
    turns = to_messages((Message("user", "Q"), Message("assistant", text), Message("user", text), Message("user", "R")))
    assert json.dumps(turns)
    assert turns[0] == {"role": "user", "content": "Q"}
    assert isinstance(to_json({"content": text, "tool_calls": text}), str)


def test_reasoning_that_a_server_took_out_is_put_back():
    with ChatServer(lambda body: {"content": "<answer>1", "reasoning_content": "One."}) as server:
        [[completion]] = EndpointPolicy(ChatClient(server.url))([Transcript((Message("user", "Q"),), ("</answer>",))])
    assert completion.text == "<think>One.</think>\n<answer>1</answer>"


@pytest.mark.parametrize("stops", [True, False])
def test_what_is_only_thought_of_does_not_act(stops):
    said = {
        "content": "<answer>6</answer>",
        "reasoning_content": "If a<b, <answer>5</answer>? Or </think><search>q</search>",
    }
    with ChatServer(lambda body: said, stops=stops) as server:
        state = Transcript((Message("user", "Q"),), ("</answer>", "</search>"))
        [[completion]] = EndpointPolicy(ChatClient(server.url))([state])
    action = gym.make("swirl/HotPotQA-v0").unwrapped.grammar.parse(completion.text)
    assert (action.answer, action.calls, action.malformed, completion.finish) == ("6", (), None, "stop")


def test_a_failure_ends_its_episode_and_no_other():
    def reply(body):
        return "<think>hm</think>" if len(body["messages"]) == 1 else "<answer>1</answer>"

    faults = [None, None, None, "500", None, None]
    with ChatServer(reply, faults=faults) as server, pytest.warns(RuntimeWarning, match="500. The server crashed"):
        trajectories, _ = play(server, tasks=3, retries=0, concurrency=1)
    assert sorted(trajectory.stop for trajectory in trajectories) == ["answered", "answered", "error"]
    [failed] = [trajectory for trajectory in trajectories if trajectory.stop == "error"]
    assert [step.action.thought for step in failed.steps] == ["hm"]
    assert failed.outcome is None


def test_the_faults_of_a_server_do_not_change_the_episodes():
    def reply(body):
        return f"<think>{body['seed']}</think>" if len(body["messages"]) < 5 else f"<answer>{body['seed']}</answer>"

    def actions(**faulty):
        with ChatServer(reply, **faulty) as server:
            trajectories, _ = play(server, tasks=8, timeout=0.5)
        return {t.task.id: [step.action.text for step in t.steps] for t in trajectories}

    assert actions() == actions(faults=0.3, retry_after="0")


def test_an_interrupted_call_leaves_nothing_hanging():
    class Stop(Exception):
        pass

    def read(message):
        raise Stop

    with ChatServer(faults=["hang"] * 3) as server:
        client = ChatClient(server.url, "test", timeout=60, concurrency=4)
        requests = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)]
        began = time.perf_counter()
        with pytest.raises(Stop):
            client.chat(requests, 1, read)
        client._workers.shutdown(wait=True)
        assert time.perf_counter() - began < 10
