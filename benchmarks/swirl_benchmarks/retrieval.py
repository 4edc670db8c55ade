"""How much of the gold evidence the search back ends find: recall@2 and @5 of the gold paragraphs, per data set.

The query is the question itself. A gold paragraph counts as found if a document of its title that begins as it does
is among the first k; a question's recall is the share of its gold paragraphs that are found (of four, two at most
at k = 2). Without a folder the corpus of a data set is all paragraphs of its bundled test tasks; with one, the official
files and the corpora in it, in the layout of `LAYOUT`.
"""

import html
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from swirl_benchmarks.metrics import Estimate, bootstrap
from swirl_env.errors import DataError, UnknownNameError, near
from swirl_env.tasks import TaskSet, load_tasks
from swirl_env.tasks.paragraphs import shows, supporting
from swirl_env.tools.search.corpus import open_corpus
from swirl_env.tools.search.tool import open_index
from swirl_env.types import Document

LAYOUT = {
    "hotpotqa": ("hotpotqa/hotpot_dev_distractor_v1*.json*", "hotpotqa/hotpotqa_corpus.jsonl*"),
    "musique": ("musique/musique_ans_v1.0_dev*.jsonl*", "musique/musique_corpus.jsonl*"),
    "beerqa": ("beerqa/beerqa_train_v1.0*.json*", "beerqa/beerqa_corpus.jsonl*"),
}
"""Data set -> (questions, corpus) inside the folder of `--data`; the BeerQA development file is not always at hand."""
BACKENDS = ("bm25", "dense", "hybrid")
KS = (2, 5)


def recall(found: Sequence[Document], wanted: Sequence[tuple[str, str | None]]) -> float:
    """Share of the gold paragraphs among the documents found."""
    shown = [f"{html.unescape(document.title).strip()}\n{document.text.strip()}" for document in found]
    return sum(any(shows(text, paragraph) for text in shown) for paragraph in wanted) / len(wanted)


def load(name: str, data: Path | None, split: str = "test") -> tuple[TaskSet, Sequence[Document]] | None:
    """(tasks, corpus) of a data set; `None` where the folder has it not."""
    if data is None:
        tasks = load_tasks(name, split)
        return tasks, list(dict.fromkeys(document for task_id in tasks.tasks for document in tasks.documents(task_id)))
    files = [next(iter(sorted(data.glob(pattern))), None) for pattern in LAYOUT[name]]
    if None in files:
        return None
    return load_tasks(name, split, str(files[0])), open_corpus(str(files[1]))


def retrieval(
    data: Path | None = None,
    sets: Sequence[str] = tuple(LAYOUT),
    backends: Sequence[str] = BACKENDS,
    model: str | None = None,
    tasks: int | None = None,
) -> dict[str, Any]:
    """Recall of every back end on every data set.

    Args:
        data: folder with official files and corpora; `None`: the bundled tasks.
        sets: data sets to measure.
        backends: of `BACKENDS`.
        model: the embedding model of `dense` and `hybrid`.
        tasks: how many questions of each set, the first ones; `None`: all.

    Returns:
        data set -> `questions`, `paragraphs` and `backends`: name -> `recall@k` as {mean, low, high}, `ms` (median of a
        query); and, where both parts and the hybrid were measured, `hybrid_minus_best@k`: the paired difference
        between the hybrid and the better of its parts.

    Raises:
        DataError: no data set could be measured.
    """
    report: dict[str, Any] = {}
    for backend in backends:
        if backend not in BACKENDS:
            raise UnknownNameError(f"No back end to measure is called {backend!r}.{near(backend, BACKENDS)}")
    for name in sets:
        if name not in LAYOUT:
            raise UnknownNameError(f"No data set is called {name!r} here.{near(name, LAYOUT)}")
        loaded = load(name, data)
        if loaded is None:
            continue
        task_set, documents = loaded
        asked = [task for task in task_set.tasks.values() if supporting(task.meta)][:tasks]
        values: dict[str, dict[int, list[float]]] = {}
        entry: dict[str, Any] = {"questions": len(asked), "paragraphs": len(documents), "backends": {}}
        for backend in backends:
            index = open_index(backend, documents if data else tuple(documents), model)
            values[backend], seconds = {k: [] for k in KS}, []
            for task in tqdm(asked, f"{name} {backend}", unit="question", delay=2):
                start = time.perf_counter()
                found = [documents[i] for i in index.rank(task.question, max(KS))]
                seconds.append(time.perf_counter() - start)
                for k in KS:
                    values[backend][k].append(recall(found[:k], supporting(task.meta)))
            entry["backends"][backend] = {
                **{f"recall@{k}": asdict(bootstrap(values[backend][k])) for k in KS},
                "ms": round(float(np.median(seconds)) * 1e3, 3),
            }
        if set(BACKENDS) <= set(values):
            for k in KS:
                best = max(("bm25", "dense"), key=lambda part: float(np.mean(values[part][k])))
                gain = np.subtract(values["hybrid"][k], values[best][k])
                entry[f"hybrid_minus_best@{k}"] = {"best": best, **asdict(bootstrap(gain.tolist()))}
        report[name] = entry
    if not report:
        raise DataError(f"{data or 'The bundled data'} holds none of {', '.join(sets)} in the expected layout.")
    return report


def print_retrieval(report: dict[str, Any], console: Console | None = None) -> None:
    """The report as a table, every recall with its 95 % interval."""
    table = Table(title="Recall of gold paragraphs, the question as the query", title_justify="left")
    for heading in ("data set", "questions", "paragraphs", "back end", *(f"recall@{k}" for k in KS), "ms a query"):
        table.add_column(heading, justify="left" if heading in ("data set", "back end") else "right")
    for name, entry in report.items():
        for i, (backend, figures) in enumerate(entry["backends"].items()):
            first = (name, str(entry["questions"]), f"{entry['paragraphs']:,}") if i == 0 else ("", "", "")
            recalls = [str(Estimate(**figures[f"recall@{k}"])) for k in KS]
            table.add_row(
                *first, backend, *recalls, f"{figures['ms']:.2f}", end_section=i + 1 == len(entry["backends"])
            )
    (console or Console()).print(table)
