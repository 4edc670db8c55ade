"""Tools: what an action can call. `swirl_env.tools.mcp` brings those of MCP servers."""

from swirl_env.tools.base import call_tool, make_tool, tool
from swirl_env.tools.calculator import calculator
from swirl_env.tools.named import named_tools
from swirl_env.tools.python import Python
from swirl_env.tools.search import Search
from swirl_env.tools.sql import Sql

__all__ = ["Python", "Search", "Sql", "calculator", "call_tool", "make_tool", "named_tools", "tool"]
