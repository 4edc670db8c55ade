"""Log-distributions at action tokens: plain rows (the reference) and a shared trunk (the fast way), equal in exact arithmetic.

The K sub-trajectories of a trajectory share one prefix, the trunk. `rows` runs each candidate action behind its whole
context, K x G times. `shared` runs the trunk once, keeps its keys and values with their gradient, and runs the G
candidates of each state on a slice of them; each branch starts with the last context token, so that its first action
token is predicted too. Every function yields, state by state, float[A, V] log-probs per candidate.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import DynamicCache


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """int64[N, T], padded on the right with each row's own last token."""
    length = max(map(len, rows))
    return torch.tensor(
        np.stack([np.pad(row, (0, length - len(row)), mode="edge") for row in rows]), device=device
    ).long()


def _logprobs(logits: torch.Tensor, candidates: Sequence[np.ndarray], temperature: float) -> list[torch.Tensor]:
    scaled = torch.log_softmax(logits.float() / temperature, -1)
    return [scaled[g, : len(action)] for g, action in enumerate(candidates)]


def rows(
    model,
    trunk: np.ndarray,
    starts: Sequence[int],
    candidates: Sequence[Sequence[np.ndarray]],
    temperature: float = 1.0,
) -> Iterator[list[torch.Tensor]]:
    """One row a candidate: the reference that every faster way is tested against.

    Args:
        model: a causal language model.
        trunk: int[T], the trajectory's tokens.
        starts: state k is trunk[:starts[k]].
        candidates: for each state, its G actions as int[A].
        temperature: tau, which divides the logits.

    Yields:
        for each state, per candidate, float[A, V].
    """
    for start, actions in zip(starts, candidates, strict=True):
        ids = _padded([np.concatenate([trunk[:start], action]) for action in actions], model.device)
        keep = ids.shape[1] - start + 1
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        yield _logprobs(logits, actions, temperature)


def shared(
    model,
    trunk: np.ndarray,
    starts: Sequence[int],
    candidates: Sequence[Sequence[np.ndarray]],
    temperature: float = 1.0,
) -> Iterator[list[torch.Tensor]]:
    """The trunk once, then one call a state for its candidates; arguments as for `rows`."""
    last = max(starts) - 1
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    if last:
        ids = torch.tensor(trunk[None, :last], device=model.device).long()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        layers = [(layer.keys, layer.values) for layer in cache.layers]
    for start, actions in zip(starts, candidates, strict=True):
        ids = _padded([np.concatenate([trunk[start - 1 : start], action[:-1]]) for action in actions], model.device)
        cache = DynamicCache()
        for i, pair in enumerate(layers):
            keys, values = (part[:, :, : start - 1].expand(len(actions), -1, -1, -1) for part in pair)
            cache.update(keys, values, i)
        positions = torch.arange(start - 1, start - 1 + ids.shape[1], device=model.device).expand(len(actions), -1)
        logits = model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
        yield _logprobs(logits, actions, temperature)
