"""Model text -> thought | tool calls | answer | malformed(reason), and back. The only parser in the house.

A dialect is data: a form of writing (`syntax.py`), its tags, how results come back, how the prompt explains it. Rules of
every dialect: free text beside a call or an answer is thought; a thought alone is legal (but for the paper's dialect); no
mark at all, a call together with an answer, two answers, and a tag left open are malformed. Parsing takes linear time and
never raises. Text that comes from a tool is escaped before the model sees it (`escape`), so that a document can neither
close its own block nor forge a tag.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.syntax import NAME, Lines, Malformed, Message, Parts, Syntax, Tags, escape
from swirl_env.types import Action, Tool, ToolResult

__all__ = ["DIALECTS", "Dialect", "Grammar", "escape"]

MAX_CHARACTERS = 100_000
"""Longer actions are malformed; they are kept in the record but not parsed."""
MAX_CALLS = 8
"""More calls in one action are malformed."""


@dataclass(frozen=True)
class Dialect:
    name: str
    prompt: str
    """Format string with {instruction}, {actions}, {limit} and {question}."""
    result: str = "<result>{text}</result>"
    """Format string with {query} and {text}: how one result is shown."""
    error: str = "<error>{text}</error>"
    """Format string with {text}: how what went wrong is shown."""
    form: Literal["tags", "lines", "message"] = "tags"
    """How actions are written."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tool name -> tag, where they differ."""
    call: str | None = None
    """One tag for every call, with JSON inside; `None`: a tag for each tool."""
    think: str | None = "think"
    """The tag of a thought; `None`: thoughts are free text beside a call."""
    answer: str = "answer"
    """The tag, or the action, of an answer."""


_TURNS = "{instruction} Take one step each turn, at most {limit}. A step is one of:\n{actions}\n"

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("default", _TURNS + "Results come back as <result>...</result>.\n\n{question}"),
        # The elements of the paper's generation prompt (appendix E of v2), in our own words.
        Dialect(
            "paper",
            "{instruction} Use as few words as possible for the answer. These can be written:\n{actions}\n"
            "You may make up to {limit} such steps, one after another. Do not repeat an earlier query: that wastes "
            "time. Results come back as QUERY -> RESULT. Once you know enough, answer. In each turn write either a "
            "query or an answer, never both.\n\n{question}",
            result="{query} -> {text}",
            tags={"search": "search_query", "calculator": "math_exp"},
            think=None,
        ),
        # Jin et al. 2025, section 3.3
        Dialect(
            "search-r1",
            "{instruction} First reason inside <think> and </think>. You have at most {limit} turns, each one of:\n"
            "{actions}\nResults come back between <information> and </information>.\n\n{question}",
            result="<information>{text}</information>",
        ),
        # NousResearch's function calling format, which Qwen's chat templates use too
        Dialect(
            "hermes",
            "{instruction} You may call the functions whose signatures are here:\n<tools>\n{actions}\n</tools>\n"
            'A call is <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>; its result comes back between '
            "<tool_response> and </tool_response>. Take one step each turn, at most {limit}: <think>a thought</think>, "
            "calls, or <answer>the final answer</answer>.\n\n{question}",
            result="<tool_response>\n{text}\n</tool_response>",
            call="tool_call",
        ),
        # the message format of OpenAI's chat completions
        Dialect(
            "openai",
            "{instruction} You may call these tools:\n{actions}\nTake one step each turn, at most {limit}: an assistant "
            "message with tool_calls, or one whose content is the final answer.\n\n{question}",
            error="{text}",
            form="message",
        ),
        # Yao et al. 2022, section 3.1
        Dialect(
            "react",
            "{instruction} Take one step each turn, at most {limit}. A step is a line of each or of one of:\n{actions}\n"
            "Results come back as Observation: ...\n\n{question}",
            result="Observation: {text}",
            error="Observation: {text}",
            form="lines",
            answer="finish",
        ),
    )
}


class Grammar:
    """One dialect over one live set of tools."""

    def __init__(self, dialect: str, tools: Iterable[Tool]):
        if dialect not in DIALECTS:
            raise UnknownNameError(f"No grammar is called {dialect!r}.{near(dialect, DIALECTS)}")
        self.dialect = DIALECTS[dialect]
        offered = list(tools)
        self.tools = {tool.name: tool for tool in offered}
        for tool in offered:
            if tool is not self.tools[tool.name]:
                raise ConfigError(f"Two tools are called {tool.name!r}. Give one of them another name.")
        for name in self.tools:
            if not re.fullmatch(NAME, name, re.A):
                raise ConfigError(f"A tool cannot be called {name!r}: names are letters, digits, '_', '-' and '.'.")
        self.syntax = self._make_syntax()
        self.stop = self.syntax.stop
        """A policy may stop sampling after any of these."""

    def _make_syntax(self) -> Syntax:
        style = self.dialect
        if style.form == "message":
            return Message(self.tools)
        if style.form == "lines":
            return Lines(self.tools, style.answer)
        reserved = {"result", "error", *re.findall(r"<(\w+)>", style.result + style.error)}
        return Tags(self.tools, style.tags, style.think, style.answer, style.call, reserved)

    # -- prompt and observations: what the model reads

    def prompt(self, instruction: str, question: str, limit: int) -> str:
        """The first user turn. The tool descriptions come from the live tool set."""
        return self.dialect.prompt.format(
            instruction=instruction, actions="\n".join(self.syntax.listing()), limit=limit, question=question
        )

    def observation(self, action: Action, results: tuple[ToolResult, ...], steps_left: int) -> str:
        """The user turn after an action that did not end the episode."""
        lines = []
        if action.malformed is not None:
            lines.append(self.dialect.error.format(text=action.malformed))
        for i, (call, result) in enumerate(zip(action.calls, results, strict=True)):
            form = self.dialect.result if result.error is None else self.dialect.error
            lines.append(self.syntax.result(form, call, result.text, action.text, i))
        if steps_left == 1:
            lines.append(f"One step is left: write {self.syntax.answer_now()} now.")
        return "\n".join(lines) or "Go on."

    # -- actions

    def parse(self, text: Any) -> Action:
        """Any object -> `Action`. Linear time, never raises; whatever is not a legal action has `malformed` set."""
        if not isinstance(text, str):
            return Action("", malformed=f"An action is a string, not {type(text).__name__}. {self.syntax.advice()}")
        if len(text) > MAX_CHARACTERS:
            return Action(
                text, malformed=f"The action has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read."
            )
        try:
            parts = self.syntax.read(text)
            thought = "\n".join([stripped for said in parts.thoughts if (stripped := said.strip())])
            self._check(parts, thought)
        except Malformed as reason:
            return Action(text, malformed=f"{reason} {self.syntax.advice()}")
        return Action(text, thought, tuple(parts.calls), parts.answers[0] if parts.answers else None)

    def _check(self, parts: Parts, thought: str) -> None:
        """The rules of every dialect."""
        if len(parts.answers) > 1:
            raise Malformed(f"There are {len(parts.answers)} answers; give one.")
        if parts.answers and parts.calls:
            raise Malformed("A call and an answer cannot stand in one action.")
        if parts.answers and not parts.answers[0]:
            raise Malformed("The answer is empty.")
        if len(parts.calls) > MAX_CALLS:
            raise Malformed(f"There are {len(parts.calls)} calls; at most {MAX_CALLS} can stand in one action.")
        if not (parts.answers or parts.calls):
            if not self.syntax.thinks:
                raise Malformed("The action holds no call and no answer.")
            if not thought:
                raise Malformed("The thought is empty.")

    def render(self, action: Action) -> str:
        """The text of a well-formed action: `parse(render(a))` has the same thought, calls and answer.

        Raises:
            ValueError: nothing in this dialect reads back as this action (a thought that holds a tag, say).
        """
        wanted = (action.thought, action.calls, action.answer)
        for bare in (True, False):
            text = self.syntax.write(*wanted, bare=bare)
            back = self.parse(text)
            if (back.thought, back.calls, back.answer) == wanted:
                return text
        raise ValueError(f"The {self.dialect.name} dialect cannot write {action}; it would be read back as {back}.")
