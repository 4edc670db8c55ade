"""The `swirl` command: runs, evaluations and the figures they print."""
