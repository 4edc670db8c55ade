"""Verdicts kept on disk: what was judged once is not judged again.

An entry is found by the content of what was asked (for a model: prompt, model and parameters), never by position. SQLite in
WAL mode holds them: threads and processes share a file, and a killed process leaves it whole. Unknown verdicts are not
kept, so a failed call is made again. What a judge knows only in its own memory is not seen: give it another name then.
"""

import hashlib
import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

from swirl_env.errors import DataError
from swirl_env.judges.base import ask, key_of
from swirl_env.types import Judge, StepView, Verdict


class Cached:
    """A judge whose verdicts are kept in a file.

    Args:
        judge: asked about what is not in the file.
        path: SQLite file, made if missing; may be shared by any number of judges, threads and processes.

    Raises:
        DataError: the file is no database of verdicts.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> from swirl_env.judges import make_judge
        >>> from swirl_env.wrappers import JudgeReward
        >>> judge = make_judge({"combine": ["rules"], "cache": "verdicts.db"})
        >>> env = JudgeReward(gym.make("swirl/GSM8K-v0"), judge)
        >>> for _ in range(2):
        ...     text, info = env.reset(seed=0)
        ...     reward = env.step("<calculator>10+3</calculator>")[1]
        >>> judge.misses, judge.hits
        (1, 1)
    """

    def __init__(self, judge: Judge, path: str | Path):
        self.judge, self.path = judge, Path(path)
        self.name, self.uses_gold = judge.name, getattr(judge, "uses_gold", False)
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._open()

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        keys = [self._key(view) for view in views]
        with self._lock:
            found = {key: row for key in keys if (row := self._get(key)) is not None}
        missing = {key: view for key, view in zip(keys, views, strict=True) if key not in found}  # each once
        new = dict(zip(missing, ask(self.judge, list(missing.values())), strict=True)) if missing else {}
        with self._lock:
            self.hits += len(views) - len(missing)
            self.misses += len(missing)
            self._put({key: verdict for key, verdict in new.items() if verdict.score is not None})
        return [found.get(key) or new[key] for key in keys]

    @property
    def hit_rate(self) -> float | None:
        """Share of what was asked so far that was known; `None` before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def concurrency(self) -> int:
        """How many threads may ask at once."""
        return getattr(self.judge, "concurrency", 1)

    def _key(self, view: StepView) -> bytes:
        content = json.dumps(key_of(self.judge, view), default=str)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()

    def _get(self, key: bytes) -> Verdict | None:
        row = (
            self._open()
            .execute("select score, reason, judge, parts, tokens from verdicts where key = ?", (key,))
            .fetchone()
        )
        return None if row is None else Verdict(row[0], row[1], row[2], json.loads(row[3]), 0.0, row[4])

    def _put(self, verdicts: dict[bytes, Verdict]) -> None:
        rows = [
            (key, v.score, _writable(v.reason), v.judge, json.dumps(v.parts), v.tokens) for key, v in verdicts.items()
        ]
        if rows:
            with self._open() as transaction:
                transaction.executemany("insert or ignore into verdicts values (?, ?, ?, ?, ?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        """The connection of this process; a forked child opens its own."""
        if self._connection is None or self._connection[0] != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
                connection.execute("pragma journal_mode = wal")
                connection.execute("pragma synchronous = normal")
                connection.execute(
                    "create table if not exists verdicts (key blob primary key, score real not null, reason text not null, "
                    "judge text not null, parts text not null, tokens integer not null) without rowid"
                )
                connection.execute("select score, reason, judge, parts, tokens from verdicts limit 1")
            except sqlite3.DatabaseError as error:
                raise DataError(f"{self.path} is no cache of verdicts ({error}). Give another file.") from None
            self._connection = os.getpid(), connection
        return self._connection[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"judge": self.judge, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Cached.__init__(self, state["judge"], state["path"])


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
