"""Judges: they score one action at a time and see neither the gold answer nor the action's result."""

from swirl_env.judges.base import ask, views
from swirl_env.judges.named import make_judge
from swirl_env.judges.rules import RulesJudge

__all__ = ["RulesJudge", "ask", "make_judge", "views"]
