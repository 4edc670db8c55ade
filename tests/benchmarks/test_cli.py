"""The `swirl` command as real processes, and the pipeline end to end with a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from swirl_agents.testing_server import ChatServer

from swirl_env.io import read
from swirl_env.types import Trajectory

SWIRL = [sys.executable, "-m", "swirl_benchmarks.cli"]


def spawn(*arguments, code=0, **kwargs):
    done = subprocess.run([*SWIRL, *map(str, arguments)], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_help_names_every_command_without_torch():
    done = spawn("--help")
    for command in ("run", "eval", "generate", "judge", "filter", "train", "export", "play", "envs"):
        assert command in done.stdout
    code = "import sys, swirl_benchmarks.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_envs():
    out = spawn("envs").stdout
    assert "swirl/GSM8K-v0" in out
    assert "calculator" in out


@pytest.mark.parametrize("env", ["swirl/GSM8K-v0", "swirl/HotPotQA-v0"])
def test_eval_oracle(env, tmp_path):
    file = tmp_path / "o.json"
    spawn("eval", env, "--model", "oracle", "--json", file)
    figures = json.loads(file.read_text())
    assert figures["env"] == env
    assert figures["model"] == "oracle"
    assert figures["n"] == 100
    assert figures["outcome"]["mean"] == 1.0
    assert figures["outcome"]["low"] < 1.0
    assert figures["process"]["mean"] > 0.9
    assert figures["malformed"]["mean"] == figures["tool_errors"]["mean"] == 0.0
    assert figures["unknown"] == 0


def test_eval_random_then_replay(swirl, tmp_path):
    recorded, first, second = (tmp_path / name for name in ("r.jsonl", "a.json", "b.json"))
    swirl("eval", "swirl/GSM8K-v0", "--model", "random", "--tasks", 6, "--json", first, "--out", recorded)
    swirl("eval", "swirl/GSM8K-v0", "--model", f"replay:{recorded}", "--tasks", 6, "--json", second)
    a, b = (json.loads(path.read_text()) for path in (first, second))
    assert a["n"] == b["n"] == 6
    assert {k: a[k] for k in ("outcome", "process", "steps", "stops")} == {
        k: b[k] for k in ("outcome", "process", "steps", "stops")
    }
    assert len(list(read(recorded, Trajectory))) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "swirl/GSM8k-v0", "--model", "oracle"], "Did you mean 'swirl/GSM8K-v0'?"),
        (["eval", "swirl/GSM8K-v0", "--model", "orcle"], "Did you mean 'oracle'?"),
        (["eval", "swirl/GSM8K-v0", "--model", "/no/such/folder"], "There is no model folder '/no/such/folder'"),
        (["eval", "swirl/GSM8K-v0", "--model", "replay:nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--path", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--judge", "ruls"], "Did you mean 'rules'?"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--tasks", "0"], "--tasks must be at least 1"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--seed", "-1"], "--seed 0 or more"),
        (["eval", "nomodule:swirl/X-v0", "--model", "oracle"], "No module named 'nomodule'"),
        (["eval", "CartPole-v1", "--model", "oracle"], "is not an environment of this toolkit"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--json", "."], "cannot be written"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--kwargs", '{"path": "x"}'], "cannot hold 'path'"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--kwargs", "{"], "--kwargs must be JSON"),
        (["eval", "swirl/GSM8K-v0", "--model", "oracle", "--kwargs", '{"metric": ["x"]}'], "metric must be a name"),
        (["judge", "nowhere", "--judge", "rules"], "There is no nowhere"),
        (["data", "fetch", "gsm9k"], "Did you mean 'gsm8k'"),
        (["bench", "speed", "--only", "envs"], "--only takes update, fork"),
        (["play", "swirl/GSM8K-v0", "--seed", "-1"], "--seed must be 0 or more"),
        (["play", "swirl/GSM8K-v0", "--task", "nope"], "No task has the id 'nope'"),
        (["run", "swirl/GSM8K-v0", "--filter", "proces", "--tasks", "2"], "Did you mean 'process'?"),
        (["run", "swirl/GSM8K-v0", "--tasks", "0"], "tasks must be at least 1"),
        (["run", "swirl/GSM8K-v0", "--swirl.samples", "1"], "samples must be at least 2"),
        (["eval", "swirl/GSM8K-v0", "--modle", "oracle"], "--model"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, says, swirl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in swirl(*arguments, code=2)


def test_a_server_that_fails_is_no_outcome_of_zero(swirl, tmp_path):
    command = ["eval", "swirl/GSM8K-v0", "--tasks", "4", "--json", tmp_path / "o.json", "--model"]
    with ChatServer(faults=[None, None, *["close"] * 99]) as server:  # one for the check, one episode answers
        model = json.dumps({"endpoint": server.url, "retries": 0})
        failed = swirl(*command, model, code=2)
    assert "3 of 4 episodes ended by an error" in failed
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["stops"] == {"error": 3, "answered": 1}
    assert figures["steps"]["mean"] == 1
    with ChatServer(context=60) as server:  # no state fits
        swirl(*command, f"endpoint:{server.url}", code=2)
    assert json.loads((tmp_path / "o.json").read_text())["outcome"]["mean"] is None


def test_a_server_that_refuses_a_field_can_be_asked_without_it(swirl):
    command = ["eval", "swirl/GSM8K-v0", "--tasks", "1", "--model"]
    with ChatServer(refuses=("seed",)) as server:
        assert "Leave that field out" in swirl(*command, f"endpoint:{server.url}", code=2)
        swirl(*command, json.dumps({"endpoint": server.url, "extra": {"seed": None}}))
        assert "Did you mean 'extra'" in swirl(*command, json.dumps({"endpoint": server.url, "extr": {}}), code=2)
    assert "--model as JSON is like" in swirl(*command, "{}", code=2)


def test_a_folder_without_safetensors(swirl, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = swirl("eval", "swirl/GSM8K-v0", "--model", tmp_path, code=2)
    assert "0 .gguf files and no .safetensors file" in said


def test_play():
    done = spawn("play", "swirl/GSM8K-v0", "--seed", 1, input="hm\n<calculator>1+1</calculator>\n<answer>2</answer>\n")
    assert "There is no tag." in done.stdout
    assert "<result>2</result>" in done.stdout
    assert "The gold answer:" in done.stdout
    assert "before the episode" in spawn("play", "swirl/GSM8K-v0", input="").stdout


RUN = ("run", "swirl/GSM8K-v0", "--tasks", 3, "--samples", 1, "--demonstrations", 3, "--filter", "none", "--max-steps", 3, "--swirl.max-new-tokens", 8,
       "--swirl.samples", 8, "--swirl.batch-size", 1, "--batch-size", 2)  # fmt: skip
FILES = [
    "demonstrations.jsonl",
    "trajectories.jsonl",
    "judged.jsonl",
    "kept.jsonl",
    "training/warm_start/metrics.jsonl",
    "training/swirl/candidates.jsonl",
    "training/swirl/metrics.jsonl",
]


def contents(folder):
    """The records of a run, with what differs from run to run left out."""
    stable = {}
    for name in FILES:
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for line in lines:
            line.pop("seconds", None)
            for step in line.get("steps", []):
                for part in [*step["results"], step["verdict"] or {}, step["tokens"] or {}]:
                    part.pop("seconds", None)
                    part.pop("logprobs", None)
            for key, value in line.items():
                line[key] = round(value, 4) if isinstance(value, float) else value
        stable[name] = sorted(json.dumps(line, sort_keys=True) for line in lines)
    results = json.loads((folder / "results.json").read_text())
    return stable, {name: results["policies"][name]["process"] for name in results["policies"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments",
    [["trajectories.jsonl"], ["eval/base.unjudged.jsonl", "training/swirl/candidates.jsonl"]],
    ids=["while acting", "before and after"],
)
def test_run_end_to_end_resumes_after_kill_and_refuses_another_config(moments, tiny, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = spawn(*RUN, "--model", tiny, "--out", whole, "--json", tmp_path / "r.json")
    assert "paired difference in process" in done.stdout
    expected = contents(whole)
    assert all(expected[0].values())
    assert json.loads((tmp_path / "r.json").read_text())["policies"].keys() == {"base", "warm_start", "swirl"}
    train, test = (
        {t.task.id for t in read(whole / name, Trajectory)} for name in ("trajectories.jsonl", "eval/swirl.jsonl")
    )
    assert not train & test
    assert not train & {t.task.id for t in read(whole / "demonstrations.jsonl", Trajectory)}

    for moment in moments:
        process = subprocess.Popen([*map(str, [*SWIRL, *RUN, "--model", tiny, "--out", killed])], stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and not (killed / moment).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    spawn(*RUN, "--model", tiny, "--out", killed)
    assert contents(killed) == expected

    # a second run of a finished one makes nothing again
    before = {name: (whole / name).read_bytes() for name in FILES}
    spawn(*RUN, "--model", tiny, "--out", whole)
    assert {name: (whole / name).read_bytes() for name in FILES} == before

    done = spawn(*RUN, "--model", tiny, "--out", whole, "--seed", 1, code=2)
    assert "another config (seed: 0 there, 1 now)" in done.stderr


MOODY = """
from pathlib import Path
from swirl_env.types import Verdict

class Moody:
    name, uses_gold = "moody@1", False

    def __call__(self, views):
        knows = Path(__file__).with_name("knows").exists()
        return [self.verdict(view, knows or sum(map(ord, view.question)) % 2) for view in views]

    def verdict(self, view, knows):
        return Verdict(0.5 + len(view.action.text) % 2 / 2 if knows else None, "", self.name)
"""


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_trained_on_though_its_judge_now_knows_more(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(MOODY)
    out, env = tmp_path / "run", os.environ | {"PYTHONPATH": str(tmp_path)}
    command = ["process" if word == "none" else word for word in RUN]
    command += ["--model", tiny, "--judge", "mine:Moody", "--unknown-limit", 1, "--out", out]
    spawn(*command, env=env)
    first = json.loads((out / "results.json").read_text())
    assert first["stage_1"]["unknown"] and first["stage_1"]["kept"]
    kept = (out / "kept.jsonl").read_bytes()
    (out / "results.json").unlink()
    shutil.rmtree(out / "swirl")
    (tmp_path / "knows").touch()
    spawn(*command, env=env)
    assert (out / "kept.jsonl").read_bytes() == kept
    assert json.loads((out / "results.json").read_text())["stage_1"] == first["stage_1"]


@pytest.mark.slow
def test_plain_rows_give_the_same_losses(tiny, tmp_path):
    losses = []
    for flags in ([], ["--reference"]):
        out = tmp_path / f"run{len(flags)}"
        spawn(*RUN, "--model", tiny, "--out", out, *flags)
        lines = (out / "training" / "swirl" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert json.loads((out / "run.json").read_text())["config"]["swirl"]["reference"] is bool(flags)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_a_run_with_a_judge_behind_a_server_tells_how_often_the_cache_knew(tiny, tmp_path):
    with ChatServer("fine\nGOOD") as server:
        judge = json.dumps(
            {"combine": ["rules", {"model": server.url}], "how": "mean", "cache": str(tmp_path / "v.db")}
        )
        spawn(*RUN, "--model", tiny, "--judge", judge, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    # one call is the check at the begin
    assert results["verdicts"]["asked"] >= len(server.bodies) - 1 > 0
    assert 0 <= results["verdicts"]["hit_rate"] < 1


def test_run_stops_with_a_sentence_where_nothing_is_kept(swirl, tiny, tmp_path):
    out = tmp_path / "run"
    said = swirl(*RUN, "--model", tiny, "--filter", "outcome", "--out", out, code=2)
    assert "The filter outcome leaves none of the 3 trajectories" in said
    assert len(list(read(out / "judged.jsonl", Trajectory))) == 3


def test_an_update_whose_verdicts_are_all_unknown_is_shown(capsys):
    from swirl_algos.launch import _Progress

    with _Progress("train") as log:
        log({"update": 0, "updates": 1, "score": None, "loss": 0.5})
    assert "loss=0.500" in capsys.readouterr().err
