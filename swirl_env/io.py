"""JSONL in and out. Files are append-only: one record a line, each written whole by one system call.

A process killed while writing leaves at most one torn last line; the next writer cuts it off, the next reader
skips it. Everything before it is kept. Unknown keys, wrong types and a newer schema are errors that name the line.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from swirl_env.errors import DataError
from swirl_env.types import SCHEMA

Record = TypeVar("Record")


@cache
def _adapter(record_type: Any) -> TypeAdapter:
    return TypeAdapter(record_type)


def dumps(record: Any) -> str:
    """A record as one line of JSON."""
    data = _adapter(cast(Any, type(record))).dump_python(record, mode="json")
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate (half an emoji, cut by a tokenizer) has no UTF-8 form
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text


def loads(record_type: type[Record], line: str, where: str = "record") -> Record:
    """One line of JSON -> record. Raises `DataError` naming the place, the field and what came."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: expected one JSON object a line, got {line[:60]!r} ({error}).") from None
    if isinstance(data, dict) and isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
        raise DataError(f"{where}: schema {data['schema']} is newer than {SCHEMA}. Update swirl-env to read this file.")
    try:
        return _adapter(cast(Any, record_type)).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        message = f"{where}: {place}: {first['msg']}, got {str(first['input'])[:60]!r}."
        raise DataError(f"{message} Expected a {record_type.__name__}.") from None


def read(path: str | Path, record_type: type[Record]) -> Iterator[Record]:
    """The records of a file, one at a time; a torn last line is skipped. A missing file holds none."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as lines:  # a line may be torn inside a character
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n") and line.strip():
                yield loads(record_type, line.decode(errors="replace"), f"{path}:{number}")


class Writer(Generic[Record]):
    """Appends records to a file; each call of `write` leaves a whole line or none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        size = keep = os.fstat(self._file).st_size
        while keep:
            start = max(0, keep - 65536)
            newline = os.pread(self._file, keep - start, start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            os.ftruncate(self._file, keep)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy opens the file anew: a number that stands for it means nothing elsewhere."""
        return Writer, (self.path,)

    def write(self, record: Record) -> None:
        if self._file < 0:
            raise ValueError(f"{self.path} is closed.")
        data = (dumps(record) + "\n").encode()
        start = os.fstat(self._file).st_size
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError as error:
            os.ftruncate(self._file, start)
            raise OSError(
                error.errno,
                f"{self.path}: {error.strerror}. Every record before this one is kept; make room and run again",
            ) from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> "Writer[Record]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_text(path: Path, text: str) -> None:
    """A file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_official(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a data set's official file: a JSON array, `{"data": [...]}` or JSONL, each also gzip-compressed."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name the file in it.")
    if not path.is_file():
        raise DataError(
            f"There is no file {path}." + ("" if path.is_absolute() else f" It was looked for in {Path.cwd()}.")
        )
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            if (
                path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
            ):  # a line at a time: the file may be large
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}:{number}", _json(line, f"{path}:{number}")
                return
            rows = _json(lines.read(), str(path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: expected UTF-8 JSON or JSONL, plain or gzip: {error}.") from None
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON array of records (or JSONL in a file called *.jsonl).")
    for number, row in enumerate(rows):
        yield f"{path}[{number}]", row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}. Is the file complete?") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply.") from None
