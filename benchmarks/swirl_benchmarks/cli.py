"""The `swirl` command. Heavy imports wait until a subcommand needs them."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from swirl_benchmarks import steps
from swirl_benchmarks.bench import BENCHES
from swirl_benchmarks.run import RunConfig
from swirl_benchmarks.terminal import console
from swirl_env.errors import ConfigError, SwirlError, UnknownNameError

Env = Annotated[str, tyro.conf.Positional]


def run(
    config: Annotated[RunConfig, tyro.conf.arg(name="")],
    *,
    out: str | None = None,
    json: str | None = None,
    reference: bool = False,
) -> None:
    """Warm start, generate, judge, filter, train, and evaluate before and after.

    Example: swirl run swirl/GSM8K-v0 --tasks 32

    Args:
        out: run folder; one that holds the same run goes on where it stopped. Default: runs/NAME-TASKS-seedSEED.
        json: file for a copy of the results.
        reference: short for --swirl.reference: plain rows in place of packed ones, the same losses, several times slower.
    """
    from swirl_benchmarks import evaluate
    from swirl_benchmarks.run import run as run_all

    evaluate.check_target(json)
    if reference:
        config = replace(config, swirl=replace(config.swirl, reference=True))
    name = config.env.rpartition("/")[2].lower()
    folder = Path(out or f"runs/{name}-{config.tasks}-seed{config.seed}")
    results = run_all(config, folder, console(), command=" ".join(["swirl", *sys.argv[1:]]))
    if json:
        evaluate.write_json(json, results)


def eval_(
    env: Env, /, *, model: str, path: str | None = None, tasks: int | None = None, samples: int = 1, judge: str = "rules",
    kwargs: str = "{}", temperature: float = 0.0, max_new_tokens: int = 64, malformed_limit: int | None = None, seed: int = 0,
    json: str | None = None, out: str | None = None,
) -> None:  # fmt: skip
    """Evaluate a policy on test tasks.

    Example: swirl eval swirl/HotPotQA-v0 --model oracle

    Args:
        env: environment id, such as swirl/HotPotQA-v0.
        model: oracle, random, replay:FILE, endpoint:URL, endpoint:URL#MODEL, '{"endpoint": URL, ...}' (settings of a server's
            client), smollm2-135m, a folder or a hub name.
        path: official file of tasks; none: the bundled test tasks.
        tasks: how many, drawn by the seed; none: all.
        samples: episodes a task.
        judge: who scores the steps: rules, gold-steps, outcome, model:URL, model:NAME, module:attribute, or JSON.
        kwargs: arguments of the environment as JSON, such as '{"search": {"k": 2}}'.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: token cap of an action.
        malformed_limit: malformed actions that end an episode; none: no limit.
        seed: of the choice of tasks and of sampling.
        json: file for the figures.
        out: file for the judged trajectories (JSONL); must not exist yet.
    """
    import tempfile

    from swirl_agents.judges import open_judge
    from swirl_algos import stages

    from swirl_benchmarks import evaluate
    from swirl_env.transport import without_credentials

    if (tasks is not None and tasks < 1) or samples < 1 or seed < 0:
        raise ConfigError(
            f"--tasks must be at least 1, --samples too and --seed 0 or more; got {tasks}, {samples}, {seed}."
        )
    evaluate.check_target(json)
    evaluate.check_target(out)
    if out is not None and Path(out).exists():
        raise ConfigError(f"{out} exists already. Give another --out.")

    fixed = {"judge": None, "reward": "outcome", "malformed_limit": malformed_limit, "split": "test", "path": path}
    settings = evaluate.read_kwargs(kwargs, tuple(fixed)) | fixed

    def make():
        return evaluate.make(env, **settings)

    world, judging = make(), open_judge(judge)
    policy = evaluate.make_policy(model, world, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    chosen = evaluate.choose(list(world.unwrapped.task_set.tasks), tasks, seed)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        acted = stages.generate(
            make, policy, chosen, Path(scratch) / "acted.jsonl", samples=samples, seed=seed, name="evaluate"
        )
        judged = stages.judge(acted, judging, Path(out) if out else Path(scratch) / "judged.jsonl")
    model = without_credentials(model)
    figures = evaluate.report(world, model, judged) | {"judge": judging.name, "seed": seed, "temperature": temperature}
    evaluate.print_table(f"{env}, mean [95 % interval]", {model: figures}, console())
    if json:
        evaluate.write_json(json, figures)
    verdicts = [step.verdict for one in judged for step in one.steps if step.verdict is not None]
    if unknown := [verdict.reason for verdict in verdicts if verdict.score is None]:
        print(f"{len(unknown)} verdicts are unknown, such as: {unknown[0]}", file=sys.stderr)
    if failed := figures["stops"].get("error"):
        raise SwirlError(
            f"{failed} of {len(judged)} episodes ended by an error, told above; outcome and steps are of the others. Mend it and "
            "give the command again."
        )
    if len(unknown) > stages.UNKNOWN_LIMIT * len(verdicts):
        raise SwirlError(f"More than {stages.UNKNOWN_LIMIT:.0%} of the verdicts are unknown: mend the judge.")


def judge(
    run: Annotated[Path, tyro.conf.Positional], /, *, judge: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    unknown_limit: float = 0.2, json: str | None = None, ray: str | None = None, workers: int = 1, gpus: float = 0,
) -> None:  # fmt: skip
    """Judge a recorded run again, without acting again; with two judges, compare them.

    Example: swirl judge runs/demo --judge rules --judge gold-steps

    Args:
        run: run folder, or file of trajectories.
        judge: as in swirl run; once or twice.
        unknown_limit: share of unknown verdicts above which judging stops.
        json: file for the figures.
        ray: judge on a Ray cluster, as in swirl generate; none: in this process.
        workers: on Ray; each has a judge of its own.
        gpus: of each worker.
    """
    from swirl_agents.fleet import spread
    from swirl_agents.judges import open_judge
    from swirl_algos import stages

    from swirl_benchmarks import evaluate
    from swirl_benchmarks.judging import print_judges, rejudge

    if not 1 <= len(judge) <= 2:
        raise ConfigError(f"Give --judge once or twice, such as --judge rules; got {len(judge)}.")
    steps.check_fleet(ray, workers, gpus)
    evaluate.check_target(json)

    def on_ray(name, trajectories):
        def make():
            return partial(stages.verdicts, open_judge(name))

        items = {one.key: one for one in trajectories}
        return spread(make, items, address=ray, workers=workers, room=64, gpus=gpus)

    works = [partial(on_ray, name) if ray else None for name in judge]
    result = rejudge(run, [open_judge(name) for name in judge], unknown_limit, works)
    print_judges(result, console())
    if json:
        evaluate.write_json(json, result)


def play(
    env: Env, /, *, path: str | None = None, split: str = "test", task: str | None = None, seed: int | None = None,
    kwargs: str = "{}",
) -> None:  # fmt: skip
    """Act in an environment from the terminal.

    Example: swirl play swirl/GSM8K-v0

    Args:
        env: environment id.
        path: official file of tasks; none: the bundled ones.
        split: train or test.
        task: task id; none: a random one.
        seed: of the random task.
        kwargs: arguments of the environment as JSON.
    """
    if seed is not None and seed < 0:
        raise ConfigError(f"--seed must be 0 or more, got {seed}.")
    from swirl_agents.human import play as play_in

    from swirl_benchmarks import evaluate

    settings = evaluate.read_kwargs(kwargs, ("split", "path")) | {"split": split, "path": path}
    play_in(evaluate.make(env, **settings), seed=seed, task_id=task)


def view(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, *, port: int = 0, open: bool = False) -> None:
    """Browse trajectories in the browser: filter, read, compare, export.

    Example: swirl view runs/demo

    Args:
        runs: run folders, or files of trajectories (JSONL); several are shown together. They may still grow.
        port: of 127.0.0.1, which nobody else's machine reaches; 0: a free one.
        open: open the browser.
    """
    from swirl_benchmarks.viewer.server import serve

    if not runs:
        raise ConfigError("Give at least one run folder or file of trajectories, such as swirl view runs/demo.")
    serve(runs, port, open)


def serve(
    env: Env, /, *, kwargs: str = "{}", host: str = "127.0.0.1", port: int = 8000, max_sessions: int = 64, idle: float = 600.0,
    token_env: str = "SWIRL_SERVE_TOKEN",
) -> None:  # fmt: skip
    """Serve an environment over HTTP and WebSocket, in OpenEnv's protocol.

    Example: swirl serve swirl/GSM8K-v0

    Args:
        env: environment id.
        kwargs: arguments of the environment as JSON. Clients choose a seed and a task, nothing else.
        host: address to listen on; any other than this machine's own needs a token.
        port: 0: a free one.
        max_sessions: sessions at once, each with an environment of its own.
        idle: seconds without a message after which a session ends.
        token_env: environment variable with the token that clients must send (Authorization: Bearer TOKEN); not set: none.
    """
    if max_sessions < 1 or not idle > 0:
        raise ConfigError(f"--max-sessions must be at least 1 and --idle above 0, got {max_sessions} and {idle:g}.")
    import openenv  # noqa: F401  # brings uvicorn, so its lack is told first

    from swirl_benchmarks import evaluate
    from swirl_benchmarks.serve import read_token
    from swirl_benchmarks.serve import serve as serve_at

    settings = evaluate.read_kwargs(kwargs)
    serve_at(
        lambda: evaluate.make(env, **settings), env, host=host, port=port, max_sessions=max_sessions, idle=idle,
        token=read_token(token_env),
    )  # fmt: skip


def envs() -> None:
    """List the environments: tasks, tools, step limits."""
    from rich.table import Table

    from swirl_env.registration import ENVS
    from swirl_env.tasks import load_tasks

    table = Table("id", "tasks at hand", "tools", "steps", "official metric")
    for env_id, kwargs in ENVS.items():
        counts, metrics = [], ""
        for split in ("train", "test"):
            try:
                tasks = load_tasks(str(kwargs["tasks"]), split)
            except UnknownNameError:  # CofCA is for evaluation only
                continue
            counts.append(f"{len(tasks.tasks):,} {split}")
            metrics = ", ".join(tasks.metrics(next(iter(tasks.tasks.values())), None))
        tools = ", ".join(kwargs["tools"])  # type: ignore[arg-type]
        table.add_row(env_id, ", ".join(counts), tools, str(kwargs["max_steps"]), metrics)
    console().print(table)


def data_list() -> None:
    """List the official files: addresses, sizes, and where they lie."""
    from rich.table import Table

    from swirl_env.tasks.download import listing

    table = Table("set", "file", "MB", "checksum", "at hand")
    for name, source, path in listing():
        size = "?" if source.megabytes is None else f"{source.megabytes:g}"
        checksum = "published" if source.sha256 else "recorded at first download"
        table.add_row(name, source.file, size, checksum, str(path or "no"))
    console().print(table)
    print("cofca: no public copy is known; give your own with path=FILE.")


def data_fetch(name: Annotated[str, tyro.conf.Positional], /) -> None:
    """Download official files into the cache folder; prints their paths.

    Example: swirl data fetch gsm8k

    Args:
        name: a set (hotpotqa, gsm8k, musique, beerqa) or the name of one file.
    """
    from swirl_env.tasks.download import fetch

    for path in fetch(name, say=lambda text: print(text, file=sys.stderr)):
        print(path)


def report(
    run: tyro.conf.Positional[tuple[Path, ...]], /, *, out: Path = Path("report.html"), png: Path | None = None
) -> None:
    """One HTML page on runs: figures with intervals, curves, what the filter kept, regressions. Needs no network.

    Example: swirl report runs/demo --out report.html

    Args:
        run: folders of swirl run, swirl generate or swirl bench, the earlier first.
        out: the page.
        png: folder for its plots as PNG; none: NAME-files beside the page.
    """
    from swirl_benchmarks import evaluate
    from swirl_benchmarks.report import write_report

    evaluate.check_target(str(out))
    for note in write_report(run, out, png or out.with_name(f"{out.stem}-files"), " ".join(["swirl", *sys.argv[1:]])):
        print(f"swirl: {note}", file=sys.stderr)
    console().print(f"{out} is the report; open it in a browser.", soft_wrap=True)


def bench() -> None:
    """Benchmark suites: swirl bench --help."""


def data() -> None:
    """Official data files: swirl data --help."""


def export() -> None:
    """Models and trajectories for other programs: swirl export --help."""


EXTRAS = dict.fromkeys(("torch", "transformers", "accelerate", "safetensors", "gguf", "tokenizers"), "train") | {
    "matplotlib": "report",
    "jinja2": "report",
    "datasets": "export",
    "starlette": "view",
    "uvicorn": "view",
    "openenv": "openenv",
    "psutil": "train",
    "ray": "ray",
}
"""Packages that only some commands need, and the extra that brings them."""
COMMANDS: dict[str, Callable] = {
    "envs": envs,
    "play": play,
    "data": data,
    "eval": eval_,
    "bench": bench,
    "run": run,
    "generate": steps.generate,
    "judge": judge,
    "filter": steps.filter_,
    "train": steps.train,
    "export": export,
    "report": report,
    "view": view,
    "serve": serve,
}
"""By a user's way: try, measure, train, look, share."""
ABOUT = """Questions over several steps, with tools, for language models: act, measure, train by step-wise RL, look at it.

Try:      swirl envs, then swirl play swirl/GSM8K-v0 (no model is needed)

Measure:  swirl eval swirl/HotPotQA-v0 --model oracle; swirl bench smoke --model oracle --model random

Train:    swirl run swirl/GSM8K-v0 --tasks 32; or its stages: generate, judge, filter, train

Look:     swirl report runs/*, swirl view runs/*

Share:    swirl serve swirl/GSM8K-v0 (any environment, in OpenEnv's protocol)

swirl COMMAND --help shows flags and an example. --quiet before the command: no bars, no tables, errors only.
"""
GROUPS: dict[str, dict[str, Callable]] = {
    "bench": BENCHES,
    "data": {"list": data_list, "fetch": data_fetch},
    "export": {"model": steps.export_model, "rows": steps.export_rows, "tasks": steps.export_tasks},
}
RESUMED = {
    "run",
    "generate",
    "judge",
    "train",
    "bench smoke",
    "bench paper",
    "bench transfer",
    "bench ledger",
    "data fetch",
}
"""Commands that go on where they stopped."""


def main() -> None:
    """Entry point of `swirl`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(Path.cwd()))  # so that module:attribute finds a file beside you
    if sys.argv[1:2] == ["--quiet"]:
        del sys.argv[1]
        os.environ["SWIRL_QUIET"] = "1"
    try:
        group = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in GROUPS else None
        if sys.argv[1:2] == ["train"]:
            steps.train_with(sys.argv[2:])
        elif group is None:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="swirl", description=ABOUT)
        else:
            tyro.extras.subcommand_cli_from_dict(
                GROUPS[group],
                prog=f"swirl {group}",
                description=COMMANDS[group].__doc__.partition(":")[0] + ".",  # type: ignore[union-attr]
                args=sys.argv[2:],
            )
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        print(f"swirl: this needs {error.name}: pip install -e '.[{extra}]' in the project's folder.", file=sys.stderr)
        sys.exit(2)
    except (SwirlError, OSError) as error:
        from swirl_env.transport import without_credentials

        print(f"swirl: {without_credentials(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumed = {" ".join(sys.argv[1:2]), " ".join(sys.argv[1:3])} & RESUMED
        again = " What was written is kept; the same command goes on from there." if resumed else ""
        print(f"\nswirl: stopped.{again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
