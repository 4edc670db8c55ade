"""The terminal: one console, as wide as the terminal or 120 columns in a file."""

import sys

from rich.console import Console


def console() -> Console:
    """Where tables go."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)
