"""Judges on the command line, and `swirl judge`: a recorded run judged again, by one judge or by two that are compared."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from swirl_algos import stages

from swirl_benchmarks.metrics import Estimate, bootstrap, process_score
from swirl_env.errors import ConfigError
from swirl_env.io import read
from swirl_env.judges.cache import Cached
from swirl_env.types import STRICT, Judge, Trajectory


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A step that two judges score differently."""

    __pydantic_config__ = STRICT

    task: str
    sample: int
    round: int
    step: int
    question: str
    action: str
    scores: tuple[float, float]
    reasons: tuple[str, str]


def rejudge(
    run: Path, judges: Sequence[Judge], unknown_limit: float = 1.0,
    works: Sequence[Callable[[list[Trajectory]], Iterator[Trajectory]] | None] = (None, None),
) -> dict[str, Any]:  # fmt: skip
    """Judge a run's trajectories again, without acting again. Writes `judged-NAME.jsonl` for each judge, and for two judges
    `disagreements.jsonl`, the widest first; goes on where it stopped.

    Args:
        run: a run folder, or a JSONL file of trajectories.
        judges: one or two.
        unknown_limit: share of unknown verdicts above which judging stops.
        works: how each of them is asked, as in `stages.judge`.

    Returns:
        `judges`: name -> `steps`, `process` and `good` ({mean, low, high}), `unknown` (a count), and of a cached one `asked` and
        `cached`; for two judges `agreement`: `steps` known to both, `share` of them with the same GOOD or BAD, Cohen's
        `kappa`, and `correlation` of the scores.

    Raises:
        ConfigError: there is nothing to judge. `JudgeError`: too much stayed unknown.
    """
    source = run / "trajectories.jsonl" if run.is_dir() else run
    if not source.is_file():
        raise ConfigError(f"There is no {source}. Give a run folder of `swirl run`, or a file of trajectories (JSONL).")
    recorded = list(read(source, Trajectory))
    if not recorded:
        raise ConfigError(
            f"{source} holds no whole trajectory. Give a run folder of `swirl run`, or a file of trajectories."
        )
    folder = source.parent
    judged, report = [], {}
    for judge, work in zip(judges, works, strict=False):
        path = folder / f"judged-{slug(judge.name)}.jsonl"
        before = (judge.hits, judge.misses) if isinstance(judge, Cached) else (0, 0)
        judged.append(stages.judge(recorded, judge, path, unknown_limit, work))
        report[judge.name] = _figures(judged[-1])
        if isinstance(judge, Cached) and work is None:  # elsewhere each worker has its own count
            report[judge.name] |= {"asked": judge.misses - before[1], "cached": judge.hits - before[0]}
    result: dict[str, Any] = {"trajectories": len(recorded), "judges": report}
    if len(judges) == 2:
        pairs = _pairs(*judged)
        result["agreement"] = agreement(*judged)
        apart = [pair for pair in pairs if (pair.scores[0] >= 0.5) != (pair.scores[1] >= 0.5)]
        apart.sort(key=lambda pair: -abs(pair.scores[0] - pair.scores[1]))
        stages.rewrite(folder / "disagreements.jsonl", apart)
        result["disagreements"] = len(apart)
    return result


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.@-]+", "-", name).strip("-")[:100]


def _figures(judged: Sequence[Trajectory]) -> dict[str, Any]:
    verdicts = [[step.verdict for step in trajectory.steps if step.verdict is not None] for trajectory in judged]
    good = [[float(bool(v.good)) for v in one if v.score is not None] for one in verdicts]
    scores = [score for trajectory in judged if (score := process_score(trajectory)) is not None]
    return {
        "steps": sum(map(len, verdicts)),
        "process": asdict(bootstrap(scores)),
        "good": asdict(bootstrap([sum(one) for one in good], [len(one) for one in good])),
        "unknown": sum(v.score is None for one in verdicts for v in one),
        "tokens": sum(v.tokens for one in verdicts for v in one),
    }


def _pairs(left: Sequence[Trajectory], right: Sequence[Trajectory]) -> list[Disagreement]:
    """Every step that both judges scored."""
    pairs = []
    for one, other in zip(left, right, strict=True):
        for i, (a, b) in enumerate(zip(one.steps, other.steps, strict=True)):
            if a.verdict and b.verdict and a.verdict.score is not None and b.verdict.score is not None:
                scores, reasons = (a.verdict.score, b.verdict.score), (a.verdict.reason, b.verdict.reason)
                pairs.append(Disagreement(*one.key, i, one.task.question, a.action.text, scores, reasons))
    return pairs


def agreement(left: Sequence[Trajectory], right: Sequence[Trajectory]) -> dict[str, Any]:
    """`steps` that two judges scored, of the same trajectories in the same order; `share`, `kappa` and `correlation` as in `rejudge`."""
    scores = [pair.scores for pair in _pairs(left, right)]
    if not scores:
        return {"steps": 0, "share": None, "kappa": None, "correlation": None}
    a, b = np.array(scores).T
    same = float(np.mean((a >= 0.5) == (b >= 0.5)))
    p, q = float(np.mean(a >= 0.5)), float(np.mean(b >= 0.5))
    chance = p * q + (1 - p) * (1 - q)
    kappa = None if chance == 1 else (same - chance) / (1 - chance)
    correlation = float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else None
    return {"steps": len(scores), "share": same, "kappa": kappa, "correlation": correlation}


def print_judges(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title=f"{result['trajectories']} trajectories, mean [95 % interval]", title_justify="left")
    for heading in ("judge", "steps", "process score", "GOOD", "unknown", "asked", "from cache"):
        table.add_column(heading, justify="left" if heading == "judge" else "right")
    for name, figures in result["judges"].items():
        table.add_row(
            name, str(figures["steps"]), str(Estimate(**figures["process"])), str(Estimate(**figures["good"])),
            str(figures["unknown"]), str(figures.get("asked", "")), str(figures.get("cached", "")),
        )  # fmt: skip
    console.print(table)
    if "agreement" in result and result["agreement"]["share"] is not None:
        agreement = result["agreement"]
        kappa = "" if agreement["kappa"] is None else f", Cohen's kappa {agreement['kappa']:.2f}"
        console.print(
            f"They agree on {agreement['share']:.1%} of {agreement['steps']} steps{kappa}; {result['disagreements']} "
            "disagreements are in disagreements.jsonl, the widest first."
        )
