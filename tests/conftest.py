"""Hypothesis without deadlines (a busy machine is no failure), and the same examples in every CI run."""

import os

from hypothesis import settings

settings.register_profile("swirl", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("swirl")
