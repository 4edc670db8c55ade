"""Work on a Ray cluster, and many episodes behind one server: nothing lost, nothing twice, whoever dies."""

import json
import os
import signal
import sys
import threading
from functools import partial
from itertools import count

import pytest
from swirl_agents import fleet
from swirl_agents.endpoint import EndpointPolicy
from swirl_agents.fleet import Worker, spread
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_agents.testing_server import ChatServer
from swirl_algos import stages
from swirl_benchmarks import cli, scale

from swirl_env.client import ChatClient
from swirl_env.errors import ConfigError, SwirlError
from swirl_env.io import read
from swirl_env.types import Trajectory

JOBS = scale.jobs_of(30)


def call(*arguments):
    """The exit code of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["swirl", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key != "seconds"}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def records(path):
    return sorted(
        json.dumps(timeless(json.loads(line)), sort_keys=True) for line in path.read_text().split("\n") if line
    )


# -- one worker, without Ray


def player():
    return partial(rollout, scale.make_env, oracle(scale.make_env().unwrapped), batch_size=4)


def test_a_worker_takes_work_at_any_time_and_gives_what_is_done():
    worker, jobs, done = Worker(player), list(JOBS.values()), []
    assert worker.exchange([]) == ([], [])
    for some in (jobs[:5], jobs[5:6], [], jobs[6:20]):
        done += worker.exchange(some)[0]
    while len(done) < 20:
        done += worker.exchange([])[0]
    assert sorted(one.key for one in done) == sorted((*job, 0) for job in jobs[:20])


def test_what_a_worker_cannot_make_is_told():
    def make():
        raise ConfigError("no such environment")

    with pytest.raises(ConfigError, match="no such environment"):
        while True:
            Worker(make).exchange([("a", 0)])


def test_what_was_done_before_a_failure_is_given_back_and_an_exit_is_told():
    def play(jobs):
        for i, one in enumerate(player()(jobs)):
            if i == 3:
                sys.exit("enough")
            yield one

    worker, done = Worker(lambda: play), []
    with pytest.raises(SwirlError, match="SystemExit: enough"):
        done += worker.exchange(list(JOBS.values())[:6])[0]
        while True:
            done += worker.exchange([])[0]
    assert len(done) == 3


# -- a server


def test_episodes_go_on_while_another_waits_for_its_reply():
    """One reply never comes before the others have played to their end."""
    number, others, ended = count(), threading.Event(), []

    def reply(body):
        if next(number):
            return "<answer>1</answer>"
        assert others.wait(30), "the others waited for this one"
        return "<answer>2</answer>"

    with ChatServer(reply) as server:
        policy = EndpointPolicy(ChatClient(server.url), scale.make_env().unwrapped.grammar)
        for one in rollout(scale.make_env, policy, list(JOBS.values())[:12], batch_size=4):
            ended.append(one.answer)
            if len(ended) == 11:
                others.set()
    assert ended == ["1"] * 11 + ["2"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_server_that_dies_ends_the_run_early_and_the_same_command_finishes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "ENOUGH_ERRORS", 3)
    replies = []

    def reply(body):
        replies.append(1)
        return "<answer>1</answer>"

    with ChatServer(reply) as server:
        url, grammar = server.url, scale.make_env().unwrapped.grammar
        policy = EndpointPolicy(ChatClient(url, "test", retries=0), grammar)
        play = partial(rollout, scale.make_env, policy, batch_size=1)

        def dies(jobs):
            for i, one in enumerate(play(jobs)):
                yield one
                if i == 9:
                    server.__exit__()

        with pytest.raises(SwirlError, match="The last 3 episodes were all ended by an error.*give the command again"):
            stages.record(dies, list(JOBS.values()), tmp_path / "t.jsonl")
    assert [one.stop for one in read(tmp_path / "t.jsonl", Trajectory)] == ["answered"] * 10 + ["error"] * 3
    with ChatServer(reply) as server:
        policy = EndpointPolicy(ChatClient(server.url, "test"), grammar)
        stops = stages.record(partial(rollout, scale.make_env, policy), list(JOBS.values()), tmp_path / "t.jsonl")
    assert stops == {"answered": 30} and len(replies) == 30
    assert sorted(one.key for one in read(tmp_path / "t.jsonl", Trajectory)) == sorted(JOBS)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    assert call("bench", "scale", "--only", "wall,memory", "--small", "--json", tmp_path / "s.json") == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["wall"]["requests"] == 160 and report["wall"]["errors"] == report["memory"]["errors"] == 0
    assert len(report["memory"]["megabytes"]) == 10
    assert call("bench", "scale", "--only", "wal") == 2
    for command in (["generate", "swirl/GSM8K-v0", "--model", "oracle"], ["judge", tmp_path, "--judge", "rules"]):
        assert call(*command, "--workers", 0) == call(*command, "--workers", 2) == 2


# -- a cluster


def test_no_cluster_is_a_sentence(tmp_path, capsys):
    pytest.importorskip("ray")
    command = ["generate", "swirl/GSM8K-v0", "--model", "oracle", "--tasks", 2, "--out", tmp_path / "run"]
    assert call(*command, "--ray", "127.0.0.1:9") == 2
    said = capsys.readouterr().err
    assert "No Ray cluster can be joined at 127.0.0.1:9" in said and "ray start --head, or give --ray local" in said


@pytest.mark.slow
def test_the_same_records_with_and_without_ray(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["generate", "swirl/HotPotQA-v0", "--model", "oracle", "--tasks", 10, "--samples", 2]
    command += ["--kwargs", json.dumps({"tools": ["search", "mine:population"]})]
    for name, ray in (("with", ["--ray", "local", "--workers", 2]), ("without", [])):
        assert call(*command, "--out", tmp_path / name, *ray) == 0
        assert call("judge", tmp_path / name, "--judge", "mine:Kind", *ray) == 0
    for file in ("trajectories.jsonl", "judged-kind@1.jsonl"):
        assert records(tmp_path / "with" / file) == records(tmp_path / "without" / file), file
    assert call(*command, "--out", tmp_path / "with", "--ray", "local") == 0  # all is there
    lines = [f"{line}\n" for line in (tmp_path / "with" / "trajectories.jsonl").read_text().split("\n")]
    (tmp_path / "with" / "trajectories.jsonl").write_text("".join(lines[:7]) + lines[7][:30])
    assert call(*command, "--out", tmp_path / "with", "--ray", "local", "--workers", 2) == 0
    assert records(tmp_path / "with" / "trajectories.jsonl") == records(tmp_path / "without" / "trajectories.jsonl")
    assert call(*command[:-2], "--kwargs", '{"tools": ["mine:lost"]}', "--out", tmp_path / "bad", "--ray", "local") == 2


MINE = '''
from swirl_env.types import Verdict

def population(city: str) -> str:
    """How many live there.

    Args:
        city: its name.
    """
    return "7"

class Kind:
    name, uses_gold = "kind@1", False

    def __call__(self, views):
        return [Verdict(1.0, "fine", self.name) for _ in views]
'''


@pytest.mark.slow
def test_a_node_and_a_worker_die_and_each_episode_is_there_once():
    pytest.importorskip("ray")
    with scale.cluster_of(3) as (cluster, nodes):

        def kill(done, seen):
            if done == 150:
                cluster.remove_node(nodes[0], allow_graceful=False)
            if done == 300:
                os.kill(next(filter(scale._alive, map(int, os.listdir(seen)))), signal.SIGKILL)

        with pytest.warns(RuntimeWarning, match="A worker was lost, and its"):
            report = scale.play(500, 0.2, 3, kill)
    assert report["episodes"] == 500 and report["exactly_once"]


def kills(key):
    """A worker's work, which one task ends with its process."""

    def play(jobs):
        def checked():
            for job in jobs:
                if job == key:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield job

        for job in checked():
            yield from rollout(scale.make_env, oracle(scale.make_env().unwrapped), [job])

    return lambda: play


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_kills_each_worker_is_given_up_and_the_others_are_kept(monkeypatch):
    pytest.importorskip("ray")
    bad, found = list(JOBS)[17], []
    with pytest.raises(SwirlError, match=r"1 of 30 pieces of work were lost with 3 workers each.*The others are kept"):
        for one in spread(kills(JOBS[bad]), JOBS, address="local", workers=2, room=8):
            found.append(one.key)
    assert sorted(found) == sorted(set(JOBS) - {bad})
    monkeypatch.setattr(fleet, "START_SECONDS", 3.0)
    with pytest.raises(SwirlError, match="No worker could begin for 3 s.*each worker asks for"):
        list(spread(player, JOBS, address="local", workers=1, room=4, gpus=1))
