"""Work on a Ray cluster: each worker makes its environment and policy (or its judge) once, and is fed work while it has room.

    for trajectory in spread(make, items, address="auto", workers=8, room=64): ...

A worker is one actor with one method: it takes new items and gives what is done. So a worker never holds more than its room, whoever is
quick gets more, and what a lost worker or node had not given back is given to others. Scheduling, transport and the detection of deaths
are Ray's.
"""

import os
import queue
import re
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from swirl_env.errors import ConfigError, SwirlError
from swirl_env.types import Trajectory

Item = TypeVar("Item")
Work = Callable[[Iterator[Item]], Iterator[Trajectory]]
"""Turns items into trajectories, as they come. The iterator may have none for now and more later."""
LIVES = 3
"""Workers that an item may be lost with: then it is given up, since it may be what kills them."""
START_SECONDS = 300.0
"""How long no worker may be there before the run is given up."""
WAIT_SECONDS, CONNECT_SECONDS = 0.5, 10.0


class _Inbox:
    """Items as they come: having none for now ends an iteration, which may begin again."""

    def __init__(self) -> None:
        self._items = queue.SimpleQueue[Any]()
        self._first: list[Any] = []

    def put(self, item: Any) -> None:
        self._items.put(item)

    def wait(self) -> None:
        """Until there is one."""
        self._first.append(self._items.get())

    def __iter__(self) -> "_Inbox":
        return self

    def __next__(self) -> Any:
        if self._first:
            return self._first.pop()
        try:
            return self._items.get_nowait()
        except queue.Empty:
            raise StopIteration from None


class Worker:
    """What runs in an actor: `exchange` new items for what is done.

    Args:
        make: makes what it does.
        folder: where to do it, if this machine has it: that of the process that asks.
        variables: of the environment, which it has there.
    """

    def __init__(self, make: Callable[[], Work], folder: str = ".", variables: Mapping[str, str] | None = None):
        os.environ.update(variables or {})
        if os.path.isdir(folder):
            os.chdir(folder)
            sys.path.insert(0, os.getcwd())
        self._inbox, self._done = _Inbox(), queue.SimpleQueue[Trajectory | Exception]()
        self._said: list[str] = []
        threading.Thread(target=self._run, args=(make,), daemon=True).start()

    def exchange(self, items: list[Any]) -> tuple[list[Trajectory], list[str]]:
        """Take up the items; returns what is done by now, after `WAIT_SECONDS` at most if that is nothing, and the warnings since."""
        found, said = self._exchange(items), self._said
        self._said = []
        return found, said

    def _exchange(self, items: list[Any]) -> list[Trajectory]:
        for item in items:
            self._inbox.put(item)
        found: list[Trajectory] = []
        try:
            while True:
                one = self._done.get(timeout=0 if found else WAIT_SECONDS)
                if isinstance(one, Exception):
                    if not found:
                        raise one
                    self._done.put(one)  # next time, when what came before it is told
                    return found
                found.append(one)
        except queue.Empty:
            return found

    def _run(self, make: Callable[[], Work]) -> None:
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_, **__: self._said.append(str(message))
        try:
            work = make()
            while True:
                self._inbox.wait()
                for trajectory in work(self._inbox):
                    self._done.put(trajectory)
        except Exception as error:
            self._done.put(error)
        except BaseException as error:  # a tool that exits, say: nobody would learn of it in a thread
            self._done.put(SwirlError(f"{type(error).__name__}: {error}"))


@contextmanager
def cluster(address: str, workers: int) -> Iterator[Any]:
    """Ray, joined or begun: `local` begins one on this machine, which ends with the block.

    Raises:
        ConfigError: there is none at the address, or one of another version.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError("--ray needs ray: pip install -e '.[ray]' in the project's folder.") from None

    if ray.is_initialized():  # by whoever calls
        yield ray
        return
    try:
        if found := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):  # Ray would try for many minutes
            socket.create_connection((found[1].strip("[]"), int(found[2])), CONNECT_SECONDS).close()
        if address == "local":
            ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
        else:
            ray.init(address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError: Ray raises what it likes
        said = " ".join(str(error).split())
        if "ersion mismatch" in said:
            raise ConfigError(
                f"The Ray cluster at {address} is of another version: {said} Install the same on both."
            ) from None
        raise ConfigError(
            f"No Ray cluster can be joined at {address}: {said} Begin one with ray start --head, or give --ray local."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def spread(
    make: Callable[[], Work], items: Mapping[Hashable, Any], *, address: str, workers: int, room: int, gpus: float = 0
) -> Generator[Trajectory]:
    """What workers on a Ray cluster make of the items, as it comes; of each item one trajectory, however many workers are lost.

    Args:
        make: called once in each worker; what it needs must pickle, and its modules must be installed on every node.
        items: key of the trajectory -> item.
        address: `local`, `auto`, HOST:PORT, or ray://HOST:PORT.
        workers: actors; each asks for one CPU.
        room: items that a worker holds at once.
        gpus: of each worker.

    Raises:
        ConfigError: no such cluster.
        SwirlError: what a worker raised on purpose; or items were lost with `LIVES` workers each, or no worker could begin for
            `START_SECONDS`. What came before is yielded.
    """
    with cluster(address, workers) as ray:
        fleet = _Fleet(ray, make, items, gpus)
        try:
            yield from fleet.run(min(workers, len(items)), room)
        finally:
            fleet.close()


class _Fleet:
    def __init__(self, ray: Any, make: Callable[[], Work], items: Mapping[Hashable, Any], gpus: float):
        self.ray, self.items = ray, items
        self.waiting = deque(items)
        self.lost: dict[Hashable, int] = {}
        self.deaths = 0  # since something was done
        self.given_up: dict[Hashable, str] = {}
        self._actor = ray.remote(Worker).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        settings = {name: value for name, value in os.environ.items() if re.match(r"SWIRL_|OPENAI_API_KEY$", name)}
        self._arguments = ray.put(make), os.getcwd(), settings
        self._held: dict[Any, set[Hashable]] = {}
        self._calls: dict[Any, Any] = {}  # the call under way -> its actor
        self._ready: set[Any] = set()

    def begin(self) -> None:
        """One more worker. It gets work when it has answered: one that no node has room for holds none."""
        actor = self._actor.remote(*self._arguments)
        self._held[actor] = set()
        self._calls[actor.exchange.remote([])] = actor

    def run(self, workers: int, room: int) -> Iterator[Trajectory]:
        for _ in range(workers):
            self.begin()
        alive = time.monotonic()
        while self.waiting or any(self._held.values()):
            calls, _ = self.ray.wait(list(self._calls), timeout=1.0)
            if self._ready:
                alive = time.monotonic()
            elif time.monotonic() - alive > START_SECONDS:
                raise SwirlError(
                    f"No worker could begin for {START_SECONDS:.0f} s: the cluster has {self.ray.cluster_resources()}, and each worker asks for "
                    "one CPU and its --gpus. What was made is kept; give the command again when there is room."
                )
            raised: Exception | None = None
            for call in calls:
                actor = self._calls.pop(call)
                try:
                    done, said = self.ray.get(call)
                except self.ray.exceptions.RayError as error:
                    if (told := _told(error)) is None:
                        self._bury(actor, error)
                    raised = raised or told  # when what the others have is kept
                    continue
                for text in said:
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
                self._ready.add(actor)
                held = self._held[actor]
                for one in done:
                    if one.key in held:
                        held.remove(one.key)
                        self.deaths = 0
                        yield one
                more = self._next(held, room)
                held.update(more)
                self._calls[actor.exchange.remote([self.items[key] for key in more])] = actor
            if raised is not None:
                raise raised from None
        if self.given_up:
            key, reason = next(iter(self.given_up.items()))
            raise SwirlError(
                f"{len(self.given_up)} of {len(self.items)} pieces of work were lost with {LIVES} workers each, {key} for one. Ray says: "
                f"{reason} The others are kept; give the command again, with a smaller --batch-size if memory ran out."
            )

    def _next(self, held: set[Hashable], room: int) -> list[Hashable]:
        """What a worker that holds so much gets. Its last life an item spends alone, as it may be what kills them."""
        last = [key for key in held if self.lost.get(key) == LIVES - 1]
        more: list[Hashable] = []
        while self.waiting and not last and len(held) + len(more) < room:
            if self.lost.get(self.waiting[0]) == LIVES - 1:
                if held or more:
                    break
                last.append(self.waiting[0])
            more.append(self.waiting.popleft())
        return more

    def _bury(self, actor: Any, error: Exception) -> None:
        reason, self.deaths = " ".join(str(error).split())[:500], self.deaths + 1
        if self.deaths > LIVES * (len(self._held) + 1):
            raise SwirlError(
                f"{self.deaths} workers were lost in a row, with nothing done. Ray says: {reason} What was made is kept; give the command again "
                "when the cluster is well, with fewer --workers if memory ran out."
            )
        held = self._held.pop(actor)
        self._ready.discard(actor)
        self.ray.kill(actor)  # one that ran out of memory may still be there
        for key in held:
            self.lost[key] = self.lost.get(key, 0) + 1
            if self.lost[key] < LIVES:
                self.waiting.append(key)
            else:
                self.given_up[key] = reason
        warnings.warn(
            f"A worker was lost, and its {len(held)} pieces of work begin anew: {reason[:200]}",
            RuntimeWarning,
            stacklevel=2,
        )
        self.begin()

    def close(self) -> None:
        for actor in self._held:
            self.ray.kill(actor)


def _told(error: Any) -> Exception | None:
    """What a worker raised, as it would be raised here; `None` if it died, or ran out of memory."""
    cause = getattr(error, "cause", None)
    if cause is None or isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
        return None
    return cause if isinstance(cause, SwirlError) else SwirlError(f"A worker failed: {type(cause).__name__}: {cause}")
