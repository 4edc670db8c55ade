"""The rollout engine against `generate()`, token for token: forks, continuations, newcomers, budgets, families of models."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swirl_agents import engine as engine_module
from swirl_agents import graphs
from swirl_agents.batches import Batches
from swirl_agents.engine import Engine, Request, why_not
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


def mamba():
    import transformers

    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(config).eval()


OTHERS = {
    "mamba": mamba(),
    "window": build("Mistral", intermediate_size=64, num_key_value_heads=2, sliding_window=8),
    "alibi": bloom(),
}


class Row:
    """Takes the likeliest token until it has as many as it wants."""

    def __init__(self, wanted, cap=12):
        self.wanted, self.cap = wanted, cap
        self.restart()

    def restart(self):
        self.ids, self.finish = [], None


def greedy(logits, rows):
    assert len(logits) == len(rows)
    for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
        row.ids.append(token)
        row.finish = "length" if len(row.ids) == row.wanted else None


def make(model, batch_tokens=100_000, cache_tokens=100_000):
    return Engine(model, greedy, batch_tokens=batch_tokens, cache_tokens=cache_tokens)


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
        spoil(engine)


@torch.inference_mode()
def spoil(engine):
    """Slots that nobody has may hold anything."""
    for buffer in (part for buffers in engine._buffers for part in buffers):
        buffer[len(engine._slots) :] = float("nan")


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
    batches = Batches(model, greedy, batch_tokens=60, pad_id=0)
    for request in requests:
        batches.add(request)
    while any(request.left for request in requests):
        batches.step()
    for request in requests:
        assert_generated(model, request.ids, request.rows[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MODELS)
def test_families_that_the_engine_runs(family, dtype):
    assert why_not(copy.deepcopy(MODELS[family]).to(dtype)) is None


def test_a_model_in_training_mode_is_tried_without_dropout():
    model = gpt2().train()
    assert why_not(model) is None
    assert model.training


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_text_are_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = build("Llama", intermediate_size=64, num_key_value_heads=2, rope_parameters=rope)
    assert kind in why_not(model)


def test_rows_of_one_state_are_split_by_the_budget_of_batches():
    rows, seen = [Row(3) for _ in range(40)], []

    def counting(logits, some):
        seen.append(len(some))
        greedy(logits, some)

    request = Request(np.arange(1, 9, dtype=np.int32), rows)
    batches = Batches(OTHERS["window"], counting, batch_tokens=100, pad_id=0)
    batches.add(request)
    while request.left:
        batches.step()
    assert max(seen) == 5
    assert all(row.ids == rows[0].ids for row in rows)


def test_buffers_stay_within_the_budget():
    draw = np.random.default_rng(4)
    requests = [Request(draw.integers(0, VOCABULARY, 20).astype(np.int32), [Row(8, cap=8)]) for _ in range(200)]
    engine = make(MODELS["llama"], batch_tokens=4096)
    for request in requests:
        engine.add(request)
    while any(request.left for request in requests):
        engine.step()
        assert engine._owners.numel() <= 4096
    assert_generated(MODELS["llama"], requests[-1].ids, requests[-1].rows[0])


def test_rows_of_unequal_caps_get_the_room_that_they_need():
    ids = np.arange(1, 9, dtype=np.int32)
    for batch_tokens in (1, 100_000):
        requests = [Request(ids, [Row(n, cap=n) for n in wanted]) for wanted in ([3], [90], [3, 90, 2])]
        finish(make(MODELS["llama"], batch_tokens), requests, at_once=1)
        for request in requests:
            for row in request.rows:
                assert len(row.ids) == row.wanted
                assert_generated(MODELS["llama"], ids, row)


BAD = 5


@pytest.mark.parametrize("static", [False, True])
def test_what_a_broken_sample_left_behind_is_harmless(static):
    """After the token `BAD` every key and value is NaN. They stay in a slot that another sample moves into, and in one that a newcomer
    gets; both see a third sample's reach, so what was left is masked."""
    model, draw = build("Llama", intermediate_size=64, num_key_value_heads=2), np.random.default_rng(0)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD], model.lm_head.weight[BAD] = float("nan"), 0.0

    def sound(length):
        return Request(draw.integers(BAD + 1, VOCABULARY, length).astype(np.int32), [Row(12)])

    def broken():
        return Request(np.full(60, BAD, np.int32), [Row(2)])

    def poisoned(place):
        return bool(engine._buffers[0][1][place].isnan().any())

    engine = make(model)
    engine.static = static
    long, moved, late = sound(100), sound(5), sound(7)
    for request in (broken(), long, moved):
        engine.add(request)
    engine.step()
    assert poisoned(0)
    engine.step()
    assert engine._slots[0].request is moved
    engine.add(again := broken())
    while again.left:
        engine.step()
    assert poisoned(2)
    engine.add(late)
    while late.left:
        engine.step()
        assert not poisoned(slice(len(engine._slots)))
    for request in (long, moved, late):
        assert not request.left
        assert_generated(model, request.ids, request.rows[0])


@pytest.mark.parametrize("family", MODELS)
def test_few_captured_steps_are_kept_and_any_is_made_again(family, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    draw, engine = np.random.default_rng(1), make(MODELS[family])
    engine.static, made = True, []
    make_step = engine._static
    engine._static = lambda *shape: made.append(shape) or make_step(*shape)
    played, _ = play(engine, [draw.integers(0, VOCABULARY, n).astype(np.int32) for n in (5, 30, 17, 8)], draw)
    assert len(engine._graphs) == 2
    assert len(made) > len(set(made)) > 2
    for request in played:
        assert_generated(MODELS[family], request.ids, request.rows[0])


def test_buffers_that_grow_leave_none_behind():
    engine = make(MODELS["llama"])
    engine.static = True
    finish(engine, [Request(np.arange(1, 9, dtype=np.int32), [Row(6)])])
    before = [weakref.ref(part) for buffers in engine._buffers for part in buffers]
    assert len(engine._graphs)
    gc.disable()
    try:
        engine.add(Request(np.arange(1, 90, dtype=np.int32), [Row(6)]))
        engine.step()
        assert not any(old() is not None for old in before)
        assert not len(engine._graphs)
    finally:
        gc.enable()


def test_a_step_that_raises_loses_nobody():
    engine, broken = make(MODELS["llama"]), [False]

    def sample(logits, rows):
        if broken[0]:
            raise MemoryError("no room")
        greedy(logits, rows)

    engine.sample = sample
    requests = [Request(np.arange(n, n + 6, dtype=np.int32), [Row(6), Row(4)]) for n in range(3)]
    engine.add(requests[0])
    engine.step()
    for request in requests[1:]:
        engine.add(request)
    broken[0] = True
    with pytest.raises(MemoryError):
        engine.step()
    broken[0] = False
    while any(request.left for request in requests):
        engine.step()
    for request in requests:
        for row in request.rows:
            assert len(row.ids) == row.wanted
            assert_generated(MODELS["llama"], request.ids, row)


def test_new_weights_begin_samples_anew():
    model = build("Llama", intermediate_size=64, num_key_value_heads=2)
    engine = make(model)
    request = Request(np.arange(1, 9, dtype=np.int32), [Row(8)], keep=True)
    engine.add(request)
    for _ in range(3):
        engine.step()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
        model.model.layers[0].mlp.up_proj.weight.mul_(-1.0)
    while request.left:
        engine.step()
    assert_generated(model, request.ids, request.rows[0])
    again = Request(request.ids, [Row(8)])
    finish(engine, [again])
    assert again.rows[0].ids == request.rows[0].ids


def test_an_adapter_that_is_switched_off_is_noticed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        copy.deepcopy(MODELS["llama"]),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    ids, engine = np.arange(1, 20, dtype=np.int32), make(model)
    on, off = Request(ids, [Row(8)], keep=True), Request(ids, [Row(8)], keep=True)
    finish(engine, [on])
    with model.disable_adapter():
        finish(engine, [off])
        assert_generated(model, ids, off.rows[0])
    assert on.rows[0].ids != off.rows[0].ids


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


def test_two_policies_of_one_model_take_turns():
    model = tiny_model(TOKENIZER)
    before = model.config._attn_implementation
    policies = [LocalPolicy(model, TOKENIZER, max_new_tokens=12, seed=seed) for seed in range(4)]
    states = [state(text) for text in ("one", "two", "three")]
    expected = [
        [one[0].text for one in LocalPolicy(model, TOKENIZER, max_new_tokens=12, seed=n)(states)] for n in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda policy: [one[0].text for one in policy(states)], policies))
            assert found == expected
    assert model.config._attn_implementation == before


def test_the_engine_says_why_it_cannot_run_a_model():
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, eos_token_id=TOKENIZER.eos_token_id,
    )).eval()  # fmt: skip
    with pytest.warns(UserWarning, match="cannot run this model: it keeps no plain keys"):
        LocalPolicy(model, TOKENIZER, max_new_tokens=3)([state("x")])


def test_stop_strings_of_any_script_are_found():
    policy = LocalPolicy(tiny_model(TOKENIZER), TOKENIZER, max_new_tokens=40)
    policy.eos_ids = set()
    wanted = iter([*"ab", *("。" * 8).encode(), *"cdefgh"])
    bytes_of = {value: key for key, value in enumerate_bytes().items()}

    def draw(logits, uniforms, tau):
        value = next(wanted)
        return [bytes_of[ord(value) if isinstance(value, str) else value]], [0.0]

    policy._draw = draw
    [[one]] = policy([state("x", stop=("。" * 8,))])
    assert one.finish == "stop"
    assert one.text.endswith("。" * 8)


def enumerate_bytes():
    """Token id -> byte, of the byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = {}
    for value in range(256):
        text = bytes([value]).decode("latin-1")
        if value < 128:
            letters[level.pre_tokenize_str(text)[0][0]] = value
        else:
            first, second = level.pre_tokenize_str(text)[0][0]
            encoded = text.encode()
            letters[first], letters[second] = encoded[0], encoded[1]
    for text in ("。",):
        for letter, value in zip(level.pre_tokenize_str(text)[0][0], text.encode(), strict=True):
            letters[letter] = value
    return {alphabet.index(letter): value for letter, value in letters.items()}


def test_policies_without_a_session_are_asked_about_all_at_once():
    sizes = []

    class Slow(gym.Wrapper):
        def step(self, action):
            threading.Event().wait(0.002 * (1 + len(self.unwrapped.steps)))
            return self.env.step(action)

    class Thinker:
        name = "thinker"

        def __call__(self, transcripts, n=1):
            from swirl_env.types import Completion

            sizes.append(len(transcripts))
            return [[Completion("<think>hm</think>", None, "eos")] for _ in transcripts]

    def make_env():
        return Slow(gym.make("swirl/GSM8K-v0", max_steps=4))

    tasks = [(task, 0) for task in list(make_env().unwrapped.task_set.tasks)[:6]]
    assert len(list(rollout(make_env, Thinker(), tasks))) == 6
    assert sizes == [6] * 4


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
