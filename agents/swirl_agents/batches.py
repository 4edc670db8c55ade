"""Models that the engine cannot run: whole batches, padded on the left, with the model's own cache, or with none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from swirl_agents.engine import Request, Sample


class Batches:
    """The engine's interface for any causal model.

    Args:
        model: a causal language model. One without `past_key_values` (Mamba, say) reads its whole text at every token.
        sample: takes a token for each row.
        batch_tokens: rows x tokens that run at once. One row is always run, whatever its length.
        pad_id: token to pad with.
    """

    def __init__(self, model, sample: Sample, *, batch_tokens: int, pad_id: int):
        self.model, self.sample = model, sample
        self.batch_tokens, self.pad_id = batch_tokens, pad_id
        self._waiting: list[tuple[Request, Any]] = []

    def add(self, request: Request) -> None:
        """Take a request."""
        self._waiting += [(request, row) for row in request.rows]

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests."""
        self._waiting = [(request, row) for request, row in self._waiting if request not in requests]

    def free(self) -> None:
        """Nothing is held between steps."""

    def step(self) -> None:
        """Run as many of the waiting rows as there is room for, to their end."""
        self._waiting.sort(key=lambda one: len(one[0].ids))
        count = longest = 0
        for request, row in self._waiting:
            longest = max(longest, len(request.ids) + row.cap)
            if count and (count + 1) * longest > self.batch_tokens:
                break
            count += 1
        batch = self._waiting[:count]
        if batch:
            for _, row in batch:
                row.restart()  # where an earlier step raised
            self._run([request.ids for request, _ in batch], [row for _, row in batch])
        self._waiting = self._waiting[count:]
        for request, _ in batch:
            request.left -= 1

    @torch.inference_mode()
    def _run(self, prompts: list[np.ndarray], rows: list[Any]) -> None:
        longest = max(map(len, prompts))
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
        device = self.model.device
        whole_BT, mask_BT = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        cache: Any = None
        while True:
            tokens = whole_BT if cache is None else whole_BT[:, -1:]
            positions = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = self.model(
                tokens, attention_mask=mask_BT, position_ids=positions, logits_to_keep=1,
                **({} if cache is None else {"past_key_values": cache}),
            )  # fmt: skip
            cache, logits = getattr(out, "past_key_values", None), out.logits[:, -1]
            going = [i for i, row in enumerate(rows) if row.finish is None]
            self.sample(logits[going], [rows[i] for i in going])
            if all(row.finish is not None for row in rows):
                return
            said = torch.tensor([[row.ids[-1]] for row in rows], device=device)
            whole_BT = torch.cat([whole_BT, said], 1)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], 1)
