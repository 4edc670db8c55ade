"""The rules judge on every bundled task: it passes gold demonstrations, catches corrupted ones, and is not farmable."""

import random
import re
from dataclasses import replace
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swirl_agents.rollout import rollout
from swirl_agents.scripted import Scripted, oracle

import swirl_env  # noqa: F401
from swirl_env import numerals
from swirl_env.judges import RulesJudge, ask, make_judge, views
from swirl_env.judges.rules import is_polar, wrong_equation
from swirl_env.types import Action, Step, StepView, ToolCall, ToolResult, Verdict

JUDGE = RulesJudge()
SETS = [(name, split) for name in ("GSM8K", "HotPotQA") for split in ("train", "test")]


def make(name, split):
    return lambda: gym.make(f"swirl/{name}-v0", split=split)


@cache
def demonstrations(name, split):
    env = make(name, split)().unwrapped
    jobs = [(task_id, 0) for task_id in env.task_set.tasks]
    return tuple(rollout(make(name, split), oracle(env), jobs))


def mean_score(trajectory):
    return float(np.mean([step.verdict.score for step in trajectory.steps]))


@pytest.mark.parametrize(("name", "split"), SETS)
def test_oracle_solves_every_task_with_good_steps(name, split):
    recorded = demonstrations(name, split)
    assert len(recorded) == (200 if split == "train" else 100)
    assert all(trajectory.outcome == 1.0 and trajectory.stop == "answered" for trajectory in recorded)
    steps = [step for trajectory in recorded for step in trajectory.steps]
    assert not any(step.action.malformed or any(r.error == "crash" for r in step.results) for step in steps)
    assert np.mean([step.verdict.good for step in steps]) >= 0.95


def with_foreign_number(view, draw):
    """One number of a calculation replaced by one that is nowhere."""
    call = view.action.calls[0]
    numbers = list(re.finditer(r"\d+\.?\d*|\.\d+", call.arguments["expression"]))
    known = numerals.mentioned(view.question)
    shown = {float(result.text) for step in view.steps for result in step.results}
    foreign = next(n for n in iter(lambda: draw.randint(3, 999), None) if n not in known and n not in shown)
    at = draw.choice(numbers)
    text = call.arguments["expression"]
    text = f"{text[: at.start()]}{foreign}{text[at.end() :]}"
    return replace(view, action=Action("", calls=(ToolCall(call.name, {"expression": text}),)))


def corruptions(name, split):
    draw = random.Random(0)
    recorded = demonstrations(name, split)
    for i, trajectory in enumerate(recorded):
        shown = views(trajectory)
        calls = [view for view in shown if view.action.calls]
        last = shown[-1]
        if name == "GSM8K" and calls:
            yield "foreign number", with_foreign_number(draw.choice(calls), draw)
        if calls:
            yield "repeated call", replace(last, action=calls[draw.randrange(len(calls))].action, steps_left=3)
        other = recorded[(i + draw.randrange(1, len(recorded))) % len(recorded)].task
        if other.answers != trajectory.task.answers:
            yield "another task's answer", replace(last, action=Action("", answer=other.answers[0]))
        yield "an answer before any evidence", replace(shown[0], action=last.action)


@pytest.mark.parametrize(("name", "split"), SETS)
def test_corrupted_steps_are_bad(name, split):
    verdicts = {}
    for kind, view in corruptions(name, split):
        verdicts.setdefault(kind, []).append(JUDGE([view])[0].good)
    bad = {kind: 1 - np.mean(good) for kind, good in verdicts.items()}
    assert len(bad) == (4 if name == "GSM8K" else 3)
    assert min(bad.values()) >= 0.9, bad


def always_think(transcript):
    turn = len(transcript.messages) // 2
    return f"<think>Let me consider idea{turn} about subject{turn} more.</think>"


def always_search(transcript):
    words = re.findall(r"[A-Za-z0-9]{4,}", transcript.messages[0].content.rpartition("\n\n")[2]) or ["it"]
    turn = len(transcript.messages) // 2
    return f"<search>{words[turn % len(words)]} {words[(turn + 1) % len(words)]}</search>"


def always_calculate(transcript):
    numbers = re.findall(r"\d+", transcript.messages[0].content.rpartition("\n\n")[2]) or ["7", "8"]
    turn = len(transcript.messages) // 2
    left, right = numbers[turn % len(numbers)], numbers[(turn // 2) % len(numbers)]
    return f"<calculator>{left}{'+-*/'[turn % 4]}{right}</calculator>"


def same_search(transcript):
    return "<search>" + transcript.messages[0].content.rpartition("\n\n")[2] + "</search>"


def quick_answer(transcript):
    return "<answer>yes</answer>"


def numbers_of(transcript):
    return re.findall(r"\d+", transcript.messages[0].content.rpartition("\n\n")[2]) or ["7", "8"]


def result_of(transcript):
    return re.sub(r"<.*?>", "", transcript.messages[-1].content.split("\n")[0])


def sum_then_answer(transcript):
    if len(transcript.messages) == 1:
        return f"<calculator>{'+'.join(numbers_of(transcript))}</calculator>"
    return f"<answer>{result_of(transcript)}</answer>"


def sum_then_add_one(transcript):
    if len(transcript.messages) // 2 < 9 and len(transcript.messages) > 1:
        return f"<calculator>{result_of(transcript)}+1</calculator>"
    return sum_then_answer(transcript)


def endless(transcript):
    """What a policy trained against an earlier version of this judge came to do."""
    numbers = numbers_of(transcript)
    if len(transcript.messages) == 1:
        return f"<calculator>{numbers[0]}+{numbers[-1]}</calculator>"
    return f"<calculator>{result_of(transcript)}{'+*'[len(transcript.messages) // 2 % 2]}{numbers[0]}</calculator>"


def new_word(transcript):
    question = transcript.messages[0].content.rpartition("\n\n")[2].lower()
    return next((w for w in re.findall(r"\w+", transcript.messages[-1].content)[3:] if w.lower() not in question), "x")


def search_question_then_word(transcript):
    if len(transcript.messages) == 1:
        return same_search(transcript)
    return f"<answer>{new_word(transcript)}</answer>"


def same_paragraph_then_word(transcript):
    turn = len(transcript.messages) // 2
    if turn in (1, 2, 3):
        title = transcript.messages[2].content.removeprefix("<result>").split("\n")[0]
        words = [w for w in re.findall(r"\w+", transcript.messages[2].content) if len(w) > 3]
        return f"<search>{title} {words[-turn]}</search>"
    return search_question_then_word(transcript)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("GSM8K", sum_then_answer),
        ("GSM8K", sum_then_add_one),
        ("GSM8K", endless),
        ("HotPotQA", search_question_then_word),
        ("HotPotQA", same_paragraph_then_word),
        ("GSM8K", always_think),
        ("GSM8K", always_calculate),
        ("GSM8K", quick_answer),
        ("HotPotQA", always_think),
        ("HotPotQA", always_search),
        ("HotPotQA", same_search),
        ("HotPotQA", quick_answer),
    ],
)
def test_farming_scores_below_the_oracle(name, act):
    gold = demonstrations(name, "test")
    farmed = list(rollout(make(name, "test"), Scripted("farm", act), [(t.task.id, 0) for t in gold]))
    below = np.mean([mean_score(t) for t in gold]) - np.mean([mean_score(t) for t in farmed])
    assert below > 0.1


def test_judging_afterwards_gives_the_verdicts_of_stepping():
    for trajectory in demonstrations("HotPotQA", "test")[:20]:
        assert [step.verdict for step in trajectory.steps] == ask(JUDGE, views(trajectory))


# -- single rules, drawn by hand

QUESTION = "Tom has 48 apples and gives half of them to three friends. How many does each get?"


def shown(*calls):
    """Earlier steps: (tool, argument name, argument, result)."""
    return tuple(
        Step(Action("", calls=(ToolCall(tool, {key: value}),)), (ToolResult(text),)) for tool, key, value, text in calls
    )


def calculate(expression, *earlier, question=QUESTION, left=5):
    call = ToolCall("calculator", {"expression": expression})
    steps = shown(*(("calculator", "expression", text, result) for text, result in earlier))
    return JUDGE([StepView(question, steps, Action("", calls=(call,)), left)])[0]


@pytest.mark.parametrize(
    ("expression", "earlier", "good"),
    [
        ("48/2", [], True),
        ("24/3", [("48/2", "24")], True),
        ("48/7", [], False),  # 7 comes from nowhere
        ("24/3", [], False),  # 24 was not calculated yet
        ("48/2", [("48/2", "24")], False),
        ("3+48", [("48+3", "51")], False),  # the same in another order
        ("48", [], False),
        ("48*1", [], False),
        ("48*2/2", [], False),
        ("3-3", [], False),
        ("(48+2)*1", [("48+2", "50")], False),
        ("48+(2+3)", [("48+2+3", "53")], False),
        ("50*3/3", [("48+2", "50")], False),
        ("-45+48", [("3-48", "-45")], True),
        ("sqrt(10**400)", [], False),
        ("48+0", [], False),
        ("48/", [], False),
        ("", [], False),
        ("48-3", [("48/2", "24"), ("48/3", "16"), ("48*3", "144")], False),  # three results wait
        ("24+16+144", [("48/2", "24"), ("48/3", "16"), ("48*3", "144")], True),
    ],
)
def test_calculations(expression, earlier, good):
    verdict = calculate(expression, *earlier)
    assert verdict.good is good, verdict
    assert 0 <= verdict.score <= 1


def test_going_on_is_worth_less_than_answering():
    """A policy trained without this never answered: every further calculation scored 1."""
    done = [("48/2", "24"), ("24/3", "8")]
    further = calculate("8*24", *done)
    steps = shown(*(("calculator", "expression", text, result) for text, result in done))
    finish = JUDGE([StepView(QUESTION, steps, Action("", answer="8"), 3)])[0]
    assert further.good
    assert finish.score == 1.0 > further.score
    pair = [FISH, ("Tim Burton birthplace", "Tim Burton\nTim Burton was born in Burbank.")]
    assert search("Burbank city", *pair).score < search("Tim Burton birthplace", FISH).score


def test_rounded_results_count_as_known():
    assert calculate("33.33*3", ("100/3", "33.3333333333"), question="100 over 3?").good
    assert not calculate("33.35*3", ("100/3", "33.3333333333"), question="100 over 3?").good


def test_a_call_on_the_last_step_is_bad():
    assert calculate("48/2", left=1).good
    assert not calculate("48/2", left=0).good


def search(query, *earlier, question="Which city is the birthplace of the director of Big Fish?"):
    steps = shown(*(("search", "query", text, result) for text, result in earlier))
    return JUDGE([StepView(question, steps, Action("", calls=(ToolCall("search", {"query": query}),)), 3)])[0]


FISH = ("Big Fish film", "Big Fish\nBig Fish is a 2003 film directed by Tim Burton.")


@pytest.mark.parametrize(
    ("query", "earlier", "good"),
    [
        ("Big Fish director", [], True),
        ("Tim Burton birthplace", [FISH], True),
        ("Tim Burton", [], False),  # nothing said that name yet
        ("film Big Fish", [FISH], False),  # the words of an earlier query
        ("Big Fish 2003 directed", [FISH], False),  # the title and words of a paragraph already shown
        ("Big Fish", [FISH], False),  # its paragraph is shown
        ("", [], False),
        ("?!", [], False),
        ("quantum chromodynamics lattice", [], False),
    ],
)
def test_searches(query, earlier, good):
    verdict = search(query, *earlier)
    assert verdict.good is good, verdict


def answer(text, question, *paragraphs):
    steps = shown(*(("search", "query", f"q{i}", paragraph) for i, paragraph in enumerate(paragraphs)))
    return JUDGE([StepView(question, steps, Action("", answer=text), 2)])[0].good


def test_text_answers():
    asked = "Which city is the birthplace of the director of Big Fish?"
    burton = "Tim Burton\nTim Burton was born in Burbank, California, in nineteen houses."
    assert answer("Burbank", asked, burton)
    assert answer("Burbank, California", asked, burton)
    assert not answer("Burbank", asked)
    assert not answer("London", asked, burton)
    assert not answer("the", asked, burton)
    assert not answer("", asked, burton)
    assert not answer(f"{burton} {burton}", asked, f"{burton} {burton}")
    assert not answer("yes", asked, burton)
    assert not answer("Big Fish", asked, "Big Fish\nBig Fish is a film.")
    assert answer("19", "How many houses?", burton)
    assert not answer("Burbank", "How many houses?", burton)


def test_yes_or_no():
    asked = "Are Big Fish and Ed Wood both films?"
    assert is_polar(asked)
    assert not is_polar("Which film is older, Big Fish or Ed Wood?")
    assert not is_polar("Is Big Fish or Ed Wood older?")
    both = ["Big Fish\nA film.", "Ed Wood\nA film."]
    assert answer("yes", asked, *both)
    assert answer("No.", asked, *both)
    assert not answer("yes", asked, both[0])
    assert not answer("yes", asked, "Paris\nA city.", "Rome\nA city.")
    assert not answer("yes", asked)
    assert not answer("Big Fish", asked, *both)


def number_answer(text, *results):
    steps = shown(*(("calculator", "expression", f"48/{i}", result) for i, result in enumerate(results, 3)))
    return JUDGE([StepView(QUESTION, steps, Action("", answer=text), 2)])[0].good


def test_number_answers():
    assert number_answer("24", "24")
    assert number_answer("$24.00", "24")
    assert number_answer("24 apples", "24")
    assert number_answer("1,000", "1000")
    assert number_answer("33.33", "33.3333333")
    assert number_answer("34", "33.3333333")  # how many buses
    assert not number_answer("24", "24", "8")  # not the latest
    assert not number_answer("25", "24")
    assert not number_answer("24 or 25", "24")
    assert not number_answer("24")


def test_an_answer_that_leaves_most_numbers_unused_is_bad():
    question = "A pen is $3, a book is $12 and a bag is $20. What do five pens, a book and a bag cost?"

    def score(*calculations):
        steps = shown(*(("calculator", "expression", text, result) for text, result in calculations))
        return JUDGE([StepView(question, steps, Action("", answer=calculations[-1][1]), 2)])[0].score

    assert score(("12+20", "32")) == 0.5  # a single calculation for four numbers
    assert score(("3*5", "15"), ("15+12", "27"), ("27+20", "47")) == 1.0
    assert score(("3*5", "15"), ("12+20", "32")) == pytest.approx(0.8)  # 15 waits unused
    assert score(("3*20", "60"), ("60*2", "120")) == 0.5 + 0.5 * 2 / 4
    assert score(("3*2", "6")) < 0.5
    assert numerals.uses(frozenset({0.8}), 20.0)  # 20 % off
    assert not numerals.uses(frozenset({0.8}), 30.0)


def test_thoughts():
    first = StepView(QUESTION, (), Action("", thought="First halve them, then divide."), 5)
    assert JUDGE([first])[0].score == 0.5
    again = replace(
        first, steps=(Step(first.action),), action=Action("", thought="Then consider something else entirely.")
    )
    assert JUDGE([again])[0].score == 0.0
    assert JUDGE([replace(first, action=Action("", thought=QUESTION))])[0].score == 0.0
    assert JUDGE([replace(first, action=Action("", thought="Since 48 / 2 = 25, each gets many."))])[0].score == 0.0
    assert wrong_equation("so 48/2 = 24 and 1/3 = 0.33") is None
    assert wrong_equation("so 48/2 = 24.5") is not None
    assert wrong_equation("1/4 = 25% of the apples, and 3 + 4 = 5 + 2") is None
    assert JUDGE([replace(first, action=Action("x", malformed="no tag"))])[0].score == 0.0


@given(text=st.text(), thought=st.text(), kind=st.sampled_from(["expression", "query", "other", "answer"]))
def test_any_text_gets_a_score(text, thought, kind):
    action = (
        Action(text, thought, (), text) if kind == "answer" else Action(text, thought, (ToolCall("t", {kind: text}),))
    )
    for steps in ((), shown(FISH[:0] + ("search", "query", *FISH), ("calculator", "expression", "48/2", "24"))):
        assert 0 <= JUDGE([StepView(QUESTION, steps, action, 3)])[0].score <= 1


# -- asking any judge


class Broken:
    name, uses_gold = "broken@1", False

    def __init__(self, reply):
        self.reply = reply

    def __call__(self, batch):
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


@pytest.mark.parametrize(
    "reply", [RuntimeError("down"), [], [Verdict(float("nan"), "", "b")], [Verdict(2.0, "", "b")], ["GOOD"], [None]]
)
def test_a_broken_judge_is_unknown_not_zero(reply):
    with pytest.warns(RuntimeWarning, match="broken@1"):
        [verdict] = ask(Broken(reply), [StepView("q", (), Action("x"))])
    assert verdict.score is None
    assert verdict.good is None
    assert verdict.reason


def test_one_view_that_breaks_a_judge_leaves_the_others():
    class Fragile:
        name, uses_gold = "fragile@1", False

        def __call__(self, batch):
            return [Verdict(1.0 / len(view.action.text), "", self.name) for view in batch]

    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        scores = [v.score for v in ask(Fragile(), [StepView("q", (), Action(text)) for text in ("a", "", "bc")])]
    assert scores == [1.0, None, 0.5]


def test_a_malformed_action_scores_0_whoever_judges():
    class Generous:
        name, uses_gold = "generous@1", False

        def __call__(self, batch):
            return [Verdict(1.0, "fine", self.name)] * len(batch)

    batch = [
        StepView("q", (), Action("a")),
        StepView("q", (), Action("b", malformed="bad")),
        StepView("q", (), Action("c")),
    ]
    assert [v.score for v in ask(Generous(), batch)] == [1.0, 0.0, 1.0]


def test_only_a_gold_judge_sees_gold():
    class Spy:
        name = "spy@1"

        def __init__(self, uses_gold):
            self.uses_gold = uses_gold

        def __call__(self, batch):
            self.seen = batch
            return [Verdict(1.0, "", self.name)] * len(batch)

    trajectory = demonstrations("HotPotQA", "test")[0]
    for uses_gold in (True, False):
        spy = Spy(uses_gold)
        ask(spy, views(trajectory))
        assert all((view.task is not None) == uses_gold for view in spy.seen)
        assert all((view.results is not None) == uses_gold for view in spy.seen)


def test_judges_by_name():
    assert make_judge("rules").name == "rules@2"
    assert make_judge("swirl_env.judges.rules:RulesJudge").name == "rules@2"
    for name, says in [
        ("ruls", "Did you mean 'rules'"),
        ("os:path_", "has no 'path_'"),
        ("nowhere:x", "cannot import"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_judge(name)


def test_refused_calls_of_other_tools_do_not_pay_for_long():
    judge, steps, scores = RulesJudge(), (), []
    for i in range(6):
        action = Action(f"<sql>drop {i}</sql>", calls=(ToolCall("sql", {"query": f"drop table t{i}"}),))
        scores.append(ask(judge, [StepView("How many?", steps, action, 5)])[0].score)
        steps += (Step(action, (ToolResult("Only SELECT is allowed.", "tool_error"),)),)
    assert scores == [0.6, 0.5, 0.2, 0.2, 0.2, 0.2]
