"""A way into a model's attention: for the time of a call, its layers hand their queries, keys and values to a layout of ours.

Models of `transformers` look their attention function up by name, and hand it whatever their mask function made. Here both names
are one, and the mask is the layout itself. Tree-packed updates and the rollout engine are two such layouts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

_NAME = "swirl"
_current: ContextVar[Any] = ContextVar("swirl_layout", default=None)


class Layout(Protocol):
    """Who sees whom in one row of tokens."""

    def attend(self, module: Any, query, key, value, scale: float | None) -> torch.Tensor:
        """float[1, T, H, D] from float[1, H, T, D] queries and float[1, H_kv, T, D] keys and values of a layer."""
        ...


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    return attention_mask.attend(module, query, key, value, scaling), None


def _mask(*args, **kwargs):
    return _current.get()


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


@contextmanager
def attending(model, layout: Layout) -> Iterator[None]:
    """Within, the model's attention follows the layout; a backward pass whose layers run again (checkpointing) must be within,
    too. Not for two threads with one model at once."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, _NAME
    token = _current.set(layout)
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)


def grouped(query: torch.Tensor, heads: int) -> torch.Tensor:
    """Heads that share keys become further queries of them, so nothing is repeated: [1, H, T, D] -> [1, H_kv, (H / H_kv) T, D]."""
    one, _, length, size = query.shape
    return query.reshape(one, heads, -1, size)
