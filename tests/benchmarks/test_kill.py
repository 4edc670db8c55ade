"""`kill -9` at random moments of generate, judge and train: the same command then ends with what a run without a stop makes."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

RUN = "run"
TRAIN = ["train", RUN, "--filter", "none", "--batch-size", 2, "--trainer.save-every", 2, "--algo"]
POLICY = ["--judge", "mine:judge", "--max-new-tokens", 6, "--samples", 3, "--learning-rate", 1e-3]
COMMANDS = {
    "generate": ["generate", "swirl/GSM8K-v0", "--tasks", 16, "--samples", 2, "--max-new-tokens", 8, "--max-steps", 3,
                 "--batch-size", 4, "--out", RUN, "--model", "tiny"],
    "judge": ["judge", RUN, "--judge", "mine:judge"],
    "swirl": [*TRAIN, "swirl", *POLICY, "--rounds", 2, "--limit", 6],
    "reinforce": [*TRAIN, "reinforce", *POLICY, "--updates", 6],
    "sft": [*TRAIN, "sft", "--epochs", 1],
}  # fmt: skip
MOMENTS = [*["generate"] * 6, *["judge"] * 6, *["swirl"] * 4, *["reinforce"] * 2, *["sft"] * 2]
JUDGE = """
import time
from swirl_env.types import Verdict

class Slow:
    name, uses_gold, concurrency = "slow@1", False, 2

    def __call__(self, views):
        time.sleep(0.02)
        return [Verdict(len(view.action.text) % 7 / 7, "", self.name) for view in views]

judge = Slow()
"""
# a process of its own for each command, forked where everything is imported, so that kills hit the work and not the imports
FORKS = """
import json, os, signal, sys, time
import accelerate, torch, transformers, swirl_algos.grpo, swirl_algos.reinforce, swirl_algos.sft, swirl_algos.swirl
from swirl_agents import engine, local, models
from swirl_benchmarks import cli, evaluate, judging
from transformers import AutoTokenizer, LlamaForCausalLM

print("ready", flush=True)
for line in sys.stdin:
    arguments, seconds = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv, code = ["swirl", *arguments], 1
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs commands in a folder, each in a process of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, name, seconds=None):
        """The exit code of a command; it is killed after so many seconds, `None`: never."""
        self.process.stdin.write(json.dumps([[*map(str, COMMANDS[name])], seconds]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def whole(self, name):
        """Seconds of a command that nothing stops."""
        began = time.monotonic()
        assert self(name) == 0, (self.folder / "log").read_text()[-3000:]
        return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Folder of runs without a stop: before each command, after it, and how long it took."""
    folder = tmp_path_factory.mktemp("kill")
    shutil.copytree(tiny, folder / "tiny")
    (folder / "mine.py").write_text(JUDGE)
    run = Forks(folder)
    seconds = {}
    for name in COMMANDS:
        for place in ("before", "after"):
            if place == "after":
                seconds[name] = run.whole(name)
            if (folder / RUN).exists():
                shutil.copytree(folder / RUN, folder / place / name)
        if name in ("swirl", "reinforce", "sft"):
            restore(folder, name)
    yield run, seconds
    run.process.stdin.close()
    assert run.process.wait() == 0


def restore(folder, name):
    """Put the run folder back to where it was before a command."""
    shutil.rmtree(folder / RUN, ignore_errors=True)
    if (folder / "before" / name).exists():
        shutil.copytree(folder / "before" / name, folder / RUN)


def timeless(value):
    """A record without times."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key != "seconds"}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def exact(value):
    """A record without what may differ by rounding."""
    if isinstance(value, dict):
        return {key: exact(one) for key, one in value.items()}
    return [exact(one) for one in value] if isinstance(value, list) else value if not isinstance(value, float) else 0.0


def numbers(value):
    """Its floats, in order."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, float) else []


def contents(folder):
    """Every record and weight under a folder: {file: (records without floats, floats)}."""
    found = {}
    for path in folder.rglob("*.jsonl"):
        records = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        records.sort(key=lambda record: json.dumps(exact(record), sort_keys=True))
        found[str(path.relative_to(folder))] = [exact(record) for record in records], torch.tensor(numbers(records))
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        found[str(path.relative_to(folder))] = (
            sorted(tensors), torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])
        )  # fmt: skip
    return found


def check(whole, moments, seed):
    run, seconds = whole
    draw, hits = random.Random(seed), 0
    for name in moments:
        restore(run.folder, name)
        share = draw.random()
        hits += run(name, share * seconds[name]) == -9
        run.whole(name)
        one, other = contents(run.folder / RUN), contents(run.folder / "after" / name)
        where = f"{name}, killed at {share:.3f} of its time"
        assert one.keys() == other.keys(), where
        for file in one:
            assert one[file][0] == other[file][0], f"{where}: {file}"
            assert torch.allclose(one[file][1], other[file][1], atol=1e-5, rtol=1e-5), f"{where}: {file}"
    assert hits >= len(moments) / 3  # on a busy machine some are over before their time


def test_runs_end_alike_after_a_kill(whole):
    check(whole, ["generate", "judge", "swirl"], seed=1)


@pytest.mark.slow
def test_runs_end_alike_after_kills_at_20_random_moments(whole):
    check(whole, MOMENTS, seed=0)
