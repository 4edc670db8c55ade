"""Tools: what an action can call."""

from swirl_env.tools.base import call_tool, make_tool, tool
from swirl_env.tools.calculator import calculator
from swirl_env.tools.named import named_tools
from swirl_env.tools.search import Search

__all__ = ["Search", "calculator", "call_tool", "make_tool", "named_tools", "tool"]
