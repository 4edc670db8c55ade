"""The one way parameters change: AdamW, linear warm-up and decay, gradient clipping, and a stop at the first NaN."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from swirl_env.errors import SwirlError


class TrainingError(SwirlError, RuntimeError):
    """Training cannot go on; what was saved before is intact."""


Item = TypeVar("Item")


def shuffled_batches(items: Sequence[Item], epochs: int, batch_size: int, seed: int) -> list[list[Item]]:
    """The batches of all epochs, each epoch in an order of its own."""
    order, batches = np.random.default_rng(seed), []
    for _ in range(epochs):
        shuffled = [items[i] for i in order.permutation(len(items))]
        batches += [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return batches


class Optimizer:
    """AdamW over a known number of updates; the learning rate warms up over the first tenth and falls linearly to 0."""

    def __init__(self, model, learning_rate: float, updates: int, max_grad_norm: float = 1.0):
        self.model, self.max_grad_norm = model, max_grad_norm
        self.inner = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        warmup = max(1, updates // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.inner, lambda i: min((i + 1) / warmup, max(0.0, (updates - i) / max(1, updates - warmup)))
        )

    def step(self, loss: float) -> float:
        """Apply the gradient that was accumulated; returns its norm before clipping.

        Raises:
            TrainingError: the loss or the gradient is not finite; the parameters are left as they were.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if not (torch.isfinite(torch.tensor(loss)) and norm < float("inf")):
            self.inner.zero_grad(set_to_none=True)
            raise TrainingError(
                f"The loss is {loss} and the gradient norm {norm}: not finite. Lower the learning rate; "
                "the last checkpoint is intact."
            )
        self.inner.step()
        self.schedule.step()
        self.inner.zero_grad(set_to_none=True)
        return norm
