"""`LocalPolicy`: any transformers causal model as a policy, batched over states.

Each token is prefilled once: keys and values are kept from call to call while states grow, shared by the `n` samples of a
state and by the states of one trajectory (`engine`). Every draw has its own generator, seeded by the state's seed, so the
batch around it changes nothing but rounding. Ids and log-probs are kept exactly as sampled.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from swirl_agents.engine import PrefixCache
from swirl_agents.rendering import Renderer
from swirl_env.errors import ConfigError
from swirl_env.types import Completion, Tokens, Transcript

MIN_SHARED = 32
"""Tokens that all states must begin with for their common beginning to be prefilled on its own."""


class LocalPolicy:
    """Samples actions from a model in this process.

    Args:
        model: a `transformers` causal language model.
        tokenizer: its tokenizer.
        name: how records call it.
        temperature: tau; log-probs are those of softmax(logits / tau). 0 is greedy (log-probs then at tau = 1).
        max_new_tokens: cap of one action, in tokens.
        seed: for states that carry no seed of their own.
        batch_tokens: samples x (context + action) tokens that are decoded at once; bounds memory.
        cache_tokens: tokens whose keys and values are kept between calls.
        top_logprobs: how many of the likeliest tokens `Completion.alternatives` gives at each place; 0: none.
    """

    def __init__(
        self, model, tokenizer, *, name: str = "local", temperature: float = 1.0, max_new_tokens: int = 64,
        seed: int = 0, batch_tokens: int = 32_768, cache_tokens: int = 16_384, top_logprobs: int = 0,
    ):  # fmt: skip
        if not temperature >= 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {temperature!r}.")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}.")
        self.model, self.renderer, self.name = model, Renderer(tokenizer), name
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self.top_logprobs = top_logprobs
        self.batch_tokens, self._prefixes = batch_tokens, PrefixCache(model, cache_tokens)
        self.context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        eos = model.generation_config.eos_token_id if model.generation_config else None
        ends = eos if isinstance(eos, list) else [eos]
        self.eos_ids = {self.renderer.eos_id, *(token for token in ends if token is not None)}

    @property
    def parameters(self) -> dict[str, Any]:
        """What, beside the model and the state, its completions depend on."""
        return {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens, "seed": self.seed}

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        """`n` completions for each transcript; none for a state that leaves no room for an action in the context."""
        encoded = [self.renderer.encode(transcript) for transcript in transcripts]
        done: list[list[Completion]] = [[] for _ in transcripts]
        fits = [i for i, e in enumerate(encoded) if len(e.ids) + self.max_new_tokens <= self.context]
        for trunk in self._shared_trunks([encoded[i].ids for i in fits]):
            self._prefill([trunk], 0, remember=True)
        for group in self._groups(fits, [len(e.ids) for e in encoded], n):
            ids = [encoded[i].ids for i in group]
            new = [e.ids[e.spans[-1][1] if e.spans else 0 :] for e in (encoded[i] for i in group)]
            samples = self._sample(ids, [transcripts[i] for i in group], n)
            for i, delta, drawn in zip(group, new, samples, strict=True):
                done[i] = [self._completion(delta, row) for row in drawn]
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

    def _completion(self, new: np.ndarray, row: "_Row") -> Completion:
        ids, logprobs = row.ids, row.logprobs
        tokens = Tokens(
            np.concatenate([new, np.asarray(ids, np.int32)]),
            np.arange(len(new) + len(ids)) >= len(new),
            np.concatenate([np.zeros(len(new), np.float32), np.asarray(logprobs, np.float32)]),
        )
        alternatives = None
        if self.top_logprobs:
            alternatives = tuple(self._texts(place) for place in row.alternatives)
        assert row.finish is not None
        return Completion(self.renderer.decode(ids), tokens, row.finish, alternatives)  # type: ignore[arg-type]

    def _texts(self, place: dict[int, float]) -> dict[str, float]:
        """Token text -> log-prob in nats; several tokens of one text count together."""
        texts: dict[str, float] = {}
        for token, logprob in place.items():
            text = self.renderer.decode([token])
            texts[text] = float(np.logaddexp(texts.get(text, -np.inf), logprob))
        return texts

    @torch.inference_mode()
    def _sample(self, ids: list[np.ndarray], transcripts: list[Transcript], n: int) -> list[list["_Row"]]:
        cache, mask, position, logits = self._prefill(ids, self.max_new_tokens)
        logits = logits.repeat_interleave(n, 0)
        if n > 1:
            cache.batch_repeat_interleave(n)
        mask, position = mask.repeat_interleave(n, 0), position.repeat_interleave(n, 0)
        rows = [_Row(self._uniforms(t, g), t.stop) for t in transcripts for g in range(n)]
        alive = list(range(len(rows)))  # rows of the batch, some of which may have ended
        for step in range(self.max_new_tokens):
            chosen, logprobs = self._draw(logits, [rows[i].uniforms[step] for i in alive])
            likeliest = self._likeliest(logits)
            going = []
            for slot, i in enumerate(alive):
                if rows[i].finish is not None:
                    continue
                rows[i].ids.append(chosen[slot])
                rows[i].logprobs.append(logprobs[slot])
                rows[i].alternatives += likeliest[slot : slot + 1]
                rows[i].finish = self._finish(rows[i], step)
                if rows[i].finish is None:
                    going.append(slot)
                elif n == 1 and self._prefixes.usable:
                    seen = np.concatenate([ids[i], np.asarray(rows[i].ids[:-1], np.int32)])
                    self._prefixes.put(seen, cache, slot, mask[slot])
            if not going:
                break
            if len(going) <= 0.8 * len(alive):  # dropping rows copies the cache, so several go at once
                chosen, alive = [chosen[slot] for slot in going], [alive[slot] for slot in going]
                index = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(index)
                mask, position = mask[index], position[index]
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            token = torch.tensor(chosen, device=mask.device)[:, None]
            out = self.model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    @torch.inference_mode()
    def _prefill(self, ids: list[np.ndarray], more: int, remember: bool = False):
        """(cache with room for `more`, mask int64[B, T], last position int64[B, 1], logits float[B, V] of the next token)."""
        device = self.model.device
        found = [self._prefixes.find(prompt) if self._prefixes.usable else (0, None) for prompt in ids]
        new = [prompt[size:] for prompt, (size, _) in zip(ids, found, strict=True)]
        length = max(map(len, new))
        batch = np.full((len(ids), length), self.renderer.eos_id, np.int64)
        mask = np.zeros((len(ids), length), np.int64)
        for row, tokens in enumerate(new):
            batch[row, length - len(tokens) :] = tokens
            mask[row, length - len(tokens) :] = 1
        cache, full = None, torch.from_numpy(mask).to(device)
        if self._prefixes.usable:
            cache, past = self._prefixes.lay_out(found, length + more)
            full = torch.cat([past, full], 1)
        positions = (full.cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = self.model(
            torch.from_numpy(batch).to(device), attention_mask=full, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        if remember:
            for row, prompt in enumerate(ids):
                self._prefixes.put(prompt, out.past_key_values, row, full[row])
        return out.past_key_values, full, positions[:, -1:], out.logits[:, -1]

    def _shared_trunks(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        """What several states of this call begin with, to be prefilled once: states that others continue, and the common
        beginning of all (the instructions)."""
        if not self._prefixes.usable or len(prompts) < 2:
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

    def _likeliest(self, logits: torch.Tensor) -> list[dict[int, float]]:
        """Token id -> log-prob in nats of each row's likeliest tokens; nothing unless asked for."""
        if not self.top_logprobs:
            return []
        top = torch.log_softmax(logits.float() / (self.temperature or 1.0), -1).topk(self.top_logprobs)
        return [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

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
        self.alternatives: list[dict[int, float]] = []
        self.finish: str | None = None
