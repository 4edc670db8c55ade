"""`LocalPolicy`: any transformers causal model as a policy, batched over states.

Each state is prefilled once for all of its `n` samples. Every draw has its own generator, seeded by the state's seed, so
the batch around it changes nothing but rounding. Ids and log-probs are kept exactly as sampled.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from swirl_agents.rendering import Renderer
from swirl_env.errors import ConfigError
from swirl_env.types import Completion, Tokens, Transcript


class LocalPolicy:
    """Samples actions from a model in this process.

    Args:
        model: a `transformers` causal language model.
        tokenizer: its tokenizer.
        name: how records call it.
        temperature: tau; log-probs are those of softmax(logits / tau). 0 is greedy (log-probs then at tau = 1).
        max_new_tokens: cap of one action, in tokens.
        seed: for states that carry no seed of their own.
        batch_tokens: states x (context + action) tokens that are decoded at once; bounds memory.
    """

    def __init__(
        self, model, tokenizer, *, name: str = "local", temperature: float = 1.0, max_new_tokens: int = 64,
        seed: int = 0, batch_tokens: int = 32_768,
    ):  # fmt: skip
        if not temperature >= 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {temperature!r}.")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}.")
        self.model, self.renderer, self.name = model, Renderer(tokenizer), name
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self.batch_tokens = batch_tokens
        self.context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        eos = model.generation_config.eos_token_id if model.generation_config else None
        ends = eos if isinstance(eos, list) else [eos]
        self.eos_ids = {self.renderer.eos_id, *(token for token in ends if token is not None)}

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        """`n` completions for each transcript; none for a state that leaves no room for an action in the context."""
        encoded = [self.renderer.encode(transcript) for transcript in transcripts]
        done: list[list[Completion]] = [[] for _ in transcripts]
        fits = [i for i, e in enumerate(encoded) if len(e.ids) + self.max_new_tokens <= self.context]
        for group in self._groups(fits, [len(e.ids) for e in encoded], n):
            ids = [encoded[i].ids for i in group]
            new = [e.ids[e.spans[-1][1] if e.spans else 0 :] for e in (encoded[i] for i in group)]
            samples = self._sample(ids, [transcripts[i] for i in group], n)
            for i, delta, drawn in zip(group, new, samples, strict=True):
                done[i] = [self._completion(delta, *sample) for sample in drawn]
        return done

    def _groups(self, order: list[int], lengths: list[int], n: int) -> Iterator[list[int]]:
        """States of like length together, as many as the token budget allows."""
        group: list[int] = []
        for i in sorted(order, key=lambda i: lengths[i]):
            if group and (len(group) + 1) * n * (lengths[i] + self.max_new_tokens) > self.batch_tokens:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _completion(self, new: np.ndarray, ids: list[int], logprobs: list[float], finish: Any) -> Completion:
        tokens = Tokens(
            np.concatenate([new, np.asarray(ids, np.int32)]),
            np.arange(len(new) + len(ids)) >= len(new),
            np.concatenate([np.zeros(len(new), np.float32), np.asarray(logprobs, np.float32)]),
        )
        return Completion(self.renderer.decode(ids), tokens, finish)

    @torch.inference_mode()
    def _sample(self, ids: list[np.ndarray], transcripts: list[Transcript], n: int) -> list[list[tuple[Any, ...]]]:
        device, length = self.model.device, max(map(len, ids))
        batch = torch.full((len(ids), length), self.renderer.eos_id, dtype=torch.long)
        mask = torch.zeros((len(ids), length), dtype=torch.long)
        for row, prompt in enumerate(ids):
            batch[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, length - len(prompt) :] = 1
        batch, mask = batch.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(batch, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)
        if n > 1:
            cache.batch_repeat_interleave(n)
        mask, position = mask.repeat_interleave(n, 0), positions[:, -1:].repeat_interleave(n, 0)
        rows = [_Row(self._uniforms(t, g), t.stop) for t in transcripts for g in range(n)]
        alive = list(range(len(rows)))
        for step in range(self.max_new_tokens):
            chosen, logprobs = self._draw(logits, [rows[i].uniforms[step] for i in alive])
            keep = []
            for slot, i in enumerate(alive):
                rows[i].ids.append(chosen[slot])
                rows[i].logprobs.append(logprobs[slot])
                rows[i].finish = self._finish(rows[i], step)
                if rows[i].finish is None:
                    keep.append(slot)
            if not keep:
                break
            if len(keep) < len(alive):
                chosen, alive = [chosen[slot] for slot in keep], [alive[slot] for slot in keep]
                index = torch.tensor(keep, device=device)
                cache.batch_select_indices(index)
                mask, position = mask[index], position[index]
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            token = torch.tensor(chosen, device=device)[:, None]
            out = self.model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]
        drawn = [(row.ids, row.logprobs, row.finish) for row in rows]
        return [drawn[i : i + n] for i in range(0, len(drawn), n)]

    def _uniforms(self, transcript: Transcript, sample: int) -> np.ndarray:
        seed = self.seed if transcript.seed is None else transcript.seed
        return np.random.default_rng([seed, sample]).random(self.max_new_tokens)

    def _draw(self, logits: torch.Tensor, uniforms: list[float]) -> tuple[list[int], list[float]]:
        """One token a row by inverting the distribution function at its uniform; and its log-prob in nats."""
        logprobs = torch.log_softmax(logits.float() / (self.temperature or 1.0), -1)
        if self.temperature == 0:
            chosen = logprobs.argmax(-1)
        else:
            cumulative = logprobs.double().exp().cumsum(-1)
            at = torch.tensor(uniforms, device=logits.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return chosen.tolist(), logprobs.gather(1, chosen[:, None])[:, 0].tolist()

    def _finish(self, row: "_Row", step: int) -> str | None:
        if row.ids[-1] in self.eos_ids:
            return "eos"
        # a stop string ends in the newest token: decode only a tail that is longer than any of them
        tail = self.renderer.decode(row.ids[-row.tail :])
        if any(stop in tail for stop in row.stop):
            return "stop"
        return "length" if step + 1 == self.max_new_tokens else None


class _Row:
    """One action being sampled."""

    def __init__(self, uniforms: np.ndarray, stop: tuple[str, ...]):
        self.uniforms, self.stop = uniforms, stop
        self.tail = max((len(text) for text in stop), default=0) + 4
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: str | None = None
