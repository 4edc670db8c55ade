"""`swirl bench NAME`: the suites, each a table for people and JSON for machines."""

from collections.abc import Callable
from pathlib import Path

import tyro

from swirl_benchmarks import evaluate
from swirl_benchmarks.terminal import console
from swirl_env.errors import ConfigError


def _names(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{flag} takes {', '.join(known)}, separated by commas; got {', '.join(unknown)}.")
    return names


def speed(*, only: str = "env,search,judge", small: bool = False, json: str | None = None) -> None:
    """What a step, a search and a verdict cost, each beside its comparison in the same run.

    Example: swirl bench speed --only env,search

    Args:
        only: which of env, search and judge, separated by commas.
        small: search 12,000 paragraphs only, and not a million too (that takes minutes).
        json: file for the figures.
    """
    from swirl_benchmarks import speed_env, speed_judge, speed_search

    chosen = _names(only, ("env", "search", "judge"), "--only")
    evaluate.check_target(json)
    figures: dict = {}
    if "env" in chosen:
        figures["env"] = speed_env.env_figures()
        speed_env.print_env(figures["env"], console())
    if "search" in chosen:
        figures["search"] = speed_search.search_figures((12_000,) if small else (12_000, 1_000_000))
        speed_search.print_search(figures["search"], console())
    if "judge" in chosen:
        figures["judge"] = speed_judge.judge_figures()
        speed_judge.print_judge(figures["judge"], console())
    if json:
        evaluate.write_json(json, figures)


def retrieval(*, data: Path | None = None, backends: str = "bm25,dense,hybrid", json: str | None = None) -> None:
    """Recall of gold paragraphs at 2 and 5, for each data set and search back end.

    Example: swirl bench retrieval --backends bm25

    Args:
        data: folder with official files and corpora; none: the bundled tasks and their paragraphs.
        backends: which of bm25, dense and hybrid, separated by commas.
        json: file for the figures.
    """
    from swirl_benchmarks import retrieval as suite

    chosen = _names(backends, suite.BACKENDS, "--backends")
    evaluate.check_target(json)
    report = suite.retrieval(data, backends=chosen)
    suite.print_retrieval(report, console())
    if json:
        evaluate.write_json(json, report)


def judges(
    *,
    judge: tyro.conf.UseAppendAction[tuple[str, ...]] = ("rules", "rules-written"),
    limit: int | None = None,
    json: str | None = None,
) -> None:
    """How well judges agree with people, on ProcessBench GSM8K and AgentProcessBench HotPotQA.

    Example: swirl bench judges --judge rules --judge model:http://127.0.0.1:8000/v1

    Args:
        judge: as in swirl run; may be given several times.
        limit: samples of each set; none: all.
        json: file for the figures.
    """
    from swirl_benchmarks import judges as suite
    from swirl_benchmarks.judging import open_judge

    evaluate.check_target(json)
    report = suite.bench_judges({name: open_judge(name) for name in judge}, limit)
    suite.print_judges(report, console())
    if json:
        evaluate.write_json(json, report)


BENCHES: dict[str, Callable] = {"speed": speed, "retrieval": retrieval, "judges": judges}
