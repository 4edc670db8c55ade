"""SFT and SWiRL on a tiny model: masks by hand, loss equal to its closed form, fast way equal to plain rows, learning."""

import copy
import warnings
from dataclasses import replace
from itertools import repeat

import gymnasium as gym
import numpy as np
import pytest
import torch
from swirl_agents.local import LocalPolicy
from swirl_agents.rendering import Renderer
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_algos import sft, swirl
from swirl_algos.configs import SftConfig, SwirlConfig
from swirl_algos.diagnostics import of_actions
from swirl_algos.policy_gradient import PolicyGradient
from swirl_algos.trainer import Trainer, TrainingError

import swirl_env  # noqa: F401
from swirl_env.judges import RulesJudge
from swirl_env.types import Action, Verdict

TOKENIZER = tiny_tokenizer()


def make_env():
    return gym.make("swirl/GSM8K-v0")


ENV = make_env().unwrapped
GOLD = list(rollout(make_env, oracle(ENV), [(i, 0) for i in list(ENV.task_set.tasks)[:6]]))


def imitate(model, tokenizer, trajectories, config, **kwargs):
    sft.train(Trainer(model, tokenizer, **kwargs), trajectories, config)


def improve(model, tokenizer, trajectories, judge, grammar, config, **kwargs):
    swirl.train(Trainer(model, tokenizer, **kwargs), trajectories, judge, grammar, config)


def test_sft_trains_on_action_tokens_only():
    model, renderer = tiny_model(TOKENIZER), Renderer(TOKENIZER)
    encoded = renderer.encode(sft.finished(GOLD[0]))
    texts = [renderer.decode(encoded.ids[a:b]) for a, b in encoded.spans]
    assert texts == [step.action.text for step in GOLD[0].steps]
    seen = []
    imitate(copy.deepcopy(model), TOKENIZER, GOLD[:1], SftConfig(learning_rate=0.0), log=seen.append)
    ids = torch.tensor(encoded.ids).long()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
    by_hand = [-float(logprobs[t - 1, ids[t]]) for a, b in encoded.spans for t in range(a, b)]
    assert seen[0]["tokens"] == len(by_hand)
    assert seen[0]["loss"] == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_sft_learns():
    model, losses = tiny_model(TOKENIZER), []
    imitate(model, TOKENIZER, GOLD, SftConfig(learning_rate=1e-2, epochs=8, batch_size=3), log=losses.append)
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    assert len(losses) == losses[0]["updates"] == 16


class FreeText:
    """A grammar in which any text is a thought, so that the judge is asked about whatever a random model writes."""

    stop = ()

    def parse(self, text):
        return Action(text, thought=text)


GRAMMAR = FreeText()
CONFIG = SwirlConfig(samples=3, max_new_tokens=6, batch_size=2, beta=0.1, temperature=0.8)


class EvenLetters:
    """Scores the share of letters of a completion that are even: noise that a policy can learn."""

    name, uses_gold = "even@1", False

    def __call__(self, views):
        return [Verdict(float(np.mean([ord(c) % 2 == 0 for c in v.action.text] or [0])), "", self.name) for v in views]


def batch_of(model, judge, config=CONFIG):
    policy = LocalPolicy(model, TOKENIZER, temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    drawn = list(swirl.sample_candidates(policy, GOLD[:2], judge, GRAMMAR, config, 0, 0))
    nothing = repeat(0.0)
    candidates = [(i, actions, swirl._with_advantages(group, nothing, config)) for i, actions, group in drawn]
    advantages = [one.advantage for _, _, group in candidates for one in group]
    trees = swirl.branches(policy.renderer, GOLD[:2], candidates)
    return candidates, trees, np.array([np.nan if value is None else value for value in advantages])


def test_candidates_stand_at_every_state():
    candidates, trees, advantages = batch_of(tiny_model(TOKENIZER), EvenLetters())
    assert [(i, drawn[0].state) for i, _, drawn in candidates] == [
        (i, k) for i in (0, 1) for k in range(len(GOLD[i].steps))
    ]
    for i, actions, drawn in candidates:
        assert [one.g for one in drawn] == [0, 1, 2]
        assert len(actions) == 3
        assert sum(one.advantage for one in drawn) == pytest.approx(0, abs=1e-9)
        assert drawn[0].task == GOLD[i].task.id
    renderer = Renderer(TOKENIZER)
    for trajectory, states in zip(GOLD, trees, strict=False):
        contexts = [renderer.encode(state).ids.tolist() for state in trajectory.states()]
        assert [state.context.tolist() for state in states] == contexts
    assert advantages.tolist() == [one.advantage for _, _, drawn in candidates for one in drawn]


def first_update(model, reference, trees, advantages, config):
    """The metrics of one update whose reference is another model."""
    trainer = Trainer(model, TOKENIZER)
    trainer.reference = reference
    gradient = PolicyGradient(trainer, config)
    [metrics] = [
        gradient.update(trees, advantages) for _ in trainer.updates(1, "test", replace(config, learning_rate=0.0), [])
    ]
    return metrics


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("tight", [False, True])
def test_loss_is_the_formula(plain, tight):
    model, old = tiny_model(TOKENIZER, seed=1), tiny_model(TOKENIZER, seed=2)
    candidates, trees, advantages = batch_of(model, EvenLetters())
    scored = sum(one.advantage is not None for _, _, drawn in candidates for one in drawn)
    longest = max(len(state.context) for states in trees for state in states) + CONFIG.max_new_tokens
    config = replace(CONFIG, reference=plain, row_tokens=longest if tight else 100_000)
    got = first_update(model, old, trees, advantages, config)
    total, kl_total, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for i, actions, drawn in candidates:
            context = Renderer(TOKENIZER).encode(GOLD[i].states()[drawn[0].state]).ids
            for ids, one in zip(actions, drawn, strict=True):
                row = torch.tensor(np.concatenate([context, ids])).long()[None]
                p, q = (torch.log_softmax(m(row).logits[0, len(context) - 1 : -1] / 0.8, -1) for m in (model, old))
                taken = sum(float(p[t, token]) for t, token in enumerate(ids))
                kl = float((p.exp() * (p - q)).sum())
                total += (-one.advantage * taken + 0.1 * kl) / 6 / scored
                kl_total, tokens = kl_total + kl, tokens + len(ids)
    assert got["loss"] == pytest.approx(total, rel=1e-4)
    assert got["kl"] == pytest.approx(kl_total / tokens, rel=1e-4)
    assert got["tokens"] == tokens


def test_reference_and_fast_way_train_alike():
    final = []
    for reference in (True, False):
        model, losses = tiny_model(TOKENIZER, seed=1), []
        config = replace(CONFIG, reference=reference, learning_rate=1e-3)
        improve(model, TOKENIZER, GOLD[:4], EvenLetters(), GRAMMAR, config, log=losses.append)
        final.append([one["loss"] for one in losses])
    assert final[0] == pytest.approx(final[1], abs=1e-5)


def test_what_does_not_fit_is_left_out_counted_and_told():
    model, seen = tiny_model(TOKENIZER, seed=1), []
    lengths = [len(Renderer(TOKENIZER).encode(state).ids) for state in GOLD[0].states()]
    config = replace(CONFIG, row_tokens=lengths[0] + CONFIG.max_new_tokens)
    with pytest.warns(UserWarning, match="Raise row_tokens"):
        improve(model, TOKENIZER, GOLD[:1], EvenLetters(), GRAMMAR, config, log=seen.append)
    assert len(lengths) > 1
    assert seen[0]["over_budget"] == 3 * (len(lengths) - 1)
    assert seen[0]["scored"] == 3


def test_a_state_that_leaves_no_room_in_the_context_is_counted():
    lengths = [len(Renderer(TOKENIZER).encode(state).ids) for state in GOLD[0].states()]
    model, seen = tiny_model(TOKENIZER, seed=1, context=lengths[0] + CONFIG.max_new_tokens), []
    improve(model, TOKENIZER, GOLD[:1], EvenLetters(), GRAMMAR, CONFIG, log=seen.append)
    assert (seen[0]["too_long"], seen[0]["scored"]) == (len(lengths) - 1, 3)


def test_a_model_that_cannot_be_packed_trains_on_plain_rows():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, eos_token_id=TOKENIZER.eos_token_id, initializer_range=0.4,
    )  # fmt: skip
    losses = []
    for reference in (True, False):
        torch.manual_seed(0)
        model, seen = MistralForCausalLM(config).eval(), []
        swirl_config = replace(CONFIG, reference=reference)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            improve(model, TOKENIZER, GOLD[:1], EvenLetters(), GRAMMAR, swirl_config, log=seen.append)
        assert any("cannot be packed: it keeps no plain" in str(one.message) for one in told) is not reference
        losses.append(seen[0]["loss"])
    assert losses[0] == losses[1]


def test_a_template_that_drops_old_thoughts_trains_on_what_it_shows():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' and not loop.last else message['content'] }}",
    )
    thought = [replace(GOLD[0], steps=tuple(
        replace(step, action=replace(step.action, text=f"<think>hm</think>{step.action.text}")) for step in GOLD[0].steps
    ))]  # fmt: skip
    renderer = Renderer(tokenizer)
    assert renderer.rewrites
    losses, rows = [], []
    for reference in (True, False):
        model, seen = tiny_model(tokenizer, seed=1), []
        with pytest.warns(UserWarning, match="changes older turns"):
            config = replace(CONFIG, reference=reference)
            improve(model, tokenizer, thought, EvenLetters(), GRAMMAR, config, log=seen.append)
        losses.append(seen[0]["loss"])
        rows.append(seen[0]["row_tokens"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert rows[1] < rows[0]  # the samples of a state still share it
    learned = [renderer.decode(r.ids[slice(*s)]) for r in sft._rows(renderer, thought[0]) for s in r.spans]
    assert learned == [step.action.text for step in thought[0].steps]


@pytest.mark.parametrize("trained", [False, True])
def test_the_reference_of_an_adapter_is_the_starting_checkpoint(trained):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=not trained)
    model, seen = peft.get_peft_model(tiny_model(TOKENIZER, seed=1), config), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is packed, in training mode too
        improve(
            model.train(),
            TOKENIZER,
            GOLD[:4],
            EvenLetters(),
            GRAMMAR,
            replace(CONFIG, learning_rate=1e-2),
            log=seen.append,
        )
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert seen[1]["kl"] > 1e-6


class Unknowing:
    """Knows nothing about every second action, and nothing at all if told so."""

    name, uses_gold = "unknowing@1", False

    def __init__(self, everything=False):
        self.everything = everything

    def __call__(self, views):
        return [Verdict(None if self.everything or i % 2 else i / 100, "?", self.name) for i in range(len(views))]


def test_unknown_verdicts_carry_no_gradient_and_are_counted():
    candidates, trees, advantages = batch_of(tiny_model(TOKENIZER), Unknowing())
    drawn = [one for _, _, group in candidates for one in group]
    assert all(one.advantage is None for one in drawn if one.verdict.score is None)
    lonely = [group for _, _, group in candidates if sum(one.verdict.score is not None for one in group) == 1]
    assert lonely
    assert all(one.advantage is None for group in lonely for one in group)
    assert np.isnan(advantages).sum() == sum(one.advantage is None for one in drawn)
    assert sum(len(state.actions) for states in trees for state in states) == len(advantages)
    metrics = first_update(tiny_model(TOKENIZER), tiny_model(TOKENIZER), trees, advantages, CONFIG)
    assert metrics["scored"] == np.sum(~np.isnan(advantages))
    assert of_actions(drawn)["unknown"] == sum(one.verdict.score is None for one in drawn)


def test_nothing_to_learn_from_is_told():
    model = tiny_model(TOKENIZER)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(TrainingError, match="No trajectory is left"):
        improve(model, TOKENIZER, [], RulesJudge(), GRAMMAR, CONFIG)
    with pytest.raises(TrainingError, match="Is the judge answering"):
        improve(model, TOKENIZER, GOLD[:1], Unknowing(everything=True), GRAMMAR, replace(CONFIG, epochs=3))
    with pytest.raises(TrainingError, match="No trajectory to imitate"):
        imitate(model, TOKENIZER, [], SftConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("sound", [0, 1])
def test_a_judge_that_falls_silent_stops_the_training(sound):
    class Mortal(EvenLetters):
        calls = 0

        def __call__(self, views):
            self.calls += 1
            found = [Verdict(i / 10, "", self.name) for i in range(len(views))]
            return found if self.calls <= sound else [replace(one, score=None) for one in found]

    says = f"No score was known in the last 5 updates, up to update {sound + 4}"
    with pytest.raises(TrainingError, match=says):
        improve(tiny_model(TOKENIZER), TOKENIZER, GOLD[:1], Mortal(), GRAMMAR, replace(CONFIG, epochs=40, batch_size=1))


def test_token_ids_of_another_tokenizer_are_not_taken_for_ones_own():
    model = tiny_model(TOKENIZER)
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=8, temperature=1.0)
    own = list(rollout(make_env, policy, [(GOLD[0].task.id, 0)]))

    def shifted(step):
        ids = np.where(step.tokens.sampled, (step.tokens.ids + 1) % 200, step.tokens.ids)
        return replace(step, tokens=replace(step.tokens, ids=ids))

    strange = [replace(own[0], steps=tuple(map(shifted, own[0].steps)))]
    plain = [replace(own[0], steps=tuple(replace(step, tokens=None) for step in own[0].steps))]
    losses = []
    for trajectories in (own, strange, plain):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            imitate(copy.deepcopy(model), TOKENIZER, trajectories, SftConfig(epochs=1), log=losses.append)
        found = [str(one.message) for one in told if "tokenised anew" in str(one.message)]
        assert bool(found) == (trajectories is strange)
    assert losses[1]["loss"] == losses[2]["loss"]


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = tiny_model(TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(TrainingError, match="not finite"):
        imitate(model, TOKENIZER, GOLD[:1], SftConfig())
    assert torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_same_seed_same_model():
    trained = []
    for _ in range(2):
        model = tiny_model(TOKENIZER, seed=1)
        improve(model, TOKENIZER, GOLD[:2], EvenLetters(), GRAMMAR, replace(CONFIG, learning_rate=1e-3), seed=5)
        trained.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_swirl_solves_what_the_judge_rewards():
    model, seen = tiny_model(TOKENIZER, seed=1), []
    config = SwirlConfig(learning_rate=2e-2, epochs=8, batch_size=6, samples=8, max_new_tokens=4, beta=0.001)
    improve(model, TOKENIZER, GOLD, EvenLetters(), GRAMMAR, config, log=seen.append)
    assert seen[0]["score"] < 0.6
    assert seen[-1]["score"] > 0.95
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the starting checkpoint
    assert seen[-1]["kl"] > 0.01
    assert seen[-1]["entropy"] < seen[0]["entropy"]
