"""The trainer: going on after a stop, checkpoints, processes, precision, adapters, and the options of the policy gradient."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
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


@pytest.mark.parametrize(("at", "lora"), [(0, 0), (3, 0), (6, 0), (3, 4)])
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


def test_a_budget_that_ends_before_anything_was_learned_is_told_too():
    config = GrpoConfig(updates=50, batch_size=1, samples=2, max_new_tokens=4, token_budget=20)
    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER)
    with pytest.raises(TrainingError, match="All advantages of the first . updates are 0"):
        grpo.train(trainer, make_env, list(ENV.task_set.tasks)[:2], config)
    assert trainer.update < FLAT_UPDATES - 1


def test_level_scores_are_nothing_to_learn_from_though_a_penalty_stirs_them():
    class Same:
        name, uses_gold = "same@1", False

        def __call__(self, views):
            return [Verdict(0.1, "", self.name) for _ in views]

    config = replace(CONFIG, samples=7, kl="reward", normalise=True)
    with pytest.raises(TrainingError, match="All advantages of the first 8 updates are 0"):
        improve(tiny_model(TOKENIZER), config=config, judge=Same())


def test_going_on_with_other_trajectories_or_another_clip_of_the_gradient_is_refused(tmp_path):
    with pytest.raises(Stopped):
        improve(tiny_model(TOKENIZER), tmp_path, log=stop_at(5))
    with pytest.raises(TrainingError, match="its max_grad_norm is 1.0, here it is 0.5"):
        improve(tiny_model(TOKENIZER), tmp_path, settings=replace(SAVING, max_grad_norm=0.5))
    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER, SAVING, folder=tmp_path, seed=3)
    with pytest.raises(TrainingError, match="its model is"):
        improve(tiny_model(TOKENIZER, seed=5), tmp_path)
    with pytest.raises(TrainingError, match="its data is"):
        swirl.train(trainer, GOLD[1:5], EvenLetters(), FreeText(), CONFIG)


def test_tensorboard_shows_each_update_once_after_a_restart(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = TrainerConfig(save_every=2, tracker="tensorboard")
    with pytest.raises(Stopped):
        improve(tiny_model(TOKENIZER), tmp_path, settings=settings, log=stop_at(5))
    improve(tiny_model(TOKENIZER), tmp_path, settings=settings)
    found = EventAccumulator(str(tmp_path / "swirl")).Reload()
    assert [one.step for one in found.Scalars("loss")] == list(range(8))


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
        config = replace(CONFIG, reference=plain, batch_size=2, epochs=1, **options)
        trainer = improve(tiny_model(TOKENIZER), config=config, log=seen.append)
        found.append((seen, trainer))
    assert len(found[0][0]) == len(found[1][0])
    # with several passes, tokens at the edge of the clip fall on either side by rounding after a while
    alike = 2 if "passes" in options else None
    for packed, plain in zip(found[0][0][:alike], found[1][0][:alike], strict=True):
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
        config = replace(CONFIG, kl=kl, beta=beta, epochs=4, learning_rate=3e-3)
        improve(model, config=config)
        far[kl] = sum(
            float((a - b).detach().norm()) for a, b in zip(model.parameters(), start.parameters(), strict=True)
        )
    assert far["reward"] < far["exact"]


@pytest.mark.parametrize("imitate", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(imitate, monkeypatch):
    from swirl_algos import trainer as module

    final, calls, real = [], [], module.checkpoint

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "checkpoint", counted)
    for checkpointing in (False, True):
        assert not calls
        seen = []
        settings = TrainerConfig(gradient_checkpointing=checkpointing)
        if imitate:
            trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER, settings, seed=3, log=seen.append)
            sft.train(trainer, GOLD, SftConfig(epochs=1))
        else:
            trainer = improve(tiny_model(TOKENIZER), settings=settings, log=seen.append)
        final.append([one["loss"] for one in seen])
    assert final[0] == pytest.approx(final[1], abs=1e-6)
    assert len(calls) >= len(final[1]) * trainer.model.config.num_hidden_layers
    assert not any(module.training or "forward" in vars(module) for module in trainer.model.modules())


def test_gradient_checkpointing_turns_no_dropout_on():
    from transformers import OPTConfig, OPTForCausalLM

    def model():
        torch.manual_seed(0)
        shape = {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 32,
        }
        return OPTForCausalLM(
            OPTConfig(vocab_size=len(TOKENIZER), max_position_embeddings=1024, dropout=0.5, **shape)
        ).eval()

    seen = []
    for checkpointing in (False, True):
        improve(model(), settings=TrainerConfig(gradient_checkpointing=checkpointing), log=seen.append)
    half = len(seen) // 2
    assert seen[half]["kl"] == pytest.approx(0, abs=1e-6)
    assert [one["loss"] for one in seen[:half]] == pytest.approx([one["loss"] for one in seen[half:]], abs=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_an_adapter_on_top_of_an_adapter_is_saved_with_what_it_stands_on(plain, tmp_path):
    """As one adapter of both; merged where the first is of another kind."""
    peft = pytest.importorskip("peft")
    tiny_model(TOKENIZER).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    settings, at = TrainerConfig(lora_rank=4), tmp_path / "base"
    for name in ("first", "second", "third"):
        model, _ = load_model(str(at), training=True)
        trainer = improve(model, settings=settings)
        at = tmp_path / name
        trainer.save_model(at)
        if not plain and name == "first":
            described = json.loads((at / "adapter_config.json").read_text())
            (at / "adapter_config.json").write_text(json.dumps(described | {"use_rslora": True}))
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    with torch.no_grad():
        if plain:
            described = peft.PeftConfig.from_pretrained(at)
            assert (described.r, described.base_model_name_or_path) == (12, str(tmp_path / "base"))
            whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), at)(
                ids
            ).logits
        else:
            assert (tmp_path / "second" / "model.safetensors").exists()  # and the third is an adapter on it
            whole = load_model(str(at))[0](ids).logits
        torch.testing.assert_close(whole, trainer.model(ids).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(load_model(str(at))[0](ids).logits, whole, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(load_model(str(tmp_path / "first"))[0](ids).logits, whole, atol=1e-3)


def test_only_plain_adapters_become_one():
    peft = pytest.importorskip("peft")
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    assert checkpoints.joins(
        plain, plain | {"r": 8, "peft_type": "LORA", "lora_dropout": 0.1, "init_lora_weights": "gaussian"}
    )
    for other in ({"init_lora_weights": "pissa"}, {"peft_type": "ADALORA"}, {"lora_bias": True}, {"use_dora": True}, {"bias": "all"},
                  {"target_modules": ["q_proj", "v_proj"]}, {"layer_replication": [[0, 1]]}, {"exclude_modules": ["v_proj"]},
                  {"alpha_pattern": {"q_proj": 1}}, {"modules_to_save": ["lm_head"]}):  # fmt: skip
        assert not checkpoints.joins(plain | other, plain), other


def test_settings_that_cannot_work_are_told():
    with pytest.raises(ConfigError, match="tracker is tensorboard, wandb, trackio"):
        Trainer(tiny_model(TOKENIZER), TOKENIZER, TrainerConfig(tracker="tensorbord"), folder="x")
    model = tiny_model(TOKENIZER)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="layers of LlamaForCausalLM cannot be computed again"):
        Trainer(model, TOKENIZER, TrainerConfig(gradient_checkpointing=True))


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


@pytest.mark.slow  # test_learn shows in short that they learn
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


def test_a_question_that_comes_up_twice_in_an_update_is_acted_on_anew():
    acts = []
    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER)
    trainer.record = acts.extend
    config = ReinforceConfig(updates=1, batch_size=2, samples=2, max_new_tokens=6, beta=0.0)
    reinforce.train(trainer, even_env, list(ENV.task_set.tasks)[:1], config)
    first = [act for act in acts if act.state == 0]
    assert [act.episode for act in first] == [0, 1, 2, 3]
    assert len({act.text for act in first}) == 4


class Silent:
    """A judge that can tell of nothing, and counts what it is asked."""

    name, uses_gold, asked = "silent@1", False, 0

    def __call__(self, views):
        Silent.asked += len(views)
        return [Verdict(None, "?", self.name) for _ in views]


class Thinking(gym.ActionWrapper):
    """Makes a thought of any text: one that is malformed is scored without asking."""

    def action(self, action):
        return f"<think>{action}</think>"


@pytest.mark.parametrize(
    ("reward", "gold", "known"), [("process", True, False), ("outcome", True, True), ("outcome", False, False)]
)
def test_what_is_unknown_is_no_reward_of_zero(reward, gold, known, monkeypatch):
    def make():
        env = gym.make("swirl/GSM8K-v0", max_steps=2, reward=reward)
        env.unwrapped.set_judge(Silent())
        return Thinking(env)

    if not gold:
        monkeypatch.setattr(type(ENV.task_set), "outcome", lambda self, task, answer: None)

    acts = []
    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER)
    trainer.record = acts.extend
    config = ReinforceConfig(updates=1, batch_size=2, samples=2, max_new_tokens=4, beta=0.0)
    with pytest.raises(TrainingError, match="are 0 or unknown"):
        reinforce.train(trainer, make, list(ENV.task_set.tasks)[:2], config)
    last = [act.reward for act in acts if act.state == 1]
    assert last == [0.0 if known else None] * 4


def test_wrappers_may_end_episodes_and_judges_are_asked_about_real_actions_alone():
    def make():
        env = gym.make("swirl/GSM8K-v0", max_steps=9)
        env.unwrapped.set_judge(Silent())
        env = gym.wrappers.TimeLimit(Thinking(env), 1 + len(made) % 3)
        made.append(env)
        return env

    made, acts = [], []
    trainer = Trainer(tiny_model(TOKENIZER), TOKENIZER)
    trainer.record = acts.extend
    Silent.asked = 0
    config = ReinforceConfig(updates=1, batch_size=2, samples=3, max_new_tokens=4, beta=0.0)
    with pytest.raises(TrainingError):
        reinforce.train(trainer, make, list(ENV.task_set.tasks)[:2], config)
    assert len(acts) == 12 == Silent.asked
    [one] = rollout(lambda: gym.wrappers.TimeLimit(make_env(), 1), trainer.policy(1.0, 4), [(GOLD[0].task.id, 0)])
    assert (one.stop, one.outcome) == ("step_limit", 0.0)


def test_an_episode_without_room_in_the_context_has_no_answer():
    seen = []
    model = tiny_model(TOKENIZER)
    model.config.max_position_embeddings = 60
    trainer = Trainer(model, TOKENIZER, log=seen.append)
    with pytest.raises(TrainingError):
        grpo.train(trainer, make_env, list(ENV.task_set.tasks)[:2], GrpoConfig(updates=1, batch_size=2, samples=2))


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
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_trainer import *
ids = list(ENV.task_set.tasks)[:4]
online = dict(updates=2, samples=2, max_new_tokens=4, learning_rate=1e-3)
two = dict(epochs=1, batch_size=3)
world, found = int(os.environ.get("WORLD_SIZE", 1)), {{}}
for name, algorithm, config, data, settings in (
    ("swirl", swirl, replace(CONFIG, batch_size=3), [GOLD[:6], EvenLetters(), FreeText()], {{}}),
    ("swirl with an idle process", swirl, CONFIG, [GOLD[:2], EvenLetters(), FreeText()], {{}}),
    ("swirl, unequal rows", swirl, replace(CONFIG, batch_size=3, row_tokens=2000), [GOLD[:6], EvenLetters(), FreeText()], {{}}),
    ("swirl, twice over", swirl, replace(CONFIG, passes=2, kl="reward", **two), [GOLD[:6], EvenLetters(), FreeText()], {{}}),
    ("swirl with adapters", swirl, replace(CONFIG, **two), [GOLD[:6], EvenLetters(), FreeText()], {{"lora_rank": 2}}),
    ("swirl with adapters on these", swirl, replace(CONFIG, **two), [GOLD[:6], EvenLetters(), FreeText()], {{"lora_rank": 2}}),
    ("sft", sft, SftConfig(**two), [GOLD], {{"gradient_checkpointing": True, "max_grad_norm": 0.01}}),
    ("reinforce", reinforce, ReinforceConfig(batch_size=3, discount=0.5, **online), [even_env, ids], {{}}),
    ("grpo", grpo, GrpoConfig(batch_size=3, **online), [even_env, ids], {{}}),
    ("grpo with an idle process", grpo, GrpoConfig(batch_size=1, **online), [even_env, ids], {{}}),
    ("grpo, one question twice", grpo, GrpoConfig(batch_size=3, **online), [even_env, ids[:1]], {{}}),
):
    folder = Path(sys.argv[1]) / name
    settings = TrainerConfig(tracker="none", save_every=2, **settings)
    start = str(folder.with_name("swirl with adapters") / "model") if name.endswith("on these") else {base!r}
    for again in range(2 if name == "swirl" else 1):  # the second time from the checkpoint
        seen = []
        model = load_model(start, training=True, device="cpu")[0]
        trainer = Trainer(model, TOKENIZER, settings, folder=folder, seed=3, log=seen.append)
        assert (trainer.world, trainer.sharded) == (world, sys.argv[2] == "fsdp" and world > 1)
        algorithm.train(trainer, *data, config)
    trainer.save_model(folder / "model")
    found[name] = seen
if trainer.main:
    print(json.dumps(found))
trainer.accelerator.end_training()
"""


def in_processes(count, script, folder, config):
    """What they print, launched with a config of ours, with as many processes on the CPU."""
    path = Path(__file__).parents[2] / "algos" / "configs" / f"{config}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", path, "--num_processes", count]
    launch += ["--main_process_port", 0, "--mixed_precision", "no"]
    command = [sys.executable, *(launch if count > 1 else ()), script, folder, config]
    settings = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(script, folder, metrics) of several trainings in one process."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("one")
    tiny_model(TOKENIZER).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    script = folder / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), base=str(folder / "base")))
    return script, folder, json.loads(in_processes(1, script, folder, "ddp").splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(how, one_process, tmp_path):
    script, folder, one = one_process
    two = json.loads(in_processes(2, script, tmp_path, how).splitlines()[-1])
    assert list(one) == list(two)
    for name, metrics in one.items():
        for a, b in zip(metrics, two[name], strict=True):
            for key in ("loss", "gradient_norm", "tokens", "score", "outcome", "kl"):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (name, key)
        here, there = ((place / name) for place in (folder, tmp_path))
        if name != "sft":
            lines = [sorted((place / "candidates.jsonl").read_text().splitlines()) for place in (here, there)]
            assert len(lines[0]) == len(lines[1]) > 0
            assert [json.loads(x)["text"] for x in lines[0]] == [json.loads(x)["text"] for x in lines[1]]
        models = [load_model(str(place / "model"))[0].state_dict() for place in (here, there)]
        start = load_model(str(folder / "base"))[0].state_dict()
        assert any(not torch.equal(start[key], models[0][key]) for key in start)
        for key in models[0]:
            torch.testing.assert_close(models[0][key], models[1][key], atol=2e-5, rtol=1e-4)
    assert [line["update"] for line in lines_of(tmp_path / "swirl")] == [0, 1, 2, 3]


def lines_of(folder):
    return lines(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("what", "value"), [("distributed_type", DistributedType.DEEPSPEED), ("mixed_precision", "fp16")]
)
def test_what_accelerate_is_asked_for_and_the_trainer_does_not_do_is_told(what, value, monkeypatch):
    monkeypatch.setattr(f"swirl_algos.trainer.Accelerator.{what}", property(lambda self: value))
    with pytest.raises(ConfigError, match="accelerate launch asks for (DEEPSPEED|fp16)"):
        Trainer(tiny_model(TOKENIZER), TOKENIZER)


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path):
    def fail(part):
        (part / "a").write_text("x")
        raise ValueError

    with pytest.raises(ValueError):
        checkpoints.write_folder(tmp_path / "there", fail)
    assert list(tmp_path.iterdir()) == []
