"""`swirl bench NAME`: the suites, each a table for people and JSON for machines."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from swirl_benchmarks import evaluate
from swirl_benchmarks.ledger import LedgerConfig
from swirl_benchmarks.terminal import console
from swirl_env.errors import ConfigError, SwirlError, UnknownNameError, near

SPEEDS = ("update", "fork", "rollout", "env", "search", "judge", "load")


def _names(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{flag} takes {', '.join(known)}, separated by commas; got {', '.join(unknown)}.")
    return names


def _given() -> str:
    return " ".join(["swirl", *sys.argv[1:]])


def _write(path: str | None, figures: dict[str, Any]) -> None:
    """Figures and the command that made them, if a file was named."""
    if path:
        evaluate.write_json(path, {"command": _given(), **figures})


def speed(
    *, only: str = ",".join(SPEEDS), small: bool = False, model: str = "smollm2-135m", json: str | None = None,
    plot: str | None = None,
) -> None:  # fmt: skip
    """What updates, acting, steps, searches, verdicts and loading cost, each beside its comparison in the same run.

    Example: swirl bench speed --only update,fork,rollout --json out.json

    Args:
        only: which of update, fork, rollout, env, search, judge and load, separated by commas; gpu, where there is one; and curve,
            for that of updates alone.
        small: the main shapes only: no curves, no memory, no search of a million paragraphs (they take half an hour).
        model: of update, fork and rollout: smollm2-135m, a folder or a hub name.
        json: file for the figures.
        plot: file for a picture of the curve of updates (.png, .svg or .pdf).
    """
    chosen = _names(only, (*SPEEDS, "curve", "gpu"), "--only")
    evaluate.check_target(json)
    evaluate.check_target(plot)
    curved = "curve" in chosen or "update" in chosen and not small
    if plot and not curved:
        raise ConfigError(
            "--plot draws the curve of updates: give it with update or curve among --only, and without --small."
        )
    if plot:
        import matplotlib  # noqa: F401  missing, it is told before anything runs
    figures: dict = {}
    if {"update", "curve", "fork", "rollout"} & set(chosen):
        from swirl_benchmarks import speed_rollout, speed_update

        loaded = speed_update.load(model)
        figures["machine"] = speed_update.machine(model, loaded)
        report: dict = {}
        if "update" in chosen:
            report["shapes"] = speed_update.update_figures(loaded)
        if curved:
            report["curve"] = speed_update.curve_figures(loaded)
        if "update" in chosen and not small:
            report["memory"] = speed_update.memory_figures(model)
        if report:
            figures["update"] = report
            speed_update.print_update(report, console())
            if plot:
                speed_update.plot_update(report["curve"], plot)
        acted: dict = {}
        if "fork" in chosen:
            forks = speed_rollout.FORKS[: 1 if small else None]
            acted["fork"] = [
                speed_rollout.fork_figures(loaded, *shape, rounds=3 if shape is forks[0] else 1) for shape in forks
            ]
        if "rollout" in chosen:
            acted["rollout"] = speed_rollout.rollout_figures(loaded, (32,) if small else (1, 8, 32))
            if not small:
                acted["rollout"] += speed_rollout.many_figures()
        if acted:
            figures |= acted
            speed_rollout.print_rollout(acted, console())
        del loaded
        if "rollout" in chosen:
            from swirl_benchmarks import speed_trl

            figures["trl"] = speed_trl.trl_figures(model, 8 if small else 16)
            speed_trl.print_trl(figures["trl"], console())
    if "gpu" in chosen:
        from swirl_benchmarks import speed_gpu

        figures["gpu"] = speed_gpu.gpu_figures()
        speed_gpu.print_gpu(figures["gpu"], console())
    if "env" in chosen:
        from swirl_benchmarks import speed_env

        figures["env"] = speed_env.env_figures()
        speed_env.print_env(figures["env"], console())
    if "search" in chosen:
        from swirl_benchmarks import speed_search

        figures["search"] = speed_search.search_figures((12_000,) if small else (12_000, 1_000_000))
        speed_search.print_search(figures["search"], console())
    if "judge" in chosen:
        from swirl_benchmarks import speed_judge

        figures["judge"] = speed_judge.judge_figures()
        speed_judge.print_judge(figures["judge"], console())
    if "load" in chosen:
        from swirl_benchmarks import speed_load

        figures["load"] = speed_load.load_figures()
        speed_load.print_load(figures["load"], console())
    _write(json, figures)


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
    _write(json, report)


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
    from swirl_agents.judges import open_judge

    from swirl_benchmarks import judges as suite

    evaluate.check_target(json)
    report = suite.bench_judges({name: open_judge(name) for name in judge}, limit)
    suite.print_judges(report, console())
    _write(json, report)


def learn(*, seeds: tuple[int, ...] = (0, 1, 2), json: str | None = None) -> None:
    """Whether it learns: SWiRL, SFT, REINFORCE and GRPO from random weights, on sums with a calculator (about ten minutes).

    Example: swirl bench learn --seeds 0 1 2

    Args:
        seeds: of questions, sampling and order; side by side where there are cores.
        json: file for the figures.
    """
    from swirl_benchmarks import learn as suite

    evaluate.check_target(json)
    report = suite.learn_figures(seeds)
    suite.print_learn(report, console())
    _write(json, report)
    if report["missed"]:
        raise SwirlError(f"{len(report['missed'])} of {len(seeds)} seeds missed the goal, told above.")


def ledger(
    config: Annotated[LedgerConfig, tyro.conf.arg(name="")], *, out: Path = Path("runs/ledger"), json: str | None = None
) -> None:  # fmt: skip
    """The reproduction: base, SFT, SWiRL with each filter, and GRPO at equal tokens, on each environment; goes on where it stopped.

    Example: swirl bench ledger --envs swirl/GSM8K-v0 --seeds 0 --tasks 40 --samples 2 --demonstrations 40

    Args:
        out: folder of its run folders.
        json: file for the figures.
    """
    from swirl_benchmarks import ledger as suite

    evaluate.check_target(json)
    report = suite.ledger(config, out, console())
    suite.print_ledger(report, console())
    _write(json, report)


def scale(*, only: str = "cluster,wall,memory", json: str | None = None, small: bool = False) -> None:
    """A Ray cluster beside one node, deaths midway, and many requests in flight, on this machine (6 minutes).

    Example: swirl bench scale --only wall

    Args:
        only: which, of cluster (needs ray), wall and memory, joined by commas.
        json: file for the figures.
        small: few episodes, to see that it runs.
    """
    from swirl_benchmarks import scale as suite

    evaluate.check_target(json)
    known: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "cluster": (suite.cluster_figures, {"episodes": 30, "nodes": 2}),
        "wall": (suite.wall_figures, {"episodes": 32, "flying": 16, "seconds": 0.2}),
        "memory": (suite.memory_figures, {"episodes": 100}),
    }
    chosen = only.split(",")
    for name in chosen:
        if name not in known:
            raise UnknownNameError(f"No part of the scale is called {name!r}.{near(name, known)}")
    report = {name: figures(**(short if small else {})) for name in chosen for figures, short in [known[name]]}
    suite.print_scale(report, console())
    _write(json, report)


def _suite(name: str, about: str, example: str) -> Callable[..., None]:
    def command(
        *, model: tyro.conf.UseAppendAction[tuple[str, ...]] = (), out: Path | None = None, data: Path | None = None,
        limit: int | None = None, samples: int = 1, temperature: float = 0.0, max_new_tokens: int = 64, judge: str = "rules",
        seed: int = 0, json: str | None = None,
    ) -> None:  # fmt: skip
        from swirl_benchmarks import suite

        evaluate.check_target(json)
        results = suite.run_suite(
            name, model, out or Path(f"runs/bench-{name}"), data=data, limit=limit, samples=samples, temperature=temperature,
            max_new_tokens=max_new_tokens, judge=judge, seed=seed, say=lambda text: console().print(text, soft_wrap=True),
            command=_given(),
        )  # fmt: skip
        suite.print_suite(results, console())
        if json:
            evaluate.write_json(json, results)
        suite.check_results(results)

    command.__doc__ = f"""{about} The same command goes on after a stop.

    Example: swirl bench {name} {example}

    Args:
        model: as in swirl eval; may be given several times: the others are compared with the first.
        out: folder of this run; none: runs/bench-{name}. A further --model may join what is there.
        data: folder with official files; none: the download cache of swirl data fetch, else the bundled tasks.
        limit: questions of each set; none: the suite's.
        samples: episodes a question; above 1 pass@k and majority@k are told.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: token cap of an action.
        judge: who scores the steps, as in swirl eval.
        seed: of the choice of questions and of sampling.
        json: file for the figures.
    """
    return command


BENCHES: dict[str, Callable] = {
    "smoke": _suite("smoke", "Minutes, bundled tasks: every task set a little.", "--model oracle --model random"),
    "paper": _suite("paper", "The five sets of the SWiRL paper.", "--model smollm2-135m --model runs/demo/swirl"),
    "transfer": _suite(
        "transfer", "Trained on one set, evaluated on the others.", "--model smollm2-135m --model runs/demo/swirl"
    ),
    "speed": speed,
    "scale": scale,
    "retrieval": retrieval,
    "judges": judges,
    "learn": learn,
    "ledger": ledger,
}
