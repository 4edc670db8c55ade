"""How an action is written: three forms, which the dialects of `grammar.py` fill in.

`Tags`     `<search>words</search>`, or one tag for every call with JSON inside (Hermes, Qwen).
`Lines`    `Thought: ...` and `Action: search[words]` (ReAct, Yao et al. 2022).
`Message`  the JSON of an assistant message with `tool_calls` (OpenAI chat completions).

Each turns text into `Parts` in linear time or raises `Malformed` with the reason, and writes parts as text again.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swirl_env.errors import ConfigError, near
from swirl_env.types import Tool, ToolCall

GAP = r"\s{0,8}"  # bounded, so that no run of blanks makes matching quadratic
NAME = r"[A-Za-z_][\w.-]{0,63}"


class Malformed(Exception):
    """Why a text is no action."""


@dataclass(slots=True)
class Parts:
    """What a text holds, in order."""

    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


# -- arguments: a body is the tool's one required argument, or a JSON object of its arguments


def read_json(text: str) -> Any:
    """JSON that can be written again as it is: finite numbers, no deep nesting, no lone surrogates; else `None`."""

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(number)
        return float(number)

    if text.count("[") + text.count("{") > 100:
        return None
    try:
        value = json.loads(text, parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return None
    return value


def main_argument(tool: Tool) -> str | None:
    """The argument that a bare body stands for."""
    required = tool.parameters.get("required") or list(tool.parameters.get("properties", {}))
    return required[0] if required else None


def read_body(tool: Tool, body: str) -> dict[str, Any]:
    """The arguments that a body writes."""
    if body.startswith("{"):
        value, known = read_json(body), set(tool.parameters.get("properties", {}))
        if isinstance(value, dict) and (set(value) <= known or len(known) > 1 and len(value) > 1):
            return value  # a misspelt name is told; but a body of a tool with one argument may be JSON itself
    main = main_argument(tool)
    return {} if main is None and not body else {main or "input": body}


def write_body(tool: Tool | None, arguments: Mapping[str, Any], marks: str, bare: bool = True) -> str:
    """The body that `read_body` reads as these arguments: bare where that can be (and is wished), else JSON without `marks`."""
    values = list(arguments.values())
    fits = len(values) == 1 and isinstance(values[0], str)
    if bare and fits and (tool is None or read_body(tool, values[0].strip()) == arguments):
        return values[0]
    return _json(json.dumps(arguments, ensure_ascii=False), marks) if arguments else ""


def hint(tool: Tool) -> str:
    """What stands in a body, for the prompt."""
    properties, required = tool.parameters.get("properties", {}), tool.parameters.get("required", [])
    if len(properties) <= 1:
        return main_argument(tool) or ""
    shown = ", ".join(
        f'"{name}": {_kind(entry)}{"" if name in required else " (optional)"}' for name, entry in properties.items()
    )
    return f"{{{shown}}}"


def _kind(schema: Any) -> str:
    """How a value is written, for the prompt."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    return {"string": '"..."', "integer": "1", "number": "1.5", "boolean": "true", "array": "[...]"}.get(
        str(kind), "..."
    )


def function_schema(tool: Tool) -> dict[str, Any]:
    """OpenAI's form of a tool's schema."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _schema(tool: Tool) -> str:
    return _json(json.dumps(function_schema(tool), ensure_ascii=False), "<")


def _json(text: str, escaped: str) -> str:
    """JSON with some characters written by their numbers, so that nothing in a string looks like a mark."""
    for character in escaped:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _json_call(tools: Mapping[str, Tool], name: Any, arguments: Any) -> ToolCall:
    """A call whose name and arguments were JSON; arguments may be JSON once more."""
    if not isinstance(name, str) or name not in tools:
        raise Malformed(f"There is no tool {escape(str(name)[:80])!r}.{near(str(name)[:80], tools)}")
    if isinstance(arguments, str):
        arguments = read_json(arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise Malformed(f"The arguments of {name!r} are not a JSON object.")
    return ToolCall(name, arguments)


class Syntax(ABC):
    """One way of writing actions over one live set of tools."""

    thinks = True
    """Whether a step may be a thought alone."""
    stop: tuple[str, ...] = ()
    """A policy may stop sampling after any of these."""

    @abstractmethod
    def read(self, text: str) -> Parts: ...

    @abstractmethod
    def write(self, thought: str, calls: tuple[ToolCall, ...], answer: str | None, bare: bool = True) -> str:
        """Text of these parts; without `bare` every body is JSON that holds no mark."""

    @abstractmethod
    def listing(self) -> list[str]:
        """What can be written, a line each, for the prompt."""

    @abstractmethod
    def advice(self) -> str:
        """One sentence that says what to write."""

    @abstractmethod
    def answer_now(self) -> str:
        """How an answer is written, for the last step."""

    def result(self, form: str, call: ToolCall, text: str, action: str, index: int) -> str:
        """One result as the model reads it: the dialect's format string, filled in."""
        del action, index
        return form.format(query="", text=text)


def _check_apart(written: Mapping[str, str], tool_of: Mapping[str, str]) -> None:
    """Raise `ConfigError` where two tools are written alike (case does not count)."""
    for name, mark in written.items():
        if tool_of[mark.lower()] != name:
            raise ConfigError(
                f"The tools {name!r} and {tool_of[mark.lower()]!r} are both written {mark!r} here. Rename one."
            )


class Tags(Syntax):
    """`<name>body</name>`; with `call`, every call is `<call>{"name": ..., "arguments": {...}}</call>`."""

    def __init__(
        self,
        tools: Mapping[str, Tool],
        tags: Mapping[str, str],
        think: str | None,
        answer: str,
        call: str | None,
        reserved: set[str],
    ):
        self.tools, self.call, self.answer = tools, call, answer
        self.thinks, self._think = think is not None, think or "think"
        self.tag_of = {} if call else {name: tags.get(name, name) for name in tools}
        self._tool_of = {tag.lower(): name for name, tag in self.tag_of.items()}
        for tag in self._tool_of:
            if tag in reserved | {answer, self._think}:
                raise ConfigError(f"A tool cannot be called {tag!r}: that tag is taken in this grammar.")
        _check_apart(self.tag_of, self._tool_of)
        callers = [call] if call else list(self.tag_of.values())
        self._written = [f"<{tag}>...</{tag}>" for tag in (*([think] if think else []), *self.tag_of.values(), answer)]
        if call:
            self._written.insert(-1, f"<{call}>{_EXAMPLE_CALL}</{call}>")
        self._tag = re.compile(
            rf"<{GAP}(/?){GAP}({'|'.join(map(re.escape, [*self._tool_of, *callers, answer, self._think]))}){GAP}>",
            re.I | re.A,
        )
        # the usual action: one thought, nothing beside it and no `<` in it
        self._plain_thought = re.compile(rf"\s*<{re.escape(self._think)}>([^<]*)</{re.escape(self._think)}>\s*")
        self.stop = tuple(f"</{tag}>" for tag in (*callers, answer))

    _opening = re.compile(rf"<{GAP}({NAME}){GAP}>")

    def read(self, text: str) -> Parts:
        if plain := self._plain_thought.fullmatch(text):
            return Parts([plain[1]])
        parts = Parts()
        tags = list(self._tag.finditer(text))
        last_closing = {tag[2].lower(): i for i, tag in enumerate(tags) if tag[1]}
        i = free_from = 0
        while i < len(tags):
            name, closing = tags[i][2].lower(), bool(tags[i][1])
            end = None
            if not closing and last_closing.get(name, 0) > i:
                end = next(j for j in range(i + 1, len(tags)) if tags[j][1] and tags[j][2].lower() == name)
            if end is None and name != self._think:
                raise Malformed(f"</{name}> closes nothing." if closing else f"<{name}> was opened but never closed.")
            parts.thoughts.append(text[free_from : tags[i].start()])
            if end is not None:
                body = text[tags[i].end() : tags[end].start()].strip()
                if name == self._think:
                    parts.thoughts.append(body)
                elif name == self.answer:
                    parts.answers.append(body)
                else:
                    parts.calls.append(self._read_call(name, body))
                i = end
            # else: a lone <think> or </think> is dropped; templates and small models write only one of the pair
            free_from = tags[i].end()
            i += 1
        parts.thoughts.append(text[free_from:])
        if not tags:
            raise Malformed(self._foreign(text) if text.strip() else "The action is empty.")
        return parts

    def _read_call(self, tag: str, body: str) -> ToolCall:
        if self.call is None:
            name = self._tool_of[tag]
            return ToolCall(name, read_body(self.tools[name], body))
        value = read_json(body)
        if not isinstance(value, dict) or "name" not in value:
            raise Malformed(f"<{tag}> must hold JSON such as {_EXAMPLE_CALL}; got {escape(body[:80])!r}.")
        return _json_call(self.tools, value["name"], value.get("arguments", value.get("parameters", {})))

    def _foreign(self, text: str) -> str:
        """Why a text without a known tag is no action."""
        found = self._opening.search(text)
        if found is None:
            return "There is no tag."
        if found[1] in self.tools:
            return f"The tool {found[1]!r} is called by <{self.call or self.tag_of[found[1]]}>."
        return f"There is no tool {found[1]!r}.{near(found[1], self._tool_of or self.tools)}"

    def write(self, thought: str, calls: tuple[ToolCall, ...], answer: str | None, bare: bool = True) -> str:
        pieces = []
        if thought:
            pieces.append(f"<{self._think}>{thought}</{self._think}>" if self.thinks else thought)
        for call in calls:
            if self.call:
                body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
                pieces.append(f"<{self.call}>\n{_json(body, '<')}\n</{self.call}>")
            else:
                tag = self.tag_of.get(call.name, call.name)
                pieces.append(f"<{tag}>{write_body(self.tools.get(call.name), call.arguments, '<', bare)}</{tag}>")
        if answer is not None:
            pieces.append(f"<{self.answer}>{answer}</{self.answer}>")
        return "\n".join(pieces)

    def listing(self) -> list[str]:
        if self.call:
            return [_schema(tool) for tool in self.tools.values()]
        lines = [f"<{self._think}>a thought</{self._think}>"] if self.thinks else []
        for name, tool in self.tools.items():
            tag = self.tag_of[name]
            lines.append(f"<{tag}>{escape(hint(tool))}</{tag}> {escape(tool.description)}")
        return [*lines, f"<{self.answer}>the final answer</{self.answer}>"]

    def advice(self) -> str:
        return f"Write one of: {' '.join(self._written)}"

    def answer_now(self) -> str:
        return f"<{self.answer}>...</{self.answer}>"

    def result(self, form: str, call: ToolCall, text: str, action: str, index: int) -> str:
        if "</" not in form:  # nothing closes the block: no line of a result may look like one of ours
            text = text.replace("\n", "\n  ")
        query = escape(write_body(self.tools.get(call.name), call.arguments, "<")) if "{query}" in form else ""
        return form.format(query=query.replace("\n", " "), text=text)


_EXAMPLE_CALL = '{"name": "a tool", "arguments": {...}}'


class Lines(Syntax):
    """`Thought: ...`, `Action: tool[body]`, `Action: finish[answer]`; what follows `Observation:` is not read."""

    _marker = re.compile(
        r"^[ \t]{0,4}(thought|action|observation)[ \t]{0,4}\d{0,4}[ \t]{0,4}:[ \t]{0,4}", re.I | re.M | re.A
    )
    _action = re.compile(rf"({NAME})[ \t]{{0,4}}\[")
    stop = ("\nObservation",)

    def __init__(self, tools: Mapping[str, Tool], answer: str):
        self.tools, self.answer = tools, answer
        self._tool_of = {name.lower(): name for name in tools}
        _check_apart({name: name for name in tools}, self._tool_of)
        if answer in self._tool_of:
            raise ConfigError(f"A tool cannot be called {answer!r}: that name is taken in this grammar.")

    def read(self, text: str) -> Parts:
        markers = list(self._marker.finditer(text))
        if not markers:
            raise Malformed("There is no line that begins with 'Thought:' or 'Action:'.")
        parts = Parts([text[: markers[0].start()]])
        ends = [*(marker.start() for marker in markers[1:]), len(text)]
        for marker, end in zip(markers, ends, strict=True):
            segment = text[marker.end() : end].strip()
            if marker[1].lower() == "observation":
                break  # results come from the environment: what a policy writes in their place is not read
            if marker[1].lower() == "thought":
                parts.thoughts.append(segment)
            else:
                self._read_action(segment, parts)
        return parts

    def _read_action(self, segment: str, parts: Parts) -> None:
        opened = self._action.match(segment)
        closed = -1 if opened is None else _closing(segment, opened.end())
        if opened is None or closed < 0:
            raise Malformed(f"An action is written 'Action: tool[argument]'; got {escape(segment[:80])!r}.")
        name, body = opened[1].lower(), segment[opened.end() : closed].strip()
        parts.thoughts.append(segment[closed + 1 :])
        if name == self.answer:
            parts.answers.append(body)
        elif name in self._tool_of:
            parts.calls.append(ToolCall(self._tool_of[name], read_body(self.tools[self._tool_of[name]], body)))
        else:
            raise Malformed(f"There is no tool {opened[1]!r}.{near(name, [*self._tool_of, self.answer])}")

    def write(self, thought: str, calls: tuple[ToolCall, ...], answer: str | None, bare: bool = True) -> str:
        lines = [f"Thought: {thought}"] if thought else []
        for call in calls:
            lines.append(f"Action: {call.name}[{write_body(self.tools.get(call.name), call.arguments, '[]', bare)}]")
        if answer is not None:
            lines.append(f"Action: {self.answer}[{answer}]")
        return "\n".join(lines)

    def listing(self) -> list[str]:
        lines = [f"Action: {n}[{escape(hint(tool))}]  {escape(tool.description)}" for n, tool in self.tools.items()]
        return ["Thought: a thought", *lines, f"Action: {self.answer}[the final answer]"]

    def advice(self) -> str:
        names = [*self.tools, self.answer]
        return "Write 'Thought: ...' or one of: " + " ".join(f"'Action: {name}[...]'" for name in names)

    def answer_now(self) -> str:
        return f"Action: {self.answer}[...]"

    def result(self, form: str, call: ToolCall, text: str, action: str, index: int) -> str:
        return form.format(query="", text=text.replace("\n", "\n  "))  # so that no line of it begins a new section


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that was opened before `start`: the balanced one, else the last; -1 if there is none."""
    depth = 1
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] == "[" else -1
        if depth == 0:
            return bracket.start()
    return text.rfind("]", start)


_BRACKET = re.compile(r"[\[\]]")


class Message(Syntax):
    """`{"role": "assistant", "content": ..., "tool_calls": [...]}`. Content beside calls is thought, alone it is the answer;
    `reasoning_content` is thought."""

    def __init__(self, tools: Mapping[str, Tool]):
        self.tools = tools

    def read(self, text: str) -> Parts:
        value = read_json(text)
        if not isinstance(value, dict) or value.get("role", "assistant") != "assistant":
            raise Malformed("The action is not the JSON of an assistant message.")
        reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
        content, calls = _content(value.get("content")), value.get("tool_calls") or []
        if not isinstance(reasoning, str) or content is None or not isinstance(calls, list):
            raise Malformed("In the message, content and reasoning_content are text and tool_calls is a list.")
        parts = Parts([reasoning])
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                raise Malformed(f"A tool call is {_EXAMPLE_TOOL_CALL}; got {escape(str(call)[:80])}.")
            parts.calls.append(_json_call(self.tools, function.get("name"), function.get("arguments", {})))
        if calls:
            parts.thoughts.append(content)
        elif content.strip() or not reasoning.strip():
            parts.answers.append(content.strip())
        return parts

    def write(self, thought: str, calls: tuple[ToolCall, ...], answer: str | None, bare: bool = True) -> str:
        message: dict[str, Any] = {"role": "assistant", "content": answer if not calls else thought or None}
        if thought and not calls:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for i, call in enumerate(calls)
            ]
        return json.dumps(message, ensure_ascii=False)

    def listing(self) -> list[str]:
        return [_schema(tool) for tool in self.tools.values()]

    def advice(self) -> str:
        return (
            f'Write {{"role": "assistant", "content": "a thought", "tool_calls": [{_EXAMPLE_TOOL_CALL}]}}, or '
            '{"role": "assistant", "content": "the final answer"}.'
        )

    def answer_now(self) -> str:
        return "your answer as content, without tool_calls,"

    def result(self, form: str, call: ToolCall, text: str, action: str, index: int) -> str:
        made = read_json(action)["tool_calls"][index]
        name = made["id"] if isinstance(made.get("id"), str) else f"call_{index}"
        return json.dumps({"role": "tool", "tool_call_id": name[:80], "content": text}, ensure_ascii=False)


_EXAMPLE_TOOL_CALL = '{"id": "call_0", "type": "function", "function": {"name": "a tool", "arguments": "{...}"}}'


def _content(value: Any) -> str | None:
    """The text of a message's content: a string, nothing, or a list of text parts; `None` for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    return None


# -- text that comes from outside

_TAG_LIKE = re.compile(rf"<(?={GAP}[/|\uff5c]?{GAP}[A-Za-z_|\uff5c])")


def escape(text: str) -> str:
    """Text of a tool or document with every `<` that could begin a tag or a control token written as `&lt;`."""
    return _TAG_LIKE.sub("&lt;", text)
