"""In `make test-adapters` (SWIRL_ADAPTER is set) a test that was skipped is a failure: there the package has to be."""

import os
import re
from pathlib import Path

import pytest


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "SWIRL_ADAPTER" in os.environ and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def page():
    """The blocks of the how-to page that need a package, which only its own environment has: (language, text) each."""

    def blocks(package):
        text = (Path(__file__).parents[2] / "docs" / "how-to" / "other-trainers.md").read_text()
        found = re.findall(rf"<!-- not run: needs {package}\b[^\n]* -->\n```(\w+)\n(.*?)^```$", text, re.M | re.S)
        assert found
        return found

    return blocks
