"""JSONL: round trips to the bit, torn lines, strictness."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.errors import DataError
from swirl_env.io import Writer, dumps, loads, read
from swirl_env.types import (
    Action,
    EnvRecord,
    Message,
    Step,
    Task,
    Tokens,
    ToolCall,
    ToolResult,
    Trajectory,
    Verdict,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans(), FLOATS), max_size=8).map(
    lambda rows: Tokens(*(np.array([row[i] for row in rows], t) for i, t in enumerate(("int32", "bool", "float32"))))
)
TEXT = st.text(st.characters())  # lone surrogates included
NAME = st.text(st.characters(codec="utf-8"))
SCORE = st.none() | st.floats(0, 1)
STEPS = st.builds(
    Step,
    st.builds(
        Action,
        TEXT,
        TEXT,
        st.lists(st.builds(ToolCall, TEXT, st.dictionaries(NAME, TEXT))).map(tuple),
        st.none() | TEXT,
    ),
    st.lists(st.builds(ToolResult, TEXT, st.none() | TEXT, st.just(0.0))).map(tuple),
    TEXT,
    st.none() | st.builds(Verdict, SCORE, TEXT, TEXT, st.dictionaries(NAME, SCORE)),
    st.none() | TOKENS,
)
TRAJECTORIES = st.builds(
    Trajectory,
    st.builds(Task, TEXT, TEXT, st.lists(TEXT).map(tuple), st.dictionaries(NAME, st.integers() | TEXT)),
    st.builds(EnvRecord, TEXT, st.just({"k": [1, None]}), TEXT, st.just(({"type": "function"},))),
    st.lists(st.builds(Message, st.just("user"), TEXT)).map(tuple),
    st.lists(STEPS, max_size=3).map(tuple),
    st.sampled_from(["answered", "step_limit"]),
    SCORE,
    TEXT,
    st.integers(0, 2**62),
    st.integers(0, 9),
)


@given(TRAJECTORIES)
def test_round_trip(trajectory):
    line = dumps(trajectory)
    assert "\n" not in line
    assert loads(Trajectory, line.encode().decode()) == trajectory


def verdict(i):
    return Verdict(0.5, f"r\u00e9ason \U0001f993 {i}", "j@1")


def test_append_and_read(tmp_path):
    path = tmp_path / "a" / "v.jsonl"
    assert list(read(path, Verdict)) == []
    for i in range(3):
        with Writer(path) as out:
            out.write(verdict(i))
    assert list(read(path, Verdict)) == [verdict(i) for i in range(3)]


@given(cut=st.integers(1, 10_000))
def test_a_torn_last_line_is_skipped_then_repaired(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "v.jsonl"
    lines = [dumps(verdict(i)) + "\n" for i in range(3)]
    whole = "".join(lines).encode()
    path.write_bytes(whole + lines[0].encode()[: cut % len(lines[0].encode())])
    assert len(list(read(path, Verdict))) == 3
    with Writer(path) as out:
        out.write(verdict(9))
    assert [v.reason for v in read(path, Verdict)] == [verdict(i).reason for i in (0, 1, 2, 9)]


def test_a_long_torn_line_is_cut(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text(dumps(verdict(0)) + "\n" + "x" * 200_000)
    Writer(path).close()
    assert path.read_text() == dumps(verdict(0)) + "\n"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra": 1}, "extra"),
        ({"score": "high"}, "score"),
        ({"reason": None}, "reason"),
    ],
)
def test_strict_and_says_where(tmp_path, change, says):
    path = tmp_path / "v.jsonl"
    path.write_text(dumps(verdict(0)) + "\n" + json.dumps(json.loads(dumps(verdict(1))) | change) + "\n")
    with pytest.raises(DataError, match=rf"v.jsonl:2: .*{says}.*Expected a Verdict"):
        list(read(path, Verdict))


def test_newer_schema_and_no_json(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"schema": 99}\n')
    with pytest.raises(DataError, match="schema 99 is newer"):
        list(read(path, Trajectory))
    path.write_text("hello\n")
    with pytest.raises(DataError, match="v.jsonl:1: expected one JSON object"):
        list(read(path, Verdict))


KILLED = """
import sys
from swirl_env.io import Writer
from swirl_env.types import Verdict
with Writer(sys.argv[1]) as out:
    for i in range(10**9):
        out.write(Verdict(0.5, str(i) + "x" * 5000, "j@1"))
        if i == 20: print("going", flush=True)
"""


def test_kill_9_loses_nothing_whole(tmp_path):
    path = tmp_path / "v.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"going\n"
        time.sleep(0.05)
        process.kill()
        process.wait()
        process.stdout.close()
    records = list(read(path, Verdict))
    runs = [i for i, record in enumerate(records) if record.reason.startswith("0x")]
    assert len(runs) == 3
    for start, end in zip(runs, [*runs[1:], len(records)], strict=True):
        numbers = [int(record.reason.rstrip("x")) for record in records[start:end]]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > 20


def test_disk_full_keeps_what_was_written(tmp_path):
    path = tmp_path / "v.jsonl"
    script = (
        "import resource, sys\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from swirl_env.io import Writer\nfrom swirl_env.types import Verdict\n"
        "out = Writer(sys.argv[1])\n"
        "for i in range(100): out.write(Verdict(0.5, 'x' * 990, 'j@1'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Every record before this one is kept" in done.stderr
    assert path.read_bytes().endswith(b"\n")
    assert len(list(read(path, Verdict))) == 9
