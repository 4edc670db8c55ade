"""The trainer: going on after a stop, checkpoints, processes, precision, adapters, and the options of the policy gradient."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from swirl_agents.models import load_model
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_algos import checkpoints, grpo, reinforce, sft, swirl
from swirl_algos.configs import GrpoConfig, ReinforceConfig, SftConfig, SwirlConfig, TrainerConfig
from swirl_algos.diagnostics import alarm, flat, of_actions
from swirl_algos.policy_gradient import PolicyGradient
from swirl_algos.trainer import FLAT_UPDATES, Trainer, TrainingError, _factor

import swirl_env  # noqa: F401
from swirl_env.errors import ConfigError
from swirl_env.types import Action, Verdict

TOKENIZER = tiny_tokenizer()


def make_env():
    return gym.make("swirl/GSM8K-v0", max_steps=2)


ENV = make_env().unwrapped
GOLD = list(rollout(make_env, oracle(ENV), [(i, 0) for i in list(ENV.task_set.tasks)[:6]]))


class FreeText:
    """A grammar in which any text is a thought."""

    stop = ()

    def parse(self, text):
        return Action(text, thought=text)


class EvenLetters:
    name, uses_gold = "even@1", False

    def __call__(self, views):
        return [Verdict(even(v.action.text), "", self.name) for v in views]


def even(text):
    return float(np.mean([ord(c) % 2 == 0 for c in text] or [0]))


CONFIG = SwirlConfig(samples=3, max_new_tokens=6, batch_size=1, beta=0.1, learning_rate=1e-3, epochs=2)


SAVING = TrainerConfig(save_every=2, tracker="none")


def improve(model, folder=None, config=CONFIG, settings=SAVING, log=lambda m: None, judge=None):
    trainer = Trainer(model, TOKENIZER, settings, folder=folder, seed=3, log=log)
    swirl.train(trainer, GOLD[:4], judge or EvenLetters(), FreeText(), config)
    return trainer


def lines(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


class Stopped(Exception):
    pass


def stop_at(update):
    def log(metrics):
        if metrics["update"] == update:
            raise Stopped

    return log


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_going_on_is_as_never_stopped(tmp_path, at, lora):
    if lora:
        pytest.importorskip("peft")
    settings = TrainerConfig(save_every=2, lora_rank=lora, tracker="none")
    config = replace(CONFIG, kl_target=0.001)
    whole = improve(tiny_model(TOKENIZER), tmp_path / "whole", config, settings)
    with pytest.raises(Stopped):
        improve(tiny_model(TOKENIZER), tmp_path / "parts", config, settings, stop_at(at))
    parts = improve(tiny_model(TOKENIZER), tmp_path / "parts", config, settings)
    for name in ("metrics.jsonl", "candidates.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "parts" / name)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(lines(tmp_path / "whole" / "metrics.jsonl")) == 8


def test_sft_goes_on_too_with_its_dropout(tmp_path):
    def imitate(folder, log=lambda m: None):
        model = tiny_model(TOKENIZER)
        torch.manual_seed(0)
        model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
        trainer = Trainer(model, TOKENIZER, TrainerConfig(save_every=1, tracker="none"), folder=folder, log=log)
        sft.train(trainer, GOLD, SftConfig(batch_size=2, epochs=2))
        return lines(folder / "metrics.jsonl")

    whole = imitate(tmp_path / "whole")
    with pytest.raises(Stopped):
        imitate(tmp_path / "parts", stop_at(2))
    assert imitate(tmp_path / "parts") == whole


def test_a_checkpoint_is_a_model_folder(tmp_path):
    with pytest.raises(Stopped):
        improve(tiny_model(TOKENIZER), tmp_path, log=stop_at(5))
    [found] = (tmp_path / "checkpoints").glob("update-*")
    assert found.name == "update-000004"
    assert {path.suffix for path in found.iterdir()} <= {".json", ".safetensors", ".jinja"}
    model, tokenizer = load_model(str(found))
    assert len(tokenizer) == len(TOKENIZER)
    assert not torch.equal(model.lm_head.weight, tiny_model(TOKENIZER).lm_head.weight)


def test_a_checkpoint_of_another_model_or_run_is_refused(tmp_path):
    with pytest.raises(Stopped):
        improve(tiny_model(TOKENIZER), tmp_path, log=stop_at(5))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match="of another run: its model is"):
        improve(tiny_model(TOKENIZER, hidden=16), tmp_path)
    with pytest.raises(TrainingError, match=r"its learning_rate is 0.001, here it is 0.5"):
        improve(tiny_model(TOKENIZER), tmp_path, replace(CONFIG, learning_rate=0.5))
    (tmp_path / "checkpoints" / "update-000004" / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(TrainingError, match="cannot be read"):
        improve(tiny_model(TOKENIZER), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(TrainingError, match="No space left on device.*The last good checkpoint is intact"):
        improve(tiny_model(TOKENIZER), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["update-000002"]
    monkeypatch.undo()
    improve(tiny_model(TOKENIZER), tmp_path)
    whole = tmp_path / "whole"
    improve(tiny_model(TOKENIZER), whole)
    assert lines(tmp_path / "metrics.jsonl") == lines(whole / "metrics.jsonl")


def test_the_model_is_saved_whole_and_its_checkpoints_go(tmp_path):
    trainer = improve(tiny_model(TOKENIZER), tmp_path / "place")
    trainer.save_model(tmp_path / "model")
    assert not (tmp_path / "place" / "checkpoints").exists()
    model, _ = load_model(str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_an_adapter_loads_in_plain_transformers_and_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model(TOKENIZER).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    model, _ = load_model(str(base), training=True)
    trainer = improve(model, settings=TrainerConfig(lora_rank=4))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained < 0.5 * sum(p.numel() for p in trainer.model.parameters())
    trainer.save_model(tmp_path / "adapter")
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    with torch.no_grad():
        want = trainer.model(ids).logits
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        torch.testing.assert_close(plain(ids).logits, want)
        merged, _ = load_model(str(tmp_path / "adapter"))
        torch.testing.assert_close(merged(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(want, AutoModelForCausalLM.from_pretrained(base)(ids).logits)


def test_nothing_but_equal_scores_is_told():
    class Same:
        name, uses_gold = "same@1", False

        def __call__(self, views):
            return [Verdict(1.0, "", self.name) for _ in views]

    with pytest.raises(TrainingError, match="All advantages of the first 8 updates are 0"):
        improve(tiny_model(TOKENIZER), judge=Same())
    seen = []
    with pytest.raises(TrainingError, match=f"first {FLAT_UPDATES} updates"):
        improve(tiny_model(TOKENIZER), config=replace(CONFIG, epochs=50), judge=Same(), log=seen.append)
    assert len(seen) == FLAT_UPDATES - 1


def test_schedules():
    assert [_factor("linear", i, 10, 2) for i in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 0.125]
    assert [_factor("constant", i, 10, 2) for i in (0, 1, 9)] == [0.5, 1.0, 1.0]
    assert _factor("cosine", 6, 10, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"kl": "k2"}, {"kl": "k3"}, {"kl": "reward"}, {"entropy": 0.1}, {"length": "action"}, {"length": "token"}, {"normalise": True},
        {"baseline": "group"}, {"passes": 3, "clip": 0.01}, {"beta": 0.0},
    ],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
def test_options_train_alike_on_packed_and_plain_rows(options):
    found = []
    for plain in (False, True):
        seen = []
        config = replace(CONFIG, reference=plain, batch_size=2, **options)
        trainer = improve(tiny_model(TOKENIZER), config=config, log=seen.append)
        found.append((seen, trainer))
    for packed, plain in zip(found[0][0], found[1][0], strict=True):
        for key in ("loss", "kl", "entropy", "ratio", "clipped", "gradient_norm"):
            assert (key in packed) is (key in plain)
            assert packed.get(key, 0) == pytest.approx(plain.get(key, 0), rel=1e-3, abs=1e-5)
    first, last = found[0][0][0], found[0][0][-1]
    if "passes" in options:
        assert first["ratio"] > 0 and 0 < last["clipped"] <= 1
    if options.get("beta") == 0.0:
        assert "reference" not in vars(found[0][1])  # no copy is kept


def test_a_penalty_in_the_reward_keeps_the_policy_near():
    far = {}
    for kl, beta in (("exact", 0.0), ("reward", 5.0)):
        model, start = tiny_model(TOKENIZER), tiny_model(TOKENIZER)
        config = replace(CONFIG, kl=kl, beta=beta, epochs=8, learning_rate=3e-3)
        improve(model, config=config)
        far[kl] = sum(
            float((a - b).detach().norm()) for a, b in zip(model.parameters(), start.parameters(), strict=True)
        )
    assert far["reward"] < far["exact"]


def test_gradient_checkpointing_changes_nothing_but_memory():
    final = []
    for checkpointing in (False, True):
        seen = []
        settings = TrainerConfig(gradient_checkpointing=checkpointing)
        improve(tiny_model(TOKENIZER), settings=settings, log=seen.append)
        final.append([one["loss"] for one in seen])
    assert final[0] == pytest.approx(final[1], abs=1e-6)


def test_settings_that_cannot_work_are_told():
    with pytest.raises(ConfigError, match="tracker is tensorboard, wandb, trackio"):
        Trainer(tiny_model(TOKENIZER), TOKENIZER, TrainerConfig(tracker="tensorbord"), folder="x")


# -- online


class EvenReward(gym.Wrapper):
    """Pays for even letters, step by step and as the outcome."""

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info["outcome"] = even(action)
        return observation, even(action), terminated, truncated, info


def even_env():
    return EvenReward(make_env())


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [(reinforce, ReinforceConfig()), (reinforce, ReinforceConfig(discount=0.5)), (grpo, GrpoConfig())],
    ids=["reinforce", "reinforce with discount", "grpo"],
)
def test_online_algorithms_learn_what_is_paid_for(algorithm, config):
    seen = []
    config = replace(
        config, learning_rate=2e-2, updates=12, batch_size=2, samples=6, max_new_tokens=4, beta=0.001, temperature=1.0
    )
    trainer = Trainer(tiny_model(TOKENIZER, seed=1), TOKENIZER, log=seen.append)
    algorithm.train(trainer, even_env, list(ENV.task_set.tasks)[:4], config)
    assert seen[0]["outcome"] < 0.65
    assert np.mean([one["outcome"] for one in seen[-3:]]) > 0.85
    assert seen[-1]["tokens_so_far"] == sum(one["sampled_tokens"] for one in seen)


def test_online_training_goes_on_after_a_stop_and_keeps_its_budget(tmp_path):
    config = ReinforceConfig(learning_rate=1e-3, updates=6, batch_size=1, samples=3, max_new_tokens=4, token_budget=100)

    def learn(folder, log=lambda m: None):
        trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER, TrainerConfig(save_every=1), folder=folder, log=log)
        reinforce.train(trainer, even_env, list(ENV.task_set.tasks)[:3], config)

    learn(tmp_path / "whole")
    with pytest.raises(Stopped):
        learn(tmp_path / "parts", stop_at(2))
    learn(tmp_path / "parts")
    whole = lines(tmp_path / "whole" / "metrics.jsonl")
    assert lines(tmp_path / "parts" / "metrics.jsonl") == whole
    assert whole[-2]["tokens_so_far"] < 100 <= whole[-1]["tokens_so_far"]
    assert len(whole) < 6


def test_reinforce_credits_each_action_with_what_comes_after_it():
    seen = {}

    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER)
    real = PolicyGradient.update

    def update(self, trees, advantages_M, **kwargs):
        seen["advantages"] = advantages_M
        return real(self, trees, advantages_M, **kwargs)

    acts = []
    trainer.record = acts.extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyGradient, "update", update)
        config = ReinforceConfig(updates=1, batch_size=1, samples=3, max_new_tokens=4, discount=0.5, beta=0.0)
        reinforce.train(trainer, even_env, list(ENV.task_set.tasks)[:1], config)
    rewards = np.array([act.reward for act in acts]).reshape(3, 2)
    returns = np.stack([rewards[:, 0] + 0.5 * rewards[:, 1], rewards[:, 1]], 1)
    by_hand = returns - (returns.sum(0) - returns) / 2
    np.testing.assert_allclose(seen["advantages"], by_hand.ravel())


def test_diagnostics_by_hand():
    from swirl_algos.episodes import Act

    acts = [
        Act("t", 0, 0, 0, "a", 1.0, 1.0, "stop", 3, False, False), Act("t", 0, 1, 0, "b", 0.0, 0.0, "length", 2, True, False),
        Act("t", 1, 0, 0, "c", 0.5, 0.5, "stop", 3, False, True), Act("t", 1, 2, 0, "", None, None, "eos", 0, False, False),
    ]  # fmt: skip
    assert of_actions(acts) == {
        "score": 0.5, "score_by_step": [0.75, 0.0], "unknown": 1, "malformed": 0.25, "repeated": 0.25, "cut": 1, "empty": 1,
        "sampled_tokens": 8,
    }  # fmt: skip
    assert flat([[1.0, 1.0], [1.0, None], [1.0, 0.0], [None, None]]) == 3
    assert alarm([0.1, 0.9], [0.5, 0.2]) is not None
    assert alarm([0.1, 0.9], [0.5, 0.6]) is None
    assert alarm([0.9, 0.1], [0.5, 0.2]) is None
    assert alarm([], []) is None


# -- several processes

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_trainer import *
found = {{}}
for algorithm in ("swirl", "sft", "reinforce"):
    seen = []
    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER, TrainerConfig(tracker="none"), seed=3, log=seen.append)
    if algorithm == "swirl":
        swirl.train(trainer, GOLD[:6], EvenLetters(), FreeText(), replace(CONFIG, batch_size=3))
    elif algorithm == "sft":
        sft.train(trainer, GOLD, SftConfig(batch_size=3, epochs=1))
    else:
        config = ReinforceConfig(updates=2, batch_size=3, samples=2, max_new_tokens=4, learning_rate=1e-3, discount=0.5)
        reinforce.train(trainer, even_env, list(ENV.task_set.tasks)[:4], config)
    found[algorithm] = [seen, sum(float(p.double().abs().sum()) for p in trainer.model.parameters())]
if trainer.main:
    print(json.dumps(found))
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    found = []
    for processes in (1, 2):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        launch += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        done = subprocess.run([*launch, script], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    for algorithm, (one, weights) in found[0].items():
        two, same = found[1][algorithm]
        assert weights == pytest.approx(same, rel=1e-6)
        for a, b in zip(one, two, strict=True):
            for key in ("loss", "gradient_norm"):
                assert a[key] == pytest.approx(b[key], abs=1e-5), algorithm
            assert a["tokens"] == b["tokens"]


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path):
    def fail(part):
        (part / "a").write_text("x")
        raise ValueError

    with pytest.raises(ValueError):
        checkpoints.write_folder(tmp_path / "there", fail)
    assert list(tmp_path.iterdir()) == []
