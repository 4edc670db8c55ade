"""Readers of the task sets: official layouts, gold paths, bundled data, what is wrong with a file."""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle

from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, DataError, UnknownNameError
from swirl_env.judges import ask, make_judge, views
from swirl_env.tasks import load_tasks
from swirl_env.tasks.base import DATA
from swirl_env.tasks.paragraphs import shows, supporting
from swirl_env.testing import check_env_contract

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
BUNDLED = [
    ("hotpotqa", "train", 200), ("hotpotqa", "test", 100), ("musique", "train", 100), ("musique", "test", 100),
    ("beerqa", "train", 200), ("beerqa", "test", 100), ("cofca", "test", 6),
]  # fmt: skip


def make(name, split, **kwargs):
    return lambda: ToolEnv(name, split=split, tools=["search"], max_steps=5, **kwargs)


@cache
def demonstrations(name, split):
    env = make(name, split)()
    return tuple(rollout(make(name, split), oracle(env), [(task_id, 0) for task_id in env.task_set.tasks]))


@pytest.mark.parametrize(("name", "split", "count"), BUNDLED)
def test_bundled_tasks(name, split, count):
    task_set = load_tasks(name, split)
    assert len(task_set.tasks) == count
    for task in task_set.tasks.values():
        assert set(task_set.metrics(task, task.answers[0]).values()) == {1.0}
        meta = task.meta
        assert json.loads(json.dumps(meta)) == meta
        assert {"hops", "type", "supporting", "openings", "steps"} <= set(meta)
        documents = [f"{d.title}\n{d.text}" for d in task_set.documents(task.id)]
        assert supporting(meta)
        for paragraph in supporting(meta):
            assert sum(shows(document, paragraph) for document in documents) == 1, (task.id, paragraph)
        for step in meta["steps"]:
            assert step["question"]
            assert step["answer"]
            assert "#1" not in step["question"]
            assert step["title"] in meta["supporting"]


@pytest.mark.parametrize(("name", "split", "count"), BUNDLED[1:])  # the first: judges/test_rules.py
def test_the_oracle_solves_every_task_within_the_limit(name, split, count):
    recorded = demonstrations(name, split)
    assert len(recorded) == count
    assert all(trajectory.outcome == 1.0 and trajectory.stop == "answered" for trajectory in recorded)
    steps = [step for trajectory in recorded for step in trajectory.steps]
    assert not any(step.action.malformed or any(result.error for result in step.results) for step in steps)
    assert np.mean([step.verdict.good for step in steps]) >= 0.95
    gold = make_judge("gold-steps")
    scores = [np.mean([verdict.score for verdict in ask(gold, views(trajectory))]) for trajectory in recorded]
    assert np.mean(scores) >= 0.99


@pytest.mark.parametrize(("name", "split"), [("musique", "test"), ("beerqa", "test"), ("cofca", "test")])
@pytest.mark.parametrize("kwargs", [{}, {"judge": "gold-steps", "grammar": "paper", "reward": "both"}])
def test_the_environment_contract(name, split, kwargs):
    check_env_contract(make(name, split, **kwargs)())


def test_files_are_small_and_no_question_comes_twice():
    everything = []
    for path in DATA.glob("*.json*"):
        assert path.stat().st_size < 2_000_000
    for name, split, _ in BUNDLED:
        if name != "cofca":
            tasks = load_tasks(name, split).tasks
            everything += [(task.question.lower(), task_id) for task_id, task in tasks.items()]
    assert len({question for question, _ in everything}) == len(everything)
    assert len({task_id for _, task_id in everything}) == len(everything)


def test_train_and_test_of_beerqa_share_no_paragraph():
    train, test = (load_tasks("beerqa", split) for split in ("train", "test"))
    documents = [set(task_set.documents(next(iter(task_set.tasks)))) for task_set in (train, test)]
    assert not documents[0] & documents[1]


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("musique", "musique/musique_ans_v1.0_dev.subset.jsonl.gz", 277),
        ("beerqa", "beerqa/beerqa_train_v1.0.subset.json.gz", 732),
        ("beerqa", "beerqa/beerqa_test_questions_v1.0.json.gz", 14_932),
        ("hotpotqa", "hotpotqa/hotpot_dev_fullwiki_v1.subset.json.gz", 715),
    ],
)
def test_official_files(name, file, count):
    if not (SHARED / file).exists():
        pytest.skip("the official files are not at hand")
    tasks = load_tasks(name, "test", str(SHARED / file)).tasks
    assert len(tasks) == count
    assert all(bool(task.answers) == ("questions" not in file) for task in tasks.values())


# -- MuSiQue by hand

MUSIQUE = {
    "id": "3hop1__1_2_3",
    "question": "Who leads the home of the maker of the red lamp?",
    "question_decomposition": [
        {"id": 1, "question": "Who made the red lamp?", "answer": "Ada", "paragraph_support_idx": 2},
        {"id": 2, "question": "#1 >> home", "answer": "Bern", "paragraph_support_idx": 0},
        {"id": 3, "question": "Who leads #2 , home of #1 ?", "answer": "Carl", "paragraph_support_idx": 1},
    ],
    "answer": "Carl",
    "answer_aliases": ["Carl the Elder", "Carl", " "],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "People", "paragraph_text": "Ada lives in Bern.", "is_supporting": True},
        {"idx": 1, "title": "People", "paragraph_text": "Carl leads Bern.", "is_supporting": True},
        {"idx": 2, "title": "Lamp", "paragraph_text": "The red lamp was made by Ada.", "is_supporting": True},
        {"idx": 3, "title": "People", "paragraph_text": "Dora has no lamp.", "is_supporting": False},
    ],
}


def write(tmp_path, rows, name="file.json"):
    path = tmp_path / name
    text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    path.write_text(text)
    return str(path)


def test_musique_by_hand(tmp_path):
    task_set = load_tasks("musique", "test", write(tmp_path, [MUSIQUE], "m.jsonl"))
    (task,) = task_set.tasks.values()
    assert task.answers == ("Carl", "Carl the Elder")
    assert task.meta["hops"] == 3
    assert task.meta["type"] == "3hop1"
    assert task.meta["supporting"] == ["Lamp", "People", "People"]
    assert task.meta["openings"] == ["The red lamp was made by Ada.", "Ada lives in Bern.", "Carl leads Bern."]
    assert [step["question"] for step in task.meta["steps"]] == [
        "Who made the red lamp?", "Ada >> home", "Who leads Bern , home of Ada ?",
    ]  # fmt: skip
    assert task.meta["steps"][1]["written"] == "#1 >> home"
    assert task_set.metrics(task, "carl elder") == {"em": 1.0, "f1": 1.0}
    assert task_set.metrics(task, "the elder") == {"em": 0.0, "f1": pytest.approx(2 / 3)}  # the alias, not the answer


def test_paragraphs_of_one_title_are_told_apart(tmp_path):
    env = make("musique", "test", path=write(tmp_path, [MUSIQUE], "m.jsonl"))
    (trajectory,) = rollout(env, oracle(env()), [(MUSIQUE["id"], 0)])
    assert trajectory.outcome == 1.0
    found = {result.text for step in trajectory.steps for result in step.results}
    assert {"People\nAda lives in Bern.", "People\nCarl leads Bern."} <= found


def test_musique_leaves_out_what_cannot_be_answered(tmp_path):
    rows = [MUSIQUE, MUSIQUE | {"answerable": False}]
    assert len(load_tasks("musique", "test", write(tmp_path, rows, "full.jsonl")).tasks) == 1
    blind = {key: MUSIQUE[key] for key in ("id", "question", "paragraphs")}  # as in the official test file
    (task,) = load_tasks("musique", "test", write(tmp_path, [blind], "blind.jsonl")).tasks.values()
    assert task.answers == ()
    assert task.meta["hops"] == 3


# -- BeerQA and CofCA by hand


def test_beerqa_searches_all_paragraphs_of_the_file(tmp_path):
    data = [
        {"id": "a", "src": "squad", "question": "Q1?", "answers": ["x", "y"], "context": [["T", "one"]]},
        {"id": "b", "src": "hotpotqa", "question": "Q2?", "answers": ["z"], "context": [["T", "two"], ["T", "one"]]},
        {"id": "c", "src": "new", "question": "Q3?", "answers": ["w"], "context": []},
    ]
    path = write(tmp_path, {"version": "1.0", "split": "train", "data": data})
    task_set = load_tasks("beerqa", "train", path)
    a, b, c = task_set.tasks.values()
    assert [task.meta["hops"] for task in (a, b, c)] == [1, 2, None]
    assert [task.meta["type"] for task in (a, b, c)] == ["squad", "hotpotqa", "new"]
    assert b.meta["openings"] == ["two", "one"]
    assert [d.text for d in task_set.documents("a")] == ["one", "two"]
    assert task_set.documents("a") == task_set.documents("c")
    assert task_set.metrics(a, "y") == {"em": 1.0, "f1": 1.0}


def test_the_oracle_needs_gold(tmp_path):
    path = write(tmp_path, {"data": [{"id": "a", "question": "Q1?"}]})
    with pytest.raises(ConfigError, match="no gold answer"):
        oracle(make("beerqa", "test", path=path)())


def test_cofca_ids_types_and_holders():
    task_set = load_tasks("cofca", "test")
    assert list(task_set.tasks)[:3] == ["example-a", "example-a#2", "example-a#3"]
    task = task_set.tasks["example-a#3"]
    assert task.meta["hops"] == 4
    assert task.meta["type"] == "4-hop, bridge"
    assert task.meta["supporting"][-1] == "Aino Lindqvist"
    assert [step["answer"] for step in task.meta["steps"]][-1] == task.answers[0]
    with pytest.raises(UnknownNameError, match="no split 'train'"):
        load_tasks("cofca", "train")


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("musique", MUSIQUE | {"paragraphs": [{"idx": 0}]}, "'paragraphs' as"),
        ("musique", MUSIQUE | {"paragraphs": MUSIQUE["paragraphs"][:2]}, "paragraph_support_idx"),
        ("musique", MUSIQUE | {"answer_aliases": None}, "'answer_aliases'"),
        ("musique", MUSIQUE | {"answer": 3}, "'answer'"),
        (
            "musique",
            MUSIQUE | {"question_decomposition": [{"question": "#7", "answer": "x", "paragraph_support_idx": 0}]},
            "question_decomposition",
        ),
        ("beerqa", {"id": "a", "question": "Q?", "answers": []}, "at least one"),
        ("beerqa", {"id": "a", "question": "Q?", "answers": [3]}, "'answers' as a list"),
        ("beerqa", {"id": "a", "question": "Q?", "answers": ["x"], "context": ["T"]}, "'context' as"),
        ("beerqa", {"question": "Q?", "answers": ["x"]}, "'id'"),
        ("cofca", {"_id": "a", "question": "Q?", "answer": "x"}, "'context' as"),
        ("cofca", {"question": "Q?", "answer": "x", "context": [], "sub_questions": ["a"]}, "of one length"),
        ("cofca", "text", "expected a JSON object"),
    ],
)
def test_broken_records_are_named(tmp_path, name, row, says):
    path = write(tmp_path, [row], "broken.json")
    with pytest.raises(DataError) as caught:
        load_tasks(name, "test", path)
    assert says in str(caught.value)
    assert "broken.json[0]" in str(caught.value)


def unpacked(path):
    return gzip.decompress(path.read_bytes())


def test_bundled_records_are_official_ones():
    if not SHARED.exists():
        pytest.skip("the official files are not at hand")
    lines = set(unpacked(SHARED / "musique/musique_ans_v1.0_dev.subset.jsonl.gz").splitlines())
    assert set(unpacked(DATA / "musique_test.jsonl.gz").splitlines()) < lines
    official = json.loads(unpacked(SHARED / "beerqa/beerqa_train_v1.0.subset.json.gz"))["data"]
    for split in ("train", "test"):
        assert all(row in official for row in json.loads(unpacked(DATA / f"beerqa_{split}.json.gz"))["data"])
