"""The rollout engine: continuous batching over slots of keys and values that outlive a call.

A state that is being answered has a slot: a row of buffers that hold its keys and values by position, and after them those of
the samples drawn there, each of which sees the state and itself. One forward pass takes a token for every sample and prefills the
states that have just come, all in one row of tokens (no padding outside attention); a state whose samples have ended
gives its slot to the last one, so samples enter and leave at any step and nobody waits for the slowest.

`PrefixStore` keeps what slots held, by its tokens: a state that continues (after a tool has answered) is prefilled from where it was
left, and the states of a trajectory share one prefill. What is kept is bounded in tokens; the least recently used is dropped
and prefilled again when it is asked for.

Shapes: `N` tokens of a pass, `M` busy samples, `B` logits wanted, `V` vocabulary, `H` heads of size `D`. On a GPU the steps without
newcomers have static shapes and are captured as CUDA graphs (`graphs`). Models that keep other state than keys and values of
every token, or attend in ways of their own (`why_not`), are run by `Batches`: whole batches with their own cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache

from swirl_agents.attention import attending, differ, grouped, in_eval_mode, obstacle
from swirl_agents.graphs import Graphs, Step
from swirl_agents.prefixes import PrefixStore, shared_trunks

PREFILL_TOKENS = 2048
"""Tokens of states from which on no more are let in at one step."""
STEP_POSITIONS = 64
"""Buffers grow, and captured graphs differ, by so many positions."""


class Row(Protocol):
    """One sample being drawn."""

    cap: int
    """Tokens that it may take."""
    ids: list[int]
    finish: str | None
    """`None` while it goes on."""

    def restart(self) -> None:
        """Forget what was taken: it is drawn anew, by the same seed."""


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


# -- slots


TRUNK, FREE = -1, -2
"""Owners of a position that belong to no sample."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A state and the samples being drawn there: its tokens first, then theirs in the order in which they come."""

    request: Request
    rows: list[Any]
    used: int
    """Positions taken."""


@dataclass(slots=True)
class _Piece:
    """New tokens of a state that is being prefilled."""

    slot: int
    kept: int
    """Positions before them."""
    ids: np.ndarray
    mask: torch.Tensor | None = None


class Engine:
    """Draws samples from a model, many at once.

    Args:
        model: a causal language model for which `why_not` has no objection.
        sample: takes a token for each row.
        batch_tokens: slots x positions that are decoded at once; bounds memory. One sample is always run, whatever its length.
        cache_tokens: tokens whose keys and values are kept when their slot is given away.
    """

    def __init__(self, model, sample: Sample, *, batch_tokens: int, cache_tokens: int):
        self.model, self.sample, self.batch_tokens = model, sample, batch_tokens
        self.store = PrefixStore(cache_tokens)
        self.static = model.device.type == "cuda" and not any(isinstance(one, FSDPModule) for one in model.modules())
        """Whether steps without newcomers take static shapes; not where layers are shared out, whose hooks no graph could capture."""
        self._version: tuple[Any, ...] = ()
        self._waiting: list[tuple[Request, list[Any]]] = []  # and those of its rows that wait
        self._slots: list[_Slot] = []
        self._buffers: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # of each layer, keys and values [slots, H_kv, capacity, D]
        self._owners: Any = None  # int16[slots, capacity]: which of the slot's samples each position belongs to
        self._graphs = Graphs(model.device)
        self.prefilled = self.decoded = 0
        """Tokens so far."""

    def add(self, request: Request) -> None:
        """Take a request; its samples enter the batch at the next step."""
        self._waiting.append((request, list(request.rows)))

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests, wherever they are."""
        gone = {id(request) for request in requests}
        self._waiting = [(request, rows) for request, rows in self._waiting if id(request) not in gone]
        for slot in self._slots:
            if id(slot.request) in gone:
                slot.request.keep = False
                for row in slot.rows:
                    row.finish = row.finish or "dropped"
        self._release()

    @torch.inference_mode()
    def step(self) -> None:
        """Let waiting states in as far as there is room, and take one token for each sample, in one forward pass. Where that raises,
        all samples begin anew at the next step."""
        if (version := self._now()) != self._version:
            self.forget()
            self._version = version
        before = list(self._waiting)
        try:
            self._step()
        except BaseException:
            self._waiting = before
            self._restart()
            raise

    def forget(self) -> None:
        """Drop all keys and values, of what is kept and of what is being drawn (those samples begin anew): the model has changed. New
        weights and adapters are noticed; changes behind autograd's back (`parameter.data`) are not."""
        self.store.clear()
        self._graphs.clear()
        self._restart()

    def free(self) -> None:
        """As `forget`, and give the memory back."""
        self.forget()
        self._buffers, self._owners = [], None

    def _now(self) -> tuple[Any, ...]:
        version: list[Any] = [parameter._version for parameter in self.model.parameters()]
        if hasattr(self.model, "peft_config"):
            for module in self.model.modules():
                if isinstance(active := getattr(module, "active_adapters", None), list):  # a layer with adapters
                    version += [module.disable_adapters, *active]
        return tuple(version)

    def _restart(self) -> None:
        waiting = {id(row) for _, rows in self._waiting for row in rows}
        for slot in reversed(self._slots):
            rows = [row for row in slot.rows if id(row) not in waiting]
            for row in slot.rows:
                row.restart()
            if rows:
                self._waiting.insert(0, (slot.request, rows))
        self._slots = []

    def _step(self) -> None:
        busy = [
            (place, lane)
            for place, slot in enumerate(self._slots)
            for lane, row in enumerate(slot.rows)
            if row.finish is None
        ]
        pieces = self._admit()
        if not busy and not pieces:
            return
        rows = [self._slots[place].rows[lane] for place, lane in busy]
        if pieces or not self.static:
            logits = self._forward(self._lay_out(busy, pieces), [row.ids[-1] for row in rows])
        else:
            logits = self._replay(busy, [row.ids[-1] for row in rows])
        self.decoded += len(busy)
        source = list(range(len(busy)))
        for i, piece in enumerate(pieces, len(busy)):  # all samples of a state begin with the same logits
            rows += self._slots[piece.slot].rows
            source += [i] * len(self._slots[piece.slot].rows)
        self.sample(logits[: len(busy)] if not pieces else logits[source], rows)
        self._release()

    # -- entering

    def _admit(self) -> list[_Piece]:
        """Give slots to waiting states; what is to be prefilled of them."""
        chosen: list[tuple[Request, list[Any]]] = []
        longest, new = max((self._needs(slot.request, slot.rows) for slot in self._slots), default=0), 0
        while self._waiting and (not chosen or new < PREFILL_TOKENS):
            request, rows = self._waiting[0]
            count = len(self._slots) + len(chosen) + 1
            room = self.batch_tokens // (count + 1)  # `_reserve` takes a slot more
            lanes = min(len(rows), max(1, (room - STEP_POSITIONS - len(request.ids)) // max(row.cap for row in rows)))
            wide = max(longest, self._needs(request, rows[:lanes]))
            if count > 1 and wide > room:
                break
            longest, new = wide, new + len(request.ids) - self.store.find(request.ids)[0]
            chosen.append((request, rows[:lanes]))
            self._waiting[:1] = [(request, rows[lanes:])] if lanes < len(rows) else []
        if not chosen:
            return []
        self._reserve(len(self._slots) + len(chosen), longest)
        for trunk in shared_trunks([request.ids for request, _ in chosen]):
            if self.store.find(trunk)[0] < len(trunk) - 1:
                self._keep_trunk(trunk)
        pieces = []
        for request, rows in chosen:
            if len(rows) < len(request.rows) and self.store.find(request.ids)[0] < len(request.ids) - 1:
                self._keep_trunk(request.ids)  # its other samples come later
            pieces.append(self._enter(len(self._slots), request.ids))
            self._slots.append(_Slot(request, rows, len(request.ids)))
        return pieces

    def _needs(self, request: Request, rows: Sequence[Row]) -> int:
        """Positions of a slot, one more for padding, in whole steps."""
        positions = len(request.ids) + sum(row.cap for row in rows) + 1
        return -(-positions // STEP_POSITIONS) * STEP_POSITIONS

    def _enter(self, place: int, ids: np.ndarray) -> _Piece:
        """Copy what is kept of a state into a free slot, and clear what follows: it is masked, but 0 x NaN is NaN."""
        size, entry = self.store.find(ids)
        for buffer in (part for buffers in self._buffers for part in buffers):
            buffer[place, :, len(ids) :] = 0
        if entry is not None:
            for buffers, kept in zip(self._buffers, entry.layers, strict=True):
                for buffer, part in zip(buffers, kept, strict=True):
                    buffer[place, :, :size] = part[:, :size]
        self._owners[place] = FREE
        self._owners[place, : len(ids)] = TRUNK
        self.prefilled += len(ids) - size
        return _Piece(place, size, ids[size:])

    def _keep_trunk(self, ids: np.ndarray) -> None:
        """Prefill a beginning that several states share, and keep it."""
        piece = self._enter(len(self._slots), ids)
        self._forward(self._lay_out([], [piece]), [])
        self._keep(piece.slot, ids)

    # -- one pass

    def _lay_out(self, busy: list[tuple[int, int]], pieces: list[_Piece]) -> "_Batch":
        """A row of tokens: one of each busy sample, then those of the pieces."""
        device = self.model.device
        slots, lanes, write, positions = [], [], [], []
        for place, lane in busy:
            slot = self._slots[place]
            slots.append(place)
            lanes.append(lane)
            write.append(slot.used)
            positions.append(len(slot.request.ids) + len(slot.rows[lane].ids) - 1)
            slot.used += 1
        at = [*range(len(busy))]
        total = len(busy)
        for piece in pieces:
            new = range(piece.kept, piece.kept + len(piece.ids))
            slots += [piece.slot] * len(new)
            write += new
            positions += new
            total += len(new)
            at.append(total - 1)
        slot_N, write_N, positions_N, lane_M, at_B = (
            torch.tensor(values, dtype=torch.long, device=device) for values in (slots, write, positions, lanes, at)
        )
        return _Batch(
            self, slot_N, write_N, positions_N, lane_M, at_B, pieces,
            rows=max((place for place, _ in busy), default=-1) + 1,
            width=max((len(list(group)) for _, group in groupby(place for place, _ in busy)), default=0),
            reach=max((self._slots[place].used for place, _ in busy), default=0),
        )  # fmt: skip

    def _forward(self, batch: "_Batch", tokens: list[int]) -> torch.Tensor:
        """float[B, V]: logits after each busy sample's last token, then after each piece."""
        ids = np.concatenate([np.asarray(tokens, np.int64), *(piece.ids for piece in batch.pieces)])
        return self._run(batch, torch.from_numpy(ids.astype(np.int64)).to(self.model.device))

    def _run(self, batch: "_Batch", ids_N: torch.Tensor) -> torch.Tensor:
        batch.begin()
        with attending(self.model, batch):
            # a mask of ones: without one, models look for packed sequences, which waits for the device
            out = self.model(
                ids_N[None], attention_mask=torch.ones_like(ids_N)[None], position_ids=batch.positions_N[None],
                use_cache=False, logits_to_keep=batch.at_B,
            )  # fmt: skip
        return out.logits[0]

    def _replay(self, busy: list[tuple[int, int]], tokens: list[int]) -> torch.Tensor:
        """A step without newcomers on a GPU: static shapes, captured once for each. What fills them up writes where nobody looks."""
        batch = self._lay_out(busy, [])
        slots, capacity = self._owners.shape
        rows, width = min(slots - 1, _rounded(batch.rows)), _rounded(batch.width)
        reach = min(capacity, -(-batch.reach // STEP_POSITIONS) * STEP_POSITIONS)
        shape = _rounded(len(busy)), rows, width, reach
        ids_M = torch.tensor(tokens, device=self.model.device)
        given = [ids_M, batch.slot_N, batch.write_N, batch.positions_N, batch.lane_M]
        return self._graphs.run(shape, partial(self._static, *shape), given)

    def _static(self, count: int, rows: int, width: int, reach: int) -> Step:
        """A step of up to `count` samples."""
        device = self.model.device
        # a slot behind the busy ones, and its last position
        ids_N, slot_N, write_N, positions_N, lane_M = inputs = [
            torch.full((count,), value, dtype=torch.long, device=device)
            for value in (0, rows, self._owners.shape[1] - 1, 0, 0)
        ]
        batch = _Batch(
            self, slot_N, write_N, positions_N, lane_M, torch.arange(count, device=device), [],
            rows=rows + 1, width=width, reach=reach,
        )  # fmt: skip
        return partial(self._run, batch, ids_N), inputs

    # -- leaving

    @torch.inference_mode()
    def _release(self) -> None:
        """Free the slots whose samples have all ended; the last busy slots move into the gaps."""
        for place in reversed(range(len(self._slots))):
            slot = self._slots[place]
            if any(row.finish is None for row in slot.rows):
                continue
            if slot.request.keep:
                said = np.asarray(slot.rows[0].ids, slot.request.ids.dtype)
                self._keep(place, np.concatenate([slot.request.ids, said])[: slot.used])
            last = self._slots.pop()
            if last is not slot:
                self._slots[place] = last
                for buffer in (part for buffers in self._buffers for part in buffers):
                    buffer[place, :, : last.used] = buffer[len(self._slots), :, : last.used]
                    buffer[place, :, last.used : slot.used] = 0
                self._owners[place] = self._owners[len(self._slots)]
            slot.request.left -= len(slot.rows)

    def _keep(self, place: int, ids: np.ndarray) -> None:
        """Put what a slot holds into the store."""
        copied = [
            (keys[place, :, : len(ids)].clone(), values[place, :, : len(ids)].clone()) for keys, values in self._buffers
        ]
        self.store.put(ids, copied)

    def _reserve(self, slots: int, positions: int) -> None:
        """Buffers of at least this size, and a slot more for shared beginnings and padding."""
        if not self._buffers:
            layers: list[Any] = _one_token(self.model).layers
            self._buffers = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in layers]
            self._owners = torch.full((1, 0), FREE, dtype=torch.int16, device=self.model.device)
        have, need = self._owners.shape, (slots + 1, positions)
        if need[0] <= have[0] and need[1] <= have[1]:
            return
        # twice the slots, so that this is rare; but no more than the budget, or what is needed
        size = max(2 * need[0], have[0]), max(need[1], have[1])
        if size[0] * size[1] > self.batch_tokens:
            size = max(need[0], self.batch_tokens // need[1]), need[1]
        self._graphs.clear()
        busy, reach = len(self._slots), max((slot.used for slot in self._slots), default=0)

        def grown(old: torch.Tensor) -> torch.Tensor:
            new = old.new_zeros(size[0], old.shape[1], size[1], old.shape[3])
            new[:busy, :, :reach] = old[:busy, :, :reach]
            return new

        for i, (keys, values) in enumerate(self._buffers):
            self._buffers[i] = grown(keys), grown(values)
        owners = torch.full(size, FREE, dtype=torch.int16, device=self._owners.device)
        owners[:busy, :reach] = self._owners[:busy, :reach]
        self._owners = owners


@dataclass(eq=False)
class _Batch:
    """The layout of one pass: `N` tokens in a row, the first `M` of them one a busy sample, the rest pieces of states.

    Keys and values are written to their places first. The samples of a slot then attend together, padded to `width`, over what the
    slot holds of the state and each over its own; a piece attends over its state as far as it is.
    """

    engine: Engine
    slot_N: torch.Tensor
    write_N: torch.Tensor
    positions_N: torch.Tensor
    lane_M: torch.Tensor
    at_B: torch.Tensor
    pieces: list[_Piece]
    rows: int
    """Slots with busy samples."""
    width: int
    """Most busy samples of a slot."""
    reach: int
    """Positions taken in the fullest of them."""
    column_M: Any = None
    mask: Any = None

    def begin(self) -> None:
        """What all layers share."""
        engine, busy = self.engine, len(self.lane_M)
        if busy:
            slot_M, device = self.slot_N[:busy], self.slot_N.device
            engine._owners[slot_M, self.write_N[:busy]] = self.lane_M.to(torch.int16)
            before = (slot_M[:, None] == slot_M) & (
                torch.arange(busy, device=device) < torch.arange(busy, device=device)[:, None]
            )
            # which of its slot's busy samples each is (what fills up a captured step may share a place)
            self.column_M = before.sum(1).clamp(max=self.width - 1)
            lanes = torch.full((self.rows, self.width), FREE - 1, device=device, dtype=torch.int16)
            lanes[slot_M, self.column_M] = self.lane_M.to(torch.int16)
            owners = engine._owners[: self.rows, None, : self.reach]
            self.mask = self._additive((owners == TRUNK) | (owners == lanes[..., None]))[:, None]
        for piece in self.pieces:
            if piece.kept:
                new = len(piece.ids)
                seen = torch.ones(new, piece.kept + new, dtype=torch.bool, device=self.slot_N.device).tril(piece.kept)
                piece.mask = self._additive(seen)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        dtype = self.engine._buffers[0][0].dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def attend(self, module, query, key, value, scale: float | None) -> torch.Tensor:
        keys, values = self.engine._buffers[module.layer_idx]
        query, key, value = (part.to(keys.dtype) for part in (query, key, value))  # under autocast they may differ
        keys[self.slot_N, :, self.write_N] = key[0].transpose(0, 1)
        values[self.slot_N, :, self.write_N] = value[0].transpose(0, 1)
        attention, heads = torch.nn.functional.scaled_dot_product_attention, key.shape[1]
        out, start = [], len(self.lane_M)
        if start:
            out.append(self._lanes(query[0, :, :start].transpose(0, 1), keys, values, scale))
        repeats = query.shape[1] // heads
        for piece in self.pieces:
            end = start + len(piece.ids)
            part = query[:, :, start:end]
            if not piece.kept:
                done = attention(
                    part, key[:, :, start:end], value[:, :, start:end], is_causal=True, scale=scale, enable_gqa=repeats > 1
                )  # fmt: skip
            else:
                place, reach = slice(piece.slot, piece.slot + 1), piece.kept + len(piece.ids)
                assert piece.mask is not None
                mask = piece.mask.repeat(repeats, 1)
                done = attention(
                    grouped(part, heads), keys[place, :, :reach], values[place, :, :reach], attn_mask=mask, scale=scale
                ).reshape(1, query.shape[1], len(piece.ids), -1)  # fmt: skip
            out.append(done[0].transpose(0, 1))
            start = end
        return torch.cat(out)[None]

    def _lanes(self, query_MHD, keys, values, scale) -> torch.Tensor:
        """float[M, H, D]: heads that share keys, and samples that share a state, are further queries of one slot."""
        busy, count, size = query_MHD.shape
        heads = keys.shape[1]
        repeats, slot_M = count // heads, self.slot_N[:busy]
        padded = query_MHD.new_zeros(self.rows, self.width, heads, repeats, size)
        padded[slot_M, self.column_M] = query_MHD.reshape(busy, heads, repeats, size)
        queries = padded.permute(0, 2, 1, 3, 4).reshape(self.rows, heads, self.width * repeats, size)
        done = torch.nn.functional.scaled_dot_product_attention(
            queries, keys[: self.rows, :, : self.reach], values[: self.rows, :, : self.reach],
            attn_mask=self.mask.repeat_interleave(repeats, 2), scale=scale,
        )  # fmt: skip
        done = done.reshape(self.rows, heads, self.width, repeats, -1).permute(0, 2, 1, 3, 4)
        return done[slot_M, self.column_M].reshape(busy, count, -1)


def _rounded(count: int) -> int:
    """Up to a power of two."""
    return 1 << (count - 1).bit_length()


def _one_token(model) -> Any:
    """A cache with one token, which shows its shapes."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return model(ids, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values


def room_for(model) -> int:
    """Tokens whose keys and values fit into an eighth of the memory that is free on the model's GPU; 0 on other devices."""
    if model.device.type != "cuda":
        return 0
    with torch.inference_mode():
        layers: list[Any] = _one_token(model).layers
    a_token = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    return torch.cuda.mem_get_info(model.device)[0] // (8 * a_token)


# -- which models


class _Fixed:
    """Takes given tokens, whatever the logits, which it notes."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.cap = tokens.tolist(), len(tokens)
        self.ids, self.seen = list[int](), list[torch.Tensor]()
        self.finish: str | None = None

    def restart(self) -> None:
        self.ids, self.seen, self.finish = [], [], None


def why_not(model) -> str | None:
    """Why `Engine` cannot run a model, in a clause; `None` if it can. Tries a few tokens against the model's own forward pass."""
    if (reason := obstacle(model)) is not None:
        return reason
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, model.config.get_text_config().vocab_size, n) for n in (9, 6)]
    rows = [_Fixed(text[-3:]) for text in texts]

    def take(logits: torch.Tensor, some: Sequence[_Fixed]) -> None:
        for row, logits_V in zip(some, logits, strict=True):
            row.seen.append(torch.log_softmax(logits_V.float(), -1)[row.tokens[len(row.ids)]])
            row.ids.append(row.tokens[len(row.ids)])
            row.finish = "stop" if len(row.ids) == 3 else None

    try:
        with in_eval_mode(model), torch.inference_mode():
            engine = Engine(model, take, batch_tokens=512, cache_tokens=64)
            for text, row in zip(texts, rows, strict=True):
                engine.add(Request(text[:-3], [row]))
                engine.step()  # the second joins the first
            while any(row.finish is None for row in rows):
                engine.step()
            plain = []
            for text in texts:
                ids = torch.from_numpy(text).to(model.device)
                table = torch.log_softmax(model(ids[None]).logits[0, -4:-1].float(), -1)
                plain.append(table.gather(-1, ids[-3:, None])[:, 0])
    except Exception as error:  # model code raises whatever it likes
        return f"its code does not take our attention ({type(error).__name__}: {error})"
    return differ(torch.stack([one for row in rows for one in row.seen]), torch.cat(plain), model.dtype)
