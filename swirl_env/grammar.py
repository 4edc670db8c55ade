"""Model text -> thought | tool calls | answer | malformed(reason), and back. The only parser in the house.

A dialect is data: which tag calls which tool, how results come back, how the prompt explains it. Rules of every dialect:
free text beside a tag is thought; a thought alone is legal; no tag at all, a call together with an answer, two
answers, and a tag left open are malformed. Parsing takes linear time and never raises. Text that comes from a tool is
escaped before the model sees it (`escape`), so that a document can neither close its own block nor forge a tag.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.types import Action, Tool, ToolCall, ToolResult

MAX_CHARACTERS = 100_000
"""Longer actions are malformed; they are kept in the record but not parsed."""
MAX_CALLS = 8
"""More calls in one action are malformed."""


@dataclass(frozen=True)
class Dialect:
    name: str
    prompt: str
    """Format string with {instruction}, {actions}, {limit} and {question}."""
    result: str
    """Format string with {query} and {text}: how one result is shown."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tool name -> tag, where they differ."""
    think: str | None = "think"
    """The tag of a thought; `None`: thoughts are free text beside a call."""
    answer: str = "answer"


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="default",
            prompt=(
                "{instruction} Take one step each turn, at most {limit}. A step is one of:\n{actions}\n"
                "Results come back as <result>...</result>.\n\n{question}"
            ),
            result="<result>{text}</result>",
        ),
        # The elements of the paper's generation prompt (appendix E of v2), in our own words.
        Dialect(
            name="paper",
            prompt=(
                "{instruction} Use as few words as possible for the answer. These can be written:\n{actions}\n"
                "You may make up to {limit} such steps, one after another. Do not repeat an earlier query: that wastes "
                "time. Results come back as QUERY -> RESULT. Once you know enough, answer. In each turn write either a "
                "query or an answer, never both.\n\n{question}"
            ),
            result="{query} -> {text}",
            tags={"search": "search_query", "calculator": "math_exp"},
            think=None,
        ),
    )
}

_GAP = r"\s{0,8}"  # bounded, so that no run of blanks makes matching quadratic
_NAME = r"[A-Za-z_][\w.-]{0,63}"
_TAG_LIKE = re.compile(rf"<(?={_GAP}[/|]?{_GAP}[A-Za-z_|])")
_OPENING = re.compile(rf"<{_GAP}({_NAME}){_GAP}>")


def _json(text: str) -> Any:
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


def escape(text: str) -> str:
    """Text of a tool or document with every `<` that could begin a tag or a control token written as `&lt;`."""
    return _TAG_LIKE.sub("&lt;", text)


class Grammar:
    """One dialect over one live set of tools."""

    def __init__(self, dialect: str, tools: Iterable[Tool]):
        if dialect not in DIALECTS:
            raise UnknownNameError(f"No grammar is called {dialect!r}.{near(dialect, DIALECTS)}")
        self.dialect = DIALECTS[dialect]
        self.tools = {tool.name: tool for tool in tools}
        self._tag_of = {name: self.dialect.tags.get(name, name) for name in self.tools}
        self._tool_of = {tag.lower(): name for name, tag in self._tag_of.items()}
        reserved = {"result", "error", self.dialect.answer} | ({self.dialect.think} if self.dialect.think else set())
        for tag in self._tool_of:
            if tag in reserved or not re.fullmatch(_NAME, tag):
                raise ConfigError(
                    f"A tool cannot be called {tag!r}: names start with a letter and {reserved} are taken."
                )
        self._think = self.dialect.think or "think"
        names = "|".join(map(re.escape, [*self._tool_of, self.dialect.answer, self._think]))
        self._tag = re.compile(rf"<{_GAP}(/?){_GAP}({names}){_GAP}>", re.I | re.A)
        self.stop = tuple(f"</{tag}>" for tag in (*self._tag_of.values(), self.dialect.answer))
        """A policy may stop sampling after any of these."""

    # -- prompt and observations: what the model reads

    def prompt(self, instruction: str, question: str, limit: int) -> str:
        """The first user turn. The tool descriptions come from the live tool set."""
        actions = [f"<{self.dialect.think}>a thought</{self.dialect.think}>"] if self.dialect.think else []
        for name, tool in self.tools.items():
            tag, hint = self._tag_of[name], self._argument_hint(tool)
            actions.append(f"<{tag}>{hint}</{tag}> {tool.description}")
        actions.append(f"<{self.dialect.answer}>the final answer</{self.dialect.answer}>")
        return self.dialect.prompt.format(
            instruction=instruction, actions="\n".join(actions), limit=limit, question=question
        )

    def observation(self, action: Action, results: tuple[ToolResult, ...], steps_left: int) -> str:
        """The user turn after an action that did not end the episode."""
        lines = []
        if action.malformed is not None:
            lines.append(f"<error>{action.malformed}</error>")
        for call, result in zip(action.calls, results, strict=True):
            if result.error is not None:
                lines.append(f"<error>{result.text}</error>")
            else:
                lines.append(self.dialect.result.format(query=escape(self._body(call)), text=result.text))
        if steps_left == 1:
            lines.append(f"One step is left: write <{self.dialect.answer}>...</{self.dialect.answer}> now.")
        return "\n".join(lines) or "Go on."

    # -- reading actions

    def parse(self, text: Any) -> Action:
        """Any object -> `Action`. Linear time, never raises; whatever is not a legal action has `malformed` set."""
        if not isinstance(text, str):
            return Action("", malformed=f"An action is a string, not {type(text).__name__}. {self._advice()}")
        if len(text) > MAX_CHARACTERS:
            return Action(
                text, malformed=f"The action has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read."
            )
        thoughts, calls, answers = [], [], []
        tags = list(self._tag.finditer(text))
        last_closing = {tag[2].lower(): i for i, tag in enumerate(tags) if tag[1]}
        i = free_from = 0
        while i < len(tags):
            name, closing = tags[i][2].lower(), bool(tags[i][1])
            end = None
            if not closing and last_closing.get(name, 0) > i:
                end = next(j for j in range(i + 1, len(tags)) if tags[j][1] and tags[j][2].lower() == name)
            if end is None and name != self._think:
                wrong = f"</{name}> closes nothing." if closing else f"<{name}> was opened but never closed."
                return Action(text, malformed=f"{wrong} {self._advice()}")
            thoughts.append(text[free_from : tags[i].start()])
            if end is not None:
                body = text[tags[i].end() : tags[end].start()].strip()
                if name == self._think:
                    thoughts.append(body)
                elif name == self.dialect.answer:
                    answers.append(body)
                else:
                    calls.append(ToolCall(self._tool_of[name], self._arguments(self._tool_of[name], body)))
                i = end
            # else: a lone <think> or </think> is dropped; templates and small models write only one of the pair
            free_from = tags[i].end()
            i += 1
        thoughts.append(text[free_from:])
        thought = "\n".join(filter(None, (piece.strip() for piece in thoughts)))
        if problem := self._problem(text, thought, calls, answers):
            return Action(text, malformed=f"{problem} {self._advice()}")
        return Action(text, thought, tuple(calls), answers[0] if answers else None)

    def _problem(self, text: str, thought: str, calls: list[ToolCall], answers: list[str]) -> str | None:
        if len(answers) > 1:
            return f"There are {len(answers)} answers; give one."
        if answers and calls:
            return "A call and an answer cannot stand in one action."
        if answers and not answers[0]:
            return "The answer is empty."
        if len(calls) > MAX_CALLS:
            return f"There are {len(calls)} calls; at most {MAX_CALLS} can stand in one action."
        if answers or calls:
            return None
        if not text.strip():
            return "The action is empty."
        if foreign := _OPENING.search(text) if not self._tag.search(text) else None:
            if foreign[1] in self._tag_of:
                return f"The tool {foreign[1]!r} is called by <{self._tag_of[foreign[1]]}>."
            return f"There is no tool {foreign[1]!r}.{near(foreign[1], self._tool_of)}"
        if not self._tag.search(text):
            return "There is no tag."
        if thought and self.dialect.think:
            return None
        return "The thought is empty." if self.dialect.think else "The action holds no call and no answer."

    def _advice(self) -> str:
        think = [self.dialect.think] if self.dialect.think else []
        tags = [*think, *self._tag_of.values(), self.dialect.answer]
        return "Write one of: " + " ".join(f"<{tag}>...</{tag}>" for tag in tags)

    # -- arguments: a body is the tool's one required argument, or a JSON object of its arguments

    def _main_argument(self, tool: Tool) -> str | None:
        required = tool.parameters.get("required") or list(tool.parameters.get("properties", {}))
        return required[0] if required else None

    def _argument_hint(self, tool: Tool) -> str:
        required = tool.parameters.get("required", [])
        if len(required) > 1:
            return json.dumps(dict.fromkeys(required, "..."))
        return self._main_argument(tool) or ""

    def _arguments(self, name: str, body: str) -> dict[str, Any]:
        tool = self.tools[name]
        if body.startswith("{"):
            value = _json(body)
            if isinstance(value, dict) and (
                len(value) != 1 or set(value) <= set(tool.parameters.get("properties", {}))
            ):
                return value
        main = self._main_argument(tool)
        return {} if main is None and not body else {main or "input": body}

    def _body(self, call: ToolCall) -> str:
        tool = self.tools.get(call.name)
        values = list(call.arguments.values())
        single = len(values) == 1 and isinstance(values[0], str)
        if tool is None and single:
            return values[0]
        if tool is not None and single and self._arguments(call.name, values[0]) == call.arguments:
            return values[0]
        return json.dumps(call.arguments, ensure_ascii=False) if call.arguments else ""

    # -- writing actions

    def render(self, action: Action) -> str:
        """The text of a well-formed action: `parse(render(a))` has the same thought, calls and answer.

        Raises:
            ValueError: nothing in this dialect reads back as this action (a thought that holds a tag, say).
        """
        pieces = []
        if action.thought:
            think = self.dialect.think
            pieces.append(f"<{think}>{action.thought}</{think}>" if think else action.thought)
        for call in action.calls:
            tag = self._tag_of.get(call.name, call.name)
            pieces.append(f"<{tag}>{self._body(call)}</{tag}>")
        if action.answer is not None:
            pieces.append(f"<{self.dialect.answer}>{action.answer}</{self.dialect.answer}>")
        text = "\n".join(pieces)
        back = self.parse(text)
        if (back.thought, back.calls, back.answer) != (action.thought, action.calls, action.answer):
            raise ValueError(f"The {self.dialect.name} dialect cannot write {action}; it would be read back as {back}.")
        return text
