"""Tree-packed updates: the K states of a trajectory and the G candidates of each in one row, for little more than one row's price.

A trajectory is append-only, so every state is a prefix of the last one, the trunk. `pack` lays out the trunk once and hangs
the candidate actions of each state on it as branches, whose positions go on from their state:

    trunk ------------+--------+-----------+        positions 0 ... T-1
    branches of s_1   a1 a2 a3 |           |        each sees trunk[:s_1] and itself
    branches of s_2            a1 a2 a3    |        each sees trunk[:s_2] and itself
    branches of s_3                        a1 a2 a3

An action that the trunk itself goes on with (the recorded one: all of SFT and of whole trajectories) needs no branch.
Several trees share a row up to a budget of tokens. Attention runs in pieces: causal over each trunk, then one call a state
for its branches (`_attend`, on any device), or one block-sparse call (flex_attention, on a GPU); never a T x T mask. `plain`
lays out one row a candidate, the reference that everything is tested against; both give the same `Pack`, so the rest of an
update is one code path. What a state does not share with the trunk (a chat template that rewrites old turns) becomes a
tree of its own. Models that cannot be packed are told by `why_not`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from swirl_agents.attention import attending, differ, grouped, in_eval_mode, obstacle

CHUNK_LOGITS = 1 << 25
"""Logits that are held at once: rows of a chunk x vocabulary."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A recorded state and the actions sampled there."""

    context: np.ndarray
    """int[S]: all tokens before the action."""
    actions: Sequence[np.ndarray]
    """G actions, int[A] each; one without tokens has no part in an update."""


Tree = Sequence[State]
"""The states of one trajectory, shortest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One forward pass. Shapes: `B` rows of `T` tokens, `N` action tokens."""

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    layout: "Layout | None"
    """How a single row branches; `None`: plain causal rows, padded on the right."""
    at_N: torch.Tensor
    """Place in the flattened rows of the token that predicts each action token."""
    targets_N: torch.Tensor
    """The action tokens."""
    action_N: torch.Tensor
    """Which action each belongs to, counted over all states of all trees as they were given."""

    @property
    def tokens(self) -> int:
        """Tokens that the model runs over, padding included."""
        return self.ids_BT.numel()


@dataclass(frozen=True, slots=True)
class _Group:
    """The branches of one state: a run of the row."""

    segments: int
    """How many segments of its trunk it sees."""
    lengths: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Layout:
    """Where the trunks and branches of a row lie: for each tree its trunk, cut at its states, then its groups of branches."""

    trees: list[tuple[list[int], list[_Group]]] = field(default_factory=list)
    _masks: dict[Any, list[torch.Tensor]] = field(default_factory=dict)

    def masks(self, like: torch.Tensor, repeats: int) -> list[torch.Tensor]:
        """For each group, additive [repeats x n, S + n]: its branches see the trunk up to their state, and each itself. Made once,
        so that all layers share it."""
        key = like.dtype, like.device, repeats
        if key not in self._masks:
            self._masks[key] = [
                _mask(sum(segments[: group.segments]), group.lengths, like).repeat(repeats, 1)
                for segments, groups in self.trees
                for group in groups
            ]
        return self._masks[key]

    def token_facts(self) -> np.ndarray:
        """int[3, T]: for each token of the row its tree, its branch (0 for a trunk), and how far into the row's trunk it sees."""
        facts: list[tuple[np.ndarray, ...]] = []
        at = branch = 0
        for tree, (segments, groups) in enumerate(self.trees):
            size = sum(segments)
            facts.append((np.full(size, tree), np.zeros(size, int), np.arange(at, at + size)))
            for group in groups:
                last = at + sum(segments[: group.segments]) - 1
                for length in group.lengths:
                    branch += 1
                    facts.append((np.full(length, tree), np.full(length, branch), np.full(length, last)))
            at += size + sum(sum(group.lengths) for group in groups)
        return np.stack([np.concatenate(parts) for parts in zip(*facts, strict=True)])

    def block_mask(self, device: torch.device) -> Any:
        """The same as `flex_attention` wants it, for a row that is filled up to whole blocks, two at least; made once."""
        key = "flex", device
        if key not in self._masks:
            from torch.nn.attention.flex_attention import BlockMask

            facts = self.token_facts()
            length = max(2, -(-facts.shape[1] // BLOCK)) * BLOCK
            filled = np.pad(facts, ((0, 0), (0, length - facts.shape[1])), constant_values=-1)  # a tree of its own
            tree_T, branch_T, sees_T = torch.tensor(filled, device=device)

            def sees(b, h, q, k):
                trunk = (branch_T[k] == 0) & (k <= sees_T[q])
                return (tree_T[q] == tree_T[k]) & (trunk | ((branch_T[q] == branch_T[k]) & (k <= q)))

            # a row of blocks at a time: no T x T mask is held on the way
            at_T = torch.arange(length, device=device)
            rows = [sees(0, 0, some[:, None], at_T).unflatten(1, (-1, BLOCK)) for some in at_T.split(BLOCK)]
            some_QK = torch.stack([row.any(2).any(0) for row in rows])
            whole_QK = torch.stack([row.all(2).all(0) for row in rows])
            self._masks[key] = BlockMask.from_kv_blocks(  # type: ignore[assignment]
                *_blocks(some_QK & ~whole_QK), *_blocks(whole_QK), BLOCK_SIZE=BLOCK, mask_mod=sees
            )
        return self._masks[key]

    def attend(self, module, query, key, value, scale: float | None) -> torch.Tensor:
        if query.is_cuda:
            mask, length = self.block_mask(query.device), query.shape[2]
            query, key, value = (
                torch.nn.functional.pad(x, (0, 0, 0, mask.shape[-1] - length)) for x in (query, key, value)
            )
            out = _flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] > key.shape[1])
            return out[:, :, :length].transpose(1, 2)
        return _attend(query, key, value, self, scale).transpose(1, 2)


BLOCK = 128
"""Tokens of a block of the block-sparse mask."""


@cache
def _flex() -> Any:
    """Compiled once for rows of all lengths: each new length would take a minute else."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _blocks(taken_QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many blocks each row of blocks takes, int32[1, 1, Q], and which, int32[1, 1, Q, K], those first)."""
    order_QK = taken_QK.int().argsort(dim=-1, descending=True, stable=True)
    return taken_QK.sum(-1).int()[None, None], order_QK.int()[None, None]


def _mask(seen: int, lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    own = torch.block_diag(*(torch.ones(n, n, device=like.device).tril() for n in lengths))
    mask = torch.zeros(len(own), seen + len(own), dtype=like.dtype, device=like.device)
    mask[:, seen:].masked_fill_(own == 0, -torch.inf)
    return mask


# -- laying out


def plain(trees: Sequence[Tree], budget_tokens: int, device: torch.device | str = "cpu") -> Iterator[Pack]:
    """One row a candidate, as many of a state's at once as the budget allows: what trainers do that repeat the prefix.
    Arguments as for `pack`."""
    skipped = set(over_budget(trees, budget_tokens))
    for first, state in _numbered(trees):
        rows = [(g, a) for g, a in enumerate(map(np.asarray, state.actions), first) if len(a) and g not in skipped]
        context = np.asarray(state.context)
        if not rows:
            continue
        longest = max(len(a) for _, a in rows) - 1
        many = max(1, budget_tokens // (len(context) + longest))
        for some in (rows[i : i + many] for i in range(0, len(rows), many)):
            ids = np.stack(
                [np.pad(np.concatenate([context, a[:-1]]), (0, longest + 1 - len(a)), mode="edge") for _, a in some]
            )
            width = ids.shape[1]
            at = [row * width + len(context) - 1 + np.arange(len(a)) for row, (_, a) in enumerate(some)]
            positions = np.broadcast_to(np.arange(width), ids.shape)
            yield _pack(ids, positions, None, at, [a for _, a in some], [g for g, _ in some], device)


def pack(trees: Sequence[Tree], budget_tokens: int, device: torch.device | str = "cpu") -> Iterator[Pack]:
    """Trees side by side, in the order given, as many in a row as a budget of tokens allows.

    Args:
        trees: the states of each trajectory.
        budget_tokens: of a row. A tree over it is cut between its candidates, each part with the trunk that it needs; a single
            candidate over it (see `over_budget`) is left out.
        device: where the tensors lie.
    """
    row = _Row(device)
    for part in _parts(trees, budget_tokens):
        if row.size and row.size + _size(part) > budget_tokens:
            yield row.finish()
            row = _Row(device)
        row.add(part)
    if row.size:
        yield row.finish()


def over_budget(trees: Sequence[Tree], budget_tokens: int) -> list[int]:
    """The candidates, by number, that do not fit a row even alone."""
    return [
        first + g
        for first, state in _numbered(trees)
        for g, action in enumerate(state.actions)
        if len(action) and len(state.context) + len(action) - 1 > budget_tokens
    ]


_Branches = list[tuple[int, np.ndarray]]
"""(number, action) of a state's candidates."""
_Part = list[tuple[np.ndarray, _Branches]]
"""(context, candidates) of states whose contexts are prefixes of the last one's."""


def _numbered(trees: Sequence[Tree]) -> Iterator[tuple[int, State]]:
    """(number of its first action, state)."""
    number = 0
    for tree in trees:
        for state in tree:
            yield number, state
            number += len(state.actions)


def _size(part: _Part) -> int:
    trunk = part[-1][0]
    return len(trunk) + sum(
        len(action) - 1
        for context, branches in part
        for _, action in branches
        if not _along(trunk, len(context), action)
    )


def _along(trunk: np.ndarray, start: int, action: np.ndarray) -> bool:
    """Whether the trunk itself goes on with an action: it needs no branch then."""
    return np.array_equal(trunk[start : start + len(action) - 1], action[:-1])


def _parts(trees: Sequence[Tree], budget: int) -> Iterator[_Part]:
    """Trees in which every context really is a prefix of the next, cut between candidates where they are over the budget."""
    numbers = _numbered(trees)
    for tree in trees:
        part: _Part = []
        for _ in tree:
            first, state = next(numbers)
            context = np.asarray(state.context)
            if part and not np.array_equal(part[-1][0], context[: len(part[-1][0])]):
                yield part
                part = []
            for branch in enumerate(map(np.asarray, state.actions), first):
                if not len(branch[1]) or len(context) + len(branch[1]) - 1 > budget:
                    continue
                if part and _size([*part, (context, [branch])]) > budget:
                    yield part
                    part = []
                if not part or part[-1][0] is not context:
                    part.append((context, []))
                part[-1][1].append(branch)
        if part:
            yield part


class _Row:
    """A row of the tree-packed kind, while it is laid out."""

    def __init__(self, device: torch.device | str):
        self.device, self.size, self.layout = device, 0, Layout()
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.at: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.numbers: list[int] = []

    def _put(self, ids: np.ndarray, position: int) -> int:
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.size += len(ids)
        return self.size - len(ids)

    def add(self, part: _Part) -> None:
        trunk = part[-1][0]
        begin = self._put(trunk, 0)
        segments: list[int] = []
        groups: list[_Group] = []
        for context, branches in part:
            segments.append(len(context) - sum(segments))
            lengths = []
            for number, action in branches:
                first = begin + len(context)
                if not _along(trunk, len(context), action):
                    first = self._put(action[:-1], len(context))
                    lengths.append(len(action) - 1)
                inside = np.arange(first, first + len(action) - 1)
                self.at.append(np.concatenate([[begin + len(context) - 1], inside]))
                self.targets.append(action)
                self.numbers.append(number)
            groups.append(_Group(len(segments), tuple(lengths)))
        self.layout.trees.append((segments, [group for group in groups if group.lengths]))

    def finish(self) -> Pack:
        ids, positions = np.concatenate(self.ids)[None], np.concatenate(self.positions)[None]
        return _pack(ids, positions, self.layout, self.at, self.targets, self.numbers, self.device)


def _pack(ids, positions, layout, at, targets, numbers, device) -> Pack:
    owners = np.repeat(numbers, [len(target) for target in targets])
    arrays = ids, positions, np.concatenate(at), np.concatenate(targets), owners
    ids_BT, positions_BT, at_N, targets_N, action_N = (torch.tensor(array, device=device).long() for array in arrays)
    return Pack(ids_BT, positions_BT, layout, at_N, targets_N, action_N)


# -- attention


def _attend(query, key, value, layout: Layout, scale: float | None = None) -> torch.Tensor:
    """float[1, H, T, D]: each trunk causal, then each state's branches over the trunk up to it and themselves."""
    sizes: list[int] = []
    for segments, groups in layout.trees:
        sizes += [sum(segments), *(sum(group.lengths) for group in groups)]
    queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    masks = iter(layout.masks(query, repeats))
    attend = torch.nn.functional.scaled_dot_product_attention
    out, i = [], 0
    for segments, groups in layout.trees:
        out.append(attend(queries[i], keys[i], values[i], is_causal=True, scale=scale, enable_gqa=repeats > 1))
        parts = [x[i].split(segments, 2) for x in (keys, values)]
        for j, group in enumerate(groups, i + 1):
            seen = [torch.cat([*x[: group.segments], own[j]], 2) for x, own in zip(parts, (keys, values), strict=True)]
            together = grouped(queries[j], key.shape[1])
            done = attend(together, seen[0], seen[1], attn_mask=next(masks), scale=scale)
            out.append(done.reshape(*queries[j].shape[:3], -1))
        i += 1 + len(groups)
    return torch.cat(out, 2)


# -- log-probs and gradients


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What a loss is made of, at `n` action tokens; nats, of softmax(logits / tau)."""

    logprobs_n: torch.Tensor
    """log pi of the tokens that were sampled; with gradient."""
    reference_n: torch.Tensor
    """log pi_ref of the same. 0 without a reference."""
    kl_n: torch.Tensor
    """KL(pi || pi_ref), exact over the vocabulary; with gradient. 0 without a reference, or if it was not asked for."""
    entropy_n: torch.Tensor
    """Of pi; with gradient if that was asked for."""
    action_n: torch.Tensor
    """Which action each token belongs to."""
    n: slice
    """Which of the pack's action tokens these are."""


def backward(
    model, reference, pack: Pack, loss: Callable[[Terms], torch.Tensor], temperature: float = 1.0, *, exact: bool = True,
    entropy: bool = False,
) -> None:  # fmt: skip
    """Accumulate the gradient of a loss that is a sum over action tokens.

    Of a packed row the output head runs on a chunk of action tokens at a time and gives back its gradient before the next one
    begins, so the logits of all are never held at once.

    Args:
        model: a causal language model, in eval mode (dropout would take the gradient of another policy).
        reference: pi_ref: a frozen copy; `model` itself: with its adapter off (peft); `None`: no KL.
        pack: from `pack` or `plain`.
        loss: of some of the tokens; called once or more, and summed.
        temperature: tau, which divides the logits.
        exact: whether the loss reads `kl_n`.
        entropy: whether the loss reads `entropy_n`, which then has a gradient.
    """
    if pack.layout is None:
        # the model first, as below: processes that share layers gather them in one order
        own = _own_logits(model, pack)
        with frozen(model, reference):
            target = None if reference is None else _own_logits(reference, pack)
        loss(_terms(own, target, pack, slice(None), temperature, exact, entropy)).backward()
        return
    with attending(model, pack.layout):
        hidden_ND = _hidden(model, pack)
        leaf_ND = hidden_ND.detach().requires_grad_()
        target_ND = None
        with (
            frozen(model, reference),
            nullcontext() if reference in (None, model) else attending(reference, pack.layout),
        ):
            if reference is not None:
                target_ND = _hidden(reference, pack)
        for n in _chunks(model, len(leaf_ND)):
            with frozen(model, reference):
                target = None if target_ND is None else _logits(reference, target_ND[n])
            loss(_terms(_logits(model, leaf_ND[n]), target, pack, n, temperature, exact, entropy)).backward()
        hidden_ND.backward(leaf_ND.grad)


def nothing(terms: Terms) -> torch.Tensor:
    """The loss of a pass that is made for company."""
    return 0 * terms.logprobs_n.sum()


@torch.no_grad()
def logprobs(model, pack: Pack, temperature: float = 1.0) -> torch.Tensor:
    """float[N]: log pi of the action tokens, in nats."""
    if pack.layout is None:
        return _terms(_own_logits(model, pack), None, pack, slice(None), temperature).logprobs_n
    with attending(model, pack.layout):
        hidden_ND = _hidden(model, pack)
    return torch.cat([
        _terms(_logits(model, hidden_ND[n]), None, pack, n, temperature).logprobs_n for n in _chunks(model, len(hidden_ND))
    ])  # fmt: skip


@contextmanager
def frozen(model, reference) -> Iterator[None]:
    """As the reference is run: no gradient, and the adapter off where the model is its own reference."""
    with torch.no_grad(), model.disable_adapter() if reference is model else nullcontext():
        yield


def _chunks(model, count: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    parts = math.ceil(count / size)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def _own_logits(model, pack: Pack) -> torch.Tensor:
    """float[N, V] by the model's own forward pass: rows share their context, so all action tokens are at its end."""
    rows, width = pack.ids_BT.shape
    first = int(pack.at_N.min())
    logits = model(pack.ids_BT, use_cache=False, logits_to_keep=width - first).logits
    return logits[pack.at_N // width, pack.at_N % width - first]


def _hidden(model, pack: Pack) -> torch.Tensor:
    """float[N, D]: what the output head reads to predict each action token."""
    out = model.get_decoder()(
        input_ids=pack.ids_BT, attention_mask=torch.ones_like(pack.ids_BT), position_ids=pack.positions_BT, use_cache=False
    )  # fmt: skip
    return out.last_hidden_state.flatten(0, 1)[pack.at_N]


def _logits(model, hidden_nD: torch.Tensor) -> torch.Tensor:
    """float[n, V], with what some families do to their logits."""
    logits, config = model.get_output_embeddings()(hidden_nD), model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def _terms(
    logits_nV, reference_nV, pack: Pack, n: slice, temperature: float, exact: bool = True, entropy: bool = False
) -> Terms:
    logprobs_nV = _log_softmax(logits_nV, temperature)
    targets_n1 = pack.targets_N[n, None]
    taken_n = logprobs_nV.gather(-1, targets_n1)[:, 0]
    reference_n = kl_n = torch.zeros_like(taken_n)
    if reference_nV is not None:
        reference_nV = _log_softmax(reference_nV, temperature)
        reference_n = reference_nV.gather(-1, targets_n1)[:, 0]
        if exact:
            kl_div = torch.nn.functional.kl_div
            kl_n = kl_div(reference_nV, logprobs_nV, reduction="none", log_target=True).sum(-1)
    with nullcontext() if entropy else torch.no_grad():
        entropy_n = -torch.linalg.vecdot(logprobs_nV.exp(), logprobs_nV)
    return Terms(taken_n, reference_n, kl_n, entropy_n, pack.action_N[n], n)


def _log_softmax(logits_nV: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_nV = logits_nV if logits_nV.dtype == torch.float64 else logits_nV.float()
    return torch.log_softmax(logits_nV if temperature == 1 else logits_nV / temperature, -1)


# -- which models


def why_not(model) -> str | None:
    """Why a model cannot be packed, in a sentence; `None` if it can. Tries a small tree, so that a family with ways of its own
    (positions inside its attention, another output head) is found out and not trusted."""
    if (reason := obstacle(model)) is not None:
        return reason
    draw = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    trunk = draw.integers(0, vocabulary, 23)
    tree = [State(trunk[:s], [draw.integers(0, vocabulary, n) for n in (5, 1, 3)]) for s in (3, 11, 23)]
    device = model.device
    try:
        with in_eval_mode(model):
            [packed] = pack([tree], 100, device)
            fast_N = logprobs(model, packed)
            plain_N = torch.cat([logprobs(model, one) for one in plain([tree], 100, device)])
    except Exception as error:  # model code raises whatever it likes
        return f"its code does not take a branching row ({type(error).__name__}: {error})"
    return differ(fast_N, plain_N, model.dtype)
