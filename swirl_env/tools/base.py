"""What a tool is, how a Python function becomes one, and how a call is made safe.

A tool may also have `bind(documents)`: the environment calls it at each reset with the task's own documents.
"""

import inspect
import json
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from pickle import PicklingError
from typing import Any, get_type_hints

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from swirl_env.errors import ConfigError, ToolError, near
from swirl_env.syntax import escape
from swirl_env.types import Tool, ToolCall, ToolResult

MAX_RESULT_CHARACTERS = 8_000
"""Longer results are cut, and the cut is said."""


class FunctionTool:
    """A Python function with its JSON schema; picklable where the function is."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.name = function.__name__
        self.description, self.parameters = describe(function)
        plain = all(entry.get("type") == "string" and len(entry.keys() - {"description"}) == 1
                    for entry in self.parameters.get("properties", {}).values())  # fmt: skip
        self._model = None if plain else _model_of(function)
        """What the arguments are read by; `None`: they are texts, and nothing is left to read."""

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the type hints want them. Raises `ToolError` that names the one that does not fit."""
        if self._model is None:
            return dict(arguments)
        try:
            read = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ToolError(f"{self.name}: {place}: {first['msg']}, got {str(first['input'])[:80]!r}.") from None
        names = {field.alias: key for key, field in type(read).model_fields.items()}
        return {name: getattr(read, names[name]) for name in arguments}

    def __call__(self, **arguments: Any) -> str:
        result = self.function(**arguments)
        if result is None:
            raise TypeError("returned nothing; a tool returns what the model should read")
        return str(result)

    def __repr__(self) -> str:
        return f"tool({self.name})"

    def __reduce__(self) -> tuple[Any, ...]:
        if "<locals>" in self.function.__qualname__:
            raise PicklingError(
                f"The tool {self.name} is a function inside a function: move it to the top of a module."
            )
        return _restore, (self.function.__module__, self.function.__qualname__)


def _restore(module: str, qualname: str) -> "FunctionTool":
    """The tool behind a name: pickling carries names, as it does for functions."""
    found = attrgetter(qualname)(import_module(module))
    return found if isinstance(found, FunctionTool) else FunctionTool(found)


def tool(function: Callable[..., Any]) -> FunctionTool:
    """Turn a function with type hints and a Google docstring into a tool (also as decorator `@tool`).

    The docstring's first line tells the model what the tool does, `Args:` what each argument means.

    Raises:
        ConfigError: an argument has no type hint, or the docstring is missing.
    """
    return FunctionTool(function)


def describe(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """(description, JSON schema of the arguments) of a function with type hints and a Google docstring."""
    name = getattr(function, "__name__", repr(function))
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    if not documentation.short_description:
        raise ConfigError(f"The tool {name} needs a docstring: its first line is what the model reads about it.")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"The tool {name} is an async function: a tool is an ordinary one, which waits itself.")
    meanings = {item.arg_name: item.description for item in documentation.params}
    schema = _model_of(function).model_json_schema()
    for key, entry in schema.get("properties", {}).items():
        entry.pop("title", None)
        if meanings.get(key):
            entry["description"] = meanings[key]
    schema.pop("title", None)
    return documentation.short_description, {**schema, "additionalProperties": False}


def _model_of(function: Callable[..., Any]) -> type[BaseModel]:
    """A model with a field for each argument, which it carries as its alias: any name will do."""
    name, hints = getattr(function, "__name__", repr(function)), get_type_hints(function)
    fields: dict[str, Any] = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.name == "self":
            continue
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD, argument.POSITIONAL_ONLY):
            raise ConfigError(f"The tool {name} must name its arguments: {argument} cannot be given by name.")
        if argument.name not in hints:
            raise ConfigError(f"The tool {name} needs a type hint for its argument {argument.name!r}, such as `: str`.")
        default = ... if argument.default is argument.empty else argument.default
        fields[f"argument_{len(fields)}"] = (hints[argument.name], Field(default, alias=argument.name))
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    return create_model(name, __config__=config, **fields)


def make_tool(value: Any) -> Tool:
    """A tool as it is, or a plain function made into one."""
    if all(hasattr(value, name) for name in ("name", "description", "parameters")) and callable(value):
        return value
    if callable(value) and hasattr(value, "__name__"):
        return tool(value)
    raise ConfigError(f"Expected a tool or a function with type hints and a docstring, got {value!r}.")


_READS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def _checked(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that fit the schema; text that spells a number or JSON is read as such. Raises `ToolError`."""
    properties, checked = tool.parameters.get("properties", {}), dict(arguments)
    missing = [name for name in tool.parameters.get("required", []) if name not in arguments]
    unknown = [name for name in arguments if name not in properties]
    if missing or unknown:
        came = ", ".join(map(repr, arguments)) or "nothing"
        raise ToolError(f"{tool.name} takes {', '.join(properties) or 'no arguments'}; got {came}.")
    for name, value in arguments.items():
        entry = properties[name]  # a schema from elsewhere may be `true`, or name several types: those are not checked
        kind = entry.get("type") if isinstance(entry, dict) else None
        expected = _READS.get(kind) if isinstance(kind, str) else None
        if isinstance(value, str) and expected not in (None, str):
            try:
                checked[name] = value = json.loads(value)
            except (ValueError, RecursionError):
                pass
        wrong = expected and not isinstance(value, expected)
        if wrong or (isinstance(value, bool) and expected not in (None, bool)):
            raise ToolError(f"{tool.name}: {name} must be of type {kind}, got {str(value)[:80]!r}.")
    return checked


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "an error that cannot be written"


def call_tool(tools: Mapping[str, Tool], call: ToolCall) -> ToolResult:
    """Make one call; whatever happens is a result. The text is escaped and cut to `MAX_RESULT_CHARACTERS`."""
    start = time.perf_counter()
    error: str | None = "unknown_tool"
    try:
        if call.name not in tools:
            raise ToolError(f"There is no tool {call.name!r}.{near(call.name, tools)}")
        error = "bad_arguments"
        called = tools[call.name]
        arguments = _checked(called, call.arguments)
        if isinstance(called, FunctionTool):
            arguments = called.check(arguments)
        error = "tool_error"
        text = called(**arguments)
        if not isinstance(text, str):
            raise TypeError(f"returned {type(text).__name__}; a tool returns a string")
        error = None
    except ToolError as refusal:
        text = _message(refusal)
    except (Exception, SystemExit) as bug:  # a bug in a tool ends this episode, never the others beside it
        error, text = "crash", f"{call.name} crashed: {type(bug).__name__}: {_message(bug)}"
    if len(text) > MAX_RESULT_CHARACTERS:
        text = f"{text[:MAX_RESULT_CHARACTERS]} ... ({len(text) - MAX_RESULT_CHARACTERS:,} more characters were cut)"
    return ToolResult(escape(text), error, time.perf_counter() - start)
