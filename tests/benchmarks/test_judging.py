"""Judging recorded runs: nothing twice, nothing lost, unknown verdicts asked again, two judges compared."""

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from swirl_agents import judges
from swirl_agents.judges import VERDICT_TOKENS, WORD_TOKENS, open_judge
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_agents.testing_server import ChatServer
from swirl_algos import stages
from swirl_benchmarks import evaluate
from swirl_benchmarks.judging import Disagreement, rejudge

from swirl_env.errors import ConfigError, UnknownArgumentError, UnknownNameError
from swirl_env.io import Writer, read
from swirl_env.judges import ask, make_judge, views
from swirl_env.judges.cache import Cached
from swirl_env.types import Trajectory, Verdict


@pytest.fixture(scope="module")
def recorded():
    """30 oracle episodes of GSM8K."""

    def make():
        return evaluate.make("swirl/GSM8K-v0", judge=None, reward="outcome")

    env = make().unwrapped
    return list(rollout(make, oracle(env), [(task_id, 0) for task_id in list(env.task_set.tasks)[:30]]))


def test_an_episode_made_anew_is_judged_anew(recorded, tmp_path):
    judge, path = make_judge("rules"), tmp_path / "judged.jsonl"
    failed = replace(recorded[0], steps=recorded[0].steps[:1], stop="error", outcome=None)
    stages.judge([failed, recorded[1]], judge, path)
    [first, second] = stages.judge(recorded[:2], judge, path)
    assert (first.stop, len(first.steps)) == ("answered", len(recorded[0].steps))
    assert [one.key for one in read(path, Trajectory)] == [second.key, first.key]


class Server:
    """A judge of the kind that asks a server: it bears many threads, and fails now and then."""

    name, uses_gold, concurrency = "server@1", False, 16

    def __init__(self, fails=lambda text: False, seconds=0.0):
        self.fails, self.seconds, self.asked = fails, seconds, []
        self.threads, self.lock = set(), threading.Lock()

    def __call__(self, views):
        time.sleep(self.seconds)
        with self.lock:
            self.asked += [view.action.text for view in views]
            self.threads.add(threading.current_thread().name)
        return [Verdict(None if self.fails(view.action.text) else 0.7, "because", self.name) for view in views]


def keys(path):
    return [trajectory.key for trajectory in read(path, Trajectory)]


def test_in_order_in_threads_and_only_once(recorded, tmp_path):
    judge = Server(seconds=0.01)
    judged = stages.judge(recorded, judge, tmp_path / "judged.jsonl")
    assert [t.key for t in judged] == [t.key for t in recorded]
    assert sorted(keys(tmp_path / "judged.jsonl")) == sorted(t.key for t in recorded)
    assert all(step.verdict.score == 0.7 for t in judged for step in t.steps)
    assert len(judge.threads) > 4
    assert len(judge.asked) == sum(len(t.steps) for t in recorded)
    again = Server()
    assert stages.judge(recorded, again, tmp_path / "judged.jsonl") == judged
    assert again.asked == []
    assert not (tmp_path / "failures.jsonl").exists()


def test_a_trajectory_that_is_judged_for_long_holds_up_no_other(recorded, tmp_path):
    class Stuck(Server):
        """Waits at the first trajectory until all others are judged."""

        def __call__(self, views):
            first = views[0].question == recorded[0].task.question
            assert not first or others.wait(60)
            verdicts = super().__call__(views)
            if len(self.asked) == sum(len(t.steps) for t in recorded[1:]):
                others.set()
            return verdicts

    others, judge = threading.Event(), Stuck()
    judge.concurrency = 4
    judged = stages.judge(recorded, judge, tmp_path / "judged.jsonl")
    assert all(step.verdict.score == 0.7 for t in judged for step in t.steps)


def test_what_is_unknown_is_listed_and_asked_again(recorded, tmp_path):
    path = tmp_path / "judged.jsonl"
    first = Server(lambda text: "<answer>" in text)
    stages.judge(recorded, first, path)
    failures = list(read(tmp_path / "failures.jsonl", stages.Failure))
    assert sorted((f.task, f.step, f.reason) for f in failures) == sorted(
        (t.task.id, len(t.steps) - 1, "because") for t in recorded
    )
    second = Server(lambda text: "<answer>1" in text)
    judged = stages.judge(recorded, second, path)
    left = sum("<answer>1" in t.steps[-1].action.text for t in recorded)
    assert sum(step.verdict.score is None for t in judged for step in t.steps) == left > 0
    assert len(list(read(tmp_path / "failures.jsonl", stages.Failure))) == left
    assert sorted(keys(path)) == sorted(t.key for t in recorded)  # each once


def test_too_much_unknown_stops_and_keeps_what_was_judged(recorded, tmp_path):
    path = tmp_path / "judged.jsonl"
    with pytest.raises(stages.JudgeError, match=r"over the limit of 20%. The last reason: because"):
        stages.judge(recorded, Server(lambda text: True), path, unknown_limit=0.2)
    assert 0 < len(keys(path)) < len(recorded)
    assert len(stages.judge(recorded, Server(), path, unknown_limit=0.2)) == len(recorded)


def test_a_short_run_is_held_against_the_limit_at_its_end(recorded, tmp_path):
    few = recorded[:2]
    with pytest.raises(stages.JudgeError, match="over the limit of 20%"):
        stages.judge(few, Server(lambda text: True), tmp_path / "judged.jsonl", unknown_limit=0.2)
    assert len(keys(tmp_path / "judged.jsonl")) == 2


def test_what_was_known_before_counts_when_unknown_steps_are_asked_again(recorded, tmp_path):
    path, lost = tmp_path / "judged.jsonl", recorded[0].steps[-1].action.text
    for _ in range(2):  # 1 unknown step of more than 100, but 1 of the few that are asked again
        judged = stages.judge(recorded, Server(lambda text: text == lost), path, unknown_limit=0.05)
    assert any(step.verdict.score is None for step in judged[0].steps)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"faults": [None, *["close"] * 999]}, "closed the connection before its reply was whole"),
        ({"context": 30}, "longer than the model's context"),
        ({"reply": ""}, "empty reply"),
        ({"reply": "so so"}, "does not end in GOOD or BAD"),
    ],
)
def test_a_server_that_fails_every_step_fails_the_command(recorded, swirl, tmp_path, settings, says):
    write(recorded[:4], tmp_path)
    with ChatServer(**{"reply": "fine\nGOOD"} | settings) as server:
        spec = json.dumps({"model": server.url, "retries": 0, "cache": str(tmp_path / "v.db")})
        said = swirl("judge", tmp_path, "--judge", spec, code=2)
    assert re.search(f"over the limit of 20%. The last reason: .*{says}.*give the same command again", said)
    assert len(keys(tmp_path / "judged-model-endpoint-test@2.jsonl")) == 4


def test_another_judge_judges_anew(recorded, tmp_path):
    path = tmp_path / "judged.jsonl"
    stages.judge(recorded, Server(), path)
    other = Server()
    other.name = "server@2"
    judged = stages.judge(recorded, other, path)
    assert {step.verdict.judge for t in judged for step in t.steps} == {"server@2"}
    assert sorted(keys(path)) == sorted(t.key for t in recorded)


def write(recorded, folder):
    with Writer(folder / "trajectories.jsonl") as out:
        for trajectory in recorded:
            out.write(trajectory)


def test_two_judges_are_compared(recorded, tmp_path):
    write(recorded, tmp_path)

    class Strict(Server):
        name = "strict@1"

        def __call__(self, views):
            return [Verdict(0.0 if "<answer>" in v.action.text else 1.0, "strict", self.name) for v in views]

    result = rejudge(tmp_path, [Server(), Strict()])
    steps = sum(len(t.steps) for t in recorded)
    assert result["agreement"]["steps"] == steps
    assert result["agreement"]["share"] == pytest.approx(1 - len(recorded) / steps)
    assert result["agreement"]["kappa"] == pytest.approx(0)  # one of them always says GOOD
    found = list(read(tmp_path / "disagreements.jsonl", Disagreement))
    assert result["disagreements"] == len(found) == len(recorded)
    assert found[0].scores == (0.7, 0.0)
    assert found[0].reasons == ("because", "strict")


def test_a_cache_is_asked_once_for_all_runs(recorded, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(recorded, tmp_path / name)
    judge = Cached(Server(), tmp_path / "verdicts.db")
    first, second = (rejudge(tmp_path / name, [judge])["judges"]["server@1"] for name in ("a", "b"))
    steps = sum(len(t.steps) for t in recorded)
    assert (first["asked"] + first["cached"], second["asked"], second["cached"]) == (steps, 0, steps)


def test_nothing_to_judge_is_told(tmp_path):
    with pytest.raises(ConfigError, match="There is no .*trajectories.jsonl"):
        rejudge(tmp_path, [Server()])
    (tmp_path / "trajectories.jsonl").write_text('{"task": {"id": "cut')
    with pytest.raises(ConfigError, match="holds no whole trajectory"):
        rejudge(tmp_path, [Server()])


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("ruls", UnknownNameError, "Did you mean 'rules'"),
        ('{"combine": ', ConfigError, "not JSON"),
        ("model:/no/such/folder", ConfigError, "no model folder"),
        ("rules+model:smolm2-135m", UnknownNameError, "Did you mean 'smollm2-135m'"),
        ('{"model": "smollm2-135m", "mode": "prob"}', ConfigError, "mode is 'verdict' or 'probability'"),
        ('{"model": "smollm2-135m", "max_tokens": 8}', UnknownArgumentError, "Did you mean 'max_new_tokens'"),
        ("model:127.0.0.1:8000/v1", ConfigError, "did you mean model:http://127.0.0.1:8000/v1"),
    ],
)
def test_judges_of_the_command_line(text, error, says):
    with pytest.raises(error, match=says):
        open_judge(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model that has words of its own for GOOD and BAD."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path, 0)
    return path


def save_tiny(path, seed):
    tokenizer = tiny_tokenizer("GOOD BAD")
    tiny_model(tokenizer, seed).save_pretrained(path)
    tokenizer.save_pretrained(path)


def policy_of(judge):
    return judge.policy if hasattr(judge, "policy") else policy_of(judge.judge)


def test_a_local_model_judges_in_each_mode(folder, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path))
    plain = open_judge(f"model:{folder}")
    assert policy_of(plain).max_new_tokens == VERDICT_TOKENS
    mean = open_judge(json.dumps({"model": str(folder), "samples": 3, "max_new_tokens": 8}))
    assert (policy_of(mean).max_new_tokens, policy_of(mean).temperature) == (8, 1.0)
    assert re.fullmatch(r"model:tiny-[0-9a-f]{8}:mean3@2", mean.name)
    likely = open_judge(json.dumps({"model": str(folder), "mode": "probability"}))
    assert re.fullmatch(r"model:tiny-[0-9a-f]{8}:probability@2", likely.name)
    shown = views(recorded[0])
    verdicts = ask(likely, shown)
    assert all(verdict.score is None or 0 < verdict.score < 1 for verdict in verdicts)
    assert any(verdict.score is not None for verdict in verdicts)
    assert max(verdict.tokens for verdict in verdicts) <= WORD_TOKENS
    assert ask(likely, shown) == verdicts
    assert likely.hits > 0


def test_a_local_model_judges_inside_a_combination(folder, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path))
    shown = views(recorded[0])
    likely = {"model": str(folder), "mode": "probability"}
    for text in (f"rules+model:{folder}", json.dumps({"combine": ["rules", likely], "how": "min"})):
        judge = open_judge(text)
        assert isinstance(judge, Cached)
        assert "model:tiny-" in judge.name
        assert len(ask(judge, shown)) == len(shown)


def test_another_model_in_the_same_folder_is_another_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path / "cache"))
    names = []
    for place, seed in (("a", 0), ("b", 0), ("b", 1)):
        save_tiny(tmp_path / place / "swirl", seed)
        judges._loaded.cache_clear()  # as in a new process
        names.append(open_judge(f"model:{tmp_path / place / 'swirl'}").name)
    assert names[0] == names[1] != names[2]


def test_swirl_judge(recorded, tmp_path):
    write(recorded, tmp_path)
    command = [sys.executable, "-m", "swirl_benchmarks.cli", "judge", str(tmp_path), "--judge", "rules", "--judge"]
    done = subprocess.run([*command, "gold-steps", "--json", str(tmp_path / "o.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "They agree on" in done.stdout
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["judges"]["rules@2"]["process"]["mean"] > 0.9
    assert (tmp_path / "judged-gold-steps@1.jsonl").exists()
    done = subprocess.run([*command, "nope"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No judge is called 'nope'" in done.stderr
