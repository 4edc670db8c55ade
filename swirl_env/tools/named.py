"""Tools by name, as `tools=` of `gym.make` lists them."""

import copy
from typing import Any

from swirl_env.errors import UnknownNameError, near
from swirl_env.names import load_object
from swirl_env.tools.base import make_tool
from swirl_env.tools.calculator import calculator
from swirl_env.tools.python import Python
from swirl_env.tools.search import make_search
from swirl_env.tools.sql import Sql
from swirl_env.types import Tool

NAMES = {
    "calculator": "swirl_env.tools.calculator:calculator",
    "search": "swirl_env.tools.search.tool:Search",
    "python": "swirl_env.tools.python:Python",
    "sql:FILE": "swirl_env.tools.sql:Sql",
    "mcp:COMMAND": "swirl_env.tools.mcp:mcp_tools",
    "mcp:URL": "swirl_env.tools.mcp:mcp_tools",
}
"""name -> what makes the tool."""


def named_tools(name: str, search: Any = None) -> list[Tool]:
    """The tools that a name stands for.

    Args:
        name: `calculator`; `search` (with the settings of `search=`); `python`; `sql:FILE`, a SQLite file; `mcp:COMMAND LINE` or
            `mcp:http://...`, all tools of an MCP server; or `module:attribute`, where the attribute is a tool, a class of
            tools or a typed and documented function.
        search: the env argument of that name.

    Raises:
        UnknownNameError: no tool is called that, with the near match.
        ConfigError: the object is no tool, the file no database, the server does not answer.
    """
    if name == "calculator":
        return [calculator]
    if name == "search":
        return [make_tool(make_search(search))]
    if name == "python":
        return [make_tool(Python())]
    if name.startswith("sql:"):
        return [make_tool(Sql(name.removeprefix("sql:")))]
    if name.startswith("mcp:"):
        from swirl_env.tools.mcp import mcp_tools

        return [make_tool(found) for found in mcp_tools(name.removeprefix("mcp:"))]
    if ":" not in name:
        raise UnknownNameError(f"No tool is called {name!r}.{near(name, NAMES)} Your own: 'module:attribute'.")
    found = load_object(name, "tool")
    made = make_tool(found() if isinstance(found, type) else found)
    return [copy.copy(made) if hasattr(made, "bind") else made]  # what is bound to a task belongs to one env
