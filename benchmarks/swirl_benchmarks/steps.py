"""The stages of a run as commands of their own: generate -> judge -> filter -> train -> export, each from file to file."""

import argparse
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from swirl_benchmarks.terminal import console
from swirl_env.errors import ConfigError, SwirlError, UnknownNameError, near

Run = Annotated[Path, tyro.conf.Positional]


def generate(
    env: Annotated[str, tyro.conf.Positional], /, *, model: str, out: Path | None = None, path: str | None = None, split: str = "train",
    tasks: int | None = None, samples: int = 5, kwargs: str = "{}", temperature: float = 1.0, max_new_tokens: int = 64,
    malformed_limit: int | None = 3, max_steps: int | None = None, batch_size: int = 32, seed: int = 0,
    ray: str | None = None, workers: int = 1, gpus: float = 0,
) -> None:  # fmt: skip
    """Act in an environment and record the trajectories. The same command goes on after a stop.

    Example: swirl generate swirl/GSM8K-v0 --model smollm2-135m --tasks 16 --out runs/steps

    Args:
        env: environment id, such as swirl/HotPotQA-v0.
        model: as in swirl eval: oracle, random, replay:FILE, endpoint:URL, smollm2-135m, a folder or a hub name.
        out: run folder: trajectories.jsonl, and run.json with these settings; none: runs/NAME-steps-seedSEED.
        path: official file of tasks; none: the bundled ones.
        split: train or test.
        tasks: how many, drawn by the seed; none: all.
        samples: trajectories a task (the paper: 5).
        kwargs: arguments of the environment as JSON, such as '{"search": {"k": 2}}'.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: token cap of an action.
        malformed_limit: malformed actions that end an episode; none: no limit.
        max_steps: step limit; none: the environment's.
        batch_size: episodes at once (of each worker); may be another when going on.
        seed: of the choice of tasks and of sampling.
        ray: act on a Ray cluster: local (begun on this machine), auto, HOST:PORT or ray://HOST:PORT; none: in this process.
        workers: on Ray; each has an environment and a policy of its own.
        gpus: of each worker.
    """
    from swirl_agents.fleet import spread
    from swirl_agents.rollout import rollout
    from swirl_algos import stages
    from swirl_algos.folders import claim

    from swirl_benchmarks import evaluate

    least = {"tasks": 1, "samples": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0, "temperature": 0}
    given = {"tasks": tasks, "samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed,
             "temperature": temperature}  # fmt: skip
    for name, value in given.items():
        if value is not None and value < least[name]:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least[name]}, got {value}.")
    check_fleet(ray, workers, gpus)
    # judged afterwards: the same verdicts, and a run can be judged again without acting again
    fixed = {"split": split, "path": path, "malformed_limit": malformed_limit, "judge": None, "reward": "outcome"}
    settings = evaluate.read_kwargs(kwargs, (*fixed, "max_steps")) | fixed
    if max_steps is not None:
        settings["max_steps"] = max_steps

    def make():
        return evaluate.make(env, **settings)

    world = make()
    config = {"env": env, "model": model, "path": path, "split": split, "tasks": tasks, "samples": samples, "kwargs": kwargs,
              "temperature": temperature, "max_new_tokens": max_new_tokens, "malformed_limit": malformed_limit,
              "max_steps": max_steps, "seed": seed}  # fmt: skip
    out = out or Path("runs") / f"{env.rpartition('/')[2].lower()}-steps-seed{seed}"
    claim(out / "run.json", config, "--out")

    def player():
        policy = evaluate.make_policy(
            model, make(), temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, concurrency=batch_size
        )
        return partial(rollout, make, policy, seed=seed, batch_size=batch_size)

    def on_ray(jobs):
        return spread(
            player, {(*job, 0): job for job in jobs}, address=ray, workers=workers, room=2 * batch_size, gpus=gpus
        )

    chosen = evaluate.choose(list(world.unwrapped.task_set.tasks), tasks, seed)  # type: ignore[attr-defined]
    file = out / "trajectories.jsonl"
    jobs = [(task, sample) for task in chosen for sample in range(samples)]
    stops = stages.record(on_ray if ray else player(), jobs, file)
    shown = ", ".join(f"{count} {stop}" for stop, count in stops.most_common())
    console().print(f"{file}: {len(jobs)} trajectories of {len(chosen)} tasks ({shown})", soft_wrap=True)
    if failed := stops["error"]:
        raise SwirlError(
            f"{failed} of {len(jobs)} episodes ended by an error, told above. Mend it and give the command again: they are made anew."
        )


def check_fleet(ray: str | None, workers: int, gpus: float) -> None:
    """Raises `ConfigError` for what no fleet can be."""
    if workers < 1 or gpus < 0:
        raise ConfigError(f"--workers must be at least 1 and --gpus at least 0, got {workers} and {gpus:g}.")
    if ray is None and (workers > 1 or gpus):
        raise ConfigError("--workers and --gpus are of a Ray cluster: say which with --ray, such as --ray local.")


def filter_(run: Run, /, *, by: str = "process") -> None:
    """Keep the judged trajectories that are worth learning from, in kept.jsonl.

    Example: swirl filter runs/steps --by process

    Args:
        run: run folder, or file of judged trajectories (of several, which).
        by: process (every step is good), outcome (the answer is right), both or none.
    """
    from rich.table import Table
    from swirl_algos import stages
    from swirl_algos.launch import judged_file, none_left

    from swirl_env.io import read
    from swirl_env.types import Trajectory

    source = run if run.is_file() else judged_file(run)
    judged = list(read(source, Trajectory))
    result = stages.filter_by(by, judged, source.with_name("kept.jsonl"))
    counts = {"judged": len(judged), "kept": len(result.kept), "dropped": result.dropped, "unknown": result.unknown}
    table = Table(*counts, title=f"filter {by}", title_justify="left")
    table.add_row(*map(str, counts.values()))
    console().print(table)
    if not result.kept:
        raise ConfigError(none_left(by, result, source).replace("--filter", "--by"))


def train(run: Run, /, *, algo: str) -> None:
    """Train on the kept trajectories of a run. The same command goes on after a stop.

    Example: swirl train runs/steps --algo swirl --learning-rate 2e-5

    Args:
        run: run folder, or file of trajectories. Its kept.jsonl is used; where there is none, what the filter process keeps of the
            judged ones.
        algo: swirl (offline, process reward, as in the paper), sft (imitation of the same trajectories), reinforce (online, process
            reward), grpo (online, outcome reward). `swirl train RUN --algo swirl --help` shows its flags; in several processes:
            `accelerate launch -m swirl_algos.swirl RUN`, with the same flags.
    """
    raise AssertionError("train_with reads --algo first")


def train_with(arguments: list[str]) -> None:
    """`swirl train`: what is not `--algo` goes to the algorithm."""
    parser = argparse.ArgumentParser("swirl train", add_help=False, allow_abbrev=False)
    parser.add_argument("--algo")
    found, rest = parser.parse_known_args(arguments)
    if found.algo is None:
        tyro.cli(train, prog="swirl train", args=arguments)  # shows help, or says that --algo is missing
    from swirl_algos import launch

    if found.algo not in launch.CONFIGS:
        raise UnknownNameError(f"No algorithm is called {found.algo!r}.{near(found.algo, launch.CONFIGS)}")
    launch.main(found.algo, rest, program=f"swirl train RUN --algo {found.algo}")


def export_model(model: Annotated[str, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Write a model as a plain folder for transformers, a LoRA adapter merged into its base.

    Example: swirl export model runs/steps/swirl merged

    Args:
        model: model folder (of swirl train: RUN/NAME), or a name as in swirl eval.
        out: new folder.
    """
    from swirl_benchmarks import export

    export.export_model(model, out)
    console().print(f"{out} loads with AutoModelForCausalLM.from_pretrained.", soft_wrap=True)


def export_rows(run: Run, out: Annotated[Path, tyro.conf.Positional], /, *, format: str = "prompt-completion") -> None:
    """Write trajectories as rows for Hugging Face datasets, in the formats of TRL, verl or verifiers.

    Example: swirl export rows runs/steps steps.jsonl --format prompt-completion

    Args:
        run: run folder, whose kept trajectories are taken (stepwise, verifiers: all judged ones); or file of trajectories.
        out: new file, .jsonl or .parquet (needs datasets).
        format: prompt-completion (a row a step), messages (a row a trajectory: messages with native tool calls, and tools), stepwise
            (a row a trajectory: prompt, completions, and labels from the verdicts; those with an unknown one are left out), verl (a
            row a question, to be played again), verifiers (a row a trajectory: its traces.jsonl, with tokens and rewards).
    """
    from swirl_benchmarks import export

    done = export.export_rows(run, out, format)
    console().print(f"{out}: {done.rows} rows of {done.source}; {done.left_out} trajectories left out", soft_wrap=True)


def export_tasks(
    env: Annotated[str, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional], /, *, kwargs: str = "{}"
) -> None:
    """Write the questions of an environment as rows for verl: data_source, prompt, ability, reward_model, extra_info.

    Example: swirl export tasks swirl/HotPotQA-v0 test.parquet --kwargs '{"split": "test"}'

    Args:
        env: environment id.
        out: new file, .jsonl or .parquet (needs datasets).
        kwargs: arguments of the environment as JSON.
    """
    from swirl_benchmarks import evaluate, export

    count = export.export_tasks(env, out, evaluate.read_kwargs(kwargs))
    console().print(f"{out}: {count} questions of {env}", soft_wrap=True)
