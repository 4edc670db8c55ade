"""Requests to one chat client, under way together: they come as they come, and are answered as they are.

Worker threads make single attempts; the calling thread decides what is sent next, waits out pauses (a waiting request holds no
connection, and goes before fresh ones once its pause is over) and cuts late attempts.
"""

import heapq
import queue
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from swirl_env.transport import Exchange, Failure
from swirl_env.types import Completion

if TYPE_CHECKING:
    from swirl_env.client import ChatClient


@dataclass(eq=False, slots=True)
class Part:
    """Samples `first` ... `first + n - 1` of one request."""

    request: int
    first: int
    n: int
    tries: int = 0


@dataclass(eq=False, slots=True)
class _Asked:
    """A request of a session, and what has come of it."""

    key: Any
    request: dict[str, Any]
    completions: list[Completion | None]
    began: float | None = None
    """When its first attempt was sent."""


@dataclass(eq=False)
class Attempt(Exchange):
    part: Part = field(default_factory=lambda: Part(0, 0, 1))


class ChatSession:
    """Requests to one client: `add` at any time, `poll` for those that are answered. Made by `ChatClient.session`."""

    def __init__(self, client: "ChatClient", read: Callable[[dict[str, Any]], str]):
        self.client, self._read = client, read
        self._asked: dict[int, _Asked] = {}
        self._fresh: deque[Part] = deque()
        self._paused: list[tuple[float, int, Part]] = []
        self._flying: set[Attempt] = set()
        self._landed: queue.SimpleQueue[Attempt] = queue.SimpleQueue()
        self._answered: list[tuple[Any, list[Completion]]] = []
        self._count = count()

    def __len__(self) -> int:
        """Requests that `poll` has not returned yet."""
        return len(self._asked) + len(self._answered)

    def add(self, key: Any, request: dict[str, Any], n: int = 1) -> None:
        """Ask for `n` completions of a request (see `ChatClient.chat`); `key` comes back with them."""
        number = next(self._count)
        self._asked[number] = _Asked(key, request, [None] * n)
        self._fresh += self.client._split(Part(number, 0, n))
        if not n:
            self._settled(number)
        self._send()

    def poll(self, seconds: float = 0.02) -> list[tuple[Any, list[Completion]]]:
        """(key, completions) of each request that is answered; waits for one, but no longer than `seconds`."""
        until = time.monotonic() + seconds
        while not self._answered and self._asked and (now := time.monotonic()) < until:
            self._send()
            wake = [until, *(attempt.ends for attempt in self._flying)]
            if self._paused and len(self._flying) < self.client.concurrency:
                wake.append(self._paused[0][0])
            try:
                attempt = self._landed.get(timeout=max(0.0, min(wake) - now))
            except queue.Empty:
                now = time.monotonic()
                for attempt in self._flying:
                    if attempt.begun is not None and attempt.ends <= now:
                        attempt.cut()
                continue
            self._land(attempt)
            while not self._landed.empty():
                self._land(self._landed.get())
        self._send()
        answered, self._answered = self._answered, []
        return answered

    def close(self) -> None:
        """Give up what is under way."""
        for attempt in self._flying:
            attempt.cut()
        self._asked, self._answered = {}, []
        self._fresh.clear()
        self._paused.clear()

    def _send(self) -> None:
        """As many attempts as the client's limit allows; those whose pause is over go first."""
        client, now = self.client, time.monotonic()
        while len(self._flying) < client.concurrency and (self._fresh or self._paused and self._paused[0][0] <= now):
            due = self._paused and self._paused[0][0] <= now
            part = heapq.heappop(self._paused)[2] if due else self._fresh.popleft()
            asked = self._asked[part.request]
            asked.began = now if asked.began is None else asked.began
            left = asked.began + client.deadline - now
            body = client._body(asked.request, part.n, part.first)
            attempt = Attempt(body, min(client.timeout, left), part=part)
            self._flying.add(attempt)
            if left > 0:
                client._workers.submit(self._run, attempt)
            else:
                attempt.outcome = Failure(f"The deadline of {client.deadline:.4g} s is over.", "refused")
                self._landed.put(attempt)

    def _run(self, attempt: Attempt) -> None:
        self.client._transport.run(attempt)
        self._landed.put(attempt)

    def _land(self, attempt: Attempt) -> None:
        self._flying.discard(attempt)
        number = attempt.part.request
        for when, part in self._settle(attempt, self._asked[number]):
            heapq.heappush(self._paused, (when, next(self._count), part))
        if None not in self._asked[number].completions:
            self._settled(number)

    def _settled(self, number: int) -> None:
        asked = self._asked.pop(number)
        self._answered.append((asked.key, asked.completions))  # type: ignore[arg-type]

    def _settle(self, attempt: Attempt, asked: _Asked) -> list[tuple[float, Part]]:
        """Write down what an attempt brought. Returns what is still to be asked for, and when."""
        client, part, outcome, now = self.client, attempt.part, attempt.outcome, time.monotonic()
        assert asked.began is not None
        taken: list[Completion] = []
        try:
            if isinstance(outcome, Failure):
                raise outcome
            assert outcome is not None
            taken = client._completions(outcome, part, tuple(asked.request.get("stop") or ()), self._read)
        except Failure as failure:
            if part.n > 1 and not failure.passes and re.search(r"\bn\b", failure.reason):
                with client._lock:
                    client._usage._add(attempt)
                client._most = 1  # this server takes no n: ask for each sample alone
                return [(now, one) for one in client._split(part)]
            reason, tries = failure.reason, part.tries + 1
            again = failure.passes and part.tries < client.retries
            when = now + client._pause(failure, part.tries)
            if again and when >= asked.began + client.deadline:
                again = False
                reason += f" The deadline of {client.deadline:.4g} s leaves no time to ask again."
            with client._lock:
                client._usage._add(attempt)
                client._usage.retries += again
                client._usage.failures += not again
            if again:
                part.tries = tries
                return [(when, part)]
            if tries > 1:
                reason += f" ({tries} tries in {now - asked.began:.1f} s)"
            asked.completions[part.first : part.first + part.n] = [Completion(reason, None, "error")] * part.n
            return []
        with client._lock:
            client._usage._add(attempt)
        asked.completions[part.first : part.first + len(taken)] = taken
        rest = Part(part.request, part.first + len(taken), part.n - len(taken), part.tries)
        return [(now, part) for part in client._split(rest)]
