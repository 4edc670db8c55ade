"""Tools by name, as `tools=` of `gym.make` lists them."""

import copy
from typing import Any

from swirl_env.errors import UnknownNameError, near
from swirl_env.names import load_object
from swirl_env.tools.base import make_tool
from swirl_env.tools.calculator import calculator
from swirl_env.tools.search import make_search
from swirl_env.types import Tool

NAMES = ("calculator", "search")


def named_tools(name: str, search: Any = None) -> list[Tool]:
    """The tools that a name stands for: `calculator`, `search` (with the settings of `search=`) or `module:attribute`, where
    the attribute is a tool, a class of tools or a typed and documented function.

    Raises:
        UnknownNameError: no tool is called that, with the near match.
        ConfigError: the object is no tool.
    """
    if name == "calculator":
        return [calculator]
    if name == "search":
        return [make_tool(make_search(search))]
    if ":" not in name:
        raise UnknownNameError(f"No tool is called {name!r}.{near(name, NAMES)} Your own: 'module:attribute'.")
    found = load_object(name, "tool")
    made = make_tool(found() if isinstance(found, type) else found)
    return [copy.copy(made) if hasattr(made, "bind") else made]  # what is bound to a task belongs to one env
