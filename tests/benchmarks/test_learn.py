"""`swirl bench learn` in short: from a bundled weak policy (the warm start of one seed), which the benchmark itself makes from
random weights."""

import io
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_benchmarks import learn

from swirl_env.judges import ask, views
from swirl_env.testing import check_judge_contract
from swirl_env.types import Action, Step, StepView, ToolCall, ToolResult

WEAK = Path(__file__).parent / "data" / "weak"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_all_four_learn_from_a_weak_policy(tmp_path, one_thread):
    shutil.copytree(WEAK, tmp_path / "warm-0")
    config = learn.LearnConfig()
    config = replace(
        config, practised=64, samples=2, unseen=64, sft=replace(config.sft, epochs=1), swirl=replace(config.swirl, epochs=2, batch_size=8),
        reinforce=replace(config.reinforce, updates=4), grpo=replace(config.grpo, updates=8, batch_size=8),
    )  # fmt: skip
    report = learn.learn_figures([0], config, tmp_path)
    [figures] = report["seeds"]
    before = figures["policies"]["warm start"]
    for name in ("SWiRL", "REINFORCE", "GRPO"):
        after = figures["policies"][name]
        assert after["outcome"]["mean"] > before["outcome"]["mean"] + 0.05, name
        assert after["process"]["mean"] > before["process"]["mean"], name
    made = figures["made"]
    assert 0 < made["warm start"]["kept"] < made["warm start"]["trajectories"] == 128
    out = io.StringIO()
    learn.print_learn(report | {"missed": {0: "said"}}, Console(file=out, width=150))
    assert "SWiRL - warm start, accuracy" in out.getvalue() and "seed 0 (missed): said" in out.getvalue()


def call(expression, result="?"):
    return Step(
        Action("", calls=(ToolCall("calculator", {"expression": expression}),)),
        (ToolResult(result),),
    )


QUESTION = "Ada has 3 pens. Ada buys 4 more. Ada finds 5 more. How many pens does Ada have now?"


@pytest.mark.parametrize(
    ("steps", "action", "score"),
    [
        ([], call("3+4").action, 1.0),
        ([], call("5+3").action, 1.0),
        ([], call("3+3").action, 0.0),  # there is one 3
        ([], call("3-4").action, 0.0),
        ([], call("3+4+5").action, 0.0),
        ([], Action("", answer="12"), 0.0),  # it has not been worked out
        ([call("3+4", "7")], call("7+5").action, 1.0),
        ([call("3+4", "7")], call("7+4").action, 0.0),  # used
        ([call("3+4", "7")], call("3+5").action, 0.0),  # not from the latest result
        ([call("3+4", "7")], Action("", answer="7"), 0.0),  # too early
        ([call("3+4", "7"), call("7+5", "12")], Action("", answer="12"), 1.0),
        ([call("3+4", "7"), call("7+5", "12")], Action("", answer="13"), 0.0),
        ([], Action("hm", thought="hm"), 0.0),
    ],
)  # fmt: skip
def test_the_judge_of_sums_by_hand(steps, action, score):
    [verdict] = learn.Additions()([StepView(QUESTION, tuple(steps), action, 3)])
    assert verdict.score == score, verdict.reason


def test_the_judge_of_sums_calls_the_gold_way_good_and_keeps_the_contract():
    env = learn.make_env().unwrapped
    tasks = list(islice(env.task_set.tasks, 30))
    judge = learn.Additions()
    for trajectory in rollout(learn.make_env, oracle(env), [(task, 0) for task in tasks]):
        assert {verdict.score for verdict in ask(judge, views(trajectory))} == {1.0}
    check_judge_contract(judge)
