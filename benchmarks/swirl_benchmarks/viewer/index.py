"""A light index over the trajectories of runs: where each line lies, and what lists and filters know of it.

    RUN... -> sources (JSONL files) -> one streaming pass -> SQLite (unnamed, on disk, gone with the process) -> rows

Files stay where they are and are never held: a record is read by its offset when it is shown. They may grow, be written
anew, come and go: `refresh` reads what was added, and all of a file that is another one now. A torn last line waits for its
end. A line that is no trajectory is counted, with the reason. Free text finds words by their beginnings, in any order.
"""

import json
import math
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

import numpy as np
from pydantic_core import from_json

from swirl_env.errors import ConfigError, DataError, near
from swirl_env.types import SCHEMA

FILES = (
    "judged.jsonl",
    "judged-*.jsonl",
    "trajectories.jsonl",
    "kept.jsonl",
    "eval/*.jsonl",
    "eval/*/*.jsonl",
    "demonstrations.jsonl",
)
"""The files of a run folder that hold trajectories, in the order of a list."""
FACETS = {"run": "run", "stage": "file", "env": "environment", "policy": "policy", "stop": "stop reason"}
"""Columns that a list is filtered by value, and what people call them."""
FLAGS = {"errors": "a tool error", "malformed": "a malformed action", "unknown": "an unknown verdict"}
"""Columns that count something bad in a trajectory."""
RANGES = {"process": "process score", "outcome": "outcome"}
SORTS = {
    "file": ("as in the files", "id"),
    "process": ("process score, lowest first", "process IS NULL, process, id"),
    "-process": ("process score, highest first", "process DESC, id"),
    "outcome": ("outcome, lowest first", "outcome IS NULL, outcome, id"),
    "-outcome": ("outcome, highest first", "outcome DESC, id"),
    "task": ("question", "task, id"),
    "-steps": ("most steps first", "steps DESC, id"),
    "-errors": ("most tool errors first", "errors DESC, id"),
    "-malformed": ("most malformed first", "malformed DESC, id"),
}
"""Name -> what people call it, and the order."""
CLIP = 160
"""Characters of a question or answer that a list holds."""
TABLES = """
CREATE TABLE rows (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source INT, run TEXT, stage TEXT, line INT, offset INT, length INT, task TEXT, sample INT,
  round INT, env TEXT, policy TEXT, stop TEXT, steps INT, process REAL, outcome REAL, errors INT, malformed INT, unknown INT,
  question TEXT, answer TEXT
);
CREATE INDEX by_task ON rows (task);
CREATE INDEX by_place ON rows (source, line);
CREATE TABLE bad (source INT, line INT, offset INT, length INT, reason TEXT);
CREATE VIRTUAL TABLE words USING fts5 (text, content='', detail=none);
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What a list knows of one trajectory."""

    id: int
    source: int
    run: str
    stage: str
    line: int
    """From 1."""
    offset: int
    length: int
    """Bytes, without the newline."""
    task: str
    sample: int
    round: int
    env: str
    policy: str
    stop: str
    steps: int
    process: float | None
    """Mean of the known scores."""
    outcome: float | None
    errors: int
    """Tool results that are errors."""
    malformed: int
    """Malformed actions."""
    unknown: int
    """Verdicts without a score."""
    question: str
    """Its beginning, of at most `CLIP` characters."""
    answer: str | None

    @property
    def key(self) -> str:
        return f"{self.task}/{self.sample}/{self.round}"

    @property
    def place(self) -> dict[str, str]:
        """The query parameters that find it again, also after its file was written anew."""
        return {"at": _label(self.run, self.stage), "key": self.key, "line": str(self.line)}


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no trajectory of this version."""

    at: str
    line: int
    offset: int
    length: int
    reason: str


@dataclass(slots=True)
class Source:
    """A file, and how far it was read."""

    id: int
    run: str
    stage: str
    path: Path
    inode: int
    read: int = 0
    """Bytes: all whole lines so far."""
    lines: int = 0
    seen: tuple[int, int] = (-1, -1)
    """Size and time of change when it was last read."""
    tail: bytes = b""
    """The last bytes read: others at the same place mean another file."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which trajectories, in which order. Every field is a query parameter of the same name; empty: no filter."""

    run: str = ""
    stage: str = ""
    env: str = ""
    policy: str = ""
    stop: str = ""
    task: str = ""
    process_from: float | None = None
    process_to: float | None = None
    outcome_from: float | None = None
    outcome_to: float | None = None
    errors: bool = False
    malformed: bool = False
    unknown: bool = False
    q: str = ""
    sort: str = "file"

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "Selection":
        """From query parameters; others are left alone. Raises `ConfigError` for a value that means nothing."""
        values: dict[str, Any] = {}
        for one in fields(cls):
            text = parameters.get(one.name, "").strip()
            if not text:
                continue
            if one.name in FLAGS:
                values[one.name] = True
            elif one.name.endswith(("_from", "_to")):
                values[one.name] = _number(one.name.replace("_", " "), text)
            else:
                values[one.name] = text
        selection = cls(**values)
        if selection.sort not in SORTS:
            raise ConfigError(f"No order is called {selection.sort!r}.{near(selection.sort, SORTS)}")
        if selection.q and not _words(selection.q):
            raise ConfigError(f"Free text finds words and numbers; {selection.q!r} holds none.")
        return selection

    def parameters(self) -> dict[str, str]:
        """The query parameters that say it."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: "1" if value is True else str(value) for name, value in given.items()}

    def query(self, **more: Any) -> str:
        """The query string of an address that shows it, with further parameters."""
        return urlencode(self.parameters() | more)

    def where(self, without: str = "") -> tuple[str, list[Any]]:
        """The condition in SQL and its values; `without`: a field to leave out."""
        parts: list[tuple[str, Any]] = []
        for name in (*FACETS, "task"):
            if name != without and (value := getattr(self, name)):
                parts.append((f"{name} = ?", value))
        for name in RANGES:
            for end, sign in (("from", ">="), ("to", "<=")):
                if (bound := getattr(self, f"{name}_{end}")) is not None:
                    parts.append((f"{name} {sign} ?", bound))
        sql = [condition for condition, _ in parts] + [f"{name} > 0" for name in FLAGS if getattr(self, name)]
        values = [value for _, value in parts]
        if self.q:
            sql.append("id IN (SELECT rowid FROM words WHERE words MATCH ?)")
            values.append(" AND ".join(f'"{word}"*' for word in _words(self.q)))
        return " AND ".join(sql) or "1", values


def files_of(run: Path) -> list[Path]:
    """The files of a RUN that hold trajectories: those of a folder, or the file itself. What was not judged yet is left out
    where the judged file is there."""
    if not run.is_dir():
        return [run]
    found = [path for pattern in FILES for path in sorted(run.glob(pattern)) if path.is_file()]
    # of a suite: SET/MODEL.jsonl; a run in a run is given by itself
    found += [
        path
        for path in sorted(run.glob("*/*.jsonl"))
        if path.parent.name not in ("eval", "training", "questions") and not (path.parent / "run.json").exists()
    ]
    found = [
        path for path in found if path.is_file() and not path.name.endswith(("failures.jsonl", "disagreements.jsonl"))
    ]
    judged = {path.with_name(path.name.replace(".jsonl", ".unjudged.jsonl")) for path in found}
    return [path for path in found if path not in judged]


class Index:
    """All trajectories of these runs. Safe to use from several threads.

    Args:
        runs: run folders and files of trajectories.
        say: hears of each stretch of bytes that was read.

    Raises:
        ConfigError: a RUN is not there, or none holds a trajectory.
    """

    def __init__(self, runs: Sequence[Path], say: Callable[[int], object] = lambda read: None):
        if missing := [run for run in runs if not run.exists()]:
            raise ConfigError(
                f"There is no {missing[0]}. Give run folders of `swirl run` or `swirl generate`, or files of trajectories (JSONL)."
            )
        self.runs = dict(zip(_names(runs), runs, strict=True))
        self.sources: dict[Path, Source] = {}
        self.notes: list[str] = []
        """What could not be read, for people."""
        self._lock = threading.RLock()
        # an unnamed database lies in an unlinked temporary file: its pages leave memory, and nothing stays behind
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;" + TABLES
        )
        self._made = 0
        self.refresh(say)
        if not self.count(Selection()) and not self.bad()[0]:
            raise ConfigError(
                f"There is no trajectory yet in {', '.join(map(str, runs))}. Expected a run folder with trajectories.jsonl "
                "or the like, or a file of trajectories (JSONL); give the command again when one was written."
            )

    def refresh(self, say: Callable[[int], object] = lambda read: None) -> None:
        """Read what was added to the files, new files, and files that were written anew."""
        with self._lock:
            notes: list[str] = []
            found: dict[Path, tuple[str, str]] = {}
            for name, run in self.runs.items():
                paths = [path for path in files_of(run) if path.is_file()]
                if not paths:
                    notes.append(
                        f"{run} holds no trajectories: none of {', '.join(FILES)} or SET/MODEL.jsonl is there."
                    )
                for path in paths:
                    stage = str(path.relative_to(run)).removesuffix(".jsonl") if run.is_dir() else ""
                    found[path] = (name, stage)
            for path in set(self.sources) - set(found):
                self._forget(self.sources.pop(path))
            for path, place in found.items():
                try:
                    self._read(path, place, say)
                except OSError as error:
                    notes.append(f"{path} cannot be read: {error.strerror}.")
            self.notes = notes

    def _read(self, path: Path, place: tuple[str, str], say: Callable[[int], object]) -> None:
        with path.open("rb") as file:
            now = os.fstat(file.fileno())
            source = self.sources.get(path)
            if source is not None:
                if source.seen == (now.st_size, now.st_mtime_ns) and source.inode == now.st_ino:
                    return
                if source.inode != now.st_ino or not self._goes_on(source, file):
                    self._forget(source)
                    source = None
            if source is None:
                self._made += 1
                source = self.sources[path] = Source(self._made, *place, path, now.st_ino)
            file.seek(source.read)
            self._db.execute("BEGIN")
            try:
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # torn, or still being written
                    source.lines += 1
                    if line.strip():
                        self._add(source, line[:-1])
                    source.read += len(line)
                    source.tail = line[-64:]
                    say(len(line))
            finally:
                self._db.execute("COMMIT")
            source.seen = (now.st_size, now.st_mtime_ns)

    @staticmethod
    def _goes_on(source: Source, file: BinaryIO) -> bool:
        file.seek(source.read - len(source.tail))
        return file.read(len(source.tail)) == source.tail

    def _forget(self, source: Source) -> None:
        # its words stay in the table of words, where no row has their number any more
        self._db.execute("DELETE FROM rows WHERE source = ?", [source.id])
        self._db.execute("DELETE FROM bad WHERE source = ?", [source.id])

    def _add(self, source: Source, line: bytes) -> None:
        place = (source.lines, source.read, len(line))
        try:
            values, text = _facts(line)
        except DataError as error:
            self._db.execute("INSERT INTO bad VALUES (?, ?, ?, ?, ?)", (source.id, *place, _clean(str(error))))
            return
        row = (None, source.id, source.run, source.stage, *place, *values)
        number = self._db.execute(f"INSERT INTO rows VALUES ({','.join('?' * len(row))})", row).lastrowid
        self._db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, text))

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def count(self, selection: Selection, without: str = "") -> int:
        condition, values = selection.where(without)
        return int(self._all(f"SELECT count(*) FROM rows WHERE {condition}", values)[0][0])

    def page(self, selection: Selection, start: int, size: int) -> list[Row]:
        """`size` rows of the selection from the `start`-th on, counted from 0."""
        condition, values = selection.where()
        sql = f"SELECT * FROM rows WHERE {condition} ORDER BY {SORTS[selection.sort][1]} LIMIT ? OFFSET ?"
        return [Row(*row) for row in self._all(sql, [*values, size, start])]

    def facet(self, selection: Selection, name: str) -> list[tuple[str, int]]:
        """The values of a column and how many trajectories have each, under all other filters."""
        condition, values = selection.where(name)
        return self._all(
            f"SELECT {name}, count(*) FROM rows WHERE {condition} GROUP BY {name} ORDER BY min(id)", values
        )

    def find(self, at: str, key: str, line: int | None = None) -> Row:
        """The row of this file and key: at this line, if it is still there, else the first.

        Raises:
            DataError: there is none.
        """
        task, sample, round = [*key.rsplit("/", 2), "", ""][:3]
        sql = "SELECT * FROM rows WHERE task = ? AND sample = ? AND round = ? ORDER BY line IS NOT ?, line"
        for row in self._all(sql, [task, sample, round, line]):
            if (found := Row(*row)).place["at"] == at:
                return found
        raise DataError(
            f"There is no trajectory {key!r} in {at!r} now. The file may have been written anew; see the list."
        )

    def around(self, selection: Selection, row: Row) -> tuple[int | None, Row | None, Row | None]:
        """Where the row stands in the selection (from 0; `None`: it is not in it), the one before and the one after."""
        condition, values = selection.where()
        over = f"OVER (ORDER BY {SORTS[selection.sort][1]})"
        sql = f"SELECT id, row_number() {over} - 1, lag(id) {over}, lead(id) {over} FROM rows WHERE {condition}"
        found = self._all(f"SELECT * FROM ({sql}) WHERE id = ?", [*values, row.id])
        if not found:
            return None, None, None
        _, position, before, after = found[0]
        return position, *(self._by_id(number) for number in (before, after))

    def _by_id(self, number: int | None) -> Row | None:
        return None if number is None else Row(*self._all("SELECT * FROM rows WHERE id = ?", [number])[0])

    def same_question(self, row: Row) -> list[Row]:
        """The other trajectories of its question; the best to compare with first: of another run, another policy, another
        sample."""
        sql = """SELECT * FROM rows WHERE task = ? AND question = ? AND id != ?
                 ORDER BY run = ?, policy = ?, stage != ?, sample = ?, id LIMIT 500"""
        values = [row.task, row.question, row.id, row.run, row.policy, row.stage, row.sample]
        return [Row(*one) for one in self._all(sql, values)]

    def bad(self, most: int = 20) -> tuple[int, list[BadLine]]:
        """How many lines are no trajectories, and the first of them."""
        with self._lock:
            count = self._db.execute("SELECT count(*) FROM bad").fetchone()[0]
            rows = self._db.execute("SELECT * FROM bad ORDER BY source, line LIMIT ?", [most]).fetchall()
            labels = {one.id: _label(one.run, one.stage) for one in self.sources.values()}
        return count, [BadLine(labels[source], *rest) for source, *rest in rows]

    def line(self, at: str, line: int) -> bytes:
        """A line as it lies in its file, without the newline. Raises `DataError` if there is none."""
        with self._lock:
            for source in self.sources.values():
                if _label(source.run, source.stage) == at:
                    for table in ("rows", "bad"):
                        sql = f"SELECT offset, length FROM {table} WHERE source = ? AND line = ?"
                        for offset, length in self._db.execute(sql, [source.id, line]):
                            return self._bytes(source, offset, length)
        raise DataError(f"There is no line {line} in {at!r} now. The file may have been written anew; see the list.")

    def read(self, row: Row) -> bytes:
        """The line of a trajectory."""
        return self.line(row.place["at"], row.line)

    @staticmethod
    def _bytes(source: Source, offset: int, length: int) -> bytes:
        with source.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def export(self, selection: Selection) -> Iterator[bytes]:
        """The lines of the selection, byte for byte, each with its newline. Files are opened now, so that one that is written
        anew meanwhile changes nothing."""
        condition, values = selection.where()
        with self._lock:
            sql = f"SELECT source, offset, length FROM rows WHERE {condition} ORDER BY {SORTS[selection.sort][1]}"
            cursor = self._db.execute(sql, values)
            places_N3 = np.fromiter((number for row in cursor for number in row), "int64").reshape(-1, 3)
            wanted = set(places_N3[:, 0].tolist())
            files = {one.id: one.path.open("rb") for one in self.sources.values() if one.id in wanted}
        return _lines(files, places_N3)


def _lines(files: Mapping[int, BinaryIO], places_N3: np.ndarray) -> Iterator[bytes]:
    try:
        for source, offset, length in places_N3.tolist():
            files[source].seek(offset)
            yield files[source].read(length) + b"\n"
    finally:
        for file in files.values():
            file.close()


def _facts(line: bytes) -> tuple[tuple[Any, ...], str]:
    """What a row holds from `task` on, and the text that is searched. Raises `DataError`."""
    try:
        data = from_json(line)
    except ValueError:
        try:
            data = json.loads(line)  # slower; knows lone surrogates
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"expected a JSON object, got {type(data).__name__}")
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise DataError(f"schema {schema} is newer than {SCHEMA}: update swirl-env to see it")
    try:
        task, steps = data["task"], data["steps"]
        said = [str(task["id"]), task["question"], *task.get("answers", ())]
        scores, errors, malformed, unknown = [], 0, 0, 0
        for step in steps:
            action, verdict = step["action"], step.get("verdict")
            said.append(action["text"])
            malformed += action.get("malformed") is not None
            for result in step.get("results", ()):
                errors += result.get("error") is not None
                said.append(result["text"])
            if verdict is not None:
                said.append(verdict.get("reason", ""))
                score = verdict["score"]
                unknown += score is None
                scores += [] if score is None else [float(score)]
        answer = steps[-1]["action"].get("answer") if steps else None
        process = sum(scores) / len(scores) if scores else None
        outcome = data.get("outcome")
        values = (
            _clean(str(task["id"])), _counted(data.get("sample", 0)), _counted(data.get("round", 0)), _clean(str(data["env"]["id"])),
            _clean(str(data["policy"])), _clean(str(data["stop"])), len(steps), _finite(process), _finite(outcome), errors, malformed,
            unknown, _clip(task["question"]), None if answer is None else _clip(answer),
        )  # fmt: skip
        return values, _clean("\n".join(said))
    except KeyError as error:
        raise DataError(f"{error.args[0]!r} is missing: not a trajectory, or of an older schema") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"not a trajectory: {error}") from None


def _counted(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < 2**63:
        raise ValueError(f"expected a whole number as sample or round, got {str(number)[:60]!r}")
    return number


def _finite(number: Any) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)


def _clean(text: str) -> str:
    """Without half characters, which no encoding has."""
    return text.encode(errors="replace").decode()


def _clip(text: str) -> str:
    return _clean(text if len(text) <= CLIP else text[: CLIP - 1] + "\u2026")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}: expected a number such as 0.5, got {text!r}.")
    return number


def _label(run: str, stage: str) -> str:
    return f"{run}/{stage}" if stage else run


def _names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that tell them apart."""
    paths = [run.resolve().parts for run in runs]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        size = next(n for n in range(1, len(path) + 1) if all(other[-n:] != path[-n:] for other in others))
        names.append("/".join(path[-size:]).replace("//", "/"))
    return names
