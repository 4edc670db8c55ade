"""A model that the tests of the command share, and the command in this process: most tests of it need no process of its own."""

import sys

import pytest
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_benchmarks import cli


@pytest.fixture(scope="session")
def call():
    """Runs a command; returns its exit code."""

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["swirl", *map(str, arguments)])
            try:
                cli.main()
            except SystemExit as stop:
                return stop.code or 0
        return 0

    return run


@pytest.fixture
def swirl(call, capsys):
    """Runs a command; returns what it printed, on one line."""

    def checked(*arguments, code=0):
        found = call(*arguments)
        said = capsys.readouterr()
        assert found == code, said.err[-2000:]
        return " ".join((said.out + said.err).split())

    return checked


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model folder of a few thousand random weights, which now and then writes a legal action: some are single tokens."""
    folder = tmp_path_factory.mktemp("model")
    legal = [f"<calculator>{i}+{j}</calculator>" for i in range(2, 40) for j in range(2, 12)]
    tokenizer = tiny_tokenizer(" ".join([*legal, *(f"<answer>{i}</answer>" for i in range(100))]))
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
