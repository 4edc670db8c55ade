"""The paper's four filters on judged trajectories (section 2.1): none, process, outcome, both.

A trajectory with an unknown verdict is neither good nor bad: `keep` sets it aside and counts it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.types import Filter, Trajectory


def none(trajectory: Trajectory) -> bool:
    """Every trajectory."""
    return True


def process(trajectory: Trajectory) -> bool:
    """Every action, the last one included, is judged good; the answer may be wrong."""
    return bool(trajectory.steps) and all(step.verdict is not None and step.verdict.good for step in trajectory.steps)


def outcome(trajectory: Trajectory) -> bool:
    """The final answer is right."""
    return trajectory.outcome is not None and trajectory.outcome >= 0.5


def both(trajectory: Trajectory) -> bool:
    """`process` and `outcome`."""
    return process(trajectory) and outcome(trajectory)


FILTERS: dict[str, Filter] = {"none": none, "process": process, "outcome": outcome, "both": both}
_NEEDS: dict[str, Callable[[Trajectory], bool]] = {
    "none": lambda t: True,
    "process": lambda t: all(step.verdict is not None and step.verdict.score is not None for step in t.steps),
    "outcome": lambda t: t.outcome is not None,
}
_NEEDS["both"] = lambda t: _NEEDS["process"](t) and _NEEDS["outcome"](t)


class NothingKept(ConfigError):
    """A filter left nothing to train on."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a filter did."""

    kept: list[Trajectory]
    dropped: int
    unknown: int
    """Set aside: a verdict (or outcome) that the filter needs is unknown."""


def keep(name: str, trajectories: Iterable[Trajectory]) -> Kept:
    """Filter by name. Raises `UnknownNameError` for another name."""
    if name not in FILTERS:
        raise UnknownNameError(f"No filter is called {name!r}.{near(name, FILTERS)}")
    kept, dropped, unknown = [], 0, 0
    for trajectory in trajectories:
        if not _NEEDS[name](trajectory):
            unknown += 1
        elif FILTERS[name](trajectory):
            kept.append(trajectory)
        else:
            dropped += 1
    return Kept(kept, dropped, unknown)
