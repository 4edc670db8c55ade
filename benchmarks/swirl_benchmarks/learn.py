"""Does it learn? `swirl bench learn`: SWiRL beside SFT, REINFORCE and GRPO on `swirl/Arithmetic-v0`, from random weights, in minutes.

A tiny Llama with a tokenizer of its own imitates gold demonstrations; from half way on each seed goes on alone, with questions
of its own, until it is a weak policy: right on three of ten questions or more (it is looked at every 400 demonstrations). That is the warm start. It acts on other
questions, and a judge scores each step by process alone (`Additions`): it sees the question and the steps so far, neither the gold
answer nor the step's result, so nothing looks at whether the final answer is right. SWiRL learns from the trajectories that the process
filter keeps; SFT imitates the same ones; REINFORCE acts anew with the same judge, GRPO for the outcome, each with fewer tokens than SWiRL
(`swirl bench ledger` compares at equal ones). All start from the warm start and are measured on the same unseen questions, greedily.

The problems are sums of three to five numbers, and the calculator adds: what is to be learned is which numbers, in which order, and when
to answer. `Additions` knows all of that: for sums it is a complete verifier of the way. The general `rules` judge is not, and was pleased by `13+13` and by wrong signs: with it the process
score rose on every seed, and the accuracy on one of three (the ledger has the figures).
"""

import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
from rich.console import Console
from rich.table import Table
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle
from swirl_algos import stages
from swirl_algos.configs import GrpoConfig, ReinforceConfig, SftConfig, SwirlConfig, TrainerConfig

import swirl_env  # noqa: F401  registers the ids
from swirl_benchmarks.metrics import Estimate, of_cost, paired_difference, process_score, summary
from swirl_env.env import ToolEnv
from swirl_env.io import read
from swirl_env.types import StepView, ToolCall, Trajectory, Verdict

GAIN_GOAL = 0.15
"""Held-out accuracy of SWiRL over its warm start that we hold ourselves to, on every seed."""
KWARGS: dict[str, Any] = {"operators": "+", "operations": [2, 4], "max_steps": 6, "count": 50_000}
TOKENS = 24
"""Cap of an action."""
MOST_CHUNKS = 20
WARM = "warm start"
APART = 10_000
"""Numbers of questions from seed to seed."""


@dataclass(frozen=True)
class LearnConfig:
    """Sizes of the benchmark."""

    hidden: int = 96
    layers: int = 3
    together: int = 4000
    """demonstrations that all seeds share"""
    chunk: int = 400
    """demonstrations between looks at how weak the policy still is"""
    weak: float = 0.3
    """accuracy at which the warm start ends"""
    practised: int = 384
    samples: int = 4
    unseen: int = 200
    begin: SftConfig = SftConfig(learning_rate=2e-3, epochs=1, batch_size=8, row_tokens=16_384)
    imitate: SftConfig = SftConfig(learning_rate=1e-3, epochs=1, batch_size=8, row_tokens=16_384)
    sft: SftConfig = SftConfig(learning_rate=1e-3, epochs=3, batch_size=8, row_tokens=16_384)
    swirl: SwirlConfig = SwirlConfig(
        learning_rate=2.5e-4, epochs=10, batch_size=16, samples=8, temperature=0.7, max_new_tokens=TOKENS, beta=0.01, row_tokens=16_384
    )  # fmt: skip
    reinforce: ReinforceConfig = ReinforceConfig(
        learning_rate=2e-4, updates=30, batch_size=16, samples=4, temperature=0.7, max_new_tokens=TOKENS, beta=0.01, row_tokens=16_384
    )  # fmt: skip
    grpo: GrpoConfig = GrpoConfig(
        learning_rate=2e-4, updates=500, batch_size=24, samples=8, temperature=0.7, max_new_tokens=TOKENS, beta=0.01, row_tokens=16_384,
        token_budget=100_000,
    )  # fmt: skip


class Additions:
    """The process judge of sums, as one would write one's own: good is a call that adds a number of the question, not yet used, to the
    latest result (the first call: two of them), and an answer that is the latest result once all are used."""

    name, uses_gold = "additions@1", False

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        return [self._verdict(view) for view in views]

    def _verdict(self, view: StepView) -> Verdict:
        left, latest = Counter(re.findall(r"\d+", view.question)), None
        for step in view.steps:
            for call, result in zip(step.action.calls, step.results, strict=True):
                left -= _added(call, latest)
                latest = result.text
        action = view.action
        if action.answer is not None:
            if left.total():
                return Verdict(0.0, f"not yet used: {', '.join(left)}", self.name)
            sound = action.answer == latest
            return Verdict(float(sound), "the latest result" if sound else "not the latest result", self.name)
        if len(action.calls) != 1 or not re.fullmatch(r"\d+\+\d+", _expression(action.calls[0])):
            return Verdict(0.0, "neither one addition nor an answer", self.name)
        new = _added(action.calls[0], latest)
        if new.total() != (2 if latest is None else 1):
            return Verdict(0.0, "does not go on from the latest result", self.name)
        sound = new <= left
        return Verdict(float(sound), "adds what is left" if sound else "adds what is not left", self.name)


def _expression(call: ToolCall) -> str:
    return str(call.arguments.get("expression", "")).replace(" ", "")


def _added(call: ToolCall, latest: str | None) -> Counter[str]:
    """The numbers of a call but for the latest result."""
    return Counter(re.findall(r"\d+", _expression(call))) - Counter([latest] if latest is not None else [])


JUDGE = "swirl_benchmarks.learn:Additions"


def make_env(split: str = "train", judge: str | None = None) -> gym.Env:
    """The environment of the benchmark."""
    reward = "process" if judge else "outcome"
    return gym.make("swirl/Arithmetic-v0", disable_env_checker=True, split=split, judge=judge, reward=reward, **KWARGS)


def tokenizer_of(demonstrations: Sequence[Trajectory], size: int = 512) -> Any:
    """A tokenizer for one environment: a number is a token, and what its prompts say again and again takes few."""
    from swirl_agents.testing import TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = []
    for one in demonstrations:
        texts.append(f"user\n{one.prompt[0].content}")
        for step in one.steps:
            texts += [f"assistant\n{step.action.text}", f"user\n{step.observation}"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    end, begin = "<|im_end|>", "<|im_start|>"
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end, begin], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=end, additional_special_tokens=[begin]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_of(tokenizer, config: LearnConfig) -> Any:
    """A random Llama, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=4 * config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(shape).eval()


def demonstrate(numbers: range) -> list[Trajectory]:
    """Gold demonstrations of training questions."""
    env = make_env().unwrapped
    assert isinstance(env, ToolEnv)
    return list(rollout(make_env, oracle(env), [(f"arithmetic-train-{n}", 0) for n in numbers], batch_size=64))


def begin(config: LearnConfig, folder: Path) -> None:
    """The part of the warm start that all seeds share, as a model folder."""
    import torch
    from swirl_algos import sft
    from swirl_algos.trainer import Trainer

    torch.set_num_threads(1)  # of so small a model two threads are slower
    gold = demonstrate(range(config.together))
    tokenizer = tokenizer_of(gold[:400])
    trainer = Trainer(model_of(tokenizer, config), tokenizer)
    sft.train(trainer, gold, config.begin)
    trainer.save_model(folder)


def warm_start(config: LearnConfig, folder: Path, seed: int) -> dict[str, Any]:
    """One seed's weak policy, `folder/warm-SEED` (left as it is where it is there), and its trajectories: `drawn-SEED.jsonl`, judged, and
    `kept-SEED.jsonl`. Returns its figures."""
    import torch
    from swirl_agents.models import load_model
    from swirl_algos import sft
    from swirl_algos.trainer import Trainer

    torch.set_num_threads(1)
    began, first = time.monotonic(), APART * (1 + seed)  # questions of this seed's own
    figures: dict[str, Any] = {}
    warm = folder / f"warm-{seed}"
    if not warm.exists():
        model, tokenizer = load_model(str(folder / "begin"), training=True)
        looked_at = [f"arithmetic-train-{first + n}" for n in range(100)]
        accuracy, chunks = 0.0, 0
        while accuracy < config.weak and chunks < MOST_CHUNKS:
            at = first + 100 + chunks * config.chunk
            trainer = Trainer(model, tokenizer, TrainerConfig(schedule="constant", warmup=0.2), seed=seed)
            sft.train(trainer, demonstrate(range(at, at + config.chunk)), config.imitate)
            seen = _act(model, tokenizer, looked_at, "train", 1, 0.0, seed)
            accuracy, chunks = sum(one.outcome or 0 for one in seen) / len(seen), chunks + 1
        trainer.save_model(warm)
        figures |= {"demonstrations": config.together + chunks * config.chunk, "training_accuracy": accuracy}
    model, tokenizer = load_model(str(warm))
    figures["policy"] = _measured(model, tokenizer, config, folder, seed, WARM)
    drawn = _act(model, tokenizer, _practised(config, seed), "train", config.samples, 1.0, seed)
    judged = stages.judge(drawn, Additions(), folder / f"drawn-{seed}.jsonl")
    kept = stages.filter_by("process", judged, folder / f"kept-{seed}.jsonl").kept
    right = [one.outcome for one in kept if one.outcome is not None]
    return figures | {
        "trajectories": len(drawn), "kept": len(kept), "right_of_kept": sum(right) / max(1, len(right)),
        "sampled_tokens": of_cost(drawn)["tokens"],
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def contestant(config: LearnConfig, folder: Path, seed: int, name: str) -> dict[str, Any]:
    """What one algorithm makes of a seed's warm start: its figures; its unseen questions lie in `folder/SEED-NAME.jsonl`."""
    import torch
    from swirl_agents.models import load_model
    from swirl_algos import grpo, reinforce, sft, swirl
    from swirl_algos.trainer import Trainer

    torch.set_num_threads(1)
    began, log = time.monotonic(), list[dict[str, Any]]()
    model, tokenizer = load_model(str(folder / f"warm-{seed}"), training=True)
    trainer = Trainer(model, tokenizer, TrainerConfig(tracker="none"), seed=seed, log=log.append)
    kept, judging = _kept(folder, seed), partial(make_env, judge=JUDGE)
    if name == "SWiRL":
        swirl.train(trainer, kept, Additions(), make_env().unwrapped.grammar, config.swirl)  # type: ignore[attr-defined]
    elif name == "SFT, same trajectories":
        sft.train(trainer, kept, config.sft)
    elif name == "REINFORCE":
        reinforce.train(trainer, judging, _practised(config, seed), config.reinforce)
    else:
        grpo.train(trainer, judging, _practised(config, seed), config.grpo)
    sampled = [metrics["sampled_tokens"] for metrics in log if "sampled_tokens" in metrics]
    return {
        "seconds": round(time.monotonic() - began, 1), "sampled_tokens": sum(sampled),
        "policy": _measured(model, tokenizer, config, folder, seed, name),
        "curve": [[round(one["score"], 4), round(one["kl"], 5)] for one in log if one.get("score") is not None and "kl" in one],
    }  # fmt: skip


def _kept(folder: Path, seed: int) -> list[Trajectory]:
    """In an order that is not that in which episodes happened to end."""
    return sorted(read(folder / f"kept-{seed}.jsonl", Trajectory), key=lambda one: one.key)


def _practised(config: LearnConfig, seed: int) -> list[str]:
    return [f"arithmetic-train-{APART * (2 + seed) - 1 - n}" for n in range(config.practised)]


def _act(
    model, tokenizer, tasks: Sequence[str], split: str, samples: int, temperature: float, seed: int
) -> list[Trajectory]:
    from swirl_agents.local import LocalPolicy

    policy = LocalPolicy(model, tokenizer, temperature=temperature, max_new_tokens=TOKENS, seed=seed)
    jobs = [(task, g) for task in tasks for g in range(samples)]
    return list(rollout(partial(make_env, split), policy, jobs, seed=seed, batch_size=128))


def _measured(model, tokenizer, config: LearnConfig, folder: Path, seed: int, name: str) -> dict[str, Any]:
    unseen = [f"arithmetic-test-{n}" for n in range(config.unseen)]
    acted = _act(model, tokenizer, unseen, "test", 1, 0.0, seed)
    judged = stages.judge(acted, Additions(), folder / f"{seed}-{name}.jsonl")
    task_set = make_env().unwrapped.task_set  # type: ignore[attr-defined]
    whole = summary(judged, lambda one: task_set.metrics(one.task, one.answer))
    return {key: whole[key] for key in ("outcome", "process", "malformed", "steps")}


def learn_figures(
    seeds: Sequence[int] = (0, 1, 2), config: LearnConfig | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """All seeds; every policy is a job of its own, as many at once as there are cores. A seed whose gain, process score or lead over SFT
    misses its goal is listed in `missed`.

    Args:
        seeds: of questions, sampling and order.
        config: sizes; `None`: those of the goal.
        folder: where models and trajectories are left, and `warm-SEED` may lie already; `None`: nowhere.
    """
    if folder is None:
        with TemporaryDirectory() as scratch:
            return learn_figures(seeds, config, Path(scratch))
    config, began = config or LearnConfig(), time.monotonic()
    context = multiprocessing.get_context("spawn")  # torch does not live through a fork
    found: dict[int, dict[str, Any]] = {seed: {"seed": seed} for seed in seeds}
    running: dict[Future, tuple[int, str]] = {}
    with ProcessPoolExecutor(os.cpu_count() or 1, context) as pool:

        def start(seed: int, name: str) -> None:
            job = warm_start if name == WARM else contestant
            named = () if name == WARM else (name,)
            running[pool.submit(job, config, folder, seed, *named)] = seed, name

        if not all((folder / f"warm-{seed}").exists() for seed in seeds):
            pool.submit(begin, config, folder / "begin").result()
        for seed in seeds:
            start(seed, WARM)
        while running:
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                seed, name = running.pop(job)
                found[seed][name] = done = job.result()
                if name == WARM:  # the longest first
                    for next_name in ("GRPO", "SWiRL", "REINFORCE", "SFT, same trajectories"):
                        start(seed, next_name)
                elif name == "SWiRL":
                    done["sampled_tokens"] += found[seed][WARM]["sampled_tokens"]
    figures = [_of_seed(one, folder) for one in found.values()]
    return {
        "env": "swirl/Arithmetic-v0", "kwargs": KWARGS, "judge": Additions.name, "config": asdict(config), "seeds": figures,
        "goal": GAIN_GOAL, "missed": {one["seed"]: said for one in figures if (said := _missed(one))},
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _of_seed(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The figures of a seed's policies, with their paired differences."""
    done = {name: found[name] for name in (WARM, "SWiRL", "SFT, same trajectories", "REINFORCE", "GRPO")}
    acted = {name: list(read(folder / f"{found['seed']}-{name}.jsonl", Trajectory)) for name in done}
    pairs = [*((name, WARM) for name in done if name != WARM), ("SWiRL", "SFT, same trajectories"), ("SWiRL", "GRPO")]
    return {
        "seed": found["seed"], "policies": {name: one.pop("policy") for name, one in done.items()},
        "differences": {
            f"{name} - {other}": {
                "outcome": asdict(paired_difference(acted[other], acted[name], lambda one: one.outcome)),
                "process": asdict(paired_difference(acted[other], acted[name], process_score)),
            }
            for name, other in pairs
        },
        "made": done,
    }  # fmt: skip


def _missed(figures: dict[str, Any]) -> str:
    """What of the goal a seed misses."""
    gain = figures["differences"]["SWiRL - warm start"]
    lead = figures["differences"]["SWiRL - SFT, same trajectories"]["outcome"]["mean"]
    says = [
        f"accuracy {gain['outcome']['mean']:+.3f}, goal {GAIN_GOAL:+}" if gain["outcome"]["mean"] < GAIN_GOAL else "",
        f"process score {gain['process']['mean']:+.3f}" if gain["process"]["mean"] <= 0 else "",
        f"not above SFT ({lead:+.3f})" if lead <= 0 else "",
    ]  # fmt: skip
    return ", ".join(filter(None, says))


def print_learn(report: dict[str, Any], console: Console) -> None:
    """Accuracy and process score of each policy and seed, with their intervals, and the gains."""
    table = Table(title="swirl/Arithmetic-v0, unseen questions: accuracy / process score", title_justify="left")
    table.add_column("")
    for one in report["seeds"]:
        table.add_column(f"seed {one['seed']}", justify="right")
    for name in report["seeds"][0]["policies"]:
        rows = [one["policies"][name] for one in report["seeds"]]
        table.add_row(name, *(f"{Estimate(**row['outcome'])} / {row['process']['mean']:.3f}" for row in rows))
    table.add_section()
    for name in report["seeds"][0]["differences"]:
        rows = [one["differences"][name]["outcome"] for one in report["seeds"]]
        table.add_row(f"{name}, accuracy", *(str(Estimate(**row)) for row in rows))
    console.print(table)
    for one in report["seeds"]:
        made, warm = one["made"], one["made"][WARM]
        console.print(
            f"seed {one['seed']}: the process filter kept {warm['kept']} of {warm['trajectories']} trajectories, {warm['right_of_kept']:.0%} of them "
            "right; sampled tokens: " + ", ".join(f"{name} {made[name]['sampled_tokens']:,}" for name in ("SWiRL", "REINFORCE", "GRPO"))
        )  # fmt: skip
    console.print(
        f"Judge of all but GRPO: {report['judge']}, by process alone. Goal: SWiRL at least {report['goal']:+} over its warm start and above "
        f"SFT on the same trajectories, on every seed. {report['seconds']:.0f} s."
    )
    for seed, text in report["missed"].items():
        console.print(f"seed {seed} (missed): {text}")
