"""Tree-packed rows against plain rows by the model's own forward pass: log-probs, gradients, budgets, families of models."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swirl_agents import attention
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_algos import tree
from swirl_algos.tree import State

TOKENIZER = tiny_tokenizer()
VOCABULARY = 97
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def build(family, **settings):
    """A random model of a family, double precision, whose logits depend on what it reads."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **SIZES | settings, max_position_embeddings=512, initializer_range=0.4, bos_token_id=None, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


def llama():
    return build("Llama", intermediate_size=64, num_key_value_heads=2)


def gpt2():  # absolute positions
    import transformers

    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    config.initializer_range = 0.4
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double().eval()


def neox():  # parallel residual, rotary on a part of each head
    return build("GPTNeoX", intermediate_size=64)


def cohere():  # scales its logits
    return build("Cohere", intermediate_size=64, num_key_value_heads=2, logit_scale=0.3)


def granite():  # divides its logits, scales its attention
    return build("Granite", intermediate_size=64, num_key_value_heads=2, logits_scaling=3.0, attention_multiplier=0.2)


def qwen3():  # normalises queries and keys
    return build("Qwen3", intermediate_size=64, num_key_value_heads=2, head_dim=8)


FAMILIES = {build.__name__: build for build in (llama, gpt2, neox, cohere, granite, qwen3)}
MODELS = {name: make() for name, make in FAMILIES.items()}


def random_trees(draw, trees=1, states=3, samples=3, longest=9):
    """Trees of growing contexts; some actions are a single token."""
    forest = []
    for _ in range(trees):
        trunk = draw.integers(0, VOCABULARY, draw.integers(states, 40))
        starts = sorted(draw.choice(np.arange(1, len(trunk) + 1), states, replace=False).tolist())
        forest.append([
            State(trunk[:s], [draw.integers(0, VOCABULARY, draw.integers(1, longest)) for _ in range(samples)])
            for s in starts
        ])  # fmt: skip
    return forest


def by_hand(model, trees, tau=1.0):
    """Log-probs of all action tokens, a row each, by nothing but the model's own forward pass."""
    found = []
    for state in (state for states in trees for state in states):
        for action in state.actions:
            ids = torch.tensor(np.concatenate([state.context, action])).long()
            table = torch.log_softmax(model(ids[None]).logits[0, len(state.context) - 1 : -1] / tau, -1)
            found.append(table.gather(-1, ids[len(state.context) :, None])[:, 0])
    return found


def in_order(packs, values):
    """Values of action tokens, by action."""
    found = {}
    for pack, value_N in zip(packs, values, strict=True):
        for action in pack.action_N.unique().tolist():
            found[action] = value_N[pack.action_N == action]
    return [found[action] for action in sorted(found)]


def logprobs(model, packs, tau=1.0):
    return in_order(packs, [tree.logprobs(model, pack, tau) for pack in packs])


@pytest.mark.parametrize("family", FAMILIES)
@given(
    seed=st.integers(0, 10**6), trees=st.integers(1, 3), states=st.integers(1, 5), samples=st.integers(1, 4),
    budget=st.sampled_from([60, 130, 10_000]), tau=st.sampled_from([1.0, 0.7]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_every_branch_equals_its_plain_row(family, seed, trees, states, samples, budget, tau):
    model, forest = MODELS[family], random_trees(np.random.default_rng(seed), trees, states, samples)
    with torch.no_grad():
        expected = by_hand(model, forest, tau)
    for lay_out in (tree.pack, tree.plain):
        packs = list(lay_out(forest, budget))
        for got, want in zip(logprobs(model, packs, tau), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
        assert all(pack.tokens <= budget for pack in packs)


def gradient_of(model, reference, packs, weights, tau=0.8):
    model.zero_grad()

    def loss(terms):
        return ((weights[terms.action_n] * terms.logprobs_n) + 0.3 * terms.kl_n).sum()

    for pack in packs:
        tree.backward(model, reference, pack, loss, tau)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def apart(got, expected):
    """Relative distance of two gradients. (The norms of some families compute in single precision, whatever the model's.)"""
    a, b = (torch.cat([part.flatten() for part in gradient]) for gradient in (got, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_autograd_on_plain_rows(family, monkeypatch):
    monkeypatch.setattr(tree, "CHUNK_LOGITS", 7 * VOCABULARY)  # several chunks
    model, old = MODELS[family], copy.deepcopy(MODELS[family]).requires_grad_(False)
    draw = np.random.default_rng(3)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.05 * torch.from_numpy(draw.standard_normal(parameter.shape)))
    forest = random_trees(draw, 2)
    weights = torch.from_numpy(draw.standard_normal(18))
    model.zero_grad()
    total = 0.0
    number = 0
    for state in (state for states in forest for state in states):
        for action in state.actions:
            ids = torch.tensor(np.concatenate([state.context, action])).long()
            p, q = (
                torch.log_softmax(m(ids[None]).logits[0, len(state.context) - 1 : -1] / 0.8, -1) for m in (model, old)
            )
            taken = p.gather(-1, ids[len(state.context) :, None]).sum()
            total = total + weights[number] * taken + 0.3 * (p.exp() * (p - q)).sum()
            number += 1
    total.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    for lay_out, budget in ((tree.pack, 10_000), (tree.pack, 60), (tree.plain, 10_000)):
        assert apart(gradient_of(model, old, list(lay_out(forest, budget)), weights), expected) < 1e-6


def test_single_precision_agrees_too():
    model = copy.deepcopy(MODELS["llama"]).float()
    forest = random_trees(np.random.default_rng(1), 2, 4, 3)
    with torch.no_grad():
        expected = by_hand(model, forest)
    for got, want in zip(logprobs(model, list(tree.pack(forest, 10_000))), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_layout_drawn_by_hand():
    trunk = np.arange(10, 16)
    states = [State(trunk[:2], [np.array([1, 2, 3]), np.array([4])]), State(trunk, [np.array([5, 6])])]
    [pack] = tree.pack([states], 100)
    #                              trunk                   1 2   5
    assert pack.ids_BT.tolist() == [[10, 11, 12, 13, 14, 15, 1, 2, 5]]
    assert pack.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 6]]
    assert pack.at_N.tolist() == [1, 6, 7, 1, 5, 8]
    assert pack.targets_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert pack.action_N.tolist() == [0, 0, 0, 1, 2, 2]
    tree_T, branch_T, sees_T = pack.layout.token_facts()
    assert branch_T.tolist() == [0] * 6 + [1, 1, 2]
    assert sees_T.tolist() == [0, 1, 2, 3, 4, 5, 1, 1, 5]
    assert tree_T.tolist() == [0] * 9


def test_permuting_branches_changes_nothing():
    model, [states] = MODELS["llama"], random_trees(np.random.default_rng(0), 1, 3, 4)
    order = [2, 0, 3, 1]
    before = logprobs(model, list(tree.pack([states], 1000)))
    turned = [State(state.context, [state.actions[i] for i in order]) for state in states]
    after = logprobs(model, list(tree.pack([turned], 1000)))
    for k in range(3):
        for i, j in enumerate(order):
            torch.testing.assert_close(after[4 * k + i], before[4 * k + j], atol=1e-12, rtol=0)


def test_one_branch_does_not_see_another():
    model, [states] = MODELS["llama"], random_trees(np.random.default_rng(0), 1, 2, 2)
    before = logprobs(model, list(tree.pack([states], 1000)))
    states[1].actions[0][:] = (states[1].actions[0] + 1) % VOCABULARY
    after = logprobs(model, list(tree.pack([states], 1000)))
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, True, False]


@pytest.mark.parametrize("trees", [1, 2, 12])
def test_block_mask_is_the_same_tree(trees):
    from torch.nn.attention.flex_attention import flex_attention

    draw = np.random.default_rng(5)
    [pack] = tree.pack(random_trees(draw, trees, 3, 3), 10_000)
    q, k, v = (torch.randn(1, heads, pack.tokens, 16) for heads in (4, 2, 2))
    dense = tree._attend(q, k, v, pack.layout)
    mask = pack.layout.block_mask(torch.device("cpu"))
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, mask.shape[-1] - pack.tokens)) for x in (q, k, v))
    flex = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)[:, :, : pack.tokens]
    torch.testing.assert_close(dense, flex, atol=1e-5, rtol=1e-5)


def test_a_block_mask_holds_the_blocks_that_are_needed():
    """A trunk of 5 blocks with a branch of 1 at its third: whole blocks below the diagonal, none above it."""
    trunk, draw = np.arange(641), np.random.default_rng(0)
    [pack] = tree.pack([[State(trunk[:384], [draw.integers(0, 99, 129)]), State(trunk, [np.array([7])])]], 10_000)
    mask = pack.layout.block_mask(torch.device("cpu"))
    assert mask.shape[-2:] == (896, 896)
    partial, whole = mask.kv_num_blocks[0, 0], mask.full_kv_num_blocks[0, 0]
    assert (partial + whole).tolist() == [1, 2, 3, 4, 5, 6, 5]
    assert whole.tolist() == [0, 1, 2, 3, 4, 3, 0]


def test_a_budget_is_kept_and_what_never_fits_is_named():
    context = np.arange(20)
    states = [State(context[:10], [np.arange(5), np.arange(4)]), State(context, [np.arange(3), np.arange(12)])]
    assert tree.over_budget([states], 25) == [3]
    packs = list(tree.pack([states], 25))
    assert all(pack.tokens <= 25 for pack in packs)
    assert sorted(n for pack in packs for n in pack.action_N.unique().tolist()) == [0, 1, 2]
    plain = list(tree.plain([states], 25))
    assert sorted(n for pack in plain for n in pack.action_N.unique().tolist()) == [0, 1, 2]
    assert list(tree.pack([states], 5)) == list(tree.plain([states], 5)) == []


def test_an_action_without_tokens_has_no_part():
    states = [State(np.arange(5), [np.array([], int), np.arange(3)]), State(np.arange(9), [np.array([], int)])]
    for lay_out in (tree.pack, tree.plain):
        [pack] = lay_out([states], 100)
        assert pack.action_N.unique().tolist() == [1]


def test_a_context_of_one_token_without_actions():
    states = [State(np.array([1]), [np.array([], int)]), State(np.array([1]), [np.arange(9)])]
    assert list(tree.plain([states], 4)) == list(tree.pack([states], 4)) == []


def test_contexts_that_were_rewritten_share_what_they_can():
    """A chat template that drops old thoughts: the third state does not continue the second."""
    model, draw = MODELS["llama"], np.random.default_rng(2)
    trunk, other = draw.integers(0, VOCABULARY, 20), draw.integers(0, VOCABULARY, 25)
    contexts = [trunk[:8], trunk, other]
    states = [State(context, [draw.integers(0, VOCABULARY, 4) for _ in range(2)]) for context in contexts]
    [pack] = tree.pack([states], 1000)
    assert pack.tokens == 20 + 25 + 6 * 3
    with torch.no_grad():
        for got, want in zip(logprobs(model, [pack]), by_hand(model, [states]), strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_gradient_checkpointing_gives_the_same_gradient():
    draw = np.random.default_rng(4)
    forest, weights = random_trees(draw, 2), torch.from_numpy(draw.standard_normal(18))
    model = copy.deepcopy(MODELS["llama"])
    packs = list(tree.pack(forest, 10_000))
    expected = gradient_of(model, None, packs, weights)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # layers are checkpointed in training mode only; this model has no dropout
    assert apart(gradient_of(model, None, packs, weights), expected) < 1e-9


def test_an_adapter_is_its_own_reference():
    peft = pytest.importorskip("peft")
    draw = np.random.default_rng(6)
    forest, weights = random_trees(draw, 1), torch.from_numpy(draw.standard_normal(9))
    base = copy.deepcopy(MODELS["llama"])
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.1 * torch.from_numpy(draw.standard_normal(parameter.shape)))
    grown = gradient_of(model, model, list(tree.pack(forest, 1000)), weights)
    copied = gradient_of(model, base.requires_grad_(False), list(tree.plain(forest, 1000)), weights)
    assert len(grown) == len(copied) == 8
    assert apart(grown, copied) < 1e-6


def test_mixed_precision_stays_near():
    draw = np.random.default_rng(7)
    forest, weights = random_trees(draw, 1), torch.from_numpy(draw.standard_normal(9)).float()
    model = copy.deepcopy(MODELS["llama"]).float()
    expected = gradient_of(model, None, list(tree.plain(forest, 1000)), weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradient_of(model, None, list(tree.pack(forest, 1000)), weights)
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (got, expected))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_a_model_is_left_as_it_was():
    model = copy.deepcopy(MODELS["llama"])
    before = model.config._attn_implementation
    [pack] = tree.pack(random_trees(np.random.default_rng(0)), 1000)
    tree.backward(model, None, pack, lambda terms: terms.logprobs_n.sum())
    with pytest.raises(ZeroDivisionError):
        tree.backward(model, None, pack, lambda terms: 1 / 0)
    assert model.config._attn_implementation == before
    assert attention._current.get() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_can_be_packed(family, dtype):
    assert tree.why_not(copy.deepcopy(MODELS[family]).to(dtype)) is None


def test_a_model_in_training_mode_is_tried_without_dropout():
    model = copy.deepcopy(MODELS["gpt2"]).train()
    assert tree.why_not(model) is None
    assert model.training


def test_families_that_cannot_be_packed_are_found_out():
    import transformers

    window = build("Mistral", intermediate_size=64, num_key_value_heads=2, sliding_window=8)
    assert "sliding window" in tree.why_not(window)
    alibi = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    ).eval()
    assert tree.why_not(alibi) is not None  # positions inside its attention
    assert tree.why_not(tiny_model(TOKENIZER)) is None
