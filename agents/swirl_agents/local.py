"""`LocalPolicy`: any transformers causal model as a policy, many states at once (`engine`).

Each token is prefilled once: keys and values are kept while states grow, shared by the `n` samples of a state and by the
states of one trajectory. Every draw has its own generator, seeded by the state's seed, so the batch around it changes nothing
but rounding. Ids and log-probs are kept exactly as sampled.
"""

import threading
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

import numpy as np
import torch

from swirl_agents.batches import Batches
from swirl_agents.engine import Engine, Request, room_for, why_not
from swirl_agents.rendering import Encoded, Renderer
from swirl_env.errors import ConfigError
from swirl_env.types import Completion, Tokens, Transcript

BATCH_TOKENS, CACHE_TOKENS = 32_768, 65_536


class LocalPolicy:
    """Samples actions from a model in this process.

    Args:
        model: a `transformers` causal language model.
        tokenizer: its tokenizer.
        name: how records call it.
        temperature: tau; log-probs are those of softmax(logits / tau). 0 is greedy (log-probs then at tau = 1).
        max_new_tokens: cap of one action, in tokens. Both may be changed later, which holds for states asked about from then on.
        seed: for states that carry no seed of their own.
        batch_tokens: samples x (context + action) tokens that are decoded at once; bounds memory. `None`: 32,768, or more on a GPU,
            what an eighth of the memory holds that is free when the policy first acts.
        cache_tokens: tokens whose keys and values are kept when a state has to wait (for a tool, say); over it, the least
            recently used are prefilled again. A token takes 2 x layers x key-value heads x head size numbers. `None`: 65,536, or on a GPU as
            for `batch_tokens`.
        top_logprobs: how many of the likeliest tokens `Completion.alternatives` gives at each place; 0: none.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_agents.local import LocalPolicy
        >>> from swirl_agents.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()  # with a real model: model, tokenizer = load_model("smollm2-135m")
        >>> policy = LocalPolicy(tiny_model(tokenizer), tokenizer, max_new_tokens=8)
        >>> text, info = gym.make("swirl/GSM8K-v0").reset(seed=0)
        >>> completions = policy([info["transcript"]], n=2)[0]
        >>> [(completion.finish, len(completion.tokens.action_ids)) for completion in completions]
        [('length', 8), ('length', 8)]
    """

    def __init__(
        self, model, tokenizer, *, name: str = "local", temperature: float = 1.0, max_new_tokens: int = 64,
        seed: int = 0, batch_tokens: int | None = None, cache_tokens: int | None = None, top_logprobs: int = 0,
    ):  # fmt: skip
        self.model, self.renderer, self.name = model, Renderer(tokenizer), name
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self._check()
        self.top_logprobs = top_logprobs
        self.batch_tokens, self.cache_tokens = batch_tokens, cache_tokens
        self.lock = threading.RLock()  # sessions share the engine, and may be in several threads
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        eos = model.generation_config.eos_token_id if model.generation_config else None
        ends = eos if isinstance(eos, list) else [eos]
        self.eos_ids = {self.renderer.eos_id, *(token for token in ends if token is not None)}

    def _check(self) -> None:
        """Whether the settings that may be changed can work."""
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature!r}.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens!r}.")

    @property
    def parameters(self) -> dict[str, Any]:
        """What, beside the model and the state, its completions depend on."""
        return {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens, "seed": self.seed}

    def __call__(self, transcripts: list[Transcript], n: int = 1) -> list[list[Completion]]:
        """`n` completions for each transcript; none for a state that leaves no room for an action in the context."""
        done: dict[Any, list[Completion]] = {}
        with closing(self.session()) as session:
            for i, transcript in enumerate(transcripts):
                session.add(i, transcript, n)
            while len(session):
                done.update(session.poll())
        return [done[i] for i in range(len(transcripts))]

    def session(self) -> "Session":
        """States that come and go while others are being answered."""
        return Session(self)

    def free(self) -> None:
        """Give back the memory of keys and values; they are made again when asked for. (New weights are noticed; call this where
        weights were changed through `parameter.data`.)"""
        with self.lock:
            if "_engine" in vars(self):
                self._engine.free()

    @cached_property
    def _engine(self) -> Engine | Batches:
        batch_tokens = BATCH_TOKENS if self.batch_tokens is None else self.batch_tokens
        if (reason := why_not(self.model)) is None:
            cache_tokens, room = CACHE_TOKENS if self.cache_tokens is None else self.cache_tokens, room_for(self.model)
            if self.batch_tokens is None:
                batch_tokens = max(batch_tokens, room)
            if self.cache_tokens is None:
                cache_tokens = max(cache_tokens, room)
            return Engine(self.model, self._sample, batch_tokens=batch_tokens, cache_tokens=cache_tokens)
        warnings.warn(
            f"The rollout engine cannot run this model: {reason}. Whole batches are used, which are slower.",
            stacklevel=4,
        )
        return Batches(self.model, self._sample, batch_tokens=batch_tokens, pad_id=self.renderer.eos_id)

    def _sample(self, logits: torch.Tensor, rows: Sequence["_Row"]) -> None:
        """Take a token for each row."""
        taus = {row.temperature for row in rows}
        if len(taus) > 1:  # it was changed while they were drawn
            for tau in taus:
                some = [i for i, row in enumerate(rows) if row.temperature == tau]
                self._sample(logits[some], [rows[i] for i in some])
            return
        [tau] = taus
        chosen, logprobs = self._draw(logits, [row.uniforms[len(row.ids)] for row in rows], tau)
        likeliest = self._likeliest(logits, tau)
        for i, row in enumerate(rows):
            row.ids.append(chosen[i])
            row.logprobs.append(logprobs[i])
            row.alternatives += likeliest[i : i + 1]
            row.finish = self._finish(row)

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

    def _uniforms(self, transcript: Transcript, sample: int) -> np.ndarray:
        seed = self.seed if transcript.seed is None else transcript.seed
        return np.random.default_rng([seed, sample]).random(self.max_new_tokens)

    def _draw(self, logits: torch.Tensor, uniforms: list[float], tau: float) -> tuple[list[int], list[float]]:
        """One token a row by inverting the distribution function at its uniform; and its log-prob in nats."""
        logprobs = torch.log_softmax(logits.float() / (tau or 1.0), -1)
        if tau == 0:
            chosen = logprobs.argmax(-1)
        else:
            cumulative = logprobs.double().exp().cumsum(-1)
            at = torch.tensor(uniforms, device=logits.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return chosen.tolist(), logprobs.gather(1, chosen[:, None])[:, 0].tolist()

    def _likeliest(self, logits: torch.Tensor, tau: float) -> list[dict[int, float]]:
        """Token id -> log-prob in nats of each row's likeliest tokens; nothing unless asked for."""
        if not self.top_logprobs:
            return []
        top = torch.log_softmax(logits.float() / (tau or 1.0), -1).topk(self.top_logprobs)
        return [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _finish(self, row: "_Row") -> str | None:
        if row.ids[-1] in self.eos_ids:
            return "eos"
        # a stop string ends in the newest token: decode only a tail that is longer than any of them
        tail = self.renderer.decode(row.ids[-row.tail :])
        if any(stop in tail for stop in row.stop):
            return "stop"
        return "length" if len(row.ids) == row.cap else None


class Session:
    """Asks a policy about states as they come: `add` at any time, `poll` until it is empty."""

    def __init__(self, policy: LocalPolicy):
        self.policy = policy
        self._mine: dict[int, tuple[Any, Encoded, Request]] = {}
        self._hopeless: list[Any] = []

    def __len__(self) -> int:
        return len(self._mine) + len(self._hopeless)

    def add(self, key: Any, transcript: Transcript, n: int = 1) -> None:
        """Ask for `n` completions at a state, to come back under this key."""
        policy = self.policy
        policy._check()
        encoded = policy.renderer.encode(transcript)
        if len(encoded.ids) + policy.max_new_tokens > policy.context or not n:
            self._hopeless.append(key)
            return
        rows = [_Row(policy._uniforms(transcript, g), policy.temperature, transcript.stop) for g in range(n)]
        request = Request(encoded.ids, rows, keep=n == 1)
        self._mine[id(request)] = key, encoded, request
        with policy.lock:
            policy._engine.add(request)

    def close(self) -> None:
        """Give up what is not done."""
        if self._mine:
            with self.policy.lock:
                self.policy._engine.drop([request for _, _, request in self._mine.values()])
        self._mine = {}

    def poll(self) -> list[tuple[Any, list[Completion]]]:
        """Take a token for every sample; (key, completions) of the states that are done, if any."""
        done: list[tuple[Any, list[Completion]]] = [(key, []) for key in self._hopeless]
        self._hopeless = []
        if self._mine:
            with self.policy.lock:
                self.policy._engine.step()
        for place, (key, encoded, request) in list(self._mine.items()):
            if not request.left:
                del self._mine[place]
                new = encoded.ids[encoded.spans[-1][1] if encoded.spans else 0 :]
                done.append((key, [self.policy._completion(new, row) for row in request.rows]))
        return done


class _Row:
    """One action being sampled."""

    def __init__(self, uniforms: np.ndarray, temperature: float, stop: tuple[str, ...]):
        self.uniforms, self.temperature, self.stop = uniforms, temperature, stop
        self.cap = len(uniforms)
        self.tail = max((len(text.encode()) for text in stop), default=0) + 4  # a token may be a single byte
        self.restart()

    def restart(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[dict[int, float]] = []
        self.finish: str | None = None
