"""Keys and values that outlive a slot, found by the tokens they stand for; and what several states should prefill once."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

MIN_SHARED = 32
"""Tokens that waiting states must begin with for their common beginning to be prefilled on its own."""


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
            if size <= best or candidate.ids[best] != ids[best]:  # of thousands, one token tells most apart
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

        def continued(entry: _Entry) -> bool:
            size = len(entry.ids)
            return size <= len(ids) and entry.ids[-1] == ids[size - 1] and np.array_equal(entry.ids, ids[:size])

        self._entries = [entry for entry in self._entries if not continued(entry)]
        self._entries.append(_Entry(ids, layers))
        while len(self._entries) > 1 and sum(len(entry.ids) for entry in self._entries) > self.budget_tokens:
            self._entries.pop(0)


def shared_trunks(prompts: list[np.ndarray]) -> list[np.ndarray]:
    """What to prefill once for several states: the common beginning of all (the instructions), what is asked twice, and of
    states that continue each other the longest."""
    counts = Counter(tuple(prompt.tolist()) for prompt in prompts)
    ordered = sorted(counts)  # what continues a state follows it
    if not ordered:
        return []
    low, high = ordered[0], ordered[-1]
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    trunks = [low[:common]] if common >= MIN_SHARED and len(ordered) > 1 else []
    for before, prompt, after in zip([(), *ordered], ordered, [*ordered[1:], ()], strict=False):
        continues = bool(before) and prompt[: len(before)] == before
        if (continues or counts[prompt] > 1) and after[: len(prompt)] != prompt:
            trunks.append(prompt)
    return [np.asarray(trunk, np.int32) for trunk in trunks]
