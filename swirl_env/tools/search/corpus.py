"""A corpus file of any size: its paragraphs live in a memory-mapped file, so that none of them is held in memory.

The file is read once, a record at a time, into the cache folder. The copy there is named after the file's path, size
and time of change; indexes are kept beside it.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
from tqdm import tqdm

from swirl_env.cache import build_once, cache_folder
from swirl_env.errors import DataError
from swirl_env.io import read_official
from swirl_env.types import Document

FORMAT = 2
"""Raised when what is kept on disk changes."""


class Corpus(Sequence[Document]):
    """The paragraphs of a corpus file in file order.

    Args:
        folder: where `write` put them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._ends = memoryview(np.load(folder / "ends.npy", mmap_mode="r"))
        with (folder / "documents.bin").open("rb") as file:
            self._bytes = mmap(file.fileno(), 0, access=ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        start = self._ends[at - 1] if at else 0
        return Document(*json.loads(self._bytes[start : self._ends[at]]))


def write(file: Path, folder: Path) -> None:
    """Copy the records of a corpus file into `folder`.

    Raises:
        DataError: the file is missing, empty or broken; a record that is not {"title", "text"} is named with its line.
    """
    ends, end = array("q"), 0
    with (folder / "documents.bin").open("wb") as out:
        for where, row in tqdm(read_official(file), f"read {file.name}", unit="paragraph", delay=2, mininterval=1):
            title, text = (row.get("title"), row.get("text")) if isinstance(row, dict) else (None, None)
            if not isinstance(title, str) or not isinstance(text, str):
                raise DataError(f'{where}: a corpus record is {{"title": ..., "text": ...}}, got {str(row)[:60]}.')
            end += out.write(json.dumps([title, text]).encode())
            ends.append(end)
    if not ends:
        raise DataError(f"{file}: the corpus is empty.")
    np.save(folder / "ends.npy", np.frombuffer(ends, np.int64))


@lru_cache(maxsize=4)
def _open(file: Path, size: int, changed_ns: int) -> Corpus:
    key = hashlib.sha256(f"{file}\n{size}\n{changed_ns}\n{FORMAT}".encode()).hexdigest()[:16]
    folder = cache_folder() / "search" / f"{file.name.partition('.')[0]}-{key}"
    build_once(folder / "documents", lambda work: write(file, work))
    return Corpus(folder / "documents")


def open_corpus(path: str | Path) -> Corpus:
    """The paragraphs of a corpus file: JSONL or a JSON array of {"title", "text"}, plain or gzip.

    A JSONL file is streamed; an array is read at once. A file that changed is read anew.

    Raises:
        DataError: the file is missing, empty or broken, with the place.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        next(read_official(path))  # says what is wrong
    state = file.stat()
    return _open(file, state.st_size, state.st_mtime_ns)
