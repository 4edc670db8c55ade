"""GSM8K (Cobbe et al., 2021): grade school math word problems. MIT licence.

Official format: JSONL of `question`, `answer`; the answer is the worked solution with `<<48/2=24>>` annotations and a
last line `#### 72`.
"""

from collections.abc import Iterator

from swirl_env import answers
from swirl_env.errors import DataError
from swirl_env.tasks.base import Documents, Rows, text_field
from swirl_env.types import Task

INSTRUCTION = "Solve the math problem."
METRICS = {"accuracy": answers.numeric_equal}
FILES = {"train": "gsm8k_train.jsonl.gz", "test": "gsm8k_test.jsonl.gz"}


def read(rows: Rows, file: str) -> Iterator[tuple[Task, Documents]]:
    """Official rows -> tasks. `meta`: `solution` (the worked one), `hops` (its annotations)."""
    for index, (where, row) in enumerate(rows):
        question, solution = text_field(where, row, "question"), text_field(where, row, "answer")
        worked, mark, gold = solution.rpartition("####")
        if not mark or answers.parse_number(gold) is None:
            raise DataError(f"{where}: expected the answer to end in a line '#### NUMBER', got {solution[-40:]!r}.")
        meta = {"solution": worked.strip(), "hops": worked.count("<<")}
        yield Task(f"{file}-{index}", question.strip(), (gold.strip(),), meta), []
