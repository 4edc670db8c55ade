"""Keys and values kept between calls, so that a growing state is prefilled once and siblings share their prefill.

`PrefixCache` remembers the keys and values of states by their token ids, least recently used first to go. `batch_cache`
lays the remembered prefixes of a batch side by side (padded on the left, masked) in buffers with room for what is to come,
so that decoding appends without copying. Models whose cache is not plain keys and values (sliding windows, state spaces)
are used without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Reserved(DynamicLayer):
    """A layer's keys and values in buffers of fixed capacity: appending writes, it does not copy what is there."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers = [torch.zeros(*part.shape[:2], capacity, part.shape[3], dtype=part.dtype, device=part.device)
                         for part in (keys, values)]  # fmt: skip
        self._length = 0
        self.update(keys, values)

    def update(self, key_states, value_states, *args, **kwargs):
        end = self._length + key_states.shape[2]
        for buffer, part in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = part
        self._length = end
        return self._view()

    def _view(self):
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._buffers = [buffer.repeat_interleave(repeats, 0) for buffer in self._buffers]
        self._view()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._view()


def has_plain_cache(model) -> bool:
    """Whether a model's cache is keys and values of every token: no sliding window, no state space."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


@dataclass(slots=True, eq=False)
class _Entry:
    ids: np.ndarray
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """Per layer, keys and values as [heads, T, dimension]."""


class PrefixCache:
    """Keys and values of recent states of one model.

    Args:
        model: a causal language model. When its parameters change, what was remembered is dropped.
        budget_tokens: how many tokens are remembered at most.
    """

    def __init__(self, model, budget_tokens: int):
        self.model, self.budget_tokens = model, budget_tokens
        self.usable = has_plain_cache(model)
        config = model.config
        self._heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._entries: list[_Entry] = []
        self._version: tuple[int, ...] = ()

    def _fresh(self) -> None:
        version = tuple(parameter._version for parameter in self.model.parameters())
        if version != self._version:
            self._entries, self._version = [], version

    def find(self, ids: np.ndarray) -> tuple[int, _Entry | None]:
        """The longest remembered prefix of `ids` that leaves at least one token: (its length, its entry)."""
        self._fresh()
        best, entry = 0, None
        for candidate in self._entries:
            size = min(len(candidate.ids), len(ids) - 1)
            differ = np.flatnonzero(candidate.ids[:size] != ids[:size])
            same = int(differ[0]) if len(differ) else size
            if same > best:
                best, entry = same, candidate
        if entry is not None:
            self._entries.remove(entry)
            self._entries.append(entry)
        return best, entry

    def put(self, ids: np.ndarray, cache: Any, row: int, mask: torch.Tensor) -> None:
        """Remember the unmasked slots of one row of a batch."""
        slots = mask.nonzero()[:, 0]
        layers = [(layer.keys[row][:, slots].clone(), layer.values[row][:, slots].clone()) for layer in cache.layers]
        self._entries = [
            e for e in self._entries if not (len(e.ids) <= len(ids) and np.array_equal(e.ids, ids[: len(e.ids)]))
        ]
        self._entries.append(_Entry(ids, layers))
        while len(self._entries) > 1 and sum(len(entry.ids) for entry in self._entries) > self.budget_tokens:
            self._entries.pop(0)

    def lay_out(self, found: Sequence[tuple[int, _Entry | None]], more: int) -> tuple[DynamicCache, torch.Tensor]:
        """(cache, mask int64[B, P]) of a batch that begins with these prefixes, with room for `more` tokens."""
        longest = max(size for size, _ in found)
        mask = torch.zeros((len(found), longest), dtype=torch.long, device=self.model.device)
        for row, (size, _) in enumerate(found):
            mask[row, longest - size :] = 1
        cache = DynamicCache()
        for i in range(self.model.config.num_hidden_layers):
            parts = []
            for part in (0, 1):
                shape = (len(found), self._heads, longest, self._size)
                block = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
                for row, (size, entry) in enumerate(found):
                    if entry is not None:
                        block[row, :, longest - size :] = entry.layers[i][part][:, :size]
                parts.append(block)
            cache.layers.append(_Reserved(parts[0], parts[1], longest + more))
        return cache, mask
