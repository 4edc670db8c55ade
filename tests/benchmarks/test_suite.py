"""`swirl bench smoke | paper | transfer` as users give them."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from swirl_algos.stages import rewrite
from swirl_benchmarks.suite import SUITES, load, run_suite

from swirl_env.errors import ConfigError
from swirl_env.io import read
from swirl_env.registration import ENVS
from swirl_env.tasks.base import DATA
from swirl_env.types import Trajectory

SWIRL = [sys.executable, "-m", "swirl_benchmarks.cli"]


def bench(*arguments, code=0, cwd):
    command = [*SWIRL, "bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_what_there_is(name):
    suite = load(name)
    assert {one.env for one in suite.sets} <= set(ENVS)
    assert len({one.name for one in suite.sets}) == len(suite.sets) >= 5


def test_smoke_side_by_side_then_one_more(tmp_path):
    smoke = ("smoke", "--limit", 3, "--samples", 2, "--model", "oracle")
    bench(*smoke, "--json", "a.json", cwd=tmp_path)
    written = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("oracle.*jsonl")}
    shown = bench(*smoke, "--model", "random", "--json", "b.json", cwd=tmp_path).stdout
    assert "pass@2" in shown and "majority@2" in shown and "difference" in shown
    assert all(path.read_bytes() == before for path, before in written.items())  # what was there is not made again
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    for name, figures in b["sets"].items():
        oracle, other = figures["models"]["oracle"], figures["models"]["random"]
        assert oracle == a["sets"][name]["models"]["oracle"]
        assert oracle["outcome"]["mean"] == oracle["pass"]["2"]["mean"] == oracle["majority"]["2"]["mean"] == 1
        change = figures["differences"]["random"]["outcome"]
        assert change["mean"] == pytest.approx(other["outcome"]["mean"] - 1)
        assert sum(tool["calls"] for tool in oracle["tools"].values()) == oracle["cost"]["calls"] > 0
        assert oracle["cost"]["seconds_an_episode"] > 0
    assert sum(group["n"] for group in b["sets"]["musique"]["models"]["oracle"]["hops"].values()) == 3
    assert "seed: 0 there, 1 now" in bench(*smoke, "--seed", 1, code=2, cwd=tmp_path).stderr


def test_paper_takes_its_own_questions_where_the_files_are(tmp_path):
    ids = json.loads((DATA.parent.parent / "benchmarks/swirl_benchmarks/suites/paper_ids.json").read_text())["ids"]
    rows = json.loads(gzip.decompress((DATA / "hotpotqa_test.json.gz").read_bytes()))[:5]
    for row, name in zip(rows, ids["hotpotqa"][:2], strict=False):
        row["_id"] = name
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))
    done = bench("paper", "--model", "oracle", "--limit", 4, "--data", "data", "--json", "p.json", cwd=tmp_path)
    figures = json.loads((tmp_path / "p.json").read_text())["sets"]
    assert "2 of 300 ids found" in " ".join(done.stdout.split())
    assert "bundled test tasks, not the paper's" in figures["musique"]["questions"]
    assert figures["hotpotqa"]["models"]["oracle"]["n"] == 2
    played = read(tmp_path / "runs/bench-paper/hotpotqa/oracle.jsonl", Trajectory)
    assert {one.task.id for one in played} == set(ids["hotpotqa"][:2])
    assert figures["gsm8k"]["models"]["oracle"]["overlap"]["f1"]["mean"] == 1


@pytest.mark.slow
def test_transfer_knows_what_a_checkpoint_was_trained_on(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "run" / "swirl")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"env": "swirl/GSM8K-v0"}}))
    transfer = ("transfer", "--limit", 2, "--max-new-tokens", 4, "--json", "t.json", "--model", "random")
    assert "compares checkpoints" in bench(*transfer, code=2, cwd=tmp_path).stderr
    shown = bench(*transfer, "--model", "run/swirl", cwd=tmp_path).stdout
    assert "trained on swirl/GSM8K-v0" in shown
    figures = json.loads((tmp_path / "t.json").read_text())["transfer"]["run/swirl"]
    assert figures["other_sets"] == ["hotpotqa", "musique", "beerqa", "cofca"]
    assert figures["outcome"]["mean"] <= 0


def test_it_goes_on_with_the_same_model_and_questions_only(tmp_path):
    def smoke(model):
        return run_suite("smoke", [model], tmp_path / "run", data=None, limit=2, samples=1, temperature=0.0, max_new_tokens=8,
                         judge="rules", seed=0, say=lambda text: None)  # fmt: skip

    smoke("oracle")
    acted, judged = (tmp_path / "run" / "gsm8k" / f"oracle.{end}" for end in ("unjudged.jsonl", "jsonl"))
    made = list(read(acted, Trajectory))
    other = replace(made[0], task=replace(made[0].task, question="Another question under its id?"), outcome=0.0)
    rewrite(acted, [other, made[1]])
    lost = [replace(one, stop="error", outcome=None, steps=one.steps[:1]) for one in read(judged, Trajectory)]
    rewrite(judged, lost)  # as an episode is left that a server failed, and that was made anew since
    figures = smoke("oracle")["sets"]["gsm8k"]["models"]["oracle"]
    assert figures["outcome"]["mean"] == 1.0 and figures["stops"] == {"answered": 2}
    assert sorted(one.task.question for one in read(acted, Trajectory)) == sorted(one.task.question for one in made)

    recorded = tmp_path / "recorded.jsonl"
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("*/oracle.unjudged.jsonl"))
    recorded.write_bytes(everything)
    smoke(f"replay:{recorded}")
    smoke(f"replay:{recorded}")
    recorded.write_bytes(everything.replace(b"answer", b"anSwer"))
    with pytest.raises(ConfigError, match="another model than the one whose episodes"):
        smoke(f"replay:{recorded}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["smok"], "smoke"),
        (["smoke"], "Give --model once or several times"),
        (["smoke", "--model", "oracle", "--limit", "0"], "--limit and --samples must be at least 1"),
        (["paper", "--model", "oracle", "--data", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_a_sentence(arguments, says, swirl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in swirl("bench", *arguments, code=2)


def test_ctrl_c_stops_cleanly_says_how_to_go_on_and_keeps_what_was_made(tmp_path):
    command = [*SWIRL, "bench", "smoke", "--model", "random", "--samples", "200", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    acted = tmp_path / "run" / "gsm8k" / "random.unjudged.jsonl"
    deadline = time.monotonic() + 60
    while not (acted.exists() and acted.stat().st_size > 10_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "stopped. What was written is kept; the same command goes on from there." in said
    assert "Traceback" not in said
    assert len(list(read(acted, Trajectory))) > 0


def test_quiet_shows_errors_only(tmp_path):
    quiet = [*SWIRL, "--quiet", "eval", "swirl/GSM8K-v0", "--tasks", "2", "--json", "o.json", "--model"]
    done = subprocess.run([*quiet, "oracle"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "o.json").read_text())["n"] == 2
    done = subprocess.run([*quiet, "replay:x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "there is no file 'x'" in done.stderr
