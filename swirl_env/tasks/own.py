"""Your own questions: a JSONL file (or JSON array) with one record a question.

    {"question": "Who ...?", "answer": "Ada"}
    {"id": "q2", "question": "...", "answers": ["4", "four"], "documents": [{"title": "...", "text": "..."}], "meta": {}}

`answer` or `answers` hold the accepted forms (a number is compared as a number, anything else by exact match, unless `metric=`
says otherwise); without them the outcome is unknown and only the judge rewards. `documents`
are what `search` looks through; for one collection shared by all questions give `search={"corpus": FILE}` instead. Any
other key is refused: put other facts into `meta`. Without a path, six questions come as an example of the format.
"""

import re
from collections.abc import Iterator
from typing import Any

from swirl_env import answers
from swirl_env.errors import DataError, near
from swirl_env.tasks.base import Documents, Rows, text_field
from swirl_env.types import Task

INSTRUCTION = "Answer the question in a few words."
_NUMBER = re.compile(r"[-\u2212+$€£]*\s?[\d,./\s]*\d[\d,./]*\s?%?")


def match(prediction: str, gold: str) -> float:
    """1.0 or 0.0: the same number where the gold form is one, else exact match."""
    return (answers.numeric_equal if _NUMBER.fullmatch(gold.strip()) else answers.exact_match)(prediction, gold)


METRICS = {"match": match, "em": answers.exact_match, "f1": answers.f1, "accuracy": answers.numeric_equal}
FILES = {"train": "own_train.jsonl", "test": "own_test.jsonl"}
KEYS = ("id", "question", "answer", "answers", "documents", "meta")


def read(rows: Rows, file: str) -> Iterator[tuple[Task, Documents]]:
    """Rows -> tasks. `meta` is the record's own."""
    for index, (where, row) in enumerate(rows):
        question = text_field(where, row, "question")
        for key in set(row) - set(KEYS):
            raise DataError(f"{where}: {key!r} is no key of a question.{near(key, KEYS)} Other facts go into 'meta'.")
        name, meta = row.get("id", f"{file}-{index}"), row.get("meta", {})
        if not isinstance(name, (str, int)) or not isinstance(meta, dict):
            raise DataError(f"{where}: expected 'id' as text and 'meta' as an object, got {name!r} and {meta!r}.")
        yield Task(str(name), question.strip(), _answers(where, row), meta), _documents(where, row.get("documents", []))


def _answers(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "answer" in row and "answers" in row:
        raise DataError(f"{where}: give 'answer' or 'answers', not both.")
    forms = row.get("answers", [] if row.get("answer") is None else [row["answer"]])
    if not isinstance(forms, list) or not all(isinstance(form, (str, int, float)) for form in forms):
        raise DataError(f"{where}: expected 'answers' as a list of texts, got {str(forms)[:60]}.")
    forms = tuple(str(form).strip() for form in forms)
    if not all(forms):
        raise DataError(f"{where}: an accepted answer is empty. Leave 'answer' out where none is known.")
    return forms


def _documents(where: str, documents: Any) -> list[tuple[str, str]]:
    try:
        pairs = [(document["title"], document["text"]) for document in documents]
    except (TypeError, KeyError):
        pairs = None
    if pairs is None or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise DataError(
            f'{where}: expected \'documents\' as [{{"title": ..., "text": ...}}, ...], got {str(documents)[:60]}.'
        )
    return pairs
