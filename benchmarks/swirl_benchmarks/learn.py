"""Does it learn? `swirl bench learn`: SWiRL beside SFT, REINFORCE and GRPO on `swirl/Arithmetic-v0`, from a random Llama, in minutes.

For each seed: a tiny Llama with a tokenizer of its own imitates gold demonstrations until it is a weak policy (the warm start).
It acts on other questions; the `rules` judge scores each step by process alone: it sees neither the gold answer nor the results of
the step, so nothing looks at whether the final answer is right. SWiRL learns from the trajectories that the process filter keeps;
SFT imitates the same ones; REINFORCE acts anew with the same judge; GRPO acts anew for the outcome, with at most as many sampled
tokens as SWiRL had (stage 1 included). All start from the same warm start and are measured on the same unseen questions, greedily.
"""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table
from swirl_agents.scripted import Scripted, calculations
from swirl_algos import stages
from swirl_algos.configs import GrpoConfig, ReinforceConfig, SftConfig, SwirlConfig
from swirl_algos.filters import keep

import swirl_env  # noqa: F401  registers the ids
from swirl_benchmarks.metrics import paired_difference, process_score, summary
from swirl_env.env import ToolEnv
from swirl_env.judges import RulesJudge
from swirl_env.types import Action, ToolCall, Trajectory, Transcript

GAIN_GOAL = 0.15
"""Held-out accuracy of SWiRL over its warm start that we hold ourselves to, on every seed."""


@dataclass(frozen=True)
class LearnConfig:
    """Sizes of the benchmark; `small` has those of the tests."""

    kwargs: dict[str, Any] = field(default_factory=lambda: {"operations": (2, 4), "operators": "+-", "max_steps": 6})
    """of the environment"""
    hidden: int = 128
    layers: int = 4
    demonstrations: int = 400
    practised: int = 128
    samples: int = 4
    unseen: int = 200
    warm: SftConfig = SftConfig(learning_rate=3e-3, epochs=20, batch_size=32, row_tokens=8192)
    sft: SftConfig = SftConfig(learning_rate=1e-3, epochs=3, batch_size=32, row_tokens=8192)
    swirl: SwirlConfig = SwirlConfig(
        learning_rate=1e-3, epochs=3, batch_size=32, samples=8, max_new_tokens=24, beta=0.01
    )
    reinforce: ReinforceConfig = ReinforceConfig(
        learning_rate=1e-3, updates=40, batch_size=32, samples=4, max_new_tokens=24, beta=0.01
    )
    grpo: GrpoConfig = GrpoConfig(
        learning_rate=1e-3, updates=40, batch_size=32, samples=8, max_new_tokens=24, beta=0.01
    )


SMALL = LearnConfig()


def tokenizer_of(texts: list[str], size: int = 512) -> Any:
    """A tokenizer for one environment: digits apart, and what its prompts say again and again in a few tokens."""
    from swirl_agents.testing import TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _calculate(env: ToolEnv, expression: str) -> str:
    return env.grammar.render(Action("", calls=(ToolCall("calculator", {"expression": expression}),)))


def careless(env: ToolEnv, early: float = 0.45, wrong: float = 0.2) -> Scripted:
    """A demonstrator with bad habits: at each state it may answer too early (with the latest result, or a number of the question),
    or calculate with a number from nowhere; else it goes on with the worked solution."""
    prompts = {
        env.grammar.prompt(env.task_set.instruction, task.question, env.max_steps): task for task in env.task_set.tasks.values()
    }

    def act(transcript: Transcript) -> str:
        draw = np.random.default_rng(transcript.seed)
        task = prompts[transcript.messages[0].content]
        said = [m.content for m in transcript.messages if m.role == "assistant"]
        shown = [m.content for m in transcript.messages if m.role == "user"][1:]
        plan = calculations(task.question, task.meta["solution"], task.answers[0])
        left = [one for one in plan if not any(f">{one}<" in text for text in said)]
        numbers = re.findall(r"\d+", task.question)
        latest = re.findall(r"-?\d+", shown[-1])[-1] if shown else numbers[0]
        luck = draw.random()
        if luck < early and left:
            return env.grammar.render(Action("", answer=latest))
        if luck < early + wrong:
            return _calculate(env, f"{latest}+{draw.integers(2, 99)}")
        return _calculate(env, left[0]) if left else env.grammar.render(Action("", answer=latest))

    return Scripted("careless", act)


def model_of(tokenizer, seed: int, config: LearnConfig) -> Any:
    """A random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=4 * config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(shape).eval()
