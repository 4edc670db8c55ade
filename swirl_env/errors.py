"""The errors people meet. Each is also a builtin, so `except ValueError` keeps working, and each pickles.

A message says what was expected, what came, and what to do next; `near` adds the closest known name.
"""

import difflib
from collections.abc import Iterable


class SwirlError(Exception):
    """Anything this toolkit raises on purpose."""


class ConfigError(SwirlError, ValueError):
    """A setting, name or combination of settings that cannot work."""


class UnknownNameError(ConfigError, LookupError):
    """A name (environment, judge, tool, task, model, ...) that nothing answers to."""


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that an environment does not take."""


class DataError(SwirlError, ValueError):
    """A file or record that is missing, broken or of another format."""


class ToolError(SwirlError, RuntimeError):
    """What a tool wants the model to read: one sentence it can act on. It never ends an episode."""


def near(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` if a known name is close to `name`, and the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"{guess} Known: {', '.join(known) or 'none'}."
