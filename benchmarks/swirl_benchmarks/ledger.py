"""The reproduction: `swirl bench ledger`. Base, SFT, SWiRL with each filter, and GRPO at equal sampled tokens, side by side.

For each environment and seed one run folder: `swirl run` to the end (warm start, stage 1, SWiRL with the process filter), then its
rivals from the same warm start: SFT on the same kept trajectories, SWiRL on what the other filters keep, SWiRL on fewer trajectories, SWiRL that
other judges reward, and GRPO until it has sampled as many tokens as SWiRL, stage 1 included. All are measured on the same unseen questions of every environment
named, so what is learned on one and helps on another is seen too. What cannot be trained (a filter that leaves nothing, outcomes that
are all alike) stands in the table with its reason. Everything is skipped where it is done already: the same command goes on.
"""

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from swirl_agents.judges import open_judge
from swirl_algos import stages
from swirl_algos.configs import GrpoConfig, SftConfig, SwirlConfig, TrainerConfig
from swirl_algos.filters import NothingKept
from swirl_algos.folders import read_claim
from swirl_algos.launch import WARM_START, Launch
from swirl_algos.launch import train as learn

from swirl_benchmarks import evaluate
from swirl_benchmarks.metrics import Estimate, Value, mean_of, of_cost, paired_difference, process_score
from swirl_benchmarks.run import RunConfig, maker, parts, run
from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, near
from swirl_env.io import read, write_text
from swirl_env.types import Trajectory

Acted = dict[tuple[str, str], list[Trajectory]]
"""(environment measured on, policy) -> its judged trajectories."""
VALUES: dict[str, Value] = {"outcome": lambda one: one.outcome, "process": process_score}


@dataclass(frozen=True)
class LedgerConfig:
    """Sizes of the reproduction; the defaults are a grid for a GPU."""

    envs: tuple[str, ...] = ("swirl/GSM8K-v0", "swirl/HotPotQA-v0")
    """trained on each"""
    measured: tuple[str, ...] | None = None
    """measured on each; none: on those that are trained on"""
    files: tuple[str, ...] = ()
    """official files in place of the bundled tasks, each ENV=TRAIN,TEST"""
    kwargs: tuple[str, ...] = ()
    """arguments of environments, each ENV=JSON"""
    together: bool = False
    """one warm start, on demonstrations of all that is measured: who has seen neither search nor calculator cannot show transfer"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of everything that is drawn"""
    model: str = "smollm2-135m"
    """base model"""
    tasks: int = 1000
    """training questions for stage 1 (as many as there are, if fewer)"""
    unseen: int | None = None
    """unseen questions of each environment; none: as many as tasks"""
    samples: int = 5
    """trajectories a question"""
    demonstrations: int = 500
    """for the warm start, of each environment that it sees"""
    filters: tuple[str, ...] = ("process", "none", "outcome", "both")
    """of SWiRL; process always runs, and the others learn from no more trajectories than it keeps"""
    limits: tuple[int, ...] = (100, 1000)
    """kept trajectories that SWiRL also learns from alone; those above what was kept are left out"""
    judge: str = "rules"
    """as in swirl run: of the filters, of SWiRL's reward, and of the process score"""
    rivals: tuple[Literal["sft", "grpo"], ...] = ("sft", "grpo")
    """what SWiRL is compared with"""
    rewards: tuple[str, ...] = ()
    """judges that reward SWiRL in its place, on the same kept trajectories: who filters and who rewards, told apart"""
    batch_size: int = 32
    """episodes at once"""
    sft: SftConfig = field(default_factory=SftConfig)
    swirl: SwirlConfig = field(default_factory=SwirlConfig)
    grpo: GrpoConfig = field(default_factory=partial(GrpoConfig, updates=10_000))
    """its token budget is always what SWiRL sampled, stage 1 included; a row that ends with less, for lack of updates, says so"""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def ledger(config: LedgerConfig, out: Path, console: Console) -> dict[str, Any]:
    """Run, or go on with, the whole grid in `out`; returns its figures: `rows`, one an environment, seed and policy.

    Raises:
        ConfigError: a folder there holds a run with another config.
    """
    if config.swirl.rounds > 1:
        raise ConfigError("The ledger compares one round: leave out --swirl.rounds.")
    files, kwargs = _files(config), _kwargs(config)
    rows: list[dict[str, Any]] = []
    pooled: list[dict[str, Any]] = []
    for env in config.envs:
        acted: list[Acted] = []
        for seed in config.seeds:
            folder = out / f"{env.rpartition('/')[2].lower()}-seed{seed}"
            made, trajectories = _one(config, files, kwargs, env, seed, folder, console)
            rows += made
            acted.append(trajectories)
        if len(config.seeds) > 1:
            pooled += _pooled(env, acted)
    return {"config": asdict(config), "rows": rows, "pooled": pooled}


def _files(config: LedgerConfig) -> dict[str, tuple[str, str]]:
    """Of each environment its official files of training and test tasks."""
    files = {}
    for env, both in _of_each(config, "files", "ENV=TRAIN,TEST, such as swirl/GSM8K-v0=train.jsonl,test.jsonl").items():
        train, _, test = both.partition(",")
        if not (train and test):
            raise ConfigError(f"--files takes two files, ENV=TRAIN,TEST; got '{env}={both}'.")
        files[env] = train, test
    return files


def _kwargs(config: LedgerConfig) -> dict[str, str]:
    """Of each environment its arguments, as JSON."""
    kwargs = _of_each(config, "kwargs", """ENV=JSON, such as 'swirl/GSM8K-v0={"grammar": "paper"}'""")
    for given in kwargs.values():
        evaluate.read_kwargs(given)
    return kwargs


def _of_each(config: LedgerConfig, name: str, form: str) -> dict[str, str]:
    """ENV=VALUE entries of an option, by environment."""
    found, known = {}, dict.fromkeys((*config.envs, *(config.measured or ())))
    for entry in getattr(config, name):
        env, _, value = entry.partition("=")
        if not (env and value):
            raise ConfigError(f"--{name} takes {form}; got {entry!r}.")
        if env not in known:
            raise ConfigError(
                f"--{name} names {env}, which is neither trained nor measured on: {', '.join(known)}.{near(env, known)}"
            )
        found[env] = value
    return found


def _pooled(env: str, seeds: Sequence[Acted]) -> list[dict[str, Any]]:
    """Each policy over all seeds: figures, and differences to the warm start, and of SWiRL to each of its rivals (to GRPO: at equal tokens).

    Questions are the units (a question's value is the mean over seeds), so an interval speaks of other questions and these trainings; what
    another seed may give is seen in the differences of each. Where a policy could not be trained it counts as its warm start.
    """
    rows = []
    keys = dict.fromkeys(key for one in seeds for key in one)
    for measured, name in keys:
        trained = sum((measured, name) in one for one in seeds)

        def acted(policy: str, measured: str = measured) -> list[list[Trajectory]]:
            return [one.get((measured, policy), one[measured, WARM_START]) for one in seeds]

        mine = acted(name)
        row: dict[str, Any] = {
            "trained_on": env,
            "measured_on": measured,
            "policy": name,
            "seeds": len(seeds),
            "trained": trained,
        }
        row |= {what: asdict(mean_of(sum(mine, []), value)) for what, value in VALUES.items()}
        rivals = [WARM_START, *(rival for where, rival in keys if where == measured and name == "swirl")]
        for rival in dict.fromkeys(rivals):
            if rival not in (name, "base"):
                theirs = acted(rival)
                row[f"over_{rival}"] = {
                    what: asdict(paired_difference(sum(theirs, []), sum(mine, []), value))
                    | {
                        "of_each_seed": [
                            paired_difference(*pair, value).mean for pair in zip(theirs, mine, strict=True)
                        ]
                    }
                    for what, value in VALUES.items()
                }
        rows.append(row)
    return rows


def _one(
    config: LedgerConfig, files: dict[str, tuple[str, str]], kwargs: dict[str, str], env: str, seed: int, folder: Path,
    console: Console,
) -> tuple[list[dict[str, Any]], Acted]:  # fmt: skip
    """The rows of one environment and seed, and what was acted for them."""
    measured = config.measured or config.envs
    also = tuple(
        f"{other}={files[other][0]}" if other in files else other for other in measured if config.together and other != env
    )  # fmt: skip
    path, test_path = files.get(env, (None, None))
    own = RunConfig(
        env, config.model, config.tasks, unseen=config.unseen, samples=config.samples, demonstrations=config.demonstrations, also=also,
        judge=config.judge, kwargs=kwargs.get(env, "{}"), path=path, test_path=test_path, batch_size=config.batch_size, seed=seed, sft=config.sft, swirl=config.swirl,
        trainer=config.trainer,
    )  # fmt: skip
    from swirl_algos.checkpoints import NothingToLearn

    none_kept = lost = ""
    try:
        run(own, folder, console)
    except NothingKept as error:
        none_kept = lost = str(error)
    except NothingToLearn as error:
        lost = str(error)
    made = [(WARM_START, ""), ("swirl", lost)]
    if config.demonstrations:  # without them the base model is the warm start
        made.insert(0, ("base", ""))
    if "sft" in config.rivals:
        launch = Launch(folder, name="sft", seed=seed, trainer=config.trainer)
        made.append(("sft", none_kept or _try("sft", launch, config.sft)))
    kept = len(list(read(folder / "kept.jsonl", Trajectory)))
    variants: dict[str, dict[str, Any]] = {
        name: {"filter": name, "limit": kept or None} for name in config.filters if name != "process"
    }
    variants |= {str(limit): {"limit": limit} for limit in config.limits if limit < kept}
    variants |= {f"by-{re.sub(r'[^A-Za-z0-9_-]+', '-', judge)}": {"judge": judge} for judge in config.rewards}
    for name, settings in variants.items():
        launch = Launch(folder, name=f"swirl-{name}", seed=seed, trainer=config.trainer, **settings)
        made.append((f"swirl-{name}", _try("swirl", launch, config.swirl)))
    stage_1 = acted_tokens(folder)
    rival = replace(config.grpo, token_budget=stage_1 + trained_tokens(folder, "swirl"))
    # GRPO practises all questions, not those that the judge was pleased with
    everything = folder / "trajectories.jsonl"
    if "grpo" in config.rivals:
        made.append(("grpo", _try("grpo", Launch(everything, name="grpo", seed=seed, trainer=config.trainer), rival)))
    rows, everything_acted = [], Acted()
    for elsewhere in measured:
        warm: list[Trajectory] = []
        path, test_path = files.get(elsewhere, (None, None))
        there = own
        if elsewhere != env:  # no question of what was trained on is among its unseen ones
            trained_on = (env if own.path is None else f"{env}={own.path}", *also)
            there = replace(
                own, env=elsewhere, kwargs=kwargs.get(elsewhere, "{}"), path=path, test_path=test_path, also=trained_on
            )
        envs = maker(there, "train")().unwrapped, maker(there, "test")().unwrapped
        assert isinstance(envs[0], ToolEnv) and isinstance(envs[1], ToolEnv)
        unseen = parts(there, *envs)[2]
        for name, why_not in made:
            row: dict[str, Any] = {"trained_on": env, "measured_on": elsewhere, "seed": seed, "policy": name}
            if name == "grpo" or name.startswith("swirl"):
                row["sampled_tokens"] = trained_tokens(folder, name) + (0 if name == "grpo" else stage_1)
            if name == "grpo" and not why_not and row["sampled_tokens"] < 0.95 * (rival.token_budget or 0):
                row["short_of_budget"] = rival.token_budget
            claimed = folder / "training" / name / "training.json"
            if claimed.exists():
                row["trajectories"] = int(read_claim(claimed)["trajectories"].split()[0])
            if why_not:
                rows.append(row | {"not_trained": why_not})
                continue
            acted, figures = _measure(there, unseen, folder, name)
            everything_acted[elsewhere, name] = acted
            warm = acted if name == WARM_START else warm
            if warm and name != WARM_START:
                row["over_warm_start"] = {
                    what: asdict(paired_difference(warm, acted, value)) for what, value in VALUES.items()
                }
            rows.append(row | figures)
    return rows, everything_acted


def _try(algorithm: str, launch: Launch, config: Any) -> str:
    """Train; "" or the sentence that says why that cannot be, which is kept."""
    from swirl_algos.checkpoints import NothingToLearn

    folder = launch.run if launch.run.is_dir() else launch.run.parent
    why_not = folder / "training" / str(launch.name) / "nothing-to-learn.txt"
    if why_not.exists():
        return why_not.read_text(encoding="utf-8")
    gc.collect()  # the model of the evaluation before: policies and their engines know each other
    try:
        learn(algorithm, launch, config)
    except NothingKept as error:
        return str(error)
    except NothingToLearn as error:
        write_text(why_not, str(error))
        return str(error)
    return ""


def acted_tokens(folder: Path) -> int:
    """Tokens that were sampled in stage 1."""
    return of_cost(list(read(folder / "trajectories.jsonl", Trajectory)))["tokens"] or 0


def trained_tokens(folder: Path, name: str) -> int:
    """Tokens that a training sampled."""
    metrics = folder / "training" / name / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return sum(json.loads(line)["sampled_tokens"] for line in lines)


def _measure(
    config: RunConfig, unseen: Sequence[str], folder: Path, name: str
) -> tuple[list[Trajectory], dict[str, Any]]:
    """A policy's episodes on the unseen questions of an environment, judged; and their figures."""
    test = maker(config, "test")
    own = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]["env"]
    place = folder / "eval" if config.env == own else folder / "eval" / config.env.rpartition("/")[2].lower()
    acted_file = place / f"{name}.unjudged.jsonl"

    def policy() -> Any:
        from swirl_agents.local import LocalPolicy
        from swirl_agents.models import load_model

        # in the precision that swirl run measures in
        model, tokenizer = load_model(config.model if name == "base" else str(folder / name), training=True)
        return LocalPolicy(
            model, tokenizer, name=name, temperature=config.eval_temperature, max_new_tokens=config.swirl.max_new_tokens, seed=config.seed
        )  # fmt: skip

    gc.collect()
    there = {one.task.id: one for one in read(acted_file, Trajectory)}
    if there.keys() >= set(unseen):  # no model need be loaded
        acted = [there[task_id] for task_id in unseen]
    else:
        acted = stages.generate(
            test, policy(), unseen, acted_file, seed=config.seed, batch_size=config.batch_size, name=f"evaluate {name} on {config.env}"
        )  # fmt: skip
    judged = stages.judge(acted, open_judge(config.judge), place / f"{name}.jsonl", config.unknown_limit)
    figures = evaluate.report(test(), name, judged)
    return judged, {key: figures[key] for key in ("n", "outcome", "process", "metrics", "malformed", "steps")}


def _over(what: str, of_each_seed: Sequence[float | None], **difference: Any) -> str:
    """A pooled difference, its interval over questions, and that of each seed."""
    each = " ".join("unknown" if one is None else f"{one:+z.3f}" for one in of_each_seed)
    return f"{what} {Estimate(**difference).signed} (seeds: {each})"


def print_ledger(report: dict[str, Any], console: Console) -> None:
    """A table an environment trained and measured on: a row a policy and seed."""
    rows: Sequence[dict[str, Any]] = report["rows"]
    for trained, measured in dict.fromkeys((row["trained_on"], row["measured_on"]) for row in rows):
        table = Table(title=f"trained on {trained}, measured on {measured}", title_justify="left")
        for heading in (
            "policy",
            "seed",
            "questions",
            "outcome",
            "process score",
            "over warm start: outcome",
            "process",
            "trajectories",
            "sampled tokens",
        ):
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        for row in rows:
            if (row["trained_on"], row["measured_on"]) != (trained, measured):
                continue
            if "not_trained" in row:
                table.add_row(
                    row["policy"], str(row["seed"]), "", row["not_trained"].partition(". ")[0], "", "", "", "", ""
                )
                continue
            over = row.get("over_warm_start")
            table.add_row(
                row["policy"], str(row["seed"]), str(row["n"]), str(Estimate(**row["outcome"])), str(Estimate(**row["process"])),
                *(str(Estimate(**over[what])) if over else "" for what in ("outcome", "process")), str(row.get("trajectories", "")),
                f"{row['sampled_tokens']:,}{' (short of its budget)' if 'short_of_budget' in row else ''}" if "sampled_tokens" in row else "",
            )  # fmt: skip
        console.print(table)
    for row in report["pooled"]:
        figures = ", ".join(f"{what} {Estimate(**row[what])}" for what in VALUES)
        over = "".join(
            f"; over {key.removeprefix('over_')}: " + ", ".join(_over(what, **row[key][what]) for what in VALUES)
            for key in row
            if key.startswith("over_")
        )
        console.print(
            f"{row['policy']}, trained on {row['trained_on']}, measured on {row['measured_on']}, {row['trained']} of {row['seeds']} seeds trained: "
            f"{figures}{over}",
            soft_wrap=True,
        )
