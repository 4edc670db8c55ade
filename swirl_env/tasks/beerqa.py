"""BeerQA (Qi et al., 2021): open-domain questions of one hop (SQuAD), two (HotPotQA) and more. CC BY-SA 4.0.

Official format: one object {"version", "split", "data"} of records `id`, `src` (`squad`, `hotpotqa`), `question`, `answers`
and `context` as [title, text] pairs, the gold paragraphs only. So all paragraphs of a file are searched together:
its tasks share one list of documents. The official test file holds `id` and `question` only: its tasks have no
outcome, and searching them needs a corpus.
"""

from collections.abc import Iterator

from swirl_env import answers
from swirl_env.errors import DataError
from swirl_env.tasks.base import Documents, Rows, text_field
from swirl_env.tasks.paragraphs import gold_meta
from swirl_env.types import Task

INSTRUCTION = "Answer the question in a few words."
METRICS = {"em": answers.exact_match, "f1": answers.f1}
FILES = {"train": "beerqa_train.json.gz", "test": "beerqa_test.json.gz"}
MACRO = "type"
"""`meta` key whose values weigh the same in a mean: the official figure is the macro average over sources."""

HOPS = {"squad": 1, "hotpotqa": 2}


def read(rows: Rows, file: str) -> Iterator[tuple[Task, Documents]]:
    """Official rows -> tasks. `meta`: that of `paragraphs.gold_meta`, with the source as `type`."""
    del file  # every record has its id
    shared: dict[tuple[str, str], None] = {}
    pool: list[tuple[str, str]] = []
    for where, row in rows:
        question, source = text_field(where, row, "question"), row.get("src")
        try:
            context = [(title.strip(), text.strip()) for title, text in row.get("context", [])]
            gold = tuple(form.strip() for form in row.get("answers", ()) if form.strip())
        except (TypeError, ValueError, AttributeError):
            raise DataError(
                f"{where}: expected 'answers' as a list of text and 'context' as [[title, text], ...], "
                f"got {str(row.get('answers'))[:60]} and {str(row.get('context'))[:60]}."
            ) from None
        if "answers" in row and not gold:
            raise DataError(f"{where}: expected at least one text in 'answers', got {row['answers']!r}.")
        pool += [paragraph for paragraph in dict.fromkeys(context) if paragraph not in shared]
        shared |= dict.fromkeys(context)
        meta = gold_meta(HOPS.get(source), source, dict.fromkeys(context))
        yield Task(text_field(where, row, "id"), question.strip(), gold, meta), pool
