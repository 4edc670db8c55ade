"""`EndpointPolicy`: a model behind any OpenAI-compatible server acts in an environment.

Text dialects travel as plain chat messages. The `openai` dialect writes an action as the JSON of an assistant message; on
the way to the server it becomes that message, with its tool calls and the tools' messages, and the reply is written as
JSON again.
"""

import json
from typing import Any

from swirl_env.client import ChatClient, content_of
from swirl_env.grammar import Grammar
from swirl_env.session import ChatSession
from swirl_env.syntax import function_schema, read_json
from swirl_env.types import Completion, Message, Transcript


class EndpointPolicy:
    """Samples actions from a server.

    Args:
        client: of the server.
        grammar: of the environment (`env.unwrapped.grammar`); `None`: some text dialect.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_agents.endpoint import EndpointPolicy
        >>> from swirl_agents.testing_server import ChatServer
        >>> from swirl_env.client import make_endpoint
        >>> env = gym.make("swirl/GSM8K-v0")
        >>> text, info = env.reset(seed=0)
        >>> with ChatServer("<calculator>10+3</calculator>") as server:  # in place of vLLM, llama.cpp or a hosted model
        ...     policy = EndpointPolicy(make_endpoint(server.url), env.unwrapped.grammar)
        ...     print(policy([info["transcript"]])[0][0].text)
        <calculator>10+3</calculator>
    """

    def __init__(self, client: ChatClient, grammar: Grammar | None = None):
        self.client, self.grammar, self.name = client, grammar, client.name

        tooled = grammar is not None and grammar.dialect.form == "message"
        self._turns, self._read = (to_messages, to_json) if tooled else (to_turns, to_text)
        tools = [function_schema(tool) for tool in grammar.tools.values()] if tooled and grammar else []
        self._common: dict[str, Any] = {"tools": tools} if tools else {}

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        """`n` completions for each transcript; one that failed says why (`finish="error"`)."""
        return self.client.chat([self._request(transcript) for transcript in transcripts], n, self._read)

    def session(self) -> "EndpointSession":
        """States that come as they come: an episode whose step is taken goes on while the others wait for their replies."""
        return EndpointSession(self)

    def _request(self, transcript: Transcript) -> dict[str, Any]:
        return {
            "messages": self._turns(transcript.messages),
            "stop": transcript.stop if self.client.stop is None else self.client.stop,
            "seed": transcript.seed,
            **self._common,
        }


class EndpointSession(ChatSession):
    """A `ChatSession` that is asked about transcripts."""

    def __init__(self, policy: EndpointPolicy):
        super().__init__(policy.client, policy._read)
        self._policy = policy

    def add(self, key: Any, transcript: Transcript, n: int = 1) -> None:  # type: ignore[override]
        super().add(key, self._policy._request(transcript), n)


def to_turns(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages as they are; two of one role in a row become one, since many chat templates refuse them."""
    return _merged([{"role": message.role, "content": message.content} for message in messages])


def to_text(message: dict[str, Any]) -> str:
    """A reply's text, with the reasoning that a server took out of it put back in front. What is only thought of does not act:
    each `<` of the reasoning is written `&lt;`, so that no tag in it ends or makes an action."""
    content, reasoning = content_of(message), _reasoning(message).replace("<", "&lt;")
    return "\n".join(filter(None, (reasoning and f"<think>{reasoning}</think>", content)))


def to_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """OpenAI's form of a transcript of the `openai` dialect.

    An action whose calls were all answered becomes a message with `tool_calls`, and the answers in the turn after it become
    messages of role `tool`. Any other action stays the text that it is: servers refuse calls without an answer.
    """
    turns: list[dict[str, Any]] = []
    for message, after in zip(messages, (*messages[1:], None), strict=True):
        calls = _calls(message) if message.role == "assistant" else []
        ids = {call["id"] for call in calls}
        if (
            calls
            and after is not None
            and ids == {result["tool_call_id"] for result in _results(after.content, ids)[0]}
        ):
            content = content_of(read_json(message.content))
            turns.append({"role": "assistant", "content": content or None, "tool_calls": calls})
        elif message.role == "user" and turns and turns[-1].get("tool_calls"):
            results, rest = _results(message.content, {call["id"] for call in turns[-1]["tool_calls"]})
            turns += results
            if rest:
                turns.append({"role": "user", "content": rest})
        else:
            turns.append({"role": message.role, "content": _plain(message)})
    return _merged(turns)


def to_json(message: dict[str, Any]) -> str:
    """The action that a reply's message stands for; empty if it says nothing."""
    reply: dict[str, Any] = {"role": "assistant", "content": content_of(message) or None}
    if reasoning := _reasoning(message):
        reply["reasoning_content"] = reasoning
    if isinstance(calls := message.get("tool_calls"), list) and calls:
        reply["tool_calls"] = calls
    return json.dumps(reply, ensure_ascii=False) if len(reply) > 2 or reply["content"] else ""


def _reasoning(message: dict[str, Any]) -> str:
    said = message.get("reasoning_content") or message.get("reasoning")
    return said if isinstance(said, str) else ""


def _plain(message: Message) -> str:
    """The content of an action without calls; any other text as it is."""
    value = read_json(message.content) if message.role == "assistant" else None
    if not isinstance(value, dict) or value.get("tool_calls"):
        return message.content
    return content_of(value) or _reasoning(value) or message.content


def _calls(message: Message) -> list[dict[str, Any]]:
    """The calls of an action, each with the id its result has and arguments as text; none if any is not a call."""
    value = read_json(message.content)
    made = value.get("tool_calls") if isinstance(value, dict) else None
    calls = []
    for i, call in enumerate(made if isinstance(made, list) else []):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        arguments = function.get("arguments", {})
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = call["id"][:80] if isinstance(call.get("id"), str) else f"call_{i}"  # as `syntax.Message.result` has it
        calls.append({"id": name, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls if len({call["id"] for call in calls}) == len(calls) else []


def _results(observation: str, ids: set[str]) -> tuple[list[dict[str, Any]], str]:
    """(the results of these calls, the rest of the turn)."""
    results, rest = [], []
    for line in observation.split("\n"):
        value = read_json(line) if line.startswith("{") else None
        if isinstance(value, dict) and value.get("role") == "tool" and value.get("tool_call_id") in ids:
            results.append({key: value.get(key) for key in ("role", "tool_call_id", "content")})
        else:
            rest.append(line)
    return results, "\n".join(rest).strip()


def _merged(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is not None and last["role"] == turn["role"] and set(last) == set(turn) == {"role", "content"}:
            merged[-1] = {**last, "content": f"{last['content']}\n\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged
