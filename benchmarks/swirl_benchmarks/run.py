"""`swirl run`: the whole of SWiRL on one environment, from a base model to a measured, improved one.

    warm start -> generate -> judge -> filter -> train -> evaluate base, warm start and SWiRL on the same unseen questions

Small models seldom write a legal action, so SFT on gold demonstrations comes first (the warm start); stage 1 then trajectories of other training questions, and stage 2 improves on the kept ones by process reward alone. Every stage writes
its own file in the run folder and is skipped where that is complete, so a stopped run goes on where it was.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from swirl_agents.judges import open_judge
from swirl_algos import stages
from swirl_algos.configs import SftConfig, SwirlConfig, TrainerConfig, lasting
from swirl_algos.diagnostics import alarm
from swirl_algos.filters import FILTERS, NothingKept, keep
from swirl_algos.folders import claim, complete
from swirl_algos.launch import WARM_START, Launch, check_config, none_left
from swirl_algos.launch import train as learn
from tyro.conf import Positional

from swirl_benchmarks import evaluate
from swirl_benchmarks.metrics import Estimate, paired_difference, process_score
from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, UnknownNameError, near
from swirl_env.io import read
from swirl_env.judges.cache import Cached
from swirl_env.types import Trajectory

FEW = 8
"""Kept trajectories below which a person is told."""


@dataclass(frozen=True)
class RunConfig:
    """What a run does; `run.json` in its folder keeps it."""

    env: Positional[str]
    """environment id, such as swirl/GSM8K-v0"""
    model: str = "smollm2-135m"
    """base model: smollm2-135m, a folder, or a hub name"""
    tasks: int = 64
    """training questions for stage 1 (as many as there are, if fewer)"""
    unseen: int | None = None
    """unseen questions for evaluation (as many as there are, if fewer); none: as many as tasks"""
    samples: int = 5
    """trajectories a question in stage 1 (the paper: 5)"""
    demonstrations: int = 64
    """gold demonstrations for the warm start, of other training questions; 0: no warm start"""
    also: tuple[str, ...] = ()
    """other environments of which the warm start sees as many demonstrations, each ENV or ENV=FILE of official training tasks"""
    filter: str = "process"
    """which trajectories to train on: none, process, outcome or both"""
    judge: str = "rules"
    """who scores the steps: rules, gold-steps, outcome, model:URL, model:NAME, module:attribute, several joined by +, or JSON"""
    unknown_limit: float = 0.2
    """share of unknown verdicts above which the run stops"""
    kwargs: str = "{}"
    """arguments of the environment as JSON, such as '{"tools": ["search", "mine:population"]}'"""
    path: str | None = None
    """official file of training tasks; none: the bundled ones"""
    test_path: str | None = None
    """official file of test tasks; none: the bundled ones"""
    max_steps: int | None = None
    """step limit; none: the environment's"""
    malformed_limit: int | None = 3
    """malformed actions that end an episode"""
    temperature: float = 1.0
    """sampling temperature of stage 1"""
    eval_temperature: float = 0.0
    """sampling temperature of evaluation; 0 is greedy"""
    batch_size: int = 32
    """episodes at once"""
    seed: int = 0
    """of everything that is drawn"""
    sft: SftConfig = field(default_factory=SftConfig)
    swirl: SwirlConfig = field(default_factory=SwirlConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def run(config: RunConfig, folder: Path, console: Console, command: str = "") -> dict[str, Any]:
    """Run, or go on with, the pipeline in `folder`; returns the results (also in `results.json`).

    Args:
        config: what to do.
        folder: the run folder.
        console: where the table goes.
        command: recorded in the results.

    Raises:
        ConfigError: the folder holds a run with another config; the differences are named.
    """
    times = _Times()
    _check(config)
    judge = open_judge(config.judge)
    train, test = maker(config, "train"), maker(config, "test")
    train_env, test_env = train().unwrapped, test().unwrapped
    claim(folder / "run.json", lasting(config), "--out")
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        console.print(f"{folder} is complete.")
        show(results, console)
        return results
    assert isinstance(train_env, ToolEnv) and isinstance(test_env, ToolEnv)
    shown, practised, unseen = parts(config, train_env, test_env)
    console.print(
        f"{config.env}, {config.model}: {len(shown)} questions for the warm start, {len(practised)} for stage 1, "
        f"{len(unseen)} unseen for evaluation; run folder {folder}\n"
        "stages: evaluate base, warm start, evaluate it, generate, judge, filter, swirl, evaluate it"
    )
    model = _Model(config)
    evaluations: dict[str, list[Trajectory]] = {}

    def measure(name: str) -> None:
        path = folder / "eval" / f"{name}.jsonl"
        acted = stages.generate(
            test, model.policy(name, config.eval_temperature), unseen, folder / "eval" / f"{name}.unjudged.jsonl", seed=config.seed,
            batch_size=config.batch_size, name=f"evaluate {name}",
        )  # fmt: skip
        evaluations[name] = stages.judge(acted, judge, path, config.unknown_limit)
        times.done(f"evaluate {name}")

    measure("base")
    if not complete(folder / WARM_START):
        if shown:
            from swirl_agents.scripted import oracle

            gold = folder / "demonstrations.jsonl"
            stages.generate(train, oracle(train_env), shown, gold, name="demonstrate")
            for other in config.also:
                elsewhere = elsewhere_of(config, other)
                there = elsewhere().unwrapped
                assert isinstance(there, ToolEnv)
                ids = list(there.task_set.tasks)
                some = evaluate.choose(ids, min(config.demonstrations, len(ids)), config.seed)
                stages.generate(elsewhere, oracle(there), some, gold, name=f"demonstrate {other.partition('=')[0]}")
            launch = Launch(gold, model=config.model, name=WARM_START, seed=config.seed, trainer=config.trainer)
            learn("sft", launch, config.sft)
        else:
            model.save(folder / WARM_START)
    times.done("warm start")
    model.use(folder / WARM_START)
    measure("warm_start")
    if (folder / "training" / "swirl").exists():  # what is trained on stays, though its judge might tell more now
        kept = keep(config.filter, read(folder / "judged.jsonl", Trajectory))
    else:
        sampled = stages.generate(
            train, model.policy("warm_start", config.temperature), practised, folder / "trajectories.jsonl", samples=config.samples,
            seed=config.seed, batch_size=config.batch_size,
        )  # fmt: skip
        times.done("generate")
        judged = stages.judge(sampled, judge, folder / "judged.jsonl", config.unknown_limit)
        kept = stages.filter_by(config.filter, judged, folder / "kept.jsonl")
        times.done("judge and filter")
    console.print(
        f"stage 1: {len(kept.kept) + kept.dropped + kept.unknown} trajectories, {len(kept.kept)} kept by the {config.filter} filter, {kept.dropped} dropped, "
        f"{kept.unknown} unknown"
    )
    if 0 < len(kept.kept) < FEW:
        console.print(
            f"{len(kept.kept)} trajectories teach little. More --tasks or --demonstrations give more of them; --filter none keeps all."
        )
    if not kept.kept:
        raise NothingKept(none_left(config.filter, kept, folder / "judged.jsonl"))
    filter = config.filter if config.swirl.rounds > 1 else None  # once it has filtered; further rounds filter anew
    launch = Launch(folder, filter=filter, seed=config.seed, trainer=config.trainer)
    learn("swirl", launch, config.swirl, lambda name: judge)
    times.done("swirl")
    model.use(folder / "swirl")
    measure("swirl")
    results = {"command": command, **_results(config, test(), evaluations, kept, times.seconds)}
    if isinstance(judge, Cached):
        results["verdicts"] = {"asked": judge.misses, "cached": judge.hits, "hit_rate": judge.hit_rate}
    means = [
        [results["policies"][name][what]["mean"] for name in (WARM_START, "swirl")] for what in ("process", "outcome")
    ]
    if None not in means[0] + means[1]:
        results["alarm"] = alarm(*means)
    evaluate.write_json(folder / "results.json", results)
    show(results, console)
    return results


def parts(config: RunConfig, train_env: ToolEnv, test_env: ToolEnv) -> tuple[list[str], list[str], list[str]]:
    """Ids of the questions for demonstrations, for stage 1, and for evaluation: no question is in two of them, and none of the last is among
    the training tasks of this environment or of `also`.

    Raises:
        ConfigError: there are too few tasks.
    """
    train_ids, test_ids = list(train_env.task_set.tasks), list(test_env.task_set.tasks)
    seen = {_plain(train_env.task_set.tasks[task_id].question) for task_id in train_ids}
    for other in config.also:
        there = elsewhere_of(config, other)().unwrapped
        assert isinstance(there, ToolEnv)
        seen |= {_plain(task.question) for task in there.task_set.tasks.values()}
    test_ids = [task_id for task_id in test_ids if _plain(test_env.task_set.tasks[task_id].question) not in seen]
    if len(train_ids) < 2 or not test_ids:
        raise ConfigError(
            f"{len(train_ids)} training and {len(test_ids)} unseen test tasks: at least 2 and 1 are needed."
        )
    shuffled = evaluate.choose(train_ids, len(train_ids), config.seed)
    count = min(config.demonstrations, max(len(shuffled) // 2, len(shuffled) - config.tasks))
    unseen = evaluate.choose(test_ids, min(config.unseen or config.tasks, len(test_ids)), 0)
    return shuffled[:count], shuffled[count : count + config.tasks], unseen


def _plain(question: str) -> str:
    return " ".join(question.casefold().split())


def show(results: dict[str, Any], console: Console) -> None:
    """The results as a table, and the paired differences."""
    evaluate.print_table(
        f"{results['config']['env']}, unseen questions, mean [95 % interval]", results["policies"], console
    )
    for name, differences in results["differences"].items():
        for what, estimate in differences.items():
            if estimate["low"] is None:
                continue
            clear = "clear of 0" if estimate["low"] > 0 or estimate["high"] < 0 else "not clear of 0"
            console.print(f"{name}, paired difference in {what}: {Estimate(**estimate).signed} ({clear})")
    if results.get("alarm"):
        console.print(results["alarm"])
    spent = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in results.get("stage_seconds", {}).items())
    console.print(f"{results['seconds']:,.0f} s{f': {spent}' if spent else ''}", soft_wrap=True)


class _Times:
    """Seconds of each stage of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._last = round(now - self._last, 1), now


def _results(config, env, evaluations, kept, seconds: dict[str, float]) -> dict[str, Any]:
    def differences(before: str, after: str) -> dict[str, Any]:
        pair = evaluations[before], evaluations[after]
        return {
            "process": asdict(paired_difference(*pair, process_score)),
            "outcome": asdict(paired_difference(*pair, lambda trajectory: trajectory.outcome)),
        }

    return {
        "config": asdict(config),
        "note": "smollm2-135m is a dequantised Q4_1 model" if config.model == "smollm2-135m" else "",
        "policies": {name: evaluate.report(env, name, trajectories) for name, trajectories in evaluations.items()},
        "differences": {
            "swirl - warm_start": differences("warm_start", "swirl"),
            "warm_start - base": differences("base", "warm_start"),
        },
        "stage_1": {"kept": len(kept.kept), "dropped": kept.dropped, "unknown": kept.unknown},
        "seconds": round(sum(seconds.values()), 1),
        "stage_seconds": seconds,
        "versions": {name: version(name) for name in ("swirl-env", "torch", "transformers")},
        "python": platform.python_version(),
    }


def elsewhere_of(config: RunConfig, other: str) -> Callable[[], Any]:
    """Makes the training environment of an entry of `also`."""
    env, _, path = other.partition("=")
    return maker(replace(config, env=env, path=path or None, kwargs="{}", max_steps=None), "train")


def maker(config: RunConfig, split: str) -> Callable[[], Any]:
    """Makes the environment of a split, without a judge: a run is judged afterwards."""
    fixed = ("split", "path", "max_steps", "judge", "reward", "malformed_limit")
    kwargs = evaluate.read_kwargs(config.kwargs, fixed)
    kwargs |= {"split": split, "path": config.path if split == "train" else config.test_path}
    if config.max_steps is not None:
        kwargs["max_steps"] = config.max_steps
    # judged afterwards: the same verdicts, and a run can be judged again without acting again
    kwargs |= {"judge": None, "reward": "outcome", "malformed_limit": config.malformed_limit}
    return lambda: evaluate.make(config.env, **kwargs)


def _check(config: RunConfig) -> None:
    """What could only fail hours later fails now."""
    least = {"seed": 0, "tasks": 1, "samples": 1, "demonstrations": 0, "batch_size": 1}
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, got {getattr(config, name)}.")
    if config.unseen is not None and config.unseen < 1:
        raise ConfigError(f"unseen must be at least 1, got {config.unseen}.")
    if config.also and not config.demonstrations:
        raise ConfigError(
            "also adds demonstrations to the warm start, and demonstrations=0 leaves that out: drop one of them."
        )
    for other in config.also:
        elsewhere_of(config, other)()
    check_config(config.sft, "sft.")
    check_config(config.swirl, "swirl.")
    check_config(config.trainer, "trainer.")
    if not 0 <= config.unknown_limit <= 1:
        raise ConfigError(f"unknown_limit must lie in [0, 1], got {config.unknown_limit}.")
    if config.filter not in FILTERS:
        raise UnknownNameError(f"No filter is called {config.filter!r}.{near(config.filter, FILTERS)}")


class _Model:
    """The model in memory: loaded when first needed, reloaded from a checkpoint only if it is another one."""

    def __init__(self, config: RunConfig):
        self.config = config
        self._at: str | None = None

    def _load(self, name: str) -> None:
        if self._at != name:
            from swirl_agents.models import load_model

            self._model, self._tokenizer = load_model(name, training=True)
            self._at = name

    @property
    def model(self):
        self._load(self._at or self.config.model)
        return self._model

    @property
    def tokenizer(self):
        self._load(self._at or self.config.model)
        return self._tokenizer

    def use(self, checkpoint: Path) -> None:
        self._load(str(checkpoint.resolve()))

    def save(self, checkpoint: Path) -> None:
        """Write the checkpoint whole or not at all; it is then the model in memory."""
        from swirl_algos.checkpoints import save_model, write_folder

        write_folder(checkpoint, lambda part: save_model(self._model, self._tokenizer, part))
        self._at = str(checkpoint.resolve())

    def policy(self, name: str, temperature: float):
        model, tokenizer = self.model, self.tokenizer
        from swirl_agents.local import LocalPolicy

        return LocalPolicy(
            model, tokenizer, name=name, temperature=temperature,
            max_new_tokens=self.config.swirl.max_new_tokens, seed=self.config.seed,
        )  # fmt: skip
