"""What a task set is, and how one is loaded.

A module of this folder gives `INSTRUCTION`, `METRICS` (the first one is the outcome) and one of

- `FILES` (split -> bundled file) and `read(rows, file)`, which turns the rows of an official file into (task, documents)
  pairs; `file` names tasks without an id;
- `generate(split)`, which makes the tasks, a mapping from id to task.

Keyword-only parameters of either are arguments of `gym.make`. `MACRO` names the key of `Task.meta` over whose values the
official figures are averaged.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from swirl_env.errors import ConfigError, DataError, UnknownArgumentError, UnknownNameError, near
from swirl_env.io import read_official
from swirl_env.types import Document, Task

SETS = ("arithmetic", "beerqa", "cofca", "gsm8k", "hotpotqa", "musique", "own")
DATA = Path(__file__).parent.parent / "data"

Documents = Sequence[tuple[str, str]]
"""(title, text) pairs; tasks that share them share one object."""


@dataclass(frozen=True)
class TaskSet:
    """Questions of one split. Pickles as the arguments of `load_tasks`."""

    name: str
    split: str
    instruction: str
    tasks: Mapping[str, Task]
    """By id, in file order."""
    macro: str | None
    """The key of `Task.meta` over whose values figures are averaged; `None`: over the questions."""
    _documents: Mapping[str, tuple[Document, ...]]
    _metrics: Mapping[str, Callable[[str, str], float]]
    _arguments: tuple[Any, ...]

    def documents(self, task_id: str) -> tuple[Document, ...]:
        """The task's own paragraphs; empty where it has none."""
        return self._documents.get(task_id, ())

    def metrics(self, task: Task, answer: str | None) -> dict[str, float | None]:
        """Each official metric of an answer: the maximum over the accepted gold forms, 0 for no answer, `None` where the
        task has no gold."""
        return {name: self._score(metric, task, answer) for name, metric in self._metrics.items()}

    def outcome(self, task: Task, answer: str | None) -> float | None:
        """The first official metric, in [0, 1]."""
        return self._score(next(iter(self._metrics.values())), task, answer)

    def same(self, answer: str, other: str) -> bool:
        """Whether the first official metric takes one answer for the other."""
        return next(iter(self._metrics.values()))(answer, other) == 1

    def _score(self, metric: Callable[[str, str], float], task: Task, answer: str | None) -> float | None:
        if not task.answers:
            return None
        return 0.0 if answer is None else max(metric(answer, gold) for gold in task.answers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, self._arguments


def load_tasks(
    name: str,
    split: str,
    path: str | None = None,
    *,
    instruction: str | None = None,
    metric: str | None = None,
    **options: Any,
) -> TaskSet:
    """A task set: the bundled tasks of a split, or every record of an official file.

    Args:
        name: a module of this folder, such as `gsm8k`.
        split: `train` or `test`; with a path it only names the tasks.
        path: an official file of the set (JSON, JSONL, plain or gzip); `None`: 200 train or 100 test tasks come bundled.
        instruction: the first sentence of the prompt; `None`: the set's own.
        metric: which of the set's metrics is the outcome; `None`: the first.
        options: of the set itself (`operations=3` for `arithmetic`).

    Raises:
        DataError: the file is missing or a record is not what the format says, with its place.
        UnknownNameError: there is no such split or metric; `UnknownArgumentError` names the near match of an option.
    """
    if instruction is not None and (not isinstance(instruction, str) or not instruction.strip()):
        raise ConfigError(f"instruction must be a sentence, got {instruction!r}.")
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(options.items()))
    state: tuple[int, ...] = ()  # of the file: a changed one is read again
    if path is not None and (file := Path(path).expanduser()).is_file():
        path, state = str(file.resolve()), (file.stat().st_size, file.stat().st_mtime_ns)
    try:
        return _load(name, split, path, instruction, metric, frozen, state)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise ConfigError(f"{name} takes text, numbers and lists of them, got {error}.") from None


def _again(
    name: str, split: str, path: str | None, instruction: str | None, metric: str | None, frozen: Any
) -> TaskSet:
    """A task set out of a pickle."""
    return load_tasks(name, split, path, instruction=instruction, metric=metric, **dict(frozen))


def options_of(name: str) -> list[str]:
    """The arguments that a task set takes beside the common ones. Raises `UnknownNameError` for a set that is none."""
    if name not in SETS:
        raise UnknownNameError(f"No task set is called {name!r}.{near(str(name), SETS)}")
    module = import_module(f"swirl_env.tasks.{name}")
    parameters = inspect.signature(getattr(module, "generate", None) or module.read).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]


@lru_cache(maxsize=16)
def _load(
    name: str,
    split: str,
    path: str | None,
    instruction: str | None,
    metric: str | None,
    frozen: tuple[tuple[str, Any], ...],
    state: tuple[int, ...],
) -> TaskSet:
    module, options = import_module(f"swirl_env.tasks.{name}"), dict(frozen)
    for key in set(options) - set(options_of(name)):
        raise UnknownArgumentError(f"{key!r} is no argument of the task set {name}.{near(key, options_of(name))}")
    metrics = module.METRICS
    if metric is not None:
        if metric not in metrics:
            raise UnknownNameError(f"{name} has no metric {metric!r}.{near(str(metric), metrics)}")
        metrics = {metric: metrics[metric], **metrics}
    tasks: Mapping[str, Task]
    documents: dict[str, tuple[Document, ...]] = {}
    if hasattr(module, "generate"):
        if path is not None:
            raise ConfigError(f"{name} makes its own tasks: leave out path=.")
        tasks = module.generate(split, **options)
    else:
        tasks, documents = _read(module, name, split, path, options)
    return TaskSet(
        name, split, instruction or module.INSTRUCTION, tasks, getattr(module, "MACRO", None), documents, metrics,
        (name, split, path, instruction, metric, frozen),
    )  # fmt: skip


def _read(
    module: Any, name: str, split: str, path: str | None, options: dict[str, Any]
) -> tuple[dict[str, Task], dict[str, tuple[Document, ...]]]:
    if path is None and split not in module.FILES:
        raise UnknownNameError(f"{name} has no split {split!r}.{near(split, module.FILES)} Or give path=FILE.")
    file = f"{name}-{split}" if path is None else Path(path).name.partition(".")[0]
    tasks: dict[str, Task] = {}
    paragraphs_of: dict[str, Documents] = {}
    for task, paragraphs in module.read(read_official(path or DATA / module.FILES[split]), file, **options):
        task_id, copy = task.id, 2
        while task_id in tasks:  # some official ids are not unique
            task_id, copy = f"{task.id}#{copy}", copy + 1
        tasks[task_id] = task if task_id == task.id else Task(task_id, task.question, task.answers, task.meta)
        paragraphs_of[task_id] = paragraphs
    if not tasks:
        raise DataError(f"{path}: the file holds no task.")
    # what tasks share is made once, and only now: a reader may add to it until the file ends
    once = {id(paragraphs): paragraphs for paragraphs in paragraphs_of.values()}
    made = {key: tuple(Document(*pair) for pair in paragraphs) for key, paragraphs in once.items()}
    return tasks, {task_id: made[id(paragraphs)] for task_id, paragraphs in paragraphs_of.items()}


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
