"""Hypothesis without deadlines (a busy machine is no failure), and the same examples in every CI run. A trajectory made by hand,
and the viewer as a process, for the tests of the viewer with and without a browser."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell has it ignored in what it begins in the background, and the processes of the tests would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("swirl", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("swirl")


@pytest.fixture(scope="session")
def made():
    """Makes a trajectory of this task: for each score a search with its result and verdict, then the answer."""
    from swirl_env.types import Action, EnvRecord, Message, Step, Task, ToolCall, ToolResult, Trajectory, Verdict

    def make(task="1", sample=0, *, question="Who directed Big Fish?", scores=(1.0,), query="Big Fish film", result="Tim Burton",
             answer="Tim Burton", error=None, malformed=None, reason="a new query", tokens=None, env="swirl/HotPotQA-v0",
             stop="answered", outcome=1.0, policy="oracle", meta=None):  # fmt: skip
        steps = [
            Step(
                Action(f"<search>{query}</search>", calls=(ToolCall("search", {"query": query}),)),
                (ToolResult(result, error, 0.01),),
                f"<result>{result}</result>",
                Verdict(score, reason, "rules@2"),
                tokens,
            )
            for score in scores
        ]
        last = (
            Action(malformed, malformed="no tag: write one")
            if malformed
            else Action(f"<answer>{answer}</answer>", answer=answer)
        )
        return Trajectory(
            Task(task, question, ("Tim Burton",), meta or {}), EnvRecord(env, {}, "default", ()),
            (Message("user", f"Answer.\n\n{question}"),), (*steps, Step(last)), stop, outcome, policy, 0, sample,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def viewer():
    """Starts `swirl view` with these arguments; gives the process (its `address` said) and ends it as Ctrl-C does."""

    @contextmanager
    def start(*arguments):
        command = [sys.executable, "-m", "swirl_benchmarks.cli", "view", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line + process.stderr.read()
            process.address = found.group().rstrip("/")
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.said = process.communicate(timeout=20)[1]

    return start
