"""One training from the command line, in one process or many: `python -m swirl_algos.swirl RUN`, `swirl train RUN --algo swirl`,
`accelerate launch --num_processes 2 -m swirl_algos.swirl RUN`.

RUN is the folder of `swirl generate` or `swirl run`. The result is a model folder RUN/NAME; how it came about lies in
RUN/training/NAME: its settings, `metrics.jsonl`, `candidates.jsonl`, checkpoints while it is not done. The same command goes on after a
stop.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import tyro
from swirl_agents.endpoint import EndpointPolicy
from swirl_agents.judges import open_judge
from swirl_agents.scripted import SCRIPTED
from tyro.conf import Positional

from swirl_algos import stages
from swirl_algos.configs import (
    GrpoConfig,
    ReinforceConfig,
    SftConfig,
    SwirlConfig,
    TrainerConfig,
    asks_for_shares,
    lasting,
)
from swirl_algos.filters import FILTERS, Kept, NothingKept, keep
from swirl_algos.folders import claim, complete, content, digest, read_claim
from swirl_env.client import PREFIX, open_endpoint
from swirl_env.env import ToolEnv
from swirl_env.errors import ConfigError, SwirlError, UnknownNameError, near
from swirl_env.grammar import Grammar
from swirl_env.io import read
from swirl_env.types import Judge, Policy, Trajectory

CONFIGS = {"swirl": SwirlConfig, "reinforce": ReinforceConfig, "grpo": GrpoConfig, "sft": SftConfig}
WARM_START = "warm_start"


@dataclass(frozen=True)
class Launch:
    """What is trained, from what."""

    run: Positional[Path]
    """run folder, or a file of (judged) trajectories"""
    model: str | None = None
    """checkpoint to start from: a folder or a model's name; none: the run's warm start, else the model that acted"""
    name: str | None = None
    """name of the result in the run folder; none: that of the algorithm"""
    judge: str | None = None
    """who scores the actions; none: as in the run, else rules"""
    server: str | None = None
    """who acts in rounds after the first: endpoint:URL of a vLLM server, which loads each round's adapter (needs lora_rank); none: this
    process"""
    filter: str | None = None
    """which judged trajectories to train on: none, process, outcome or both; not given: kept.jsonl, else process. Also what each further
    round keeps"""
    limit: int | None = None
    """so many of them, drawn by the seed; none: all"""
    seed: int = 0
    """of the order and of every draw"""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def main(
    algorithm: str, arguments: Sequence[str] | None = None, open_judge: Callable[[str], Judge] = open_judge,
    program: str | None = None,
) -> None:  # fmt: skip
    """Read the command line and train; errors are sentences on standard error, exit code 2.

    Args:
        algorithm: swirl, reinforce, grpo or sft.
        arguments: of the command line; `None`: this process's.
        open_judge: makes a judge from its name.
        program: as help calls the command.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    kind = CONFIGS[algorithm]

    def command(
        launch: Annotated[Launch, tyro.conf.arg(name="")], config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    ) -> None:  # fmt: skip
        train(algorithm, launch, config, open_judge)
        _leave()

    about = import_module(f"swirl_algos.{algorithm}").__doc__ or algorithm
    try:
        tyro.cli(
            command,
            args=arguments,
            prog=program or f"python -m swirl_algos.{algorithm}",
            description=about.partition("\n")[0],
        )
    except (SwirlError, OSError) as error:
        if program is not None:
            raise
        print(f"swirl: {error}", file=sys.stderr)
        sys.exit(2)


def train(algorithm: str, launch: Launch, config: Any, open_judge: Callable[[str], Judge] = open_judge) -> Path:
    """Train, or go on training; returns the model folder, which may be there already.

    Raises:
        ConfigError: a value that cannot work, or the folder holds a training with other settings (the differences are named).
        TrainingError: see the algorithm's `train`.
    """
    _check(launch, config)
    if algorithm == "sft" and launch.judge is not None:
        raise ConfigError("sft imitates and asks no judge: leave out --judge.")
    folder = launch.run if launch.run.is_dir() else launch.run.parent
    name = launch.name or algorithm
    target, place = folder / name, folder / "training" / name
    recorded = read_claim(folder / "run.json") if (folder / "run.json").exists() else {}
    trajectories = chosen(launch, folder)
    if getattr(config, "rounds", 1) > 1 and launch.filter is None and (folder / "kept.jsonl").exists():
        raise ConfigError(
            f"Each further round filters anew, and which filter made {folder / 'kept.jsonl'} is not known: give it with --filter "
            f"({', '.join(FILTERS)})."
        )
    start = launch.model or _start(folder, recorded, trajectories)
    judge_name = None if algorithm == "sft" else launch.judge or recorded.get("judge") or "rules"
    settings = {"algorithm": algorithm, **lasting(launch), "run": launch.run.name, **lasting(config)} | {
        "model": os.path.relpath(start, folder) if Path(start).exists() else start, "judge": judge_name,
        "trajectories": f"{len(trajectories)} ({digest(content(trajectories))})",
    }  # fmt: skip
    first = _first_process()
    if first:
        claim(place / "training.json", settings, "--name")
    if complete(target):
        _say(f"{target} is complete.", first)
        return target
    if target.exists():
        raise ConfigError(f"{target} exists and is no model: it is not replaced. Give another --name.")
    judge = None if judge_name is None else _judge(judge_name, launch.judge is not None, trajectories, open_judge)
    if algorithm == "swirl":
        assert judge is not None
        _rounds(launch, config, trajectories, judge, start, place, target)
        return target
    gc.collect()  # trainers before this one: model, optimiser and accelerator know each other, gigabytes that nobody else holds
    with _Progress(name) as log:
        trainer = _trainer(start, launch, place, log)
        if algorithm == "sft":
            from swirl_algos import sft

            sft.train(trainer, trajectories, config)
        else:
            from swirl_algos import grpo, reinforce

            make_env = env_of(trajectories[0], judge, "outcome" if algorithm == "grpo" else config.reward)
            tasks = list(dict.fromkeys(one.task.id for one in trajectories))
            (grpo if algorithm == "grpo" else reinforce).train(trainer, make_env, tasks, config)
        trainer.save_model(target)
    _say(f"{target} is the trained model; {place / 'metrics.jsonl'} says how it went.", first)
    return target


def chosen(launch: Launch, folder: Path) -> list[Trajectory]:
    """The trajectories to train on, in an order that is not that of the file. Raises `ConfigError` where there are none."""
    if launch.run.is_file():
        found, source = list(read(launch.run, Trajectory)), launch.run
    elif launch.filter is None and (folder / "kept.jsonl").exists():
        found, source = list(read(folder / "kept.jsonl", Trajectory)), folder / "kept.jsonl"
    else:
        unjudged = folder / "trajectories.jsonl"  # enough for a filter that looks at no verdict
        enough = launch.filter == "none" and unjudged.exists() and not any(folder.glob("judged*.jsonl"))
        source = unjudged if enough else judged_file(folder)
        found = list(read(source, Trajectory))
    if launch.filter is not None or source.name.startswith("judged"):
        result = keep(launch.filter or "process", found)
        if not result.kept and found:
            raise NothingKept(none_left(launch.filter or "process", result, source))
        found = result.kept
    if not found:
        raise ConfigError(f"There is no trajectory to train on in {source}. Generate more, or use another --filter.")
    found.sort(key=lambda one: one.key)  # files are in the order in which episodes and verdicts came
    if launch.limit is not None and launch.limit < len(found):
        import numpy as np

        order = np.random.default_rng(launch.seed).permutation(len(found))[: launch.limit]
        found = [found[i] for i in sorted(order)]
    return found


def none_left(filter: str, result: Kept, source: Path) -> str:
    """What to say where a filter keeps nothing."""
    return (
        f"The filter {filter} leaves none of the {result.dropped + result.unknown} trajectories in {source} ({result.dropped} dropped, "
        f"{result.unknown} with an unknown verdict). Generate more, use another --filter, or look at their verdicts."
    )


def judged_file(folder: Path) -> Path:
    """`judged.jsonl`, or the one `judged-NAME.jsonl`. Raises `ConfigError` if there is none, or more than one."""
    found = sorted(folder.glob("judged-*.jsonl"))
    if (folder / "judged.jsonl").exists():
        return folder / "judged.jsonl"
    if not folder.exists():
        raise ConfigError(f"There is no {folder}. Make one with swirl generate or swirl run.")
    if not found:
        raise ConfigError(f"No trajectories in {folder} were judged. Judge them: swirl judge {folder} --judge rules.")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(
            f"{folder} holds the verdicts of several judges: {names}. Name one in place of the folder: {found[-1]}."
        )
    return found[0]


def env_of(trajectory: Trajectory, judge: Judge | None, reward: str) -> Callable[[], gym.Env]:
    """Makes the environment that a trajectory was recorded in, with this judge and reward."""
    record = trajectory.env
    if record.id not in gym.registry:
        raise UnknownNameError(f"No environment is called {record.id!r}: import the module that registers it.")

    def make() -> gym.Env:
        kwargs = record.kwargs | {"judge": None, "reward": "outcome"}
        env = gym.make(record.id, disable_env_checker=True, **kwargs)
        base = env.unwrapped
        assert isinstance(base, ToolEnv)
        names = [{one["function"]["name"] for one in tools} for tools in (record.tools, base.record.tools)]
        if names[0] != names[1]:
            raise ConfigError(
                f"The trajectories were recorded with the tools {', '.join(sorted(names[0])) or 'none'}, and {record.id} as it is made from "
                f"its recorded arguments has {', '.join(sorted(names[1])) or 'none'}: a wrapper changed them. Name the tools in the environment's "
                "arguments, as in tools=['search', 'mine:population'], or call the algorithm's train() with your own make_env."
            )
        base.set_judge(judge)
        base.reward = reward
        return env

    return make


def _rounds(
    launch: Launch, config: SwirlConfig, trajectories: list[Trajectory], judge: Judge, start: str, place: Path, target: Path
) -> None:  # fmt: skip
    """SWiRL once, or round by round: each acts, judges and filters with the policy of the one before."""
    from swirl_algos import swirl

    name = launch.name or "swirl"
    grammar = env_of(trajectories[0], None, "outcome")().unwrapped.grammar  # type: ignore[attr-defined]
    for round in range(config.rounds):
        last = round == config.rounds - 1
        here = target if last else place / f"round-{round}" / "model"
        if not complete(here):
            gc.collect()
            with _Progress(name if config.rounds == 1 else f"{name}, round {round}") as log:
                trainer = _trainer(start, launch, place if config.rounds == 1 else place / f"round-{round}", log)
                if launch.server and not trainer.joins:
                    raise ConfigError(
                        f"A server cannot be given what is trained on {start}: its adapter is on other layers, or of another kind, than a new "
                        "one, so they cannot become one. Merge it (swirl export model), serve the result, and start there."
                    )
                states = trajectories
                if config.beta:
                    trainer.reference  # noqa: B018  the checkpoint of this round's start, before anything acts
                if round:
                    acts = (
                        partial(_served, trainer, launch, config, grammar, start)
                        if launch.server
                        else partial(_local, trainer, config)
                    )
                    states = _again(trainer, launch, acts, trajectories, judge, round, place / f"round-{round}")
                swirl.train(trainer, states, judge, grammar, config)
                trainer.save_model(here)
        start = str(here)
    _say(f"{target} is the trained model; {place} says how it went.", _first_process())


@contextmanager
def _local(trainer: Any, config: SwirlConfig) -> Iterator[Policy]:
    """The model in training, as a policy."""
    policy = trainer.policy(config.temperature, config.max_new_tokens)
    with trainer.acting():
        yield policy
    policy.free()


@contextmanager
def _served(trainer: Any, launch: Launch, config: SwirlConfig, grammar: Grammar, adapter: str) -> Iterator[Policy]:
    """A server's model with this adapter, as a policy."""
    assert launch.server is not None
    client = open_endpoint(
        launch.server, "--server", temperature=config.temperature, max_new_tokens=config.max_new_tokens
    )
    weights = (Path(adapter) / "adapter_model.safetensors").read_bytes()
    name = f"{launch.name or 'swirl'}-{sha256(weights).hexdigest()[:8]}"  # other weights never meet the server's cache of these
    policy = EndpointPolicy(client.load_adapter(name, str(Path(adapter).resolve())), grammar)
    try:
        yield policy
        trainer.accelerator.wait_for_everyone()
    finally:
        client.unload_adapter(name)


def _again(
    trainer: Any,
    launch: Launch,
    acts: Callable[[], AbstractContextManager[Policy]],
    recorded: list[Trajectory],
    judge: Judge,
    round: int,
    place: Path,
) -> list[Trajectory]:
    """New trajectories of the recorded ones' questions by the current policy, judged and filtered; each process makes its share.
    What was kept once stays: a judge that could tell more later would change what is trained on."""
    if found := list(read(place / "kept.jsonl", Trajectory)):
        return found
    tasks = list(dict.fromkeys(one.task.id for one in recorded))
    samples = 1 + max(one.sample for one in recorded)
    part = f"-{trainer.rank}" if trainer.world > 1 else ""
    with acts() as policy:
        acted = stages.generate(
            env_of(recorded[0], None, "outcome"), policy, trainer.mine(tasks), place / f"trajectories{part}.jsonl", samples=samples,
            seed=launch.seed, round=round, name=f"generate, round {round}",
        )  # fmt: skip
    judged = trainer.gather(stages.judge(acted, judge, place / f"judged{part}.jsonl"))
    judged.sort(key=lambda one: one.key)  # in the same order, however many processes acted
    kept = keep(launch.filter or "process", judged)
    if not kept.kept:
        said = none_left(launch.filter or "process", kept, place)
        raise ConfigError(f"Round {round}: {said} The model of the round before is in {place.parent}.")
    if trainer.main:
        stages.rewrite(place / "kept.jsonl", kept.kept)
    return kept.kept


def _trainer(start: str, launch: Launch, place: Path, log: Callable[[dict], None]):
    from swirl_agents.models import load_model

    from swirl_algos.trainer import Trainer

    # a model to be shared out may be too large for one card; of several processes each has its own card
    card = "cpu" if asks_for_shares(launch.trainer) and "LOCAL_RANK" in os.environ else local_card()
    model, tokenizer = load_model(start, card, training=True)
    return Trainer(model, tokenizer, launch.trainer, folder=place, seed=launch.seed, log=log)


def _judge(name: str, named: bool, trajectories: list[Trajectory], open_judge: Callable[[str], Judge]) -> Judge:
    """The judge; where nobody named it, it must be the one whose verdicts the trajectories have."""
    judge = open_judge(name)
    before = {step.verdict.judge for one in trajectories for step in one.steps if step.verdict is not None}
    if not named and before - {judge.name}:
        raise ConfigError(
            f"The trajectories were judged by {', '.join(sorted(before))}, and {name} would score the actions now ({judge.name}). Say "
            f"who shall with --judge: the name that swirl judge was given, or {name}."
        )
    return judge


def _start(folder: Path, recorded: dict[str, Any], trajectories: list[Trajectory]) -> str:
    if complete(folder / WARM_START):
        return str(folder / WARM_START)
    name = str(recorded.get("model") or "")
    if name and name.partition(":")[0] not in SCRIPTED and not name.startswith((PREFIX, "{")):
        return name
    raise ConfigError(
        f"The trajectories in {folder} are by {trajectories[0].policy!r}, which is not known as a model to train: name one with --model "
        "(a folder, or smollm2-135m)."
    )


def _check(launch: Launch, config: Any) -> None:
    if launch.filter is not None and launch.filter not in FILTERS:
        raise UnknownNameError(f"No filter is called {launch.filter!r}.{near(launch.filter, FILTERS)}")
    if not launch.run.exists():
        raise ConfigError(f"There is no {launch.run}. Make one with swirl generate or swirl run.")
    if launch.limit is not None and launch.limit < 1:
        raise ConfigError(f"limit must be at least 1, got {launch.limit}.")
    check_config(config)
    check_config(launch.trainer, "trainer.")
    if launch.server and not (launch.trainer.lora_rank and getattr(config, "rounds", 1) > 1):
        raise ConfigError(
            "--server acts in rounds after the first, with the adapter of each: give --rounds and --trainer.lora-rank too."
        )


def check_config(config: Any, prefix: str = "") -> None:
    """What could only fail hours later fails now. Raises `ConfigError`."""
    least = {
        "epochs": 1,
        "batch_size": 1,
        "samples": 1 if isinstance(config, ReinforceConfig) else 2,
        "token_budget": 1,
        "max_new_tokens": 1,
        "rounds": 1,
        "updates": 1,
        "passes": 1,
        "row_tokens": 2,
    }
    values = asdict(config)
    for name, minimum in least.items():
        if values.get(name) is not None and values[name] < minimum:
            raise ConfigError(f"{prefix}{name} must be at least {minimum}, got {values[name]}.")
    for name in ("learning_rate", "temperature", "clip", "kl_target", "max_grad_norm"):
        if values.get(name) is not None and not values[name] > 0:
            raise ConfigError(f"{prefix}{name} must be above 0, got {values[name]}.")
    for name in ("beta", "entropy", "weight_decay"):
        if not values.get(name, 0) >= 0:
            raise ConfigError(f"{prefix}{name} must not be below 0, got {values[name]}.")
    for name in ("discount", "warmup"):
        if not 0 <= values.get(name, 0) <= 1:
            raise ConfigError(f"{prefix}{name} must lie in [0, 1], got {values[name]}.")
    if values.get("kl") == "reward" and not values["beta"]:
        raise ConfigError(
            f"{prefix}kl is reward, and {prefix}beta is 0: there is no penalty. Give a beta, or leave out kl."
        )
    if values.get("kl_target") is not None and not values["beta"]:
        raise ConfigError(f"{prefix}kl_target adapts beta, which is 0 here: give a beta to begin with, such as 0.02.")
    if values.get("samples") == 1 and values["batch_size"] == 1:
        raise ConfigError(
            f"{prefix}samples and {prefix}batch_size are both 1: an action needs another to be compared with."
        )


def local_card() -> str | None:
    """The GPU of this process, where one launcher started several; `None`: the default."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def _leave() -> None:
    """End the group of processes: one that exits inside it may abort, its work done (gloo, NCCL)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str, first: bool) -> None:
    if first:
        print(text, file=sys.stderr)


class _Progress:
    """A bar that moves with the updates, in the first process."""

    def __init__(self, name: str):
        self.name = name
        self._bar: Any = None

    def __call__(self, metrics: dict[str, Any]) -> None:
        self._bar = self._bar or stages.bar(metrics["updates"], self.name, "update", metrics["update"])
        shown = {
            key: f"{metrics[key]:.3f}" for key in ("loss", "score", "outcome", "kl") if metrics.get(key) is not None
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
