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
from swirl_env.tools.search.bm25 import Bm25
from swirl_env.tools.search.corpus import open_corpus
from swirl_env.tools.search.ranking import Index
from swirl_env.types import Document, Task

LAYOUT = {
    "hotpotqa": ("hotpotqa/hotpot_dev_distractor_v1*.json*", "hotpotqa/hotpotqa_corpus.jsonl*"),
    "musique": ("musique/musique_ans_v1.0_dev*.jsonl*", "musique/musique_corpus.jsonl*"),
    "beerqa": ("beerqa/beerqa_train_v1.0*.json*", "beerqa/beerqa_corpus.jsonl*"),
}
"""Data set -> (questions, corpus) inside the folder of `--data`; the BeerQA development file is not always at hand."""
BACKENDS = ("bm25", "dense", "hybrid")
KS = (2, 5)


def make_index(backend: str, documents: Sequence[Document], model: str | None = None) -> Index:
    """The index of a back end's name."""
    if backend == "bm25":
        return Bm25(documents)
    if backend == "dense":
        from swirl_env.tools.search.dense import Dense

        return Dense(documents, model)
    if backend == "hybrid":
        from swirl_env.tools.search import dense
        from swirl_env.tools.search.hybrid import Hybrid

        dense.query_vector.cache_clear()  # the dense back end has just asked the same: its time is part of a query
        return Hybrid(documents, model)
    raise UnknownNameError(f"No back end to measure is called {backend!r}.{near(backend, BACKENDS)}")


def gold(task: Task) -> list[tuple[str, str]]:
    """(title, how its text begins) of each gold paragraph; empty where none is known."""
    if "supporting" in task.meta:
        titles = task.meta["supporting"]
        openings = task.meta.get("openings") or [None] * len(titles)
        return [(title, opening or "") for title, opening in zip(titles, openings, strict=True)]
    return [(title, "") for title in dict.fromkeys(title for title, _ in task.meta.get("supporting_facts", ()))]


def recall(found: Sequence[Document], wanted: Sequence[tuple[str, str]]) -> float:
    """Share of the gold paragraphs among the documents found."""
    hits = [
        any(
            html.unescape(document.title).strip() == title and document.text.strip().startswith(opening)
            for document in found
        )
        for title, opening in wanted
    ]
    return sum(hits) / len(hits)


def load(name: str, data: Path | None, split: str = "test") -> tuple[TaskSet, Sequence[Document]] | None:
    """(tasks, corpus) of a data set; `None` where this installation or folder has it not."""
    if data is None:
        try:
            tasks = load_tasks(name, split)
        except ModuleNotFoundError:
            return None
        pool = dict.fromkeys(document for task_id in tasks.tasks for document in tasks.documents(task_id))
        return tasks, list(pool)
    files = [next(iter(sorted(data.glob(pattern))), None) for pattern in LAYOUT[name]]
    if None in files:
        return None
    try:
        return load_tasks(name, split, str(files[0])), open_corpus(str(files[1]))
    except ModuleNotFoundError:
        return None


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
    for name in sets:
        if name not in LAYOUT:
            raise UnknownNameError(f"No data set is called {name!r} here.{near(name, LAYOUT)}")
        loaded = load(name, data)
        if loaded is None:
            continue
        task_set, documents = loaded
        asked = [task for task in task_set.tasks.values() if gold(task)][:tasks]
        values: dict[str, dict[int, list[float]]] = {}
        entry: dict[str, Any] = {"questions": len(asked), "paragraphs": len(documents), "backends": {}}
        for backend in backends:
            index = make_index(backend, documents, model)
            values[backend], seconds = {k: [] for k in KS}, []
            for task in tqdm(asked, f"{name} {backend}", unit="question", delay=2):
                start = time.perf_counter()
                found = [documents[i] for i in index.rank(task.question, max(KS))]
                seconds.append(time.perf_counter() - start)
                for k in KS:
                    values[backend][k].append(recall(found[:k], gold(task)))
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
