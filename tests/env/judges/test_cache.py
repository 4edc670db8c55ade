"""The cache of verdicts: once asked, known; shared, and whole after a kill."""

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from swirl_env.errors import DataError
from swirl_env.judges import ask
from swirl_env.judges.cache import Cached
from swirl_env.judges.combine import Combine
from swirl_env.testing import check_judge_contract
from swirl_env.types import Action, Step, StepView, ToolResult, Verdict


class Counting:
    name, uses_gold = "counting@1", False

    def __init__(self):
        self.asked = []

    def __call__(self, views):
        self.asked += [view.action.text for view in views]
        return [
            Verdict(
                None if "?" in view.action.text else len(view.action.text) / 100,
                f"é {view.action.text}",
                self.name,
                {"p": None},
                tokens=3,
            )
            for view in views
        ]


def view(text, question="Why?"):
    return StepView(question, (), Action(text, text), 3)


def test_how_long_tools_took_is_no_other_question(tmp_path):
    cached = Cached(Counting(), tmp_path / "verdicts.db")
    for text, seconds in (("12", 0.1), ("12", 0.2), ("13", 0.1)):
        results = (ToolResult(text, seconds=seconds),)
        ask(cached, [StepView("Why?", (Step(Action("a"), results),), Action("b"), 3, None, results)])
    assert (cached.hits, cached.misses) == (1, 2)


def test_asked_once(tmp_path):
    judge = Counting()
    cached = Cached(judge, tmp_path / "c" / "verdicts.db")
    first = ask(cached, [view("a"), view("bb"), view("a"), view("why?")])
    assert judge.asked == ["a", "bb", "why?"]  # once each, also within a batch
    assert ask(cached, [view("bb"), view("a"), view("why?")]) == [first[1], first[0], first[3]]
    assert judge.asked == ["a", "bb", "why?", "why?"]  # what is unknown is asked again
    assert (cached.hits, cached.misses, cached.hit_rate) == (3, 4, 3 / 7)
    assert Cached(Counting(), tmp_path / "other.db").hit_rate is None
    ask(cached, [view("a", "Another question?")])
    assert judge.asked[-1] == "a"
    again = Cached(Counting(), cached.path)
    assert ask(again, [view("a")]) == [first[0]]
    assert again.judge.asked == []
    check_judge_contract(again)


def test_another_judge_has_its_own(tmp_path):
    other = Counting()
    other.name = "counting@2"
    ask(Cached(Counting(), tmp_path / "v.db"), [view("a")])
    ask(Cached(other, tmp_path / "v.db"), [view("a")])
    assert other.asked == ["a"]


def test_a_combination_is_known_by_all_that_its_models_depend_on(tmp_path):
    class Model(Counting):
        name = "model@1"

        def __init__(self, address):
            super().__init__()
            self.address = address

        def key(self, view):
            return self.name, self.address, view.action.text

    models = [Model(address) for address in ("http://a/v1", "http://b/v1", "http://a/v1")]
    for model in models:
        ask(Cached(Combine([Counting(), model], "min"), tmp_path / "v.db"), [view("a")])
    assert [model.asked for model in models] == [["a"], ["a"], []]


def test_no_database_is_told(tmp_path):
    path = tmp_path / "v.db"
    path.write_text("no database at all, but a longer text than that of a header\n" * 20)
    with pytest.raises(DataError, match="no cache of verdicts"):
        Cached(Counting(), path)
    assert path.read_text().startswith("no database")


def test_threads_share_one(tmp_path):
    cached = Cached(Counting(), tmp_path / "v.db")
    wrong = []

    def work(k):
        for i in range(50):
            text = f"step {(i * k) % 40}"
            if ask(cached, [view(text)])[0].reason != f"é {text}":
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cached.hits + cached.misses == 400


def _work(path, k):
    cached = Cached(Counting(), path)
    return [ask(cached, [view(f"step {i}")])[0].score for i in range(k, k + 100)]


def test_processes_share_one(tmp_path):
    path = str(tmp_path / "v.db")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        scores = pool.starmap(_work, [(path, 0), (path, 50), (path, 100)])
    assert scores[0][50:] == scores[1][:50]
    with sqlite3.connect(path) as db:
        assert db.execute("select count(*) from verdicts").fetchone() == (200,)
    db.close()


def test_a_fork_and_a_pickle_open_their_own(tmp_path):
    cached = Cached(Counting(), tmp_path / "v.db")
    ask(cached, [view("a")])
    twin = pickle.loads(pickle.dumps(cached))
    assert ask(twin, [view("a")]) == ask(cached, [view("a")])
    child = os.fork()
    if child == 0:
        os._exit(0 if ask(cached, [view("a"), view("b")])[1].score == 0.01 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(cached, [view("b")])[0].score == 0.01
    assert cached.judge.asked == ["a"]


KILLED = """
import sys
from swirl_env.judges import ask
from swirl_env.judges.cache import Cached
from swirl_env.types import Action, StepView, Verdict
class Judge:
    name, uses_gold = "j@1", False
    def __call__(self, views):
        return [Verdict(0.5, "r" * 500, self.name) for _ in views]
cached = Cached(Judge(), sys.argv[1])
for i in range(10**6):
    ask(cached, [StepView("q", (), Action(str(i), "t"), 3)])
    print(i, flush=True)
"""


def test_whole_after_a_kill(tmp_path):
    path = tmp_path / "v.db"
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(50)]
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert said[-1] == "49\n"
    with sqlite3.connect(path) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        assert db.execute("select count(*) from verdicts").fetchone()[0] >= 50
    db.close()
