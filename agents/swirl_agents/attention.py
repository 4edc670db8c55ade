"""A way into a model's attention: for the time of a call, its layers hand their queries, keys and values to a layout of ours.

Models of `transformers` look their attention function up by name, and hand it whatever their mask function made. Here both names
are one, and the mask is the layout itself. Tree-packed updates and the rollout engine are two such layouts. Which models allow it is
tried out: `obstacle` knows the kinds that a small example cannot tell, and `differ` holds the example's log-probs against the
model's own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "swirl"
_current: ContextVar[Any] = ContextVar("swirl_layout", default=None)


class Layout(Protocol):
    """Who sees whom in one row of tokens."""

    def attend(self, module: Any, query, key, value, scale: float | None) -> torch.Tensor:
        """float[1, T, H, D] from float[1, H, T, D] queries and float[1, H_kv, T, D] keys and values of a layer."""
        ...


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    if _current.get() is None and not hasattr(attention_mask, "attend"):  # another thread's plain pass, in the meantime
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attention_mask.attend(module, query, key, value, scaling), None


def _mask(*args, **kwargs):
    layout = _current.get()
    return sdpa_mask(*args, **kwargs) if layout is None else layout


_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()  # type: ignore[type-arg]
_guard = threading.Lock()


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


@contextmanager
def attending(model, layout: Layout) -> Iterator[None]:
    """Within, the model's attention follows the layout; a backward pass whose layers run again (checkpointing) must be within,
    too. Threads that share a model take turns."""
    config = model.config.get_text_config()
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
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


# -- which models


def obstacle(model) -> str | None:
    """What keeps a model from it that a small example would not show, in a clause."""
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "it keeps no plain keys and values of every token (a sliding window or a state space)"
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if found := {part.get("rope_type") for part in kinds} & {"dynamic", "longrope"}:
        return f"its positions ({found.pop()}) depend on how long the longest text of a pass is"
    return None


@contextmanager
def in_eval_mode(model) -> Iterator[None]:
    """Within, no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def differ(logprobs: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Whether log-probs are another model's: by their mean distance, since half precision rounds single ones by tenths of a nat."""
    apart = float((logprobs.float() - plain.float()).abs().mean())
    if apart < (1e-3 if dtype in (torch.float32, torch.float64) else 0.2):
        return None
    return f"on a small example its log-probs differ from its own by {apart:.2g} nats on average"
