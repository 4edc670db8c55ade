"""The adapter against the installed TRL: a real GRPOTrainer, a tiny random Llama, a tokenizer made on the spot."""

import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from swirl_env.adapters import trl as adapter
from swirl_env.errors import ConfigError

trl = pytest.importorskip("trl", reason="needs the extra `trl`")
torch = pytest.importorskip("torch", reason="needs the extra `trl`")
from swirl_agents.testing import tiny_model, tiny_tokenizer  # noqa: E402
from swirl_algos.integrations.trl import StepGRPOTrainer, spread, step_advantages  # noqa: E402

TASK = "gsm8k-train-170"
GOOD = ['<tool_call>\n{"name": "calculator", "arguments": {"expression": "10+3"}}\n</tool_call>', "38"]
"""The gold path of the task in two steps."""
BAD = [
    '<tool_call>\n{"name": "calculator", "arguments": {"expression": "999*77"}}\n</tool_call>',
    '<tool_call>\n{"name": "calculater", "arguments": {"expression": "10+3"}}\n</tool_call>',
    "I do not know",
]
"""A sum of made-up numbers, a tool that is none, no answer."""


@pytest.fixture
def tokenizer():
    """One token a byte, with the template of Qwen3 that TRL knows."""
    return make_tokenizer()


def make_tokenizer():
    made = tiny_tokenizer("<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>")
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return made


def say(model, tokenizer, scripts):
    """The model writes these messages, rollout by rollout, turn by turn; what it says and how it learns stay its own."""
    turns = []

    def generate(input_ids, attention_mask, **_):
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        if not any("tool_response" in tokenizer.decode(prompt) for prompt in prompts):
            turns[:] = [iter(script) for script in scripts]
            living = list(range(len(scripts)))
        else:
            living = [i for i in say.living if i in say.called]
        texts = [next(turns[i]) for i in living]
        say.living, say.called = living, {i for i, text in zip(living, texts, strict=True) if "<tool_call>" in text}
        rows = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
        width = max(map(len, rows))
        said = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, said], dim=1)

    model.generate = generate


def train(kind, tokenizer, folder, scripts=(GOOD, BAD), spec=None, **settings):
    """A trainer of this kind after its training, with the batches that its loss was given."""
    spec = spec or adapter.spec("swirl/GSM8K-v0")
    model = tiny_model(tokenizer)
    if scripts:
        say(model, tokenizer, scripts)
    dataset = spec.train_dataset.filter(lambda row: row["task_id"] == TASK)
    given = []

    class Seen(kind):
        def _compute_loss(self, model, inputs):
            given.append({key: value.clone() for key, value in inputs.items() if hasattr(value, "clone")})
            return super()._compute_loss(model, inputs)

    trainer = Seen(
        model=model, processing_class=tokenizer, train_dataset=dataset,
        environment_factory=spec.environment_factory, reward_funcs=spec.reward_funcs,
        args=trl.GRPOConfig(
            str(folder), **({
                "max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 400, "report_to": "none",
                "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "shuffle_dataset": False,
                "gradient_checkpointing": False, "max_tool_calling_iterations": spec.max_tool_calling_iterations,
                "chat_template_kwargs": {"enable_thinking": False},
            } | settings),
        ),
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items()) == bool(scripts)
    return trainer, given


def test_the_model_is_offered_the_tools_and_nothing_else():
    from transformers.utils import get_json_schema

    spec = adapter.spec("swirl/Tasks-v0")
    env = pickle.loads(pickle.dumps(spec.environment_factory))()
    public = [name for name, _ in inspect.getmembers(type(env), inspect.isfunction) if not name.startswith("_")]
    assert public == ["calculator", "reset", "search"]
    for name, tool in adapter.tool_env(env._env).tools.items():
        read = get_json_schema(getattr(env, name))["function"]
        assert read["description"] == tool.description
        wanted = {key: tool.parameters[key] for key in ("type", "properties", "required")}
        assert {key: read["parameters"][key] for key in wanted} == wanted
    assert type(env) is type(spec.environment_factory())
    assert env.calculator(wrong=1).startswith("error: calculator takes expression")


def test_rewards_are_those_of_the_environment(tokenizer, tmp_path):
    trainer, _ = train(trl.GRPOTrainer, tokenizer, tmp_path)
    log = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert log["rewards/outcome/mean"] == 0.5
    good, bad = (env._played for env in trainer.environments)
    assert (good.outcome, good.stop, len(good.steps)) == (1.0, "answered", 2)
    assert (bad.outcome, bad.stop, len(bad.steps)) == (0.0, "answered", 3)
    assert good.process > bad.process
    assert log["rewards/process/mean"] == pytest.approx((good.process + bad.process) / 2)
    assert bad.steps[1].action.malformed and "Did you mean 'calculator'" in bad.steps[1].action.malformed
    # the same actions, taken in the environment itself
    import gymnasium as gym

    env = gym.make("swirl/GSM8K-v0", grammar="openai")
    env.reset(options={"task_id": TASK})
    step = env.unwrapped.grammar.parse(good.steps[0].action.text)
    assert env.step(step.text)[1] == good.rewards[0]
    assert env.unwrapped.steps[0].results[0].text == good.steps[0].results[0].text == "13"


def test_advantages_of_each_step_reach_its_tokens(tokenizer, tmp_path):
    trainer, given = train(StepGRPOTrainer, tokenizer, tmp_path, scale_rewards="none", loss_type="dr_grpo")
    batch = given[0]
    (good, bad), mask = (env._played.rewards for env in trainer.environments), batch["tool_mask"]
    assert batch["advantages"].shape == batch["completion_ids"].shape
    wanted = [[good[0] - bad[0], good[1] - bad[1]], [bad[0] - good[0], bad[1] - good[1], 0.0]]
    rows = {len(BAD if "999" in tokenizer.decode(ids) else GOOD): i for i, ids in enumerate(batch["completion_ids"])}
    for steps in wanted:  # TRL shuffles the rows of a batch
        i = rows[len(steps)]
        found = segments(batch["advantages"][i], mask[i] * batch["completion_mask"][i])
        assert found == [pytest.approx([step] * len(run)) for step, run in zip(steps, found, strict=True)]
    assert good[0] != bad[0] and good[0] - bad[0] != good[1] - bad[1]
    assert not batch["advantages"][mask == 0].any()
    log = next(entry for entry in trainer.state.log_history if "steps/reward" in entry)
    assert log["steps/reward"] == pytest.approx(sum([*good, *bad]) / 5) and log["steps/unknown"] == 0


def segments(values, acted):
    """The values on each run of ones."""
    found, last = [], 0
    for value, one in zip(values.tolist(), acted.tolist(), strict=True):
        if one and not last:
            found.append([])
        if one:
            found[-1].append(value)
        last = one
    return found


def test_a_model_that_says_anything_trains_too(tokenizer, tmp_path):
    trainer, given = train(StepGRPOTrainer, tokenizer, tmp_path, scripts=None, max_completion_length=24)
    assert len(given) == 2 and trainer.environments[0]._played.outcome == 0.0


def test_beyond_the_last_step_nothing_counts(tokenizer, tmp_path):
    wordy = [GOOD[0]] * 3 + ["38"]
    spec = adapter.spec("swirl/GSM8K-v0", max_steps=2)
    trainer, given = train(
        StepGRPOTrainer, tokenizer, tmp_path, (BAD, wordy), spec, max_steps=1, max_tool_calling_iterations=8
    )
    played = trainer.environments[1]._played
    assert (played.stop, played.outcome, len(played.rewards)) == ("step_limit", 0.0, 2)
    row = next(i for i, ids in enumerate(given[0]["completion_ids"]) if tokenizer.decode(ids).count("10+3") == 3)
    found = segments(given[0]["advantages"][row], given[0]["tool_mask"][row] * given[0]["completion_mask"][row])
    assert len(found) == 4 and found[0][0] > 0 and not any(found[2] + found[3])


@pytest.mark.slow
def test_a_group_over_two_processes_is_one_group(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    (good, good_advantages), (bad, bad_advantages) = found
    assert good_advantages == [good[0] - bad[0], good[1] - bad[1]]
    assert bad_advantages == [bad[0] - good[0], bad[1] - good[1], 0.0]


def one_process(folder):
    """The good rollout in process 0, the bad one in process 1."""
    rank = int(os.environ["RANK"])
    settings = {"per_device_train_batch_size": 1, "max_steps": 1, "scale_rewards": "none"}
    trainer, [batch] = train(StepGRPOTrainer, make_tokenizer(), folder / str(rank), ([GOOD], [BAD])[rank], **settings)
    steps = segments(batch["advantages"][0], batch["tool_mask"][0] * batch["completion_mask"][0])
    rewards = trainer.environments[0]._played.rewards
    (folder / f"{rank}.json").write_text(json.dumps([rewards, [step[0] for step in steps]]))


def test_step_advantages_by_hand():
    found = step_advantages([[1.0, 0.0], [0.0, None, 1.0], [0.5], [1.0]], 2)
    assert [list(one) for one in found] == [[1.0, 0.0], [-1.0, 0.0, 0.0], [-0.5], [0.5]]
    acted = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
    assert spread([[2.0, 3.0], [5.0]], acted).tolist() == [[2, 2, 0, 3, 0], [5, 0, 0, 0, 0]]


def test_a_judge_that_cannot_tell_is_no_reward_of_zero():
    env = adapter.spec("swirl/GSM8K-v0").environment_factory()
    env.reset(task_id=TASK)
    adapter.tool_env(env._env).set_judge(Silent())
    messages = [{"role": "assistant", "content": "38"}]
    assert adapter.process([messages], [env]) == [None]
    assert adapter.outcome([messages], [env]) == [1.0]
    assert adapter.step_rewards([env]) == [[None]]


class Silent:
    name, uses_gold = "silent@1", False

    def __call__(self, views):
        from swirl_env.types import Verdict

        return [Verdict(None, "no idea", self.name) for _ in views]


def test_what_cannot_work_is_told(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="grammar= cannot be chosen here"):
        adapter.spec("swirl/GSM8K-v0", grammar="react")
    with pytest.raises(ConfigError, match="must be JSON"):
        adapter.spec("swirl/GSM8K-v0", judge=Silent())
    with pytest.raises(ConfigError, match="A row needs a task_id"):
        adapter.spec("swirl/GSM8K-v0").environment_factory().reset(prompt=[])
    with pytest.raises(ConfigError, match="No baseline"):
        StepGRPOTrainer(baseline="mean")
    with pytest.raises(ConfigError, match="scale_rewards is 'group' or 'none'"):
        train(StepGRPOTrainer, tokenizer, tmp_path, scale_rewards="batch")
    assert json.loads(adapter.spec("swirl/GSM8K-v0", max_steps=3).kwargs) == {"max_steps": 3}


def test_the_page_runs(page, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(tokenizer).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    [(_, code)] = page("trl")
    small = "max_completion_length=32, max_steps=1, num_generations=2, per_device_train_batch_size=2, use_cpu=True, bf16=False"
    for old, new in (("Qwen/Qwen3-0.6B", "tiny"), ("max_completion_length=2048", f"{small}, report_to='none'")):
        assert old in code
        code = code.replace(old, new)
    world = {}
    exec(code, world)
    assert world["trainer"].state.global_step == 1


def test_examples_of_the_docstrings():
    import doctest

    assert doctest.testmod(adapter).failed == 0 < doctest.testmod(adapter).attempted


if __name__ == "__main__":
    one_process(Path(sys.argv[1]))
