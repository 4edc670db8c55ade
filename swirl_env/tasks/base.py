"""What a task set is, and how one is loaded.

A module of this folder gives `INSTRUCTION`, `METRICS` (the first one is the outcome), `FILES` (split -> bundled file) and
`read(rows, file)`, which turns the rows of an official file into (task, documents) pairs; `file` names tasks without an id.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from swirl_env.errors import DataError, UnknownNameError, near
from swirl_env.io import read_official
from swirl_env.types import Document, Task

DATA = Path(__file__).parent.parent / "data"

Documents = list[tuple[str, str]]
"""(title, text) pairs."""


@dataclass(frozen=True)
class TaskSet:
    """Questions of one split. Pickles as its name, split and path."""

    name: str
    split: str
    path: str | None
    instruction: str
    tasks: dict[str, Task]
    """By id, in file order."""
    _documents: dict[str, Documents]
    _metrics: dict[str, Callable[[str, str], float]]

    def documents(self, task_id: str) -> list[Document]:
        """The task's own paragraphs; empty where it has none."""
        return [Document(title, text) for title, text in self._documents.get(task_id, ())]

    def metrics(self, task: Task, answer: str | None) -> dict[str, float]:
        """Each official metric of an answer: the maximum over the accepted gold forms, 0 for no answer."""
        return {
            name: 0.0 if answer is None else max(metric(answer, gold) for gold in task.answers)
            for name, metric in self._metrics.items()
        }

    def outcome(self, task: Task, answer: str | None) -> float:
        """The first official metric, in [0, 1]."""
        return next(iter(self.metrics(task, answer).values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tasks, (self.name, self.split, self.path)


@lru_cache(maxsize=16)
def load_tasks(name: str, split: str, path: str | None = None) -> TaskSet:
    """A task set: the bundled tasks of a split, or every record of an official file.

    Args:
        name: a module of this folder, such as `gsm8k`.
        split: `train` or `test`; with a path it only names the tasks.
        path: an official file of the set (JSON, JSONL, plain or gzip); `None`: 200 train or 100 test tasks come bundled.

    Raises:
        DataError: the file is missing or a record is not what the format says, with its place.
        UnknownNameError: there is no such split.
    """
    module = import_module(f"swirl_env.tasks.{name}")
    if path is None and split not in module.FILES:
        raise UnknownNameError(f"{name} has no split {split!r}.{near(split, module.FILES)} Or give path=FILE.")
    name_of_file = f"{name}-{split}" if path is None else Path(path).name.partition(".")[0]
    tasks, documents = {}, {}
    for task, paragraphs in module.read(read_official(path or DATA / module.FILES[split]), name_of_file):
        task_id, copy = task.id, 2
        while task_id in tasks:  # some official ids are not unique
            task_id, copy = f"{task.id}#{copy}", copy + 1
        tasks[task_id] = task if task_id == task.id else Task(task_id, task.question, task.answers, task.meta)
        documents[task_id] = paragraphs
    if not tasks:
        raise DataError(f"{path}: the file holds no task.")
    return TaskSet(name, split, path, module.INSTRUCTION, tasks, documents, module.METRICS)


def text_field(where: str, row: Any, name: str) -> str:
    """A non-empty text field of a record. Raises `DataError` that says what the record holds instead."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with {name!r}, got {str(row)[:60]!r}.")
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        came = f"{value!r}"[:60] if name in row else f"a record with {', '.join(map(str, row)) or 'no keys'}"
        raise DataError(f"{where}: expected a text field {name!r}, got {came}.")
    return value


Rows = Iterator[tuple[str, Any]]
