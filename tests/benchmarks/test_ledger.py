"""The reproduction's grid, with a tiny model and a judge that is pleased by even letters."""

import io
import json
from dataclasses import replace

import gymnasium as gym
import pytest
from rich.console import Console
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_algos.configs import GrpoConfig, SftConfig, SwirlConfig, TrainerConfig
from swirl_benchmarks.ledger import LedgerConfig, _pooled, acted_tokens, ledger, print_ledger, trained_tokens
from swirl_benchmarks.run import RunConfig, maker, parts

from swirl_env.errors import ConfigError
from swirl_env.io import read
from swirl_env.types import Trajectory

JUDGE = """
from swirl_env.types import Verdict

class Even:
    name, uses_gold = "even@1", False

    def __call__(self, views):
        return [Verdict(0.5 + len(view.action.text) % 2 / 2, "", self.name) for view in views]
"""


@pytest.mark.slow
def test_the_grid_goes_on_and_tells_what_could_not_be_trained(tiny, tmp_path, monkeypatch):
    (tmp_path / "evenly.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    config = LedgerConfig(
        envs=("swirl/GSM8K-v0", "swirl/HotPotQA-v0"), seeds=(0,), model=str(tiny), tasks=3, samples=1, demonstrations=2, filters=("process", "outcome"),
        limits=(1, 100), judge="evenly:Even", rewards=("rules",), sft=SftConfig(epochs=1), trainer=TrainerConfig(tracker="none"),
        swirl=SwirlConfig(samples=2, batch_size=1, max_new_tokens=8), grpo=GrpoConfig(updates=2, max_new_tokens=8),
    )  # fmt: skip
    out, said = tmp_path / "ledger", io.StringIO()
    console = Console(file=said, width=200)
    small = ledger(LedgerConfig(**vars(config) | {"envs": config.envs[:1]}), out, console)
    made = {row["policy"]: row for row in small["rows"]}
    assert list(made) == ["base", "warm_start", "swirl", "sft", "swirl-outcome", "swirl-1", "swirl-by-rules", "grpo"]
    assert "leaves none of the 3 trajectories" in made["swirl-outcome"]["not_trained"]
    assert "All advantages" in made["grpo"]["not_trained"]
    assert [made[name]["trajectories"] for name in ("swirl", "sft", "swirl-1", "swirl-by-rules")] == [3, 3, 1, 3]
    assert made["sft"]["over_warm_start"]["process"]["mean"] == pytest.approx(
        made["sft"]["process"]["mean"] - made["warm_start"]["process"]["mean"]
    )
    folder = out / "gsm8k-v0-seed0"
    lines = (folder / "training" / "swirl" / "metrics.jsonl").read_text().splitlines()
    sampled = sum(json.loads(line)["sampled_tokens"] for line in lines)
    assert acted_tokens(folder) + trained_tokens(folder, "swirl") > sampled == trained_tokens(folder, "swirl") > 0
    weights = (folder / "swirl-1" / "model.safetensors").stat().st_mtime_ns
    again = ledger(LedgerConfig(**vars(config) | {"envs": config.envs[:1]}), out, console)
    assert again == small
    assert (folder / "swirl-1" / "model.safetensors").stat().st_mtime_ns == weights
    print_ledger(small, console)
    assert "trained on swirl/GSM8K-v0, measured on swirl/GSM8K-v0" in said.getvalue()
    with pytest.raises(ConfigError, match="another config"):
        ledger(LedgerConfig(**vars(config) | {"tasks": 2}), out, console)


def test_unseen_questions_are_in_no_file_that_was_trained_on(tmp_path):
    config = RunConfig("swirl/GSM8K-v0", tasks=5)
    envs = [maker(config, split)().unwrapped for split in ("train", "test")]
    unseen = parts(config, *envs)[2]
    question = envs[1].task_set.tasks[unseen[0]].question
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": f" {question.upper()}", "answer": "so\n#### 1"}))
    also = (f"swirl/GSM8K-v0={tmp_path / 'other.jsonl'}",)
    assert unseen[0] not in parts(replace(config, also=also), *envs)[2]


def test_what_could_not_be_trained_counts_as_its_warm_start():
    env = gym.make("swirl/GSM8K-v0").unwrapped
    ids = list(env.task_set.tasks)[:4]
    right = list(rollout(lambda: gym.make("swirl/GSM8K-v0"), oracle(env), [(one, 0) for one in ids]))
    wrong = [replace(one, outcome=0.0) for one in right]
    seeds = [
        {("e", "warm_start"): wrong, ("e", "swirl"): right, ("e", "swirl-none"): right, ("e", "grpo"): wrong},
        {("e", "warm_start"): wrong, ("e", "grpo"): right},
    ]
    rows = {row["policy"]: row for row in _pooled("e", seeds)}
    assert (rows["swirl"]["trained"], rows["swirl"]["seeds"], rows["swirl"]["outcome"]["mean"]) == (1, 2, 0.5)
    assert rows["swirl"]["over_warm_start"]["outcome"]["of_each_seed"] == [1.0, 0.0]
    assert rows["swirl"]["over_grpo"]["outcome"]["of_each_seed"] == [1.0, -1.0]
    assert rows["swirl"]["over_swirl-none"]["outcome"]["of_each_seed"] == [
        0.0,
        0.0,
    ]  # neither was trained with the second seed
    assert "over_swirl" not in rows["swirl-none"]
    assert "over_grpo" not in rows["grpo"] and "over_warm_start" not in rows["warm_start"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"files": ("swirl/GSM8K-v0",)}, r"--files takes ENV=TRAIN,TEST, such as .*; got 'swirl/GSM8K-v0'"),
        ({"files": ("swirl/GSM8K-v0=train.jsonl",)}, "--files takes two files"),
        ({"kwargs": ("swirl/GSM8k-v0={}",)}, "neither trained nor measured on: swirl/GSM8K-v0.*Did you mean"),
        ({"kwargs": ("swirl/GSM8K-v0={",)}, "--kwargs must be JSON"),
        ({"kwargs": ('swirl/GSM8K-v0={"split": "test"}',)}, "cannot hold 'split'"),
    ],
)
def test_what_is_said_of_an_environment_must_be_of_one_in_the_grid(settings, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        ledger(LedgerConfig(envs=("swirl/GSM8K-v0",), **settings), tmp_path, Console(file=io.StringIO()))


def test_an_environment_has_its_arguments(tiny, tmp_path):
    config = LedgerConfig(
        envs=("swirl/Arithmetic-v0",), kwargs=('swirl/Arithmetic-v0={"operators": "+", "count": 9}',), seeds=(0,), model=str(tiny),
        tasks=2, samples=1, demonstrations=0, filters=(), rivals=(), limits=(), trainer=TrainerConfig(tracker="none"),
        swirl=SwirlConfig(samples=2, max_new_tokens=4),
    )  # fmt: skip
    ledger(config, tmp_path, Console(file=io.StringIO()))
    [run] = tmp_path.iterdir()
    for file in ("trajectories.jsonl", "eval/warm_start.jsonl"):
        asked = list(read(run / file, Trajectory))
        assert asked and all(one.env.kwargs["operators"] == "+" and one.env.kwargs["count"] == 9 for one in asked)
