"""The retrieval benchmark and the speed of search, on small cases worked out by hand."""

import json
import os

import pytest
from rich.console import Console
from swirl_benchmarks.retrieval import print_retrieval, recall, retrieval
from swirl_benchmarks.speed_search import print_search, resampled, search_figures

from swirl_env.errors import DataError, UnknownNameError
from swirl_env.types import Document


def test_recall_by_hand():
    wanted = [("A & B", "First"), ("C", "")]
    first, other, c = Document("A &amp; B", "First one."), Document("A & B", "Another."), Document("C", "text")
    assert recall([], wanted) == 0
    assert recall([other], wanted) == 0  # the title alone is not enough where the text is known
    assert recall([other, first], wanted) == 0.5
    assert recall([first, c, c], wanted) == 1


def official(folder):
    (folder / "hotpotqa").mkdir()
    pages = {"Big Fish": "Big Fish is a film.", "Tim Burton": "Tim Burton is a director.", "Zebra": "Striped."}
    row = {"_id": "1", "question": "Who made the film Big Fish?", "answer": "Tim Burton"}
    row |= {"context": [[title, [text]] for title, text in pages.items()]}
    row |= {"supporting_facts": [["Big Fish", 0], ["Tim Burton", 0]]}
    (folder / "hotpotqa" / "hotpot_dev_distractor_v1.json").write_text(json.dumps([row]))
    lines = [json.dumps({"title": title, "text": text}) for title, text in pages.items()]
    (folder / "hotpotqa" / "hotpotqa_corpus.jsonl").write_text("\n".join(lines))
    return folder


def test_official_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path / "cache"))
    report = retrieval(data=official(tmp_path), backends=["bm25"])
    assert list(report) == ["hotpotqa"]
    entry = report["hotpotqa"]
    assert (entry["questions"], entry["paragraphs"]) == (1, 3)
    assert entry["backends"]["bm25"]["recall@2"]["mean"] == 0.5  # the director shares no word with the question
    console = Console(record=True, width=120)
    print_retrieval(report, console)
    assert "0.500" in console.export_text()


def test_bundled_tasks():
    entry = retrieval(backends=["bm25"], sets=["hotpotqa"], tasks=20)["hotpotqa"]
    assert entry["questions"] == 20 and entry["paragraphs"] > 500
    at = entry["backends"]["bm25"]
    assert 0.4 < at["recall@2"]["mean"] < at["recall@5"]["mean"] <= 1


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(DataError, match="holds none of"):
        retrieval(data=tmp_path)
    with pytest.raises(UnknownNameError, match="Did you mean 'hotpotqa'"):
        retrieval(sets=["hotpotq"])
    with pytest.raises(UnknownNameError, match="Did you mean 'bm25'"):
        retrieval(sets=["hotpotqa"], backends=["bm52"])


def test_resampling_is_seeded_and_of_the_right_length():
    documents = [Document("A", "One two three. Four five six seven! Eight?"), Document("B", "Nine ten eleven twelve.")]
    made = list(resampled(documents, 200, seed=3))
    assert made == list(resampled(documents, 200, seed=3)) != list(resampled(documents, 200, seed=4))
    assert 75 < sum(len(d.text.split()) for d in made) / len(made) < 95
    assert len({d.title for d in made}) == 200


def test_speed_of_search_is_measured_in_processes_of_its_own():
    before = dict(os.environ)
    report = search_figures(sizes=(300,), libraries=("bm25",), queries=5)
    (row,) = report["rows"]
    assert row["paragraphs"] == 300 and row["ms"] > 0 and row["rss_mb"] > 10 and row["build_peak_mb"] > 10
    assert dict(os.environ) == before
    console = Console(record=True, width=160)
    print_search({**report, "rows": [{**row, "target": {"ms": 0.0}}]}, console)
    assert "(over)" in console.export_text()
    with pytest.raises(UnknownNameError, match="Did you mean 'tantivy'"):
        search_figures(libraries=("tantvy",))
