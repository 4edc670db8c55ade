"""HotpotQA (Yang et al., 2018): questions over two Wikipedia paragraphs. CC BY-SA 4.0.

Official format: one JSON array of `_id`, `question`, `answer`, `type`, `level`, `supporting_facts` as [title, sentence]
pairs and `context` as [title, sentences] pairs (distractor or full-wiki).
"""

import html
from collections.abc import Iterator

from swirl_env import answers
from swirl_env.errors import DataError
from swirl_env.tasks.base import Documents, Rows, text_field
from swirl_env.tasks.paragraphs import gold_meta
from swirl_env.types import Task

INSTRUCTION = "Answer the question in a few words."
METRICS = {"em": answers.exact_match, "f1": answers.f1}
FILES = {"train": "hotpotqa_train.json.gz", "test": "hotpotqa_test.json.gz"}


def read(rows: Rows, file: str) -> Iterator[tuple[Task, Documents]]:
    """Official rows -> tasks. `meta`: that of `paragraphs.gold_meta`, `level`, `supporting_facts` ([title, sentence] pairs)."""
    del file  # every record has its id
    for where, row in rows:
        question, gold = text_field(where, row, "question"), text_field(where, row, "answer")
        try:
            context = [(html.unescape(title), "".join(sentences).strip()) for title, sentences in row["context"]]
            facts = [[html.unescape(title), int(sentence)] for title, sentence in row.get("supporting_facts", [])]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(
                f"{where}: expected 'context' as [[title, [sentence, ...]], ...] and 'supporting_facts' as "
                f"[[title, index], ...], got {str(row.get('context'))[:60]}."
            ) from None
        texts: dict[str, str] = dict(reversed(context))
        titles: list[str] = list(dict.fromkeys(str(title) for title, _ in facts))
        meta = gold_meta(hops=2, type=row.get("type"), supporting=[(title, texts.get(title)) for title in titles])
        meta |= {"level": row.get("level"), "supporting_facts": facts}
        yield Task(text_field(where, row, "_id"), question.strip(), (gold.strip(),), meta), context
