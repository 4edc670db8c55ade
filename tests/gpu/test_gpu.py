"""What only a card can show: captured steps and block-sparse attention give what the CPU gives, and a training runs to its end."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from swirl_agents.engine import Engine
from swirl_agents.local import BATCH_TOKENS, LocalPolicy
from swirl_agents.models import load_model
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_algos import sft, swirl, tree
from swirl_algos.configs import SftConfig, SwirlConfig, TrainerConfig
from swirl_algos.trainer import Trainer
from swirl_algos.tree import State

import swirl_env  # noqa: F401  registers the environments
from swirl_env.types import Action, Verdict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")
TOKENIZER = tiny_tokenizer()


class FreeText:
    """A grammar in which any text is a thought, so that the judge is asked about whatever a random model writes."""

    stop = ()

    def parse(self, text):
        return Action(text, thought=text)


class EvenLetters:
    name, uses_gold = "even@1", False

    def __call__(self, views):
        return [Verdict(len(view.action.text) % 2, "", self.name) for view in views]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Precision is a process's for good."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_env():
    return gym.make("swirl/GSM8K-v0", split="train", disable_env_checker=True)


def model_on(device):
    return tiny_model(TOKENIZER, hidden=128, layers=3).to(device)  # heads of 32: block-sparse kernels want 16 at least


def states(count):
    env, found = make_env(), []
    for seed in range(count):
        found.append(env.reset(seed=seed)[1]["transcript"])
    return found


def test_the_engine_draws_the_same_tokens_as_on_the_cpu():
    drawn = {}
    for device in ("cpu", "cuda"):
        policy = LocalPolicy(model_on(device), TOKENIZER, temperature=0, max_new_tokens=24)
        drawn[device] = [one for group in policy(states(12), n=3) for one in group]
        assert isinstance(policy._engine, Engine)
    assert len(policy._engine._graphs) > 0
    assert policy._engine.batch_tokens > BATCH_TOKENS
    same = [cpu.text == card.text for cpu, card in zip(drawn["cpu"], drawn["cuda"], strict=True)]
    assert np.mean(same) > 0.9
    for cpu, card, equal in zip(drawn["cpu"], drawn["cuda"], same, strict=True):
        if equal:
            np.testing.assert_allclose(card.tokens.logprobs, cpu.tokens.logprobs, atol=1e-3)


def test_captured_steps_give_what_plain_ones_give_while_samples_come_and_go():
    policy = LocalPolicy(model_on("cuda"), TOKENIZER, temperature=1.0, max_new_tokens=40)
    captured = [one.text for group in policy(states(40), n=2) for one in group]
    assert len(policy._engine._graphs) > 0
    plain = LocalPolicy(policy.model, TOKENIZER, temperature=1.0, max_new_tokens=40)
    plain._engine.static = False
    again = [one.text for group in plain(states(40), n=2) for one in group]
    assert np.mean([one == other for one, other in zip(captured, again, strict=True)]) > 0.9


def gradient(model, lay_out, trees):
    model.zero_grad(set_to_none=True)
    for pack in lay_out(trees, 4096, model.device):
        tree.backward(model, None, pack, lambda terms: -terms.logprobs_n.sum())
    return torch.cat([p.grad.float().flatten() for p in model.parameters()])


def test_a_packed_update_gives_the_gradient_of_plain_rows():
    exact, draw = model_on("cuda"), np.random.default_rng(0)
    half = model_on("cuda").to(torch.bfloat16)
    assert tree.why_not(exact) is None
    assert tree.why_not(half) is None
    for _ in range(4):  # rows of other lengths
        trunk = draw.integers(0, 200, draw.integers(150, 400))
        starts = sorted(draw.choice(np.arange(20, len(trunk)), 4, replace=False).tolist())
        trees = [[State(trunk[:s], [draw.integers(0, 200, draw.integers(1, 30)) for _ in range(4)]) for s in starts]]
        expected = gradient(exact, tree.plain, trees)
        apart = {
            name: float((gradient(model, lay_out, trees) - expected).norm() / expected.norm())
            for name, model, lay_out in (
                ("packed", exact, tree.pack),
                ("half", half, tree.plain),
                ("packed half", half, tree.pack),
            )
        }
        assert apart["packed"] < 1e-3, apart
        assert apart["packed half"] < 1.5 * apart["half"], apart  # as far from the truth as rounding takes plain rows


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_imitation_then_swirl_and_the_model_on_disk(precision, rank, tmp_path):
    gold = list(
        rollout(
            make_env,
            oracle(make_env().unwrapped),
            [(task_id, 0) for task_id in list(make_env().unwrapped.task_set.tasks)[:8]],
        )
    )
    base, told = model_on("cuda"), []
    base.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = TrainerConfig(precision=precision, lora_rank=rank, tracker="none")
    trainer = Trainer(base, TOKENIZER, config, folder=tmp_path / "sft")
    sft.train(trainer, gold, SftConfig(epochs=2, learning_rate=1e-3))
    trainer.save_model(tmp_path / "imitates")
    model, tokenizer = load_model(str(tmp_path / "imitates"), training=True)
    trainer = Trainer(model, tokenizer, config, folder=tmp_path / "swirl", log=told.append)
    swirl.train(trainer, gold, EvenLetters(), FreeText(), SwirlConfig(batch_size=2, max_new_tokens=24))
    trainer.save_model(tmp_path / "better")
    assert len(told) == len(gold) / 2
    assert all(np.isfinite([one["loss"], one["gradient_norm"], one["kl"]]).all() for one in told)
    assert any(one["gradient_norm"] > 0 for one in told)
    assert load_model(str(tmp_path / "better"))[0].device.type == "cuda"
