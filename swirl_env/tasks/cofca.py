"""CofCA (Wu et al., ICLR 2025): questions of two to four hops over counterfactual passages. For evaluation only.

No public copy is at hand. The layout is that of a published reader of the data: JSON files of one array each, records
of `_id` (not unique: later ones become `ID#2`), `question`, `answer`, `type` (text or a list of text), `context` as [title,
sentences] pairs as in HotPotQA, `sub_questions` and `sub_answers` (one per hop). Read each file by `path=`. What comes
bundled is a small file of our own making in this layout, to try the environment with; no figure on it means anything.
Scored as HotPotQA.
"""

from collections.abc import Iterator

from swirl_env import answers
from swirl_env.errors import DataError
from swirl_env.tasks.base import Documents, Rows, text_field
from swirl_env.tasks.paragraphs import gold_meta
from swirl_env.types import Task

INSTRUCTION = "Answer the question in a few words, going by the paragraphs that can be searched."
METRICS = {"em": answers.exact_match, "f1": answers.f1}
FILES = {"test": "cofca_example.json"}


def read(rows: Rows, file: str) -> Iterator[tuple[Task, Documents]]:
    """Official rows -> tasks. `meta`: that of `paragraphs.gold_meta`. The data does not say which paragraphs are gold: the
    title of a step is that of the paragraph that holds its answer and most words of its question."""
    for index, (where, row) in enumerate(rows):
        question, gold = text_field(where, row, "question"), text_field(where, row, "answer")
        try:
            context = [(title.strip(), "".join(sentences).strip()) for title, sentences in row["context"]]
            asked, found = list(row.get("sub_questions", [])), list(row.get("sub_answers", []))
            kinds = row.get("type")
            kind = kinds if kinds is None or isinstance(kinds, str) else ", ".join(kinds)
            holders = [_holder(*pair, context) for pair in zip(asked, found, strict=True)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: expected 'context' as [[title, [sentence, ...]], ...], 'type' as text or a list of text, "
                f"'sub_questions' and 'sub_answers' as lists of text of one length; {type(error).__name__}: {error}."
            ) from None
        steps = [
            {"question": sub_question, "answer": sub_answer, "title": holder and holder[0]}
            for sub_question, sub_answer, holder in zip(asked, found, holders, strict=True)
        ]
        meta = gold_meta(len(steps) or None, kind, dict.fromkeys(filter(None, holders)), steps)
        yield Task(str(row.get("_id") or f"{file}-{index}"), question.strip(), (gold.strip(),), meta), context


def _holder(question: str, answer: str, context: Documents) -> tuple[str, str] | None:
    """The paragraph that holds an answer; of several, the one with most words of the question."""
    asked = set(answers.normalize(question).split())
    plain = [(f" {answers.normalize(' '.join(paragraph))} ", paragraph) for paragraph in context]
    holding = [(text, paragraph) for text, paragraph in plain if f" {answers.normalize(answer)} " in text]
    return max(holding, key=lambda pair: len(asked & set(pair[0].split())), default=(None, None))[1]
