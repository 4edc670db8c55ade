"""generate -> judge -> filter -> train -> export, command by command."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from swirl_agents.rollout import rollout
from swirl_agents.scripted import Scripted, oracle
from swirl_agents.testing_server import ChatServer
from swirl_algos import stages
from swirl_benchmarks.export import FORMATS, messages, prompt_completion, stepwise, verifiers, verl

import swirl_env  # noqa: F401
from swirl_env.io import read
from swirl_env.types import Trajectory, Verdict
from swirl_env.wrappers import AddTool

NEW = ("generate", "filter", "train", "export")


@pytest.fixture(scope="module")
def trained(call, tiny, tmp_path_factory):
    """A run folder of the tiny model, judged and with all trajectories kept."""
    folder = tmp_path_factory.mktemp("run") / "run"
    generate = ["generate", "swirl/GSM8K-v0", "--model", tiny, "--tasks", 3, "--samples", 2, "--max-steps", 3]
    assert not call(*generate, "--max-new-tokens", 8, "--out", folder)
    assert not call("judge", folder, "--judge", "rules")
    assert not call("filter", folder, "--by", "none")
    return folder


def recorded(env_id="swirl/GSM8K-v0", texts=None, **kwargs):
    """A judged trajectory: of the oracle, or of these actions."""

    def make():
        return gym.make(env_id, **kwargs)

    env = make().unwrapped
    said = iter(texts or ())
    policy = Scripted("script", lambda transcript: next(said)) if texts else oracle(env)
    return next(rollout(make, policy, [(next(iter(env.task_set.tasks)), 0)]))


def test_help_shows_an_example_and_loads_no_torch():
    code = f"""
import sys
from swirl_benchmarks import cli
for name in {["--help", *NEW]}:
    sys.argv = ["swirl", name, "--help"]
    try:
        cli.main()
    except SystemExit:
        pass
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.endswith("False\n")
    for name in NEW:
        assert f"• {name}" in out
        assert f"Example: swirl {name}" in out


def test_generate_goes_on_and_refuses_another_config(swirl, tmp_path):
    command = ["generate", "swirl/GSM8K-v0", "--model", "oracle", "--samples", 2, "--out", tmp_path / "run"]
    assert "6 trajectories of 3 tasks (6 answered)" in swirl(*command, "--tasks", 3)
    file = tmp_path / "run" / "trajectories.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    assert [t.env.kwargs["split"] for t in read(file, Trajectory)] == ["train"] * 6
    file.write_text("".join(whole[:2]) + whole[2][:50])  # as a killed process leaves it
    swirl(*command, "--tasks", 3, "--batch-size", 1)
    assert {t.key for t in read(file, Trajectory)} == {json_key(line) for line in whole}
    assert len(file.read_text().splitlines()) == 6
    assert "(tasks: 3 there, 4 now). Use another --out" in swirl(*command, "--tasks", 4, code=2)
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["model"] == "oracle"
    assert config["temperature"] == 1.0


def json_key(line):
    record = json.loads(line)
    return record["task"]["id"], record["sample"], record["round"]


def test_episodes_that_a_failing_server_ended_are_made_anew(swirl, tmp_path):
    with ChatServer(faults=[None, None, "close", "close"]) as server:  # one for the check
        model = json.dumps({"endpoint": server.url, "retries": 0})
        command = ["generate", "swirl/GSM8K-v0", "--model", model, "--tasks", 3, "--samples", 1, "--out", tmp_path]
        assert "2 of 3 episodes ended by an error" in swirl(*command, code=2)
        assert "(3 answered)" in swirl(*command)
    assert [t.stop for t in read(tmp_path / "trajectories.jsonl", Trajectory)] == ["answered"] * 3


def test_filter_prints_the_funnel_and_says_where_nothing_is_kept(swirl, tmp_path):
    good = recorded()
    step = replace(good.steps[0], verdict=Verdict(None, "no reply", "x@1"))
    unknown = replace(good, sample=1, steps=(step, *good.steps[1:]))
    bad = recorded(texts=["junk"] * 10, max_steps=2)
    stages.rewrite(tmp_path / "judged-x@1.jsonl", [good, unknown, replace(bad, sample=2)])
    assert "│ 3 │ 1 │ 1 │ 1 │" in swirl("filter", tmp_path)
    assert [t.key for t in read(tmp_path / "kept.jsonl", Trajectory)] == [good.key]
    assert "│ 3 │ 3 │ 0 │ 0 │" in swirl("filter", tmp_path / "judged-x@1.jsonl", "--by", "none")
    stages.rewrite(tmp_path / "judged-y@1.jsonl", [good])
    assert "of several judges: judged-x@1.jsonl, judged-y@1.jsonl. Name one in place of the folder:" in swirl(
        "filter", tmp_path, code=2
    )
    (tmp_path / "judged-y@1.jsonl").unlink()
    stages.rewrite(tmp_path / "judged-x@1.jsonl", [unknown, replace(bad, sample=2)])
    said = swirl("filter", tmp_path, "--by", "both", code=2)
    assert "leaves none of the 2 trajectories" in said
    assert "(1 dropped, 1 with an unknown verdict). Generate more, use another --by" in said
    assert not list(read(tmp_path / "kept.jsonl", Trajectory))  # no older choice is left


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "swirl/GSM8K-v0", "--model", "orcle", "--out", "new"], "Did you mean 'oracle'?"),
        (["generate", "swirl/GSM8k-v0", "--model", "oracle", "--out", "new"], "Did you mean 'swirl/GSM8K-v0'?"),
        (["generate", "swirl/GSM8K-v0", "--model", "oracle", "--out", "new", "--samples", "0"], "--samples must be at least 1"),
        (["generate", "swirl/GSM8K-v0", "--model", "oracle", "--out", "new", "--split", "trian"], "trian"),
        (["filter", "."], "swirl judge . --judge rules"),
        (["filter", "nowhere"], "There is no nowhere. Make one with swirl generate"),
        (["filter", "judged.jsonl", "--by", "proces"], "Did you mean 'process'?"),
        (["train", "."], "--algo"),
        (["train", ".", "--algo", "swrl"], "Did you mean 'swirl'?"),
        (["train", "gold.jsonl", "--algo", "sft", "--model", "x", "--name", "taken"], "taken exists and is no model"),
        (["train", ".", "--algo", "swirl", "--learning-rat", "1"], "--learning-rate"),
        (["train", "gold.jsonl", "--algo", "sft"], "by 'oracle', which is not known as a model to train: name one with --model"),
        (["train", "judged.jsonl", "--algo", "swirl", "--model", "x", "--filter", "none"], "judged by own@7, and rules would score"),
        (["train", "judged.jsonl", "--algo", "sft", "--model", "x", "--judge", "rules"], "leave out --judge"),
        (["export", "rows", ".", "out.jsonl"], "There is no kept.jsonl in .. Filter first: swirl filter ."),
        (["export", "rows", "nowhere", "out.jsonl"], "There is no nowhere"),
        (["export", "rows", "gold.jsonl", "out.json"], "ends in .jsonl or .parquet"),
        (["export", "rows", "gold.jsonl", "out.parquet", "--format", "verifiers"], "ends in .jsonl, got out.parquet"),
        (["export", "tasks", "swirl/GSM8K-v0", "judged.jsonl"], "judged.jsonl exists already"),
        (["export", "tasks", "swirl/GSM8K-v0", "out.jsonl", "--kwargs", '{"max_step": 3}'], "Did you mean 'max_steps'"),
        (["export", "rows", "gold.jsonl", "judged.jsonl"], "judged.jsonl exists already"),
        (["export", "rows", "gold.jsonl", "out.jsonl", "--format", "mesages"], "Did you mean 'messages'?"),
        (["export", "rows", "gold.jsonl", "out.jsonl", "--format", "stepwise"], "has a known verdict on every step"),
        (["export", "model", "nowhere/x/y", "out"], "There is no model folder"),
        (["export", "model", "gold.jsonl", "."], ". exists already"),
    ],
)  # fmt: skip
def test_bad_input_is_told(arguments, says, swirl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    gold = recorded()
    stages.rewrite(tmp_path / "gold.jsonl", [replace(gold, steps=tuple(replace(s, verdict=None) for s in gold.steps))])
    other = [replace(s, verdict=Verdict(1.0, "", "own@7")) for s in gold.steps]
    stages.rewrite(tmp_path / "judged.jsonl", [replace(gold, steps=tuple(other))])
    if "." in arguments[1:3]:
        (tmp_path / "judged.jsonl").unlink()
    assert says in swirl(*arguments, code=2)
    assert not (tmp_path / "out.jsonl").exists()


def test_train_shows_the_flags_of_the_algorithm(swirl):
    said = swirl("train", "runs/x", "--algo", "grpo", "--help")
    assert "GRPO: the rival with outcome reward" in said
    assert "--token-budget" in said
    assert "SWiRL stage 2" in swirl("train", "--algo=swirl", "--help")


@pytest.mark.parametrize("algorithm", ["swirl", "grpo", "sft", "reinforce"])
def test_every_algorithm_trains_from_a_run(algorithm, swirl, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    online = ["--updates", 2] if algorithm in ("grpo", "reinforce") else []
    acting = ["--samples", 2, "--max-new-tokens", 6] if algorithm != "sft" else []
    command = [
        "train",
        folder,
        "--algo",
        algorithm,
        "--batch-size",
        1,
        "--trainer.tracker",
        "none",
        *online,
        *acting,
    ]
    if algorithm == "grpo":  # a random model solves nothing
        assert "All advantages of the first 2 updates are 0" in swirl(*command, code=2)
        return
    assert "is the trained model" in swirl(*command)
    assert (folder / algorithm / "model.safetensors").exists()
    assert "is complete" in swirl(*command)
    kept = (folder / "kept.jsonl").read_text().splitlines(keepends=True)
    (folder / "kept.jsonl").write_text("".join(kept[::-1]))  # another order is no other training
    assert "is complete" in swirl(*command)
    (folder / "kept.jsonl").write_text("".join(kept[:2]))
    assert "another config (trajectories: '6 (" in swirl(*command, code=2)


def test_demonstrations_need_no_verdicts(swirl, tiny, tmp_path):
    folder = tmp_path / "gold"
    swirl("generate", "swirl/GSM8K-v0", "--model", "oracle", "--tasks", 2, "--samples", 1, "--out", folder)
    train = ["train", folder, "--algo", "sft", "--model", tiny, "--epochs", 1, "--trainer.tracker", "none"]
    assert f"swirl judge {folder} --judge rules" in swirl(*train, code=2)
    assert "is the trained model" in swirl(*train, "--filter", "none")


def test_rounds_want_to_know_the_filter(swirl, trained):
    said = swirl("train", trained, "--algo", "swirl", "--rounds", 2, code=2)
    assert "give it with --filter (none, process, outcome, both)" in said


@pytest.mark.slow
@pytest.mark.parametrize("left", [("kept.jsonl",), ()])
def test_rounds_go_on_where_they_stopped(left, swirl, trained, tmp_path):
    command = [
        "--algo",
        "swirl",
        "--rounds",
        3,
        "--filter",
        "none",
        "--samples",
        2,
        "--max-new-tokens",
        6,
        "--learning-rate",
        1e-2,
    ]
    command += ["--batch-size", 2, "--trainer.tracker", "none"]
    weights = []
    for name in ("whole", "parts"):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        swirl("train", folder, *command)
        place = folder / "training" / "swirl"
        if name == "parts":  # as if killed in the last round
            shutil.rmtree(folder / "swirl")
            for path in (place / "round-2").iterdir():
                if path.name not in left:
                    path.unlink()
            swirl("train", folder, *command)
        for round in (1, 2):
            assert [one.round for one in read(place / f"round-{round}" / "kept.jsonl", Trajectory)] == [round] * 6
        weights.append((folder / "swirl" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_rounds_where_two_processes_share_the_layers(swirl, tmp_path):
    (tmp_path / "texts.py").write_text(
        "import zlib\nfrom swirl_env.types import Verdict\n\n\nclass Any:\n    name, uses_gold = 'any@1', False\n\n    def __call__(self, views):\n"
        "        return [Verdict(zlib.crc32(view.action.text.encode()) % 100 / 100, '', self.name) for view in views]\n"
    )
    folder, weak = tmp_path / "run", Path(__file__).parent / "data" / "weak"
    swirl(
        "generate",
        "swirl/Arithmetic-v0",
        "--model",
        weak,
        "--tasks",
        8,
        "--samples",
        1,
        "--max-new-tokens",
        16,
        "--out",
        folder,
    )
    swirl("judge", folder, "--judge", "rules")
    launch = ["--config_file", Path(__file__).parents[2] / "algos" / "configs" / "fsdp.yaml", "--num_processes", 2]
    launch += [
        "--main_process_port",
        0,
        "--mixed_precision",
        "no",
        "-m",
        "swirl_algos.swirl",
        folder,
        "--rounds",
        2,
        "--filter",
        "none",
    ]
    launch += ["--judge", "texts:Any", "--max-new-tokens", 16, "--trainer.tracker", "none"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "swirl" / "model.safetensors").exists()
    assert {one.round for one in read(folder / "training" / "swirl" / "round-1" / "kept.jsonl", Trajectory)} == {1}


def test_a_server_acts_in_further_rounds_with_the_adapter_of_the_one_before(swirl, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    command = [
        "train",
        folder,
        "--algo",
        "swirl",
        "--rounds",
        3,
        "--trainer.lora-rank",
        2,
        "--filter",
        "none",
        "--samples",
        2,
    ]
    command += ["--max-new-tokens", 6, "--learning-rate", 1e-2, "--batch-size", 2, "--trainer.tracker", "none"]
    given = {}

    def reply(body):
        at = Path(server.adapters[body["model"]])
        given[body["model"]] = at.relative_to(folder), json.loads((at / "adapter_config.json").read_text())
        return f"<answer>{len(given)}</answer>"

    with ChatServer(reply, adapters=True) as server:
        swirl(*command, "--server", f"endpoint:{server.url}")
        assert server.adapters == {}
    places = [Path("training", "swirl", f"round-{round}", "model") for round in (0, 1)]
    assert [place for place, _ in given.values()] == places
    # each is one adapter of the model that the server began with, of all rounds so far
    assert [config["r"] for _, config in given.values()] == [2, 4]
    assert len({config["base_model_name_or_path"] for _, config in given.values()}) == 1
    for round, name in enumerate(given, 1):
        acted = list(read(folder / "training" / "swirl" / f"round-{round}" / "trajectories.jsonl", Trajectory))
        assert {one.policy for one in acted} == {f"endpoint:{name}"} and {one.answer for one in acted} == {str(round)}


def test_tools_of_a_wrapper_are_missed_before_anything_is_trained(swirl, tiny, tmp_path):
    def population(city: str) -> str:
        """How many live there.

        Args:
            city: its name.
        """
        return "7"

    def make():
        return AddTool(gym.make("swirl/GSM8K-v0", max_steps=2), population)

    env = make().unwrapped
    one = next(rollout(make, oracle(env), [(next(iter(env.task_set.tasks)), 0)]))
    stages.rewrite(tmp_path / "judged.jsonl", [one])
    said = swirl("train", tmp_path, "--algo", "swirl", "--filter", "none", "--model", tiny, code=2)
    assert "recorded with the tools calculator, population, and swirl/GSM8K-v0" in said
    assert "has calculator: a wrapper changed them" in said


@pytest.mark.parametrize(
    ("algorithm", "flags", "says"),
    [
        ("swirl", ["--kl-target", 0], "kl_target must be above 0"),
        ("swirl", ["--kl-target", 0.1, "--beta", 0], "kl_target adapts beta, which is 0"),
        ("swirl", ["--trainer.max-grad-norm", 0], "trainer.max_grad_norm must be above 0"),
        ("swirl", ["--kl", "reward", "--beta", 0], "there is no penalty"),
        (
            "swirl",
            ["--rounds", 2, "--server", "endpoint:http://127.0.0.1:1/v1"],
            "give --rounds and --trainer.lora-rank",
        ),
        ("swirl", ["--clip", 0], "clip must be above 0"),
        ("reinforce", ["--discount", 2], "discount must lie in [0, 1]"),
        ("reinforce", ["--samples", 1, "--batch-size", 1], "an action needs another"),
        ("grpo", ["--token-budget", 0], "token_budget must be at least 1"),
        ("grpo", ["--samples", 1], "samples must be at least 2"),
        ("sft", ["--learning-rate", 0], "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_told_at_once(algorithm, flags, says, swirl, trained):
    assert says in swirl("train", trained, "--algo", algorithm, *flags, code=2)


@pytest.mark.slow
def test_a_module_trains_with_a_judge_in_its_own_process(trained, tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    command = [
        sys.executable,
        "-m",
        "swirl_algos.swirl",
        str(folder),
        "--judge",
        f"model:{tiny}",
        "--samples",
        "2",
        "--batch-size",
        "1",
    ]
    settings = os.environ | {"SWIRL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 2
    assert "No score was known in the last 5 updates" in done.stderr  # a random model has no verdicts


def test_an_adapter_becomes_a_plain_model_folder(swirl, trained, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    swirl(
        "train",
        trained,
        "--algo",
        "sft",
        "--name",
        "lora",
        "--trainer.lora-rank",
        2,
        "--trainer.tracker",
        "none",
        "--learning-rate",
        1e-2,
    )
    assert f"Name a model in it: {trained / 'lora'}" in swirl("export", "model", trained, tmp_path / "out", code=2)
    swirl("export", "model", trained / "lora", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    base = peft.PeftConfig.from_pretrained(str(trained / "lora")).base_model_name_or_path
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain, whole = (
            AutoModelForCausalLM.from_pretrained(base),
            AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        )
        start = plain(ids).logits
        want = peft.PeftModel.from_pretrained(plain, str(trained / "lora"))(ids).logits
        torch.testing.assert_close(whole(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(want, start, atol=1e-3)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == whole.config.vocab_size
    swirl("export", "model", tmp_path / "out", tmp_path / "again")  # a plain model
    assert "exists already" in swirl("export", "model", trained / "lora", tmp_path / "out", code=2)


def test_the_readme_goes_step_by_step(swirl, tiny, tmp_path, monkeypatch):
    """Its commands, with a tiny model in place of the real one, of which no trajectory is good."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent.parent / "README.md").read_text()
    block = text.partition("### Step by step")[2].split("```")[1]
    commands = [line.split()[1:] for line in block.splitlines() if line.startswith("swirl ")]
    assert len(commands) == 9
    replaced = {"smollm2-135m": str(tiny), "process": "none", "32": "4", "16": "3"}
    for command in commands:
        swirl(*(replaced.get(word, word) for word in command))
    assert (tmp_path / "runs" / "steps" / "merged" / "model.safetensors").exists()
    assert len((tmp_path / "runs" / "steps" / "rows.jsonl").read_text().splitlines()) == 6


# -- rows

TEXTS = [
    "<think>hm</think>",
    "junk",
    "<think>both</think><calculator>1+1</calculator><calculator>2*(</calculator>",
    "<think>so</think><answer>2</answer>",
]


def test_rows_by_hand():
    one = recorded(texts=TEXTS)
    assert prompt_completion(one)[0] == {
        "prompt": [{"role": "user", "content": one.prompt[0].content}],
        "completion": [{"role": "assistant", "content": "<think>hm</think>"}],
    }
    [row] = messages(one)
    assert row["tools"] == list(one.env.tools)
    error = one.steps[2].results[1].text
    calls = [
        {"type": "function", "function": {"name": "calculator", "arguments": {"expression": text}}}
        for text in ("1+1", "2*(")
    ]
    assert row["messages"] == [
        {"role": "user", "content": one.task.question},
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "junk"},
        {"role": "user", "content": one.steps[1].observation},
        {"role": "assistant", "content": "both", "tool_calls": calls},
        {"role": "tool", "name": "calculator", "content": "2"},
        {"role": "tool", "name": "calculator", "content": error},
        {"role": "assistant", "content": "2", "reasoning_content": "so"},
    ]
    [row] = stepwise(one)
    assert row["labels"] == [step.verdict.good for step in one.steps]
    assert row["completions"][0] == "<think>hm</think>"
    assert row["completions"][1] == "Go on.\njunk"


@pytest.mark.parametrize("env_id", ["swirl/GSM8K-v0", "swirl/HotPotQA-v0"])
@pytest.mark.parametrize("grammar", ["default", "paper", "hermes", "openai"])
def test_rows_hold_what_was_said(env_id, grammar):
    one = recorded(env_id, grammar=grammar)
    rows = prompt_completion(one)
    assert [row["completion"][0]["content"] for row in rows] == [step.action.text for step in one.steps]
    for row, state in zip(rows, one.states(), strict=True):
        assert "\n".join(message["content"] for message in row["prompt"]) == state.text
    [row] = stepwise(one)
    last = "\n".join([one.states()[-1].text, one.steps[-1].action.text])
    assert "\n".join([row["prompt"], *row["completions"]]) == last
    [row] = messages(one)
    calls = [call["function"] for message in row["messages"] for call in message.get("tool_calls", [])]
    assert [call["name"] for call in calls] == [call.name for step in one.steps for call in step.action.calls]
    assert row["messages"][-1]["content"] == one.answer


def test_rows_leave_out_what_is_unknown_or_empty(swirl, tmp_path):
    one = recorded()
    unknown = replace(one.steps[0], verdict=Verdict(None, "?", "x@1"))
    given = [one, replace(one, sample=1, steps=(unknown, *one.steps[1:])), replace(one, sample=2, steps=())]
    stages.rewrite(tmp_path / "judged-x@1.jsonl", given)
    said = swirl("export", "rows", tmp_path, tmp_path / "steps.jsonl", "--format", "stepwise")
    assert "1 rows of" in said and "2 trajectories left out" in said
    said = swirl("export", "rows", tmp_path / "judged-x@1.jsonl", tmp_path / "chat.jsonl", "--format", "messages")
    assert "2 rows of" in said and "1 trajectories left out" in said


def some():
    """Trajectories with different tools, and actions of every kind."""
    gold = [recorded(env_id) for env_id in ("swirl/GSM8K-v0", "swirl/HotPotQA-v0")]
    return [*gold, replace(recorded(texts=TEXTS), sample=1)]


@pytest.mark.parametrize("form", FORMATS)
def test_datasets_reads_the_rows(form, swirl, tmp_path):
    datasets = pytest.importorskip("datasets")
    stages.rewrite(tmp_path / "kept.jsonl", some())
    stages.rewrite(tmp_path / "judged-x@1.jsonl", some())
    want = [row for one in some() for row in FORMATS[form](one)]
    if form == "verl":
        want = numbered(want[:2])
    if form == "verifiers":
        swirl("export", "rows", tmp_path, tmp_path / "traces.jsonl", "--format", form)
        assert [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()] == want
        return
    for kind, loader in (("jsonl", "json"), ("parquet", "parquet")):
        out = tmp_path / f"rows.{kind}"
        swirl("export", "rows", tmp_path, out, "--format", form)
        found = datasets.load_dataset(loader, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert list(found) == want


def numbered(rows):
    return [row | {"extra_info": row["extra_info"] | {"index": i}} for i, row in enumerate(rows)]


def test_rows_for_verl(swirl, tmp_path):
    datasets = pytest.importorskip("datasets")
    one = recorded("swirl/HotPotQA-v0")
    [row] = verl(one)
    assert row == {
        "data_source": "searchR1_hotpotqa",
        "prompt": [{"role": "user", "content": one.prompt[0].content}],
        "ability": "qa",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(one.task.answers)}},
        "extra_info": {
            "split": "train", "index": 0, "task_id": one.task.id, "env": "swirl/HotPotQA-v0", "question": one.task.question,
        },
    }  # fmt: skip
    said = swirl(
        "export",
        "tasks",
        "swirl/HotPotQA-v0",
        tmp_path / "test.parquet",
        "--kwargs",
        '{"split": "test", "max_steps": 3}',
    )
    assert "100 questions of swirl/HotPotQA-v0" in said
    found = list(datasets.Dataset.from_parquet(str(tmp_path / "test.parquet"), cache_dir=str(tmp_path / "cache")))
    assert set(found[0]) == set(row) and set(found[0]["extra_info"]) == set(row["extra_info"])
    assert [row["extra_info"]["index"] for row in found] == list(range(100))
    assert found[0]["extra_info"]["split"] == "test" and "at most 3." in found[0]["prompt"][0]["content"]
    assert verl(recorded())[0]["ability"] == "math"


def test_traces_by_hand():
    one = recorded(texts=TEXTS)
    [row] = verifiers(one)
    [trace] = row["traces"]
    said = [
        (node["message"]["role"], node["message"]["content"], node.get("sampled", False)) for node in trace["nodes"]
    ]
    want = [("user", one.prompt[0].content, False)]
    for step in one.steps:
        want.append(("assistant", step.action.text, True))
        if step.observation:
            want.append(("user", step.observation, False))
    assert said == want
    assert [node["parent"] for node in trace["nodes"]] == [None, *range(len(want) - 1)]
    scores = [step.verdict.score for step in one.steps]
    assert trace["info"]["turn_rewards"] == scores
    assert trace["rewards"]["process"]["score"] == sum(scores) / len(scores)
    assert trace["rewards"]["outcome"] == {"score": one.outcome, "weight": 1.0}
    assert trace["stop_condition"] == "answered" and trace["ok"] and row["ok"]


@pytest.mark.slow  # runs where trl is: make test-slow
@pytest.mark.parametrize("form", ["prompt-completion", "messages", "stepwise"])
def test_trl_takes_the_rows(form):
    utils = pytest.importorskip("trl.data_utils")
    from swirl_agents.testing import tiny_tokenizer

    for row in [row for one in some() for row in FORMATS[form](one)]:
        assert utils.is_conversational(row) == (form != "stepwise")
        if form == "stepwise":
            assert set(row) == {"prompt", "completions", "labels"}
            assert isinstance(row["prompt"], str)
            assert len(row["completions"]) == len(row["labels"])
        else:
            text = utils.apply_chat_template(row, tiny_tokenizer(), tools=row.get("tools"))
            assert set(text) == ({"text"} if form == "messages" else {"prompt", "completion"})
