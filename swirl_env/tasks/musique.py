"""MuSiQue (Trivedi et al., 2022): questions of two to four hops composed from single-hop ones. CC BY 4.0.

Official format: JSONL of `id` (`2hop__...`, `3hop1__...`), `question`, `answer`, `answer_aliases`, `answerable`, `paragraphs`
as {idx, title, paragraph_text, is_supporting} and `question_decomposition` as {id, question, answer,
paragraph_support_idx}, where `#1` stands for the first answer. Questions that MuSiQue-Full marks as not answerable are
left out, as its answer metric leaves them out; the official test file has no answers, so its tasks have no outcome.
"""

import re
from collections.abc import Iterator
from typing import Any

from swirl_env import answers
from swirl_env.errors import DataError
from swirl_env.tasks.base import Documents, Rows, text_field
from swirl_env.tasks.paragraphs import gold_meta
from swirl_env.types import Task

INSTRUCTION = "Answer the question in a few words."
METRICS = {"em": answers.exact_match, "f1": answers.token_f1}
FILES = {"train": "musique_train.jsonl.gz", "test": "musique_test.jsonl.gz"}


def read(rows: Rows, file: str) -> Iterator[tuple[Task, Documents]]:
    """Official rows -> tasks. `meta`: that of `paragraphs.gold_meta`; each of `steps` also has `written`, the sub-question
    before its `#1` was resolved."""
    del file  # every record has its id
    for where, row in rows:
        question, task_id = text_field(where, row, "question"), text_field(where, row, "id")
        if row.get("answerable") is False:
            continue
        gold = [text_field(where, row, "answer")] if "answer" in row else []
        try:
            paragraphs = {
                p["idx"]: (str(p["title"]).strip(), str(p["paragraph_text"]).strip()) for p in row["paragraphs"]
            }
            parts = row.get("question_decomposition", [])
            support = [paragraphs[part["paragraph_support_idx"]] for part in parts]
            steps = _steps(parts, support)
            forms = [form.strip() for form in (*gold, *row.get("answer_aliases", ()))] if gold else []
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: expected 'paragraphs' as [{{idx, title, paragraph_text}}, ...], 'question_decomposition' as "
                f"[{{question, answer, paragraph_support_idx}}, ...] and 'answer_aliases' as a list of text; "
                f"{type(error).__name__}: {error}."
            ) from None
        kind = task_id.partition("__")[0]
        hops = re.match(r"(\d)hop", kind)
        meta = gold_meta(int(hops[1]) if hops else len(steps) or None, kind, dict.fromkeys(support), steps)
        yield (
            Task(task_id, question.strip(), tuple(dict.fromkeys(filter(None, forms))), meta),
            list(paragraphs.values()),
        )


def _steps(parts: list[dict[str, Any]], support: list[tuple[str, str]]) -> list[dict[str, Any]]:
    found = [str(part["answer"]) for part in parts]
    return [
        {
            "question": re.sub(r"#([1-9])", lambda n: found[int(n[1]) - 1], part["question"]),
            "answer": part["answer"],
            "title": title,
            "written": part["question"],
        }
        for part, (title, _) in zip(parts, support, strict=True)
    ]
