"""The rollout engine against `generate()`, token for token: forks, continuations, newcomers, budgets, families of models."""

import threading
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swirl_agents import engine as engine_module
from swirl_agents.engine import Batches, Engine, Request, why_not
from swirl_agents.local import LocalPolicy
from swirl_agents.prefixes import shared_trunks
from swirl_agents.rollout import rollout
from swirl_agents.testing import tiny_model, tiny_tokenizer

import swirl_env  # noqa: F401
from swirl_env.types import Message, Transcript

VOCABULARY = 97
TOKENIZER = tiny_tokenizer()


def build(family, **settings):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def gpt2():
    import transformers

    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    config.initializer_range, config.bos_token_id, config.eos_token_id = 0.4, None, None
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def bloom():  # positions inside its attention
    import transformers

    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    return transformers.BloomForCausalLM(config).eval()


MODELS = {
    "llama": build("Llama", intermediate_size=64, num_key_value_heads=2),
    "gpt2": gpt2(),
    "neox": build("GPTNeoX", intermediate_size=64),
    "granite": build("Granite", intermediate_size=64, num_key_value_heads=1, attention_multiplier=0.2),
}
OTHERS = {
    "window": build("Mistral", intermediate_size=64, num_key_value_heads=2, sliding_window=8),
    "alibi": bloom(),
}


class Row:
    """Takes the likeliest token until it has as many as it wants."""

    def __init__(self, wanted):
        self.wanted, self.ids, self.finish = wanted, [], None


def greedy(logits, rows):
    assert len(logits) == len(rows)
    for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
        row.ids.append(token)
        row.finish = "length" if len(row.ids) == row.wanted else None


def make(model, batch_tokens=100_000, cache_tokens=100_000, longest=12):
    return Engine(model, greedy, max_new_tokens=longest, batch_tokens=batch_tokens, cache_tokens=cache_tokens)


def generated(model, ids, wanted):
    """Greedy tokens of `generate()`; and whether each was clear of the next best."""
    ids = torch.tensor(ids).long()[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=wanted, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values[:, 0]
    return out.sequences[0, ids.shape[1] :].tolist(), (best[:, 0] - best[:, 1] > 1e-4).tolist()


def assert_generated(model, ids, row):
    expected, clear = generated(model, ids, row.wanted)
    for got, want, sure in zip(row.ids, expected, clear, strict=True):
        if got != want:
            assert not sure
            return  # what follows a tie may differ


def finish(engine, requests, at_once=None):
    """Run requests to their end, letting some in later than others."""
    waiting = list(requests)
    while any(request.left for request in requests):
        for request in waiting[: at_once or len(waiting)]:
            engine.add(request)
        waiting = waiting[at_once or len(waiting) :]
        engine.step()


@pytest.mark.parametrize("family", MODELS)
@given(
    seed=st.integers(0, 10**6), states=st.integers(1, 5), samples=st.integers(1, 4), at_once=st.sampled_from([1, 2, 9]),
    batch_tokens=st.sampled_from([1, 90, 100_000]), cache_tokens=st.sampled_from([1, 60, 100_000]), static=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_greedy_equals_generate(family, seed, states, samples, at_once, batch_tokens, cache_tokens, static):
    """States of one trajectory and of others, with samples of unequal length, whatever the budgets and the order."""
    model, draw = MODELS[family], np.random.default_rng(seed)
    trunk = draw.integers(0, VOCABULARY, 60).astype(np.int32)
    prompts = [trunk[: draw.integers(1, 60)] for _ in range(states)] + [
        draw.integers(0, VOCABULARY, 7).astype(np.int32)
    ]
    requests = [Request(ids, [Row(int(draw.integers(1, 12))) for _ in range(samples)]) for ids in prompts]
    engine = make(model, batch_tokens, cache_tokens)
    engine.static = static
    finish(engine, requests, at_once)
    for request in requests:
        for row in request.rows:
            assert len(row.ids) == row.wanted
        assert_generated(model, request.ids, max(request.rows, key=lambda row: row.wanted))
        longest = max((row.ids for row in request.rows), key=len)
        assert all(row.ids == longest[: len(row.ids)] for row in request.rows)


def play(engine, prompts, draw, turns=4):
    """Episodes of unequal actions and observations; (request of each turn, tokens that are new to the engine)."""
    live, played, new = [], [], 0

    def add(ids, turn, fresh):
        nonlocal new
        new += fresh
        request = Request(ids, [Row(int(draw.integers(1, 12)))], keep=True)
        engine.add(request)
        live.append((request, turn))

    for ids in prompts:
        add(ids, 1, len(ids))
    while live:
        engine.step()
        for request, turn in [one for one in live if not one[0].left]:
            live.remove((request, turn))
            played.append(request)
            if turn < turns:
                observation = draw.integers(0, VOCABULARY, draw.integers(1, 20)).astype(np.int32)
                said = np.array(request.rows[0].ids, np.int32)
                add(
                    np.concatenate([request.ids, said, observation]), turn + 1, 1 + len(observation)
                )  # 1: the last one said
    return played, new


@pytest.mark.parametrize("family", MODELS)
def test_a_growing_state_is_prefilled_once(family):
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, VOCABULARY, n).astype(np.int32) for n in (5, 30, 17, 8)]
    engine = make(MODELS[family])
    played, new = play(engine, prompts, draw)
    assert engine.prefilled == new
    assert engine.decoded == sum(len(request.rows[0].ids) - 1 for request in played)
    for request in played:
        assert_generated(MODELS[family], request.ids, request.rows[0])


def test_over_the_budget_the_least_recent_is_prefilled_again():
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, VOCABULARY, n).astype(np.int32) for n in (25, 30, 17, 28)]
    engine = make(MODELS["llama"], cache_tokens=60)
    played, new = play(engine, prompts, draw)
    assert engine.prefilled > new
    assert sum(len(entry.ids) for entry in engine.store._entries) <= 60 or len(engine.store._entries) == 1
    for request in played:
        assert_generated(MODELS["llama"], request.ids, request.rows[0])


def test_states_of_a_trajectory_share_one_prefill():
    trunk = np.random.default_rng(2).integers(0, VOCABULARY, 80).astype(np.int32)
    requests = [Request(trunk[:n], [Row(5) for _ in range(4)]) for n in (40, 60, 80)]
    engine = make(MODELS["llama"])
    finish(engine, requests)
    assert engine.prefilled <= 80 + 3 + 2  # the trunk, and the last token of a state again where it was kept


def test_nobody_waits_for_the_slowest():
    engine = make(MODELS["llama"])
    slow, quick = (Request(np.arange(1, 9, dtype=np.int32), [Row(n)]) for n in (12, 2))
    late = Request(np.arange(3, 12, dtype=np.int32), [Row(2)])
    for request in (slow, quick):
        engine.add(request)
    for _ in range(2):
        engine.step()
    assert (slow.left, quick.left) == (1, 0)
    engine.add(late)
    for _ in range(2):
        engine.step()
    assert (slow.left, late.left) == (1, 0)
    while slow.left:
        engine.step()
    assert_generated(MODELS["llama"], slow.ids, slow.rows[0])
    assert_generated(MODELS["llama"], late.ids, late.rows[0])


def test_what_is_dropped_leaves_the_others_alone():
    engine = make(MODELS["llama"])
    requests = [Request(np.arange(n, n + 6, dtype=np.int32), [Row(8), Row(8)]) for n in range(4)]
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    engine.drop(requests[:2])
    while any(request.left for request in requests[2:]):
        engine.step()
    for request in requests[2:]:
        assert_generated(MODELS["llama"], request.ids, request.rows[0])
    assert not engine._slots


def test_new_weights_forget_what_was_kept():
    model = build("Llama", intermediate_size=64, num_key_value_heads=2)
    ids = np.arange(1, 30, dtype=np.int32)
    engine = make(model)
    first, again, other = (Request(ids, [Row(6)], keep=True) for _ in range(3))
    finish(engine, [first])
    finish(engine, [again])
    assert engine.prefilled == len(ids) + 1
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    finish(engine, [other])
    assert engine.prefilled == 2 * len(ids) + 1
    assert_generated(model, ids, other.rows[0])
    assert other.rows[0].ids != first.rows[0].ids


@pytest.mark.parametrize("family", OTHERS)
def test_models_of_other_kinds_run_in_batches(family):
    model, draw = OTHERS[family], np.random.default_rng(0)
    assert why_not(model)
    rows = [Row(n) for n in (9, 3, 6)]
    requests = [
        Request(draw.integers(0, VOCABULARY, n).astype(np.int32), [row])
        for n, row in zip((20, 5, 11), rows, strict=True)
    ]
    batches = Batches(model, greedy, max_new_tokens=12, batch_tokens=60, pad_id=0)
    for request in requests:
        batches.add(request)
    while any(request.left for request in requests):
        batches.step()
    for request in requests:
        assert_generated(model, request.ids, request.rows[0])


@pytest.mark.parametrize("family", MODELS)
def test_families_that_the_engine_runs(family):
    assert why_not(MODELS[family]) is None


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), max_size=6))
def test_shared_trunks_serve_several(prompts):
    arrays = [np.array(prompt, np.int32) for prompt in prompts]
    trunks = [trunk.tolist() for trunk in shared_trunks(arrays)]
    for trunk in trunks:
        assert sum(prompt == trunk[: len(prompt)] for prompt in prompts) >= 2
    for short in prompts:
        for i, long in enumerate(prompts):
            if long[: len(short)] == short and (len(short) < len(long) or short in prompts[:i]):
                assert any(trunk[: len(short)] == short for trunk in trunks)


# -- sessions and rollouts


def state(text, seed=None, stop=()):
    return Transcript((Message("user", text),), stop, seed)


def test_two_sessions_do_not_mix():
    policy = LocalPolicy(tiny_model(TOKENIZER), TOKENIZER, max_new_tokens=6)
    expected = [policy([state(text, 3)], 2)[0] for text in ("one", "two")]
    with closing(policy.session()) as first, closing(policy.session()) as second:
        first.add("a", state("one", 3), 2)
        second.add("b", state("two", 3), 2)
        found = {}
        while len(first):
            found.update(first.poll())
        while len(second):
            found.update(second.poll())
    for got, want in zip((found["a"], found["b"]), expected, strict=True):
        assert [one.tokens.action_ids.tolist() for one in got] == [one.tokens.action_ids.tolist() for one in want]


def test_a_session_that_is_closed_leaves_nothing_behind():
    policy = LocalPolicy(tiny_model(TOKENIZER), TOKENIZER, max_new_tokens=6)
    with closing(policy.session()) as session:
        session.add("a", state("one"), 2)
        session.poll()
    assert not policy._engine._slots
    assert len(session) == 0


def test_a_state_without_room_and_a_stop_that_never_comes():
    policy = LocalPolicy(tiny_model(TOKENIZER, context=64), TOKENIZER, max_new_tokens=6)
    policy.eos_ids = set()
    fits, hopeless = policy([state("x", stop=("never",)), state("y" * 200)])
    assert [one.finish for one in fits] == ["length"]
    assert hopeless == []


def test_other_episodes_go_on_while_a_tool_is_slow(tmp_path):
    """Episode a's tool answers only when b has taken two more steps: with a barrier between steps neither would end."""
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(f'{{"id": "{name}", "question": "What is {name}?"}}\n' for name in "ab"))
    taken, enough = [], threading.Event()

    def wait_for(who: str) -> str:
        """Waits.

        Args:
            who: Whose call it is.
        """
        taken.append(who)
        if who == "a" and taken.count("a") == 2:
            assert enough.wait(30), "the other episode stood still"
        if taken.count("b") == 3:
            enough.set()
        threading.Event().wait(0.005)  # slow enough for a thread
        return "done"

    from swirl_env.wrappers import AddTool

    def make_env():
        return AddTool(
            gym.make("swirl/Tasks-v0", path=str(questions), tools=[], reward="outcome", max_steps=3), wait_for
        )

    class Caller(LocalPolicy):
        """Writes the call of its own episode, whatever the model says."""

        def _completion(self, new, row):
            done = super()._completion(new, row)
            who = "a" if row.about == "a" else "b"
            from dataclasses import replace

            return replace(done, text=f"<wait_for>{who}</wait_for>", tokens=None)

        def session(self):
            session, add = super().session(), None
            add = session.add

            def adding(key, transcript, n=1):
                add(key, transcript, n)
                [*_, (_, _, request)] = session._mine.values()
                request.rows[0].about = "a" if "What is a?" in transcript.text else "b"

            session.add = adding
            return session

    policy = Caller(tiny_model(TOKENIZER), TOKENIZER, max_new_tokens=3)
    played = list(rollout(make_env, policy, [("a", 0), ("b", 0)]))
    assert sorted(trajectory.task.id for trajectory in played) == ["a", "b"]
    assert all(trajectory.stop == "step_limit" and len(trajectory.steps) == 3 for trajectory in played)
    assert played[0].task.id == "b"


def test_what_a_step_raises_in_a_thread_comes_out(tmp_path):
    class Broken(gym.Wrapper):
        def step(self, action):
            threading.Event().wait(0.005)
            if self.unwrapped.steps:
                raise RuntimeError("broken wrapper")
            return self.env.step(action)

    def make_env():
        return Broken(gym.make("swirl/GSM8K-v0"))

    from swirl_agents.scripted import Scripted

    policy = Scripted("thinker", lambda transcript: "<think>hm</think>")
    task = next(iter(make_env().unwrapped.task_set.tasks))
    with pytest.raises(RuntimeError, match="broken wrapper"):
        list(rollout(make_env, policy, [(task, 0)]))


def test_prefill_is_let_in_by_portions(monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 20)
    draw = np.random.default_rng(3)
    requests = [Request(draw.integers(0, VOCABULARY, 15).astype(np.int32), [Row(4)]) for _ in range(6)]
    engine = make(MODELS["llama"])
    for request in requests:
        engine.add(request)
    engine.step()
    assert len(engine._slots) == 2
    while any(request.left for request in requests):
        engine.step()
    for request in requests:
        assert_generated(MODELS["llama"], request.ids, request.rows[0])
