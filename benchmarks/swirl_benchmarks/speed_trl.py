"""What acting costs beside TRL's GRPOTrainer: the `trl` row of `swirl bench speed --only rollout`.

TRL's own tool loop (transformers back end: a batched `generate()` on the whole text of every episode that called a tool, a barrier
at each step) plays questions of HotpotQA with a search tool. The model chooses the tokens, greedily; how many an action has and
when an episode ends is drawn beforehand, so that both sides do the same work. The engine then plays the same questions and results.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console

from swirl_benchmarks.speed_rollout import Episodes, act, lengths
from swirl_benchmarks.timing import in_turn, show, spread
from swirl_env.tasks import load_tasks

TEMPLATE = """{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with tools, in a form that TRL takes: earlier turns stay as they are."""


def _questions(count: int) -> tuple[list[str], Iterator[str]]:
    """Questions, and paragraphs to answer searches with, cut to unequal lengths."""
    tasks = load_tasks("hotpotqa", "test")
    draw = np.random.default_rng(2)
    paragraphs = [document.text for task_id in tasks.tasks for document in tasks.documents(task_id)]
    return (
        [task.question for task in list(tasks.tasks.values())[:count]],
        (text[: int(draw.integers(200, 700))] for text in cycle(paragraphs)),
    )


def _no_reward(completions: list[Any], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


class _Loop:
    """TRL's trainer, whose model writes as many tokens and calls as were drawn."""

    def __init__(self, model, tokenizer, count: int, folder: str):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.wanted, self.steps = lengths(count)
        self.questions = [[{"role": "user", "content": question}] for question in _questions(count)[0]]
        self.tokenizer, self.inner = tokenizer, model.generate
        tokenizer.chat_template, tokenizer.response_template = TEMPLATE, {}
        tokenizer.pad_token, tokenizer.parse_response = tokenizer.eos_token, self._parse
        model.generate = self._generate

        def search(query: str) -> str:
            """Search the encyclopedia.

            Args:
                query: what to look for.
            """
            return next(self.paragraphs)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = GRPOTrainer(
                model, _no_reward, processing_class=tokenizer, tools=[search],
                train_dataset=Dataset.from_list([{"prompt": question} for question in self.questions]),
                args=GRPOConfig(
                    folder, bf16=False, report_to="none", beta=0.0, num_generations=2, per_device_train_batch_size=2, max_completion_length=4096,
                    gradient_checkpointing=False, generation_kwargs={"do_sample": False},
                ),
            )  # fmt: skip
        # what its training step sets: each row's tools
        self.trainer._sync_tool_dicts = [{"search": search}] * count
        self.trainer._async_tool_dicts = [{}] * count
        model.eval()

    def play(self) -> None:
        """All episodes, by TRL; what the model was shown and said is kept."""
        self.turn, self.paragraphs = 0, _questions(0)[1]
        self.shown: dict[tuple[int, int], np.ndarray] = {}
        self.said: dict[tuple[int, int], np.ndarray] = {}
        self.trainer._generate(self.questions)

    def episodes(self) -> Episodes:
        """What was played, for the engine to play again."""
        wanted = np.zeros_like(self.wanted)
        results: list[list[np.ndarray]] = []
        for i, steps in enumerate(self.steps):
            results.append([])
            for step in range(steps):
                wanted[i, step] = len(self.said[i, step])
                if step + 1 < steps:
                    begin = len(self.shown[i, step]) + wanted[i, step]
                    results[i].append(self.shown[i, step + 1][begin:])
        return Episodes([self.shown[i, 0] for i in range(len(self.steps))], wanted, results, self.steps)

    def _generate(self, input_ids, attention_mask, **kwargs):
        import torch

        rows, width = np.flatnonzero(self.turn < self.steps), input_ids.shape[1]
        limit_B = self.wanted[rows, self.turn]
        ends_B = width + torch.tensor(limit_B, device=input_ids.device)
        out = self.inner(
            input_ids, attention_mask=attention_mask, stopping_criteria=[lambda ids, scores, **_: ids.shape[1] >= ends_B], **kwargs
        )  # fmt: skip
        for i, ids, mask, said, limit in zip(rows, input_ids, attention_mask, out[:, width:], limit_B, strict=True):
            self.shown[i, self.turn] = ids[mask.bool()].cpu().numpy().astype(np.int32)
            written = said[:limit].tolist()
            end = written.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in written else limit
            self.said[i, self.turn] = np.array(written[:end], np.int32)
        self.turn, self.parsed = self.turn + 1, iter(rows)
        return out

    def _parse(self, ids, **_: Any) -> dict[str, Any]:
        """What the model says: a search, whatever it wrote, until its episode is over."""
        message: dict[str, Any] = {"role": "assistant", "content": self.tokenizer.decode(ids)}
        if self.turn < self.steps[next(self.parsed)]:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": "search", "arguments": {"query": message["content"]}}}
            ]
        return message


def trl_figures(name: str, count: int = 16, rounds: int = 2) -> dict[str, Any]:
    """Seconds of the engine and of TRL's tool loop, their ratio, and how many actions have the same tokens; `{"trl": None}` where TRL is
    not installed."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        return {"trl": None}
    from swirl_agents.models import load_model

    model, tokenizer = load_model(name, training=True)
    with TemporaryDirectory() as folder:
        loop = _Loop(model, tokenizer, count, folder)
        loop.play()
        episodes = loop.episodes()
        seconds = in_turn({"engine": partial(act, model, episodes), "trl": loop.play}, rounds, warm_up=0)
    said, _ = act(model, episodes)
    return {
        "trl": found, "episodes": count, "steps": int(episodes.steps.sum()), "seconds": spread(seconds["engine"]),
        "trl_seconds": spread(seconds["trl"]), "ratio": spread(seconds["trl"] / seconds["engine"]),
        "tokens_of_actions": int(sum(map(len, loop.said.values()))),
        "same_actions": sum(ids == loop.said[key].tolist() for key, ids in said.items()),
    }  # fmt: skip


def print_trl(figures: dict[str, Any], console: Console) -> None:
    """The figures in a sentence."""
    if figures["trl"] is None:
        console.print("rollout against TRL's tool loop: not measured, trl is not installed (pip install trl).")
        return
    console.print(
        f"rollout against the tool loop of TRL {figures['trl']}: {figures['episodes']} episodes, {figures['steps']} steps: engine "
        f"{show(figures['seconds'], 2)} s, TRL {show(figures['trl_seconds'], 2)} s: {show(figures['ratio'], 2)} times faster; "
        f"{figures['same_actions']} of {figures['steps']} actions have the same tokens"
    )
