"""Tools: what an action can call."""

from swirl_env.tools.base import call_tool, make_tool, tool
from swirl_env.tools.calculator import calculator
from swirl_env.tools.python import Python
from swirl_env.tools.search import Search
from swirl_env.tools.sql import Sql

__all__ = ["Python", "Search", "Sql", "calculator", "call_tool", "make_tool", "tool"]
