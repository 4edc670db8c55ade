"""What acting costs: `swirl bench speed --only fork,rollout`.

`fork`: G samples at each of K states of a trajectory, by the engine from one prefill of the trunk, against one `generate()` of the same
model for each state. `rollout`: episodes of five steps and unequal length, by the engine (keys and values kept across tool calls,
no barrier), against a batched `generate()` on the whole text at each step. Greedy tokens are compared; where they part, the
two likeliest tokens of `generate()` must lie within `TIE` nats, or the row is counted as different.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swirl_benchmarks.speed_update import ACTION, PROMPT, stream_of, tree_of
from swirl_benchmarks.timing import in_turn, show, spread

GOALS = {"fork": 3.5, "rollout": 2.0}
"""Times faster than `generate()` that we hold ourselves to."""
FORK = (5, 4, PROMPT)
"""(K, G, prompt tokens) that the goal is for."""
FORKS = [
    FORK,
    (1, 4, PROMPT),
    (2, 4, PROMPT),
    (10, 4, PROMPT),
    (16, 4, PROMPT),
    (5, 1, PROMPT),
    (5, 16, PROMPT),
    (5, 4, 1000),
]
STEPS = 5
TIE = 1e-4


class Row:
    """Takes tokens until it has as many as it wants; greedy, or drawn."""

    def __init__(self, wanted: int, greedy: bool = True, cap: int | None = None):
        self.wanted, self.greedy, self.cap = wanted, greedy, cap or wanted
        self.restart()

    def restart(self) -> None:
        self.ids: list[int] = []
        self.finish: str | None = None


def _sample(logits, rows: Sequence[Any]) -> None:
    import torch

    greedy = rows[0].greedy
    chosen = logits.argmax(-1) if greedy else torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]
    for row, token in zip(rows, chosen.tolist(), strict=True):
        row.ids.append(token)
        row.finish = "length" if len(row.ids) == row.wanted else None


def engine_of(model):
    from swirl_agents.engine import Engine

    return Engine(model, _sample, batch_tokens=1 << 17, cache_tokens=1 << 17)


def generate(
    model, contexts: Sequence[np.ndarray], wanted: Sequence[int], samples: int = 1, greedy: bool = True, leads: bool = False
):  # fmt: skip
    """`generate()` of a batch padded on the left, each row until it has as many tokens as it wants (the batch until all have);
    (tokens of each row, with `leads` what the likeliest token's logit is over the next one's)."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    width = max(map(len, contexts))
    ids = torch.zeros(len(contexts), width, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, width - len(context) :] = torch.tensor(context, device=model.device)
        mask[row, width - len(context) :] = 1
    ends = width + torch.tensor(np.repeat(wanted, samples), device=model.device)

    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= ends

    out = model.generate(
        ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([Enough()]),
        generation_config=GenerationConfig(
            max_new_tokens=max(wanted), do_sample=not greedy, num_return_sequences=samples, top_k=0, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=leads,
        ),
    )  # fmt: skip
    rows = [
        tokens[width : width + n].tolist() for tokens, n in zip(out.sequences, np.repeat(wanted, samples), strict=True)
    ]
    if not leads:
        return rows, None
    best = torch.stack([logits.float().topk(2).values for logits in out.logits], 1)
    return rows, (best[..., 0] - best[..., 1]).tolist()


def _apart(got: list[int], want: list[int], lead: list[float]) -> str:
    """`same`, `tie` (they part where the two likeliest tokens are level) or `different`."""
    for a, b, gap in zip(got, want, lead, strict=False):
        if a != b:
            return "tie" if gap < TIE else "different"
    return "same"


def fork_figures(model, states: int = 5, samples: int = 4, prompt: int = PROMPT, rounds: int = 3) -> dict[str, Any]:
    """Seconds of the engine and of `generate()`, their ratio, and how the greedy tokens compare."""
    from swirl_agents.engine import Request

    contexts = [state.context.astype(np.int32) for state in tree_of(states, 1, prompt, stream_of(model))]

    def fork(greedy: bool = False) -> list[Any]:
        engine = engine_of(model)
        requests = [Request(ids, [Row(ACTION, greedy) for _ in range(samples)]) for ids in contexts]
        for request in requests:
            engine.add(request)
        while any(request.left for request in requests):
            engine.step()
        return requests

    def plain() -> None:
        for ids in contexts:
            generate(model, [ids], [ACTION], samples, greedy=False)

    seconds = in_turn({"fork": fork, "generate": plain}, rounds, warm_up=int(rounds > 1))
    compared = {"same": 0, "tie": 0, "different": 0}
    for request in fork(greedy=True):
        [want], [lead] = generate(model, [request.ids], [ACTION], leads=True)
        for row in request.rows:
            compared[_apart(row.ids, want, lead)] += 1
    return {
        "states": states, "samples": samples, "prompt": prompt,
        "seconds": spread(seconds["fork"]), "generate_seconds": spread(seconds["generate"]),
        "ratio": spread(seconds["generate"] / seconds["fork"]), "goal": GOALS["fork"] if (states, samples, prompt) == FORK else None, "greedy": compared,
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Episodes:
    """What the episodes are made of, the actions' tokens left out."""

    prompts: list[np.ndarray]
    """int32[T] of each episode."""
    wanted: np.ndarray
    """int[B, S]: tokens of each action."""
    results: list[list[np.ndarray]]
    """int32[T] of each step: what follows its action, up to the next action."""
    steps: np.ndarray
    """int[B]: steps of each episode."""


def lengths(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each action int[B, S], steps of each episode int[B]), unequal; the first episode has all steps."""
    draw = np.random.default_rng(1)
    steps = draw.integers(2, STEPS + 1, count)
    steps[0] = STEPS
    return draw.integers(10, 61, (count, STEPS)), steps


def drawn(count: int, stream: Iterator[int]) -> Episodes:
    """Prompts of 100 to 200 tokens and results of 60 to 180, out of the stream."""
    draw = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        length = int(draw.integers(low, high + 1))
        return np.fromiter(islice(stream, length), np.int32, length)

    wanted, steps = lengths(count)
    prompts = [tokens(100, 200) for _ in range(count)]
    return Episodes(prompts, wanted, [[tokens(60, 180) for _ in range(STEPS)] for _ in range(count)], steps)


def act(model, episodes: Episodes) -> tuple[dict[tuple[int, int], list[int]], Any]:
    """Play with the engine: {(episode, step): its tokens}."""
    from swirl_agents.engine import Request

    engine, longest = engine_of(model), int(episodes.wanted.max())
    live: list[tuple[int, int, Any]] = []
    said: dict[tuple[int, int], list[int]] = {}

    def ask(i: int, step: int, ids: np.ndarray) -> None:
        request = Request(ids, [Row(int(episodes.wanted[i, step]), cap=longest)], keep=True)
        engine.add(request)
        live.append((i, step, request))

    for i, prompt in enumerate(episodes.prompts):
        ask(i, 0, prompt)
    while live:
        engine.step()
        for one in [one for one in live if not one[2].left]:
            live.remove(one)
            i, step, request = one
            said[i, step] = request.rows[0].ids
            if step + 1 < episodes.steps[i]:
                ids = [request.ids, np.array(said[i, step], np.int32), episodes.results[i][step]]
                ask(i, step + 1, np.concatenate(ids))
    return said, engine


def _act_plainly(model, episodes: Episodes, said: dict[tuple[int, int], list[int]] | None = None) -> dict[str, int]:
    """Play with a fresh `generate()` at each step; where `said` is given, count how its tokens compare (each state is then that of
    `said`)."""
    contexts = list(episodes.prompts)
    compared = {"same": 0, "tie": 0, "different": 0}
    for step in range(STEPS):
        running = [i for i in range(len(contexts)) if step < episodes.steps[i]]
        asked = [contexts[i] for i in running], [int(episodes.wanted[i, step]) for i in running]
        rows, leads = generate(model, *asked, leads=said is not None)
        for i, row, lead in zip(running, rows, leads or repeat([]), strict=False):
            if said is not None:
                compared[_apart(said[i, step], row, lead)] += 1
                row = said[i, step]
            contexts[i] = np.concatenate([contexts[i], np.array(row, np.int32), episodes.results[i][step]])
    return compared


def rollout_figures(model, counts: Sequence[int] = (32,), rounds: int = 2) -> list[dict[str, Any]]:
    """For each number of episodes: seconds of the engine and of `generate()`, their ratio, and how the greedy tokens compare."""
    figures = []
    for count in counts:
        episodes = drawn(count, stream_of(model))
        seconds = in_turn(
            {"engine": partial(act, model, episodes), "generate": partial(_act_plainly, model, episodes)},
            rounds if count == 32 else 1, warm_up=0,
        )  # fmt: skip
        said, engine = act(model, episodes)
        tokens = engine.prefilled + engine.decoded
        figures.append({
            "episodes": count, "steps": int(episodes.steps.sum()), "goal": GOALS["rollout"] if count == 32 else None,
            "seconds": spread(seconds["engine"]), "generate_seconds": spread(seconds["generate"]),
            "ratio": spread(seconds["generate"] / seconds["engine"]),
            "tokens_per_second": round(tokens / float(np.median(seconds["engine"])), 1),
            "greedy": _act_plainly(model, episodes, said),
        })  # fmt: skip
    return figures


def many_figures(counts: Sequence[int] = (32, 128, 256)) -> list[dict[str, Any]]:
    """As `rollout_figures`, on a random model of a few thousand weights: so many episodes of a real one take too long here, and what is
    left is the work around the model."""
    from swirl_agents.testing import tiny_model, tiny_tokenizer

    model = tiny_model(tiny_tokenizer(), context=8192)
    return [figures | {"model": "tiny, random", "goal": None} for figures in rollout_figures(model, counts)]


def print_rollout(report: dict[str, Any], console: Console) -> None:
    """The figures as a table; one under its goal is marked."""
    table = Table(title="Acting: the engine against generate()", title_justify="left")
    for heading in ("what", "engine, s", "generate(), s", "times faster", "goal", "greedy rows same / tie / different"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    rows = [
        (f"fork: K={one['states']}, G={one['samples']}, prompt {one['prompt']:,}", one)
        for one in report.get("fork", ())
    ]
    for one in report.get("rollout", ()):
        tiny = " (tiny model)" if "model" in one else ""
        rows.append((f"rollout: {one['episodes']} episodes, {one['steps']} steps{tiny}", one))
    for name, one in rows:
        missed = " (missed)" if one["goal"] and one["ratio"]["median"] < one["goal"] else ""
        table.add_row(
            name, show(one["seconds"], 2), show(one["generate_seconds"], 2), show(one["ratio"], 2) + missed,
            str(one["goal"] or ""),
            " / ".join(map(str, one["greedy"].values())) + (" (missed)" if one["greedy"]["different"] else ""),
        )  # fmt: skip
    console.print(table)
