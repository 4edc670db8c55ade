"""How good is a judge? `swirl bench judges`: step-level judgements against people's, on two bundled sets.

ProcessBench, GSM8K part (Zheng et al., arXiv 2412.06559): written solutions; where is the first wrong step, if any? A judge's
prediction is its first BAD step. F1 as in the paper: the harmonic mean of the accuracy on erroneous samples (the very step)
and on correct ones (no step). Each step is an action with a thought and no calls.

AgentProcessBench, HotPotQA part (arXiv 2603.14465): search episodes, each message labelled +1, 0 or -1. Accuracy, F1 of BAD,
false GOOD and false BAD rates over the labels +1 and -1, and balanced accuracy (the mean of the two recalls: 0.5 for a judge that always
says the same). The share of label 0 judged GOOD is reported apart. A message that writes a call in a form that its host did not
take is a malformed action, which `ask` scores 0 for every judge; the row `GOOD unless malformed` shows what that alone is worth.

Every judge goes one way: views in, verdicts out, GOOD is a score of at least 0.5. Of the two forms of the rules judge, `rules-written`
is for ProcessBench, where thought follows thought, and `rules` for episodes with tools. A row `..., three folds` is the
same judge with its named checks chosen on two folds (by hash of the question) and scored on the third, pooled. The folds choose which checks are on; how the checks are
worded, and their thresholds, was settled with examples of both sets in view, so these rows are optimistic too. An unknown
verdict is left out of the figures and counted; a ProcessBench sample with an unknown before its first BAD is left out
whole. Intervals resample questions.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import swirl_env
from swirl_benchmarks.metrics import RESAMPLES, Estimate
from swirl_env.io import read_official
from swirl_env.judges import RulesJudge, ask
from swirl_env.judges.rules import HABITS
from swirl_env.judges.written import CHECKS
from swirl_env.types import Action, Judge, Step, StepView, ToolCall, ToolResult

DATA = Path(swirl_env.__file__).parent / "data"
PROCESSBENCH = DATA / "processbench_gsm8k.json.gz"
AGENTPROCESSBENCH = DATA / "agentprocessbench_hotpotqa.jsonl.gz"
FOLDS = 3
MIN_PASSED = 0.97
"""Checks are chosen so that at least this share of right solutions passes on the folds they are chosen on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One solution or episode: what a judge sees, and what people said."""

    question: str
    views: tuple[StepView, ...]
    labels: tuple[int, ...]
    """ProcessBench: one number, the first wrong step or -1. AgentProcessBench: +1, 0 or -1 for each view."""


# -- from the official records to views


def processbench(path: Path = PROCESSBENCH) -> list[Sample]:
    """Samples of ProcessBench: each step a thought."""
    samples = []
    for _, row in read_official(path):
        steps = tuple(Step(Action(text, thought=text)) for text in row["steps"])
        shown = tuple(StepView(row["problem"], steps[:i], step.action) for i, step in enumerate(steps))
        samples.append(Sample(row["problem"], shown, (row["label"],)))
    return samples


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)


def agentprocessbench(path: Path = AGENTPROCESSBENCH) -> list[Sample]:
    """Samples of AgentProcessBench: each assistant message an action, the tool messages after it its results."""
    samples = []
    for _, row in read_official(path):
        steps: list[Step] = []
        shown, labels = [], []
        messages = row["messages"]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            action = to_action(message)
            if str(i) in row["step_labels"]:
                shown.append(StepView(row["question"], tuple(steps), action))
                labels.append(row["step_labels"][str(i)])
            replies = []
            for reply in messages[i + 1 :]:
                if reply["role"] != "tool":
                    break
                replies.append(ToolResult(paragraphs(reply["content"] or "")))
            missing = [ToolResult("no result was recorded", "tool_error")] * len(action.calls)
            steps.append(Step(action, tuple([*replies, *missing][: len(action.calls)])))
        samples.append(Sample(row["question"], tuple(shown), tuple(labels)))
    return samples


def to_action(message: Mapping[str, Any]) -> Action:
    """An assistant message as an action: calls of `search`, an `<answer>`, or a thought."""
    text = message.get("content") or ""
    calls = []
    for call in message.get("tool_calls") or ():
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            arguments = {}
        queries = arguments.get("query_list") or arguments.get("query") or ""
        query = queries if isinstance(queries, str) else "\n".join(map(str, queries))
        calls.append(ToolCall(call["function"]["name"], {"query": query}))
    answered = _ANSWER.findall(text)
    answer = answered[-1].strip() if answered and not calls else None
    thought = re.sub(r"</?think>", " ", _ANSWER.sub(" ", text)).strip()
    lost = "a tool call written as text" if not calls and answer is None and "<tool_call>" in text else None
    return Action(text, thought, tuple(calls), answer, lost)


def paragraphs(reply: str) -> str:
    """A retriever's JSON as paragraphs under their titles; other text as it is."""
    try:
        found = [hit["document"]["contents"] for group in json.loads(reply)["result"] for hit in group]
    except (ValueError, KeyError, TypeError):
        return reply
    titled = [text.partition("\n") for text in found]
    return "\n\n".join(dict.fromkeys("\n".join((title.strip('"'), body)) for title, _, body in titled))


# -- judging


@dataclass(frozen=True, slots=True)
class Judged:
    """A judge's verdicts on every view of every sample; `good[s][v]` is `None` where unknown."""

    good: list[list[bool | None]]
    seconds: float
    """A view, wall clock."""
    tokens: float
    """A view."""
    why: str | None
    """The reason of the first unknown verdict; `None` if all are known."""


def judge_all(judge: Judge, samples: Sequence[Sample], batch: int = 64) -> Judged:
    """All views in batches, through `ask`: what is malformed costs no call, what fails is unknown."""
    every = [view for sample in samples for view in sample.views]
    start = time.perf_counter()
    verdicts = [verdict for i in range(0, len(every), batch) for verdict in ask(judge, every[i : i + batch])]
    seconds = time.perf_counter() - start
    good = iter([verdict.good for verdict in verdicts])
    n = max(1, len(every))
    return Judged(
        [[next(good) for _ in sample.views] for sample in samples], seconds / n, sum(v.tokens for v in verdicts) / n,
        next((v.reason for v in verdicts if v.score is None), None),
    )  # fmt: skip


def first_bad(good: Sequence[bool | None]) -> int | None:
    """Index of the first BAD step, -1 if every step is GOOD; `None` if an unknown stands before it."""
    for i, verdict in enumerate(good):
        if verdict is None:
            return None
        if not verdict:
            return i
    return -1


def harmonic(a: float, b: float) -> float:
    """ProcessBench's F1 of the two accuracies: 2ab / (a + b)."""
    return 2 * a * b / (a + b) if a + b else 0.0


Counts = np.ndarray
"""float[N, C]: what each sample adds to each count; every figure is a function of the sums over samples."""


def counts_processbench(samples: Sequence[Sample], good: Sequence[Sequence[bool | None]]) -> Counts:
    """Columns: erroneous found, erroneous, correct passed, correct, erroneous passed, unknown."""
    rows = []
    for sample, verdicts in zip(samples, good, strict=True):
        [label], said = sample.labels, first_bad(verdicts)
        known, bad = said is not None, label >= 0
        rows.append(
            [
                bad and said == label,
                bad and known,
                not bad and said == -1,
                not bad and known,
                bad and said == -1,
                not known,
            ]
        )
    return np.array(rows, float).reshape(-1, 6)


def counts_agentprocessbench(samples: Sequence[Sample], good: Sequence[Sequence[bool | None]]) -> Counts:
    """Columns: +1 judged GOOD, +1, -1 judged BAD, -1, 0 judged GOOD, 0, unknown."""
    rows = []
    for sample, verdicts in zip(samples, good, strict=True):
        pairs = [
            (label, verdict) for label, verdict in zip(sample.labels, verdicts, strict=True) if verdict is not None
        ]
        rows.append(
            [n for want, right in ((1, True), (-1, False), (0, True))
             for n in (pairs.count((want, right)), sum(label == want for label, _ in pairs))]
            + [len(verdicts) - len(pairs)]
        )  # fmt: skip
    return np.array(rows, float).reshape(-1, 7)


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


PROCESS_FIGURES: dict[str, Callable[[Counts], float]] = {
    "f1": lambda c: harmonic(_ratio(c[0], c[1]), _ratio(c[2], c[3])),
    "found": lambda c: _ratio(c[0], c[1]),
    "passed": lambda c: _ratio(c[2], c[3]),
    "accuracy": lambda c: _ratio(c[0] + c[2], c[1] + c[3]),
    "false_good": lambda c: _ratio(c[4], c[1]),
    "false_bad": lambda c: 1 - _ratio(c[2], c[3]),
}
"""Of summed counts: F1, share of first wrong steps found, of right solutions passed, of wrong solutions passed whole, ..."""

AGENT_FIGURES: dict[str, Callable[[Counts], float]] = {
    "balanced": lambda c: (_ratio(c[0], c[1]) + _ratio(c[2], c[3])) / 2,
    "accuracy": lambda c: _ratio(c[0] + c[2], c[1] + c[3]),
    "f1_bad": lambda c: _ratio(2 * c[2], c[2] + c[3] + c[1] - c[0]),
    "false_good": lambda c: 1 - _ratio(c[2], c[3]),
    "false_bad": lambda c: 1 - _ratio(c[0], c[1]),
    "neutral_good": lambda c: _ratio(c[4], c[5]),
}


def estimates(
    samples: Sequence[Sample], counts_NC: Counts, figures: Mapping[str, Callable[[Counts], float]], seed: int = 0
) -> dict[str, Any]:
    """Each figure with its 95 % percentile bootstrap over questions, all samples of one together; unknown is `None`."""
    names = {question: i for i, question in enumerate(dict.fromkeys(sample.question for sample in samples))}
    by_question = np.zeros((len(names), counts_NC.shape[1]))
    np.add.at(by_question, [names[sample.question] for sample in samples], counts_NC)
    draw = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    drawn = [by_question[row].sum(0) for row in draw]
    report: dict[str, Any] = {}
    for name, figure in figures.items():
        values = np.array([figure(row) for row in drawn])
        values = values[np.isfinite(values)]
        mean = figure(counts_NC.sum(0))
        bounds = np.quantile(values, [0.025, 0.975]) if len(names) > 1 and len(values) else (None, None)
        known = Estimate(float(mean), *(None if b is None else float(b) for b in bounds)) if np.isfinite(mean) else None
        report[name] = asdict(known or Estimate(None, None, None))
    return report | {"unknown": int(counts_NC[:, -1].sum())}


# -- three folds


def fold_of(question: str) -> int:
    """0, 1 or 2, by hash of the question's words: all samples of a question fall into one fold."""
    return hashlib.sha256(" ".join(question.split()).encode()).digest()[0] % FOLDS


def in_folds(
    samples: Sequence[Sample],
    base: Sequence[Sequence[bool | None]],
    flagged: Mapping[str, Sequence[Sequence[bool]]],
    value: Callable[[Sequence[Sample], Sequence[Sequence[bool | None]]], float],
) -> tuple[list[list[bool | None]], list[list[str]]]:
    """Verdicts of rules not tuned on what they score.

    Args:
        base: verdicts without any of the named checks.
        flagged: for each check, which views it finds bad.
        value: of verdicts on some samples; to be as large as can be.

    Returns:
        for each sample the verdicts under the set of checks that is best on the other two folds (of equals the largest set);
        the chosen set for each fold.
    """

    def under(chosen: Sequence[str], i: int) -> list[bool | None]:
        return [
            None if good is None else good and not any(flagged[name][i][v] for name in chosen)
            for v, good in enumerate(base[i])
        ]

    subsets = [chosen for size in range(len(flagged), -1, -1) for chosen in combinations(flagged, size)]
    pooled: list[list[bool | None]] = [[] for _ in samples]
    picks = []
    for fold in range(FOLDS):
        inside = [i for i, sample in enumerate(samples) if fold_of(sample.question) == fold]
        outside = [i for i, sample in enumerate(samples) if fold_of(sample.question) != fold]
        best = max(subsets, key=lambda s: value([samples[i] for i in outside], [under(s, i) for i in outside]))
        picks.append(list(best))
        for i in inside:
            pooled[i] = under(best, i)
    return pooled, picks


def _flags(samples: Sequence[Sample], names: Sequence[str], written: bool) -> tuple[list, dict[str, list]]:
    """Verdicts without the named checks, and for each what it alone adds."""
    base = judge_all(RulesJudge(written, off=names), samples).good
    flagged = {}
    for name in names:
        alone = judge_all(RulesJudge(written, off=[other for other in names if other != name]), samples).good
        flagged[name] = [[not good for good in verdicts] for verdicts in alone]
    return base, flagged


def _value_processbench(samples: Sequence[Sample], good: Sequence[Sequence[bool | None]]) -> float:
    total = counts_processbench(samples, good).sum(0)
    passed = PROCESS_FIGURES["passed"](total)
    return PROCESS_FIGURES["f1"](total) if passed >= MIN_PASSED else passed - 1


def _value_agentprocessbench(samples: Sequence[Sample], good: Sequence[Sequence[bool | None]]) -> float:
    return AGENT_FIGURES["balanced"](counts_agentprocessbench(samples, good).sum(0))


# -- the suite


def bench_judges(judges: Mapping[str, Judge], limit: int | None = None) -> dict[str, Any]:
    """Both sets for each judge, the floors and the rules judge in three folds.

    Args:
        judges: by the name to print; `rules` and `rules-written` need not be among them, but may.
        limit: samples of each set, spread over it; none: all.

    Returns:
        JSON: for each set `samples`, `views`, and `judges`: name -> figures {mean, low, high}, `unknown`, `seconds` and `tokens` a
        view, and `why` the first unknown one is; for the rules in folds also `chosen` (checks of each fold) and `alone` (counts with one check only).
    """
    report: dict[str, Any] = {}
    sets: list[tuple[str, list[Sample], Any, Any, Any, Sequence[str], bool]] = [
        ("processbench_gsm8k", processbench(), counts_processbench, PROCESS_FIGURES, _value_processbench, tuple(CHECKS), True),
        ("agentprocessbench_hotpotqa", agentprocessbench(), counts_agentprocessbench, AGENT_FIGURES, _value_agentprocessbench, HABITS, False),
    ]  # fmt: skip
    for name, samples, count, figures, value, checks, written in sets:
        if limit is not None:
            samples = [samples[i] for i in np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(int)]
        rows: dict[str, Any] = {}
        shapely = [[view.action.malformed is None for view in sample.views] for sample in samples]
        for label, good in [("always-GOOD", True), ("always-BAD", False), ("GOOD unless malformed", shapely)]:
            fixed = good if isinstance(good, list) else [[good] * len(sample.views) for sample in samples]
            rows[label] = estimates(samples, count(samples, fixed), figures)
        for label, judge in judges.items():
            judged = judge_all(judge, samples)
            rows[label] = estimates(samples, count(samples, judged.good), figures)
            rows[label] |= {"judge": judge.name, "seconds": judged.seconds, "tokens": judged.tokens, "why": judged.why}
        base, flagged = _flags(samples, checks, written)
        pooled, chosen = in_folds(samples, base, flagged, value)
        title = f"{'rules-written' if written else 'rules'}, three folds"
        rows[title] = estimates(samples, count(samples, pooled), figures) | {"chosen": chosen, "alone": {}}
        for check in ("", *checks):
            only = [
                [None if good is None else good and not (check and bad) for good, bad in zip(a, b, strict=True)]
                for a, b in zip(base, flagged[check or checks[0]], strict=True)
            ]
            total = count(samples, only).sum(0)
            rows[title]["alone"][check or "none"] = {key: round(float(f(total)), 4) for key, f in figures.items()}
        report[name] = {"samples": len(samples), "views": sum(len(s.views) for s in samples), "judges": rows}
    return report


def print_judges(report: Mapping[str, Any], console: Console) -> None:
    """A table for each set; figures with 95 % intervals."""
    for name, part in report.items():
        first = next(iter(part["judges"].values()))
        columns = [key for key, value in first.items() if isinstance(value, dict)]
        table = Table(
            "judge",
            *columns,
            "unknown",
            "ms",
            "tokens",
            title=f"{name}: {part['samples']} samples, {part['views']} steps",
        )
        for judge, row in part["judges"].items():
            cells = [_cell(row[key]) for key in columns]
            cost = [f"{row['seconds'] * 1e3:.3g}", f"{row['tokens']:.0f}"] if "seconds" in row else ["", ""]
            table.add_row(judge, *cells, str(row["unknown"]), *cost)
        console.print(table)
        for judge, row in part["judges"].items():
            if row.get("why"):
                console.print(f"{judge}: unknown, such as: {row['why']}", markup=False)


def _cell(estimate: Mapping[str, float | None]) -> str:
    if estimate["mean"] is None:
        return "unknown"
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['mean']:.3f}" + ("" if low is None else f"\n[{low:.2f}, {high:.2f}]")
