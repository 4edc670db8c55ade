"""How fast the `search` tool is, beside tantivy: time of a query, memory, opening and building, at two corpus sizes.

A corpus is made by resampling the sentences of real paragraphs to about 85 words each (seeded), with a title of its own.
It has fewer different words and longer lists than a real corpus of its size, so times are on the careful side.
Queries are real questions. Every library builds and queries in a process of its own, so that memory is its own.
"""

import json
import multiprocessing
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swirl_env.errors import UnknownNameError, near
from swirl_env.tasks import load_tasks
from swirl_env.tools.search import make_search, words
from swirl_env.types import Document

WORDS = 85
K = 5
LIBRARIES = ("bm25", "tantivy")
TARGETS = {12_000: {"ms": 1.0}, 1_000_000: {"ms": 25.0, "rss_mb": 2_000.0, "open_seconds": 1.0}}


def resampled(documents: Sequence[Document], n: int, seed: int = 0) -> Iterator[Document]:
    """`n` paragraphs of about `WORDS` words made of the sentences of `documents`."""
    sentences = [s for d in documents for s in re.split(r"(?<=[.!?])\s+", d.text.strip()) if s]
    lengths = np.array([len(sentence.split()) for sentence in sentences])
    per, draw = max(1, round(WORDS / float(lengths.mean()))), np.random.default_rng(seed)
    for number in range(n):
        chosen = draw.integers(len(sentences), size=per).tolist()
        yield Document(
            f"{documents[chosen[0] % len(documents)].title} {number}", " ".join(sentences[i] for i in chosen)
        )


def search_figures(
    sizes: Sequence[int] = (12_000, 1_000_000), libraries: Sequence[str] = LIBRARIES, queries: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Times and memory of each library at each size.

    Args:
        sizes: paragraphs.
        libraries: of `LIBRARIES`; tantivy is left out where it is not installed (`pip install tantivy`).
        queries: real questions asked, each for its best `K` paragraphs.
        seed: of the corpus.

    Returns:
        `rows`: one dict a size and library: `paragraphs`, `library`, `build_seconds`, `build_peak_mb`, `open_seconds`,
        `ms` (median of a query), `mean_ms`, `cpu_ms` (processor time), `rss_mb` (resident after the queries, mapped files included)
        and `target`; `seed`, `queries`, `load` (of the machine before).
    """
    for library in libraries:
        if library not in LIBRARIES:
            raise UnknownNameError(f"No library to measure is called {library!r}.{near(library, LIBRARIES)}")
    sets = [load_tasks("hotpotqa", split) for split in ("train", "test")]
    documents = list(dict.fromkeys(d for tasks in sets for task_id in tasks.tasks for d in tasks.documents(task_id)))
    asked = [task.question for tasks in sets[::-1] for task in tasks.tasks.values()][:queries]
    report: dict[str, Any] = {"seed": seed, "queries": len(asked), "k": K, "load": os.getloadavg()[0], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            corpus = Path(folder) / f"resampled-{size}.jsonl"
            with corpus.open("w", encoding="utf-8") as out:
                for document in resampled(documents, size, seed):
                    out.write(json.dumps({"title": document.title, "text": document.text}) + "\n")
            for library in libraries:
                if library == "tantivy" and find_spec("tantivy") is None:
                    continue
                row: dict[str, Any] = {"paragraphs": size, "library": library}
                for step in (_build, _query):  # a fresh process each: memory is its own
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                        row |= process.submit(step, library, str(corpus), folder, asked).result()
                report["rows"].append({**row, "target": TARGETS.get(size, {})})
    return report


def _build(library: str, corpus: str, folder: str, asked: list[str]) -> dict[str, float]:
    os.environ["SWIRL_CACHE"] = folder
    start = time.perf_counter()
    if library == "bm25":
        make_search({"corpus": corpus})
    else:
        import tantivy

        writer = _tantivy(corpus).writer(256_000_000, 1)  # one thread: the same index every time
        with open(corpus, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                writer.add_document(tantivy.Document(body=f"{row['title']} {row['text']}", **row))
        writer.commit()
        writer.wait_merging_threads()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"build_seconds": round(time.perf_counter() - start, 2), "build_peak_mb": round(peak)}


def _query(library: str, corpus: str, folder: str, asked: list[str]) -> dict[str, float]:
    os.environ["SWIRL_CACHE"] = folder
    start = time.perf_counter()
    if library == "bm25":
        find: Any = make_search({"corpus": corpus, "k": K})
    else:
        find = _tantivy_search(_tantivy(corpus))
    opened = time.perf_counter() - start
    for query in asked[:5]:
        find(query=query)
    wall, cpu = [], []
    for query in asked:
        start, used = time.perf_counter(), time.process_time()
        find(query=query)
        wall.append((time.perf_counter() - start) * 1e3)
        cpu.append((time.process_time() - used) * 1e3)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    return {
        "open_seconds": round(opened, 3),
        "ms": round(float(np.median(wall)), 3),
        "mean_ms": round(float(np.mean(wall)), 3),
        "cpu_ms": round(float(np.mean(cpu)), 3),
        "rss_mb": round(resident),
    }


def _tantivy(corpus: str) -> Any:
    import tantivy

    schema = tantivy.SchemaBuilder()
    schema.add_text_field("body")
    for name in ("title", "text"):
        schema.add_text_field(name, stored=True)
    folder = Path(corpus + ".tantivy")
    folder.mkdir(exist_ok=True)
    return tantivy.Index(schema.build(), path=str(folder))


def _tantivy_search(index: Any) -> Any:
    import tantivy

    searcher = index.searcher()

    def find(query: str) -> str:
        parts = [tantivy.Query.term_query(index.schema, "body", word) for word in words(query)]
        best = tantivy.Query.boolean_query([(tantivy.Occur.Should, part) for part in parts])
        found = [searcher.doc(address) for _, address in searcher.search(best, K).hits]
        return "\n\n".join(f"{document['title'][0]}\n{document['text'][0]}" for document in found)

    return find


def print_search(report: dict[str, Any], console: Console | None = None) -> None:
    """The figures as a table; a figure over its target is marked."""
    table = Table(title="Search, the best 5 paragraphs of a real question", title_justify="left")
    headings = ("ms", "mean_ms", "cpu_ms", "rss_mb", "open_seconds", "build_seconds", "build_peak_mb")
    for heading in ("paragraphs", "library", *headings):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "library" else "right")
    for row in report["rows"]:
        over = {name for name, most in row["target"].items() if row[name] > most}
        cells = [f"{row[name]:,}" + (" (over)" if name in over else "") for name in headings]
        table.add_row(f"{row['paragraphs']:,}", row["library"], *cells)
    (console or Console()).print(table)
