"""The terminal: one console, as wide as the terminal or 120 columns in a file."""

import os
import sys

from rich.console import Console


def console() -> Console:
    """Where tables go; nowhere with `SWIRL_QUIET=1`. Colours only on a terminal, none with `NO_COLOR`."""
    return Console(
        quiet=bool(os.environ.get("SWIRL_QUIET")), width=None if sys.stdout.isatty() else 120, highlight=False
    )
