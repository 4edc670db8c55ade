"""The rollout engine: continuous batching over slots of keys and values that outlive a call.

Every sample being drawn has a slot: a row of buffers that hold its keys and values by position. A decoding step runs over all
busy slots at once; a sample that ends gives its slot to the last one, and a request that arrives takes the next, so samples
enter and leave at any step and nobody waits for the slowest. `PrefixStore` keeps what slots held, by its tokens: a state that
continues (after a tool has answered) is prefilled from where it was left, the n samples of a state share one prefill, and so
do the states of a trajectory. What is kept is bounded in tokens; the least recently used is dropped and prefilled again when
it is asked for.

Shapes: `B` busy slots, `Q` new tokens of each, `P` positions that are attended to, `V` vocabulary. On a GPU the decoding step has
static shapes (B and P rounded up) and is captured as a CUDA graph for each. Models that keep other state than keys and
values of every token, or want their masks otherwise (`why_not`), are run by `Batches`: whole batches with their own cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

PREFILL_TOKENS = 2048
"""Tokens, padding included, that are prefilled in one forward pass (a longer state has one to itself)."""
MIN_SHARED = 32
"""Tokens that waiting states must begin with for their common beginning to be prefilled on its own."""
STEP_POSITIONS = 256
"""Buffers grow, and captured graphs differ, by so many positions."""


class Row(Protocol):
    """One sample being drawn."""

    ids: list[int]
    finish: str | None
    """`None` while it goes on."""


@dataclass(eq=False)
class Request:
    """A state and the samples to draw there."""

    ids: np.ndarray
    """int[T]: the state."""
    rows: Sequence[Any]
    """A `Row` for each."""
    keep: bool = False
    """Whether the state is likely to be continued by what its (only) sample says."""
    left: int = field(init=False)
    """Samples that are not done."""

    def __post_init__(self) -> None:
        self.left = len(self.rows)


Sample = Callable[[torch.Tensor, Sequence[Any]], None]
"""(logits float[B, V], B rows): appends to each row's `ids` and sets `finish`."""


def has_plain_cache(model) -> bool:
    """Whether a model's cache is keys and values of every token: no sliding window, no state space."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


# -- what is kept


@dataclass(slots=True, eq=False)
class _Entry:
    ids: np.ndarray
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """Per layer, keys and values as [H, T, D]."""


class PrefixStore:
    """Keys and values of recent states by their token ids, at most `budget_tokens` of them (but always the last one)."""

    def __init__(self, budget_tokens: int):
        self.budget_tokens = budget_tokens
        self._entries: list[_Entry] = []

    def clear(self) -> None:
        self._entries = []

    def find(self, ids: np.ndarray) -> tuple[int, _Entry | None]:
        """The longest kept prefix of `ids` that leaves at least one token: (its length, its entry)."""
        best, entry = 0, None
        for candidate in self._entries:
            size = min(len(candidate.ids), len(ids) - 1)
            if size <= best:
                continue
            differ = np.flatnonzero(candidate.ids[:size] != ids[:size])
            same = int(differ[0]) if len(differ) else size
            if same > best:
                best, entry = same, candidate
        if entry is not None:
            self._entries.remove(entry)
            self._entries.append(entry)
        return best, entry

    def put(self, ids: np.ndarray, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep a state; those that it continues are dropped."""
        self._entries = [
            e for e in self._entries if not (len(e.ids) <= len(ids) and np.array_equal(e.ids, ids[: len(e.ids)]))
        ]
        self._entries.append(_Entry(ids, layers))
        while len(self._entries) > 1 and sum(len(entry.ids) for entry in self._entries) > self.budget_tokens:
            self._entries.pop(0)


# -- slots


@dataclass(slots=True)
class _Plan:
    """Which slots the forward pass in progress reads and writes."""

    begin: int = 0
    end: int = 0
    positions: int = 0
    """P"""
    write_BQ: Any = None
    """int64[B, Q]: where each new token goes."""
    slot_B1: Any = None


class _Slots(DynamicLayer):
    """One layer's keys and values as [slots, H, capacity, D], by position."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, plan: _Plan):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys: Any = keys
        self.values: Any = values
        self.plan = plan

    def update(self, key_states, value_states, *args, **kwargs):
        plan, seen = self.plan, []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[plan.slot_B1, :, plan.write_BQ] = new.transpose(1, 2)
            seen.append(buffer[plan.begin : plan.end, :, : plan.positions])
        return tuple(seen)

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.plan.positions


class Engine:
    """Draws samples from a model, many at once.

    Args:
        model: a causal language model for which `why_not` has no objection.
        sample: takes a token for each row.
        max_new_tokens: that a row may take.
        batch_tokens: slots x positions that are decoded at once; bounds memory. One row is always run, whatever its length.
        cache_tokens: tokens whose keys and values are kept when their slot is given away.
    """

    def __init__(self, model, sample: Sample, *, max_new_tokens: int, batch_tokens: int, cache_tokens: int):
        self.model, self.sample = model, sample
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.store = PrefixStore(cache_tokens)
        self._version: tuple[int, ...] = ()
        self._waiting: list[tuple[Request, int]] = []  # and the first of its rows that waits
        self._busy: list[tuple[Request, Any]] = []  # by slot
        self._lengths: list[int] = []  # positions that a slot holds
        self._plan = _Plan()
        self._layers: list[_Slots] = []
        self._graphs: dict[tuple[int, int], Any] = {}
        self.prefilled = self.decoded = 0
        """Tokens so far, padding left out."""

    def add(self, request: Request) -> None:
        """Take a request; its samples enter the batch at the next step."""
        self._waiting.append((request, 0))

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests, wherever they are."""
        gone = {id(request) for request in requests}
        self._waiting = [(request, first) for request, first in self._waiting if id(request) not in gone]
        for request, row in self._busy:
            if id(request) in gone:
                request.keep, row.finish = False, row.finish or "dropped"
        self._release()

    @torch.inference_mode()
    def step(self) -> None:
        """Let waiting samples in as far as there is room, and take one token for each."""
        self._forget_other_weights()
        self._admit()
        if self._busy:
            size = len(self._busy)
            logits = self._decode([row.ids[-1] for _, row in self._busy], self._lengths)
            self.decoded += size
            self._lengths = [length + 1 for length in self._lengths]
            self.sample(logits[:size], [row for _, row in self._busy])
            self._release()

    def _forget_other_weights(self) -> None:
        version = tuple(parameter._version for parameter in self.model.parameters())
        if version != self._version:
            self.store.clear()
            self._version = version

    # -- entering

    def _admit(self) -> None:
        chosen: list[tuple[Request, int, int]] = []
        rows, longest = len(self._busy), max(self._lengths, default=0) + self.max_new_tokens
        while self._waiting:
            request, first = self._waiting[0]
            longest = max(longest, len(request.ids) + self.max_new_tokens)
            room = self.batch_tokens // longest - rows
            if room < 1 and rows:
                break
            last = min(len(request.rows), first + max(1, room))
            chosen.append((request, first, last))
            rows += last - first
            if last < len(request.rows):
                self._waiting[0] = request, last
                break
            self._waiting.pop(0)
        if not chosen:
            return
        self._reserve(rows, longest)
        for trunk in shared_trunks([request.ids for request, _, _ in chosen]):
            if self.store.find(trunk)[0] < len(trunk) - 1:
                self._prefill([trunk])
                self._keep(len(self._busy), trunk)
        split = {id(request) for request, first, last in chosen if last - first < len(request.rows)}
        found = {id(request): self.store.find(request.ids)[0] for request, _, _ in chosen}
        for batch in _alike(chosen, lambda one: len(one[0].ids) - found[id(one[0])]):
            logits = self._prefill([request.ids for request, _, _ in batch])
            begin = len(self._busy)
            for slot, (request, first, _) in enumerate(batch, begin):
                self._take(slot, request, first)
                if id(request) in split:  # later samples find the state here
                    self._keep(slot, request.ids)
            source = list(range(len(batch)))
            for i, (request, first, last) in enumerate(batch):  # the other samples of a state begin as the first
                for row in range(first + 1, last):
                    self._copy(begin + i, len(self._busy), len(request.ids))
                    self._take(len(self._busy), request, row)
                    source.append(i)
            self.sample(logits[source], [row for _, row in self._busy[begin:]])
            self._release()

    def _take(self, slot: int, request: Request, row: int) -> None:
        assert slot == len(self._busy)
        self._busy.append((request, request.rows[row]))
        self._lengths.append(len(request.ids))

    def _prefill(self, prompts: list[np.ndarray]) -> torch.Tensor:
        """Put states into the slots behind the busy ones; float[B, V], logits of the token after each."""
        begin, device = len(self._busy), self.model.device
        found = [self.store.find(prompt) for prompt in prompts]
        new = [prompt[size:] for prompt, (size, _) in zip(prompts, found, strict=True)]
        width, dump = max(map(len, new)), self._layers[0].keys.shape[2] - 1
        tokens = np.zeros((len(prompts), width), np.int64)
        positions = np.zeros((len(prompts), width), np.int64)
        write = np.full((len(prompts), width), dump)  # padding goes where nobody looks
        for slot, (part, (size, entry)) in enumerate(zip(new, found, strict=True)):
            if entry is not None:
                for layer, (keys, values) in zip(self._layers, entry.layers, strict=True):
                    layer.keys[begin + slot, :, :size] = keys[:, :size]
                    layer.values[begin + slot, :, :size] = values[:, :size]
            tokens[slot, width - len(part) :] = part
            positions[slot, width - len(part) :] = write[slot, width - len(part) :] = np.arange(size, size + len(part))
        self.prefilled += sum(map(len, new))
        tokens_BQ, positions_BQ, write_BQ = (torch.from_numpy(array).to(device) for array in (tokens, positions, write))
        return self._forward(tokens_BQ, positions_BQ, write_BQ, begin, max(map(len, prompts)))

    # -- one pass

    def _forward(self, tokens_BQ, positions_BQ, write_BQ, begin: int, positions: int) -> torch.Tensor:
        """float[B, V]: logits after the last token of each of the slots from `begin` on."""
        plan, end = self._plan, begin + len(tokens_BQ)
        plan.begin, plan.end, plan.positions, plan.write_BQ = begin, end, positions, write_BQ
        plan.slot_B1 = torch.arange(begin, end, device=tokens_BQ.device)[:, None]
        hidden = torch.arange(positions, device=tokens_BQ.device) > positions_BQ[..., None]
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=hidden.device)
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)[:, None]
        cache = DynamicCache()
        cache.layers = list(self._layers)
        out = self.model(
            tokens_BQ, attention_mask=mask, position_ids=positions_BQ, past_key_values=cache, use_cache=True, logits_to_keep=1
        )  # fmt: skip
        return out.logits[:, -1]

    def _decode(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        device = self.model.device
        tokens_B1, positions_B1 = (torch.tensor(values, device=device)[:, None] for values in (tokens, lengths))
        positions = max(lengths) + 1
        if device.type != "cuda":
            return self._forward(tokens_B1, positions_B1, positions_B1, 0, positions)
        # static shapes: slots that are not busy write to themselves, positions beyond a row's own are masked
        slots, capacity = self._layers[0].keys.shape[0], self._layers[0].keys.shape[2]
        rows = min(slots, 1 << (len(tokens) - 1).bit_length())
        positions = min(capacity, -(-positions // STEP_POSITIONS) * STEP_POSITIONS)
        graph = self._graphs.get((rows, positions)) or self._capture(rows, positions)
        graph.tokens[: len(tokens)], graph.positions[: len(tokens)] = tokens_B1, positions_B1
        graph.positions[len(tokens) :] = 0
        graph.graph.replay()
        return graph.logits

    def _capture(self, rows: int, positions: int) -> Any:
        graph = _Graph(*(torch.zeros(rows, 1, dtype=torch.long, device=self.model.device) for _ in range(2)))
        graph.positions += self._layers[0].keys.shape[2] - 1  # while trying out, write where nobody looks
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(graph.tokens, graph.positions, graph.positions, 0, positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph.graph):
            graph.logits = self._forward(graph.tokens, graph.positions, graph.positions, 0, positions)
        self._graphs[rows, positions] = graph
        return graph

    # -- leaving

    @torch.inference_mode()
    def _release(self) -> None:
        """Free the slots of rows that have ended; the last busy slots move into the gaps."""
        for slot in reversed(range(len(self._busy))):
            request, row = self._busy[slot]
            if row.finish is None:
                continue
            if request.keep:
                said = np.asarray(row.ids[: self._lengths[slot] - len(request.ids)], request.ids.dtype)
                self._keep(slot, np.concatenate([request.ids, said]))
            last = len(self._busy) - 1
            if slot != last:
                self._copy(last, slot, self._lengths[last])
                self._busy[slot], self._lengths[slot] = self._busy[last], self._lengths[last]
            self._busy.pop()
            self._lengths.pop()
            request.left -= 1

    def _keep(self, slot: int, ids: np.ndarray) -> None:
        """Put what a slot holds into the store."""
        self.store.put(
            ids,
            [
                (layer.keys[slot, :, : len(ids)].clone(), layer.values[slot, :, : len(ids)].clone())
                for layer in self._layers
            ],
        )

    def _copy(self, source: int, target: int, length: int) -> None:
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                buffer[target, :, :length] = buffer[source, :, :length]

    def _reserve(self, slots: int, positions: int) -> None:
        """Buffers of at least this size (one slot and position more, for shared beginnings and padding); what is there stays."""
        if not self._layers:
            layers: list[Any] = _one_token(self.model).layers
            self._layers = [_Slots(layer.keys[:, :, :0], layer.values[:, :, :0], self._plan) for layer in layers]
        have = self._layers[0].keys.shape[0], self._layers[0].keys.shape[2]
        need = slots + 1, -(-(positions + 1) // STEP_POSITIONS) * STEP_POSITIONS
        if need[0] <= have[0] and positions + 1 <= have[1]:
            return
        slots, positions = max(need[0], have[0]), max(need[1], have[1])
        if slots * positions > 2 * self.batch_tokens:  # few long states after many short ones, or the other way
            slots, positions = need
        self._graphs.clear()
        held = max(self._lengths, default=0)
        for layer in self._layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(slots, old.shape[1], positions, old.shape[3])
                new[: len(self._busy), :, :held] = old[: len(self._busy), :, :held]
                setattr(layer, name, new)


@dataclass(eq=False)
class _Graph:
    tokens: torch.Tensor
    positions: torch.Tensor
    graph: Any = None
    logits: Any = None


def shared_trunks(prompts: list[np.ndarray]) -> list[np.ndarray]:
    """What several states begin with, to be prefilled once: states that others continue, and the common beginning of all
    (the instructions)."""
    if len(prompts) < 2:
        return []
    ordered = sorted((prompt.tolist() for prompt in prompts), key=tuple)  # what continues a state follows it
    low, high = ordered[0], ordered[-1]
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    trunks = [np.asarray(low[:common], np.int32)] if common >= MIN_SHARED else []
    following = [*ordered[1:], []]
    for i, (prompt, after) in enumerate(zip(ordered, following, strict=True)):
        before = ordered[i - 1] if i else []
        continues = bool(before) and len(prompt) > len(before) and prompt[: len(before)] == before
        if continues and after[: len(prompt)] != prompt:
            trunks.append(np.asarray(prompt, np.int32))
    return trunks


def _alike(items: list[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Items of like length together, at most `PREFILL_TOKENS` a batch with padding."""
    batch: list[Any] = []
    for item in sorted(items, key=length):
        if batch and (len(batch) + 1) * length(item) > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _one_token(model) -> Any:
    """A cache with one token, which shows its shapes."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return model(ids, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values


# -- models of other kinds


class Batches:
    """The same interface for any causal model: whole batches, padded on the left, with the model's own cache."""

    def __init__(self, model, sample: Sample, *, max_new_tokens: int, batch_tokens: int, pad_id: int):
        self.model, self.sample, self.pad_id = model, sample, pad_id
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self._waiting: list[Request] = []

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def drop(self, requests: Sequence[Request]) -> None:
        self._waiting = [request for request in self._waiting if request not in requests]

    def step(self) -> None:
        """Run as many of the waiting requests as there is room for, to their end."""
        batch: list[Request] = []
        rows = longest = 0
        for request in sorted(self._waiting, key=lambda one: len(one.ids)):
            rows, longest = rows + len(request.rows), max(longest, len(request.ids) + self.max_new_tokens)
            if batch and rows * longest > self.batch_tokens:
                break
            batch.append(request)
        if batch:
            self._run(batch)
        for request in batch:
            self._waiting.remove(request)
            request.left = 0

    @torch.inference_mode()
    def _run(self, batch: list[Request]) -> None:
        rows = [row for request in batch for row in request.rows]
        prompts = [request.ids for request in batch for _ in request.rows]
        longest = max(map(len, prompts))
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
        device = self.model.device
        tokens, mask_BP = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        cache: Any = None
        while True:
            positions = (mask_BP.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = self.model(
                tokens, attention_mask=mask_BP, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )  # fmt: skip
            cache, logits = out.past_key_values, out.logits[:, -1]
            going = [i for i, row in enumerate(rows) if row.finish is None]
            self.sample(logits[going], [rows[i] for i in going])
            if all(row.finish is not None for row in rows):
                return
            tokens = torch.tensor([[row.ids[-1]] for row in rows], device=device)
            mask_BP = torch.cat([mask_BP, mask_BP.new_ones(len(rows), 1)], 1)


class _Fixed:
    """Takes given tokens, whatever the logits, which it notes."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.ids, self.seen = tokens.tolist(), list[int](), list[torch.Tensor]()
        self.finish: str | None = None


def why_not(model) -> str | None:
    """Why `Engine` cannot run a model, in a sentence; `None` if it can. Tries a few tokens against the model's own forward pass."""
    if not has_plain_cache(model):
        return "it keeps no plain keys and values of every token (a sliding window or a state space)"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({model.config._attn_implementation}) takes no mask of slots"
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, model.config.get_text_config().vocab_size, n) for n in (9, 6)]
    rows = [_Fixed(text[-3:]) for text in texts]

    def take(logits: torch.Tensor, some: Sequence[_Fixed]) -> None:
        for row, logits_V in zip(some, logits, strict=True):
            row.seen.append(logits_V.float())
            row.ids.append(row.tokens[len(row.ids)])
            row.finish = "stop" if len(row.ids) == 3 else None

    engine = Engine(model, take, max_new_tokens=3, batch_tokens=64, cache_tokens=64)
    for text, row in zip(texts, rows, strict=True):
        engine.add(Request(text[:-3], [row]))
    try:
        while any(row.finish is None for row in rows):
            engine.step()
        with torch.inference_mode():
            plain = [model(torch.from_numpy(text)[None].to(model.device)).logits[0, -4:-1].float() for text in texts]
    except Exception as error:  # model code raises whatever it likes
        return f"its code does not take slots ({type(error).__name__}: {error})"
    apart = max(float((torch.stack(row.seen) - logits).abs().max()) for row, logits in zip(rows, plain, strict=True))
    scale = max(float(logits.abs().max()) for logits in plain)
    if apart > (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1) * scale:
        return f"on a small example its logits differ by {apart:.2g}"
    return None
