"""What a step-wise update costs: `swirl bench speed --only update`.

A trajectory of K states with G candidates each is packed into one row (`swirl_algos.tree`) and timed, forward and backward, against plain
rows, one a candidate, that compute logits at action tokens only. Plain rows are timed on one candidate a state, times G.
Curves over K, G and the prompt are fitted by tokens, action tokens and attended pairs; memory is that of a process of its own.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice, repeat
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swirl_benchmarks.timing import in_turn, show, spread
from swirl_env.errors import SwirlError
from swirl_env.tasks import load_tasks

ACTION, RESULT, PROMPT = 40, 120, 150
"""Tokens of an action, of a tool's result with its turn, and of the prompt."""
GOALS = {(5, 4): 5.0, (10, 8): 9.0}
"""(K, G) -> times faster than plain rows that we hold ourselves to; token counts alone allow 5.6 and 12.5."""
LOGPROB_GOAL, GRADIENT_GOAL, FIT_GOAL, MEMORY_GOAL = 1e-4, 1e-5, 0.15, 2.2
CURVE = [
    (1, 4, 150), (2, 4, 150), (3, 4, 150), (5, 1, 150), (5, 2, 150), (5, 4, 150), (5, 8, 150), (5, 16, 150), (8, 4, 150),
    (10, 1, 150), (10, 4, 150), (10, 8, 150), (16, 1, 150), (16, 4, 150), (5, 4, 100), (5, 4, 500), (5, 4, 1000), (5, 4, 2000),
    (2, 2, 4000),
]  # fmt: skip
"""(K, G, prompt tokens) that are measured."""
BEYOND = [(16, 8, 150), (16, 16, 150), (5, 4, 4000), (16, 16, 4000)]
"""Those that are computed from the fit, and marked so."""


def load(name: str) -> Any:
    """The model, in the precision that it is trained in. Its `text_T` is real text in its tokens, which all figures are made of: on
    random tokens models meet activations so large that single precision shows."""
    from swirl_agents.models import load_model

    model, tokenizer = load_model(name, training=True)
    tasks = load_tasks("hotpotqa", "test")
    paragraphs = (document.text for task_id in tasks.tasks for document in tasks.documents(task_id))
    model.text_T = np.array(tokenizer(" ".join(paragraphs), add_special_tokens=False, verbose=False).input_ids)
    return model


def stream_of(model) -> Iterator[int]:
    """Tokens without end: the model's text, or of a random model random ones."""
    text_T = getattr(model, "text_T", None)
    if text_T is None:
        text_T = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, 1 << 16)
    return cycle(text_T.tolist())


def machine(name: str, model) -> dict[str, Any]:
    """What the figures were made on."""
    import torch

    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "model": name, "dtype": str(model.dtype), "device": gpu or f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def tree_of(
    states: int,
    samples: int,
    prompt: int = PROMPT,
    stream: Iterator[int] | None = None,
    action: int = ACTION,
    result: int = RESULT,
) -> list[Any]:
    """Tokens in the shape of a trajectory; zeros without a stream."""
    from swirl_algos.tree import State

    tokens = stream or repeat(0)

    def take(count: int) -> np.ndarray:
        return np.fromiter(islice(tokens, count), np.int64, count)

    trunk = take(prompt + (states - 1) * (action + result))
    lengths = [prompt + k * (action + result) for k in range(states)]
    return [State(trunk[:n], [take(action) for _ in range(samples)]) for n in lengths]


def work(tree: Sequence[Any]) -> tuple[int, int, int]:
    """(tokens, action tokens, attended pairs) of a packed tree."""
    trunk = len(tree[-1].context)
    branches = [(len(state.context), len(action) - 1) for state in tree for action in state.actions]
    pairs = trunk * (trunk + 1) // 2 + sum(n * context + n * (n + 1) // 2 for context, n in branches)
    return trunk + sum(n for _, n in branches), sum(n + 1 for _, n in branches), pairs


def update(model, packs: Sequence[Any], weights_M) -> None:
    """Forward and backward of a loss that weighs the log-probs of each action."""
    from swirl_algos import tree

    model.zero_grad(set_to_none=True)
    for pack in packs:
        tree.backward(model, None, pack, lambda terms: -(weights_M[terms.action_n] * terms.logprobs_n).sum())


def packs_of(states: list[Any], plain: bool, device) -> list[Any]:
    """One packed row, or plain rows."""
    from swirl_algos import tree

    return list((tree.plain if plain else tree.pack)([states], 1 << 20, device))


def update_figures(model, shapes: Sequence[tuple[int, int]] = tuple(GOALS), rounds: int = 3) -> list[dict[str, Any]]:
    """For each (K, G): seconds packed and plain, their ratio, and how far log-probs and gradients are apart (candidates compared:
    all where there are few, else two a state)."""
    import torch
    from swirl_algos import tree
    from swirl_algos.tree import State

    figures = []
    for states, samples in shapes:
        whole = tree_of(states, samples, stream=stream_of(model))
        single = [State(state.context, state.actions[:1]) for state in whole]
        few = whole if states * samples <= 20 else [State(state.context, state.actions[:2]) for state in whole]
        weights_M = torch.tensor(
            np.random.default_rng(1).standard_normal(states * samples), device=model.device
        ).float()
        seconds = in_turn(
            {
                "packed": partial(update, model, packs_of(whole, False, model.device), weights_M),
                "plain": partial(update, model, packs_of(single, True, model.device), weights_M),
            },
            rounds,
        )
        gradients, logprobs = [], []
        for plain in (True, False):
            packs = packs_of(few, plain, model.device)
            update(model, packs, weights_M)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            found = [(pack.action_N, tree.logprobs(model, pack)) for pack in packs]
            order = torch.cat([action_N for action_N, _ in found]).argsort(stable=True)
            logprobs.append(torch.cat([logprobs_N for _, logprobs_N in found])[order])
        tokens, _, _ = work(whole)
        figures.append({
            "states": states, "samples": samples, "goal": GOALS.get((states, samples)),
            "packed_seconds": spread(seconds["packed"]), "plain_seconds": spread(seconds["plain"] * samples),
            "plain_is": f"one row a state, times {samples}",
            "ratio": spread(seconds["plain"] * samples / seconds["packed"]),
            "tokens_packed": tokens, "tokens_plain": sum(p.tokens for p in packs_of(single, True, "cpu")) * samples,
            "compared": sum(len(state.actions) for state in few),
            "logprob_difference": float((logprobs[0] - logprobs[1]).abs().max()),
            "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[0].norm()),
        })  # fmt: skip
        model.zero_grad(set_to_none=True)
    return figures


def curve_figures(model, curve: Sequence[tuple[int, int, int]] = tuple(CURVE), rounds: int = 1) -> dict[str, Any]:
    """Seconds of a packed update over K, G and the prompt; the fit a x tokens + b x action tokens + c x attended pairs (least
    squares of relative errors); points too large to measure, from the fit."""
    import torch

    def contestant(states: int, samples: int, prompt: int) -> Any:
        packs = packs_of(tree_of(states, samples, prompt, stream_of(model)), False, model.device)
        return partial(update, model, packs, torch.ones(states * samples, device=model.device))

    seconds = in_turn({str(point): contestant(*point) for point in curve}, rounds)
    medians = np.array([float(np.median(seconds[str(point)])) for point in curve])
    features = np.array([work(tree_of(*point)) for point in curve], float)
    fit = np.linalg.lstsq(features / medians[:, None], np.ones(len(curve)), rcond=None)[0]
    errors = features @ fit / medians - 1

    def row(point: tuple[int, int, int], **more: Any) -> dict[str, Any]:
        tokens, action_tokens, pairs = work(tree_of(*point))
        fitted = float(np.dot((tokens, action_tokens, pairs), fit))
        names = dict(zip(("states", "samples", "prompt"), point, strict=True))
        return names | {"tokens": tokens, "fitted_seconds": round(fitted, 3)} | more

    return {
        "fit": dict(zip(("token", "action_token", "attended_pair"), map(float, fit), strict=True)),
        "largest_error": float(np.abs(errors).max()),
        "goal": FIT_GOAL,
        "points": [
            *(row(point, seconds=round(float(s), 3), error=round(float(e), 3))
              for point, s, e in zip(curve, medians, errors, strict=True)),
            *(row(point, extrapolated=True) for point in BEYOND),
        ],
    }  # fmt: skip


def peak_gigabytes(model: str, packed: bool, states: int = 10, samples: int = 8, trunk: int = 4000) -> float:
    """Peak resident memory of a process that makes one update: of a packed tree, or of one plain row as long as its trunk with logits at
    its last action only."""
    code = "import sys; from swirl_benchmarks.speed_update import _peak; _peak(*__import__('json').loads(sys.argv[1]))"
    call = [sys.executable, "-c", code, json.dumps([model, packed, states, samples, trunk])]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise SwirlError(f"The memory of an update could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def _peak(name: str, packed: bool, states: int, samples: int, trunk: int) -> None:
    import resource

    import torch

    model = load(name)
    if packed:
        tree = tree_of(states, samples, trunk - (states - 1) * (ACTION + RESULT), stream_of(model))
    else:
        tree = tree_of(1, 1, trunk - ACTION, stream_of(model))
    update(model, packs_of(tree, not packed, model.device), torch.ones(states * samples, device=model.device))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def memory_figures(model: str) -> dict[str, Any]:
    """Peak memory of the two kinds of update, each in a process of its own, and their ratio."""
    plain, packed = (peak_gigabytes(model, packed) for packed in (False, True))
    return {
        "shape": "K=10, G=8, trunk of 4,000 tokens", "packed_gigabytes": round(packed, 2), "plain_row_gigabytes": round(plain, 2),
        "ratio": round(packed / plain, 3), "goal": MEMORY_GOAL,
    }  # fmt: skip


def print_update(report: dict[str, Any], console: Console) -> None:
    """The figures as tables; one over its goal is marked."""
    if shapes := report.get("shapes"):
        table = Table(title="An update, forward and backward: packed against plain rows", title_justify="left")
        for heading in (
            "K x G",
            "packed, s",
            "plain, s",
            "times faster",
            "goal",
            "tokens",
            "log-probs apart",
            "gradient apart",
        ):
            table.add_column(heading, justify="right")
        for one in shapes:
            missed = " (missed)" if one["goal"] and one["ratio"]["median"] < one["goal"] else ""
            table.add_row(
                f"{one['states']} x {one['samples']}", show(one["packed_seconds"], 2), show(one["plain_seconds"], 2),
                show(one["ratio"], 2) + missed, f"{one['goal']}", f"{one['tokens_packed']:,} / {one['tokens_plain']:,}",
                _within(one["logprob_difference"], LOGPROB_GOAL), _within(one["gradient_difference"], GRADIENT_GOAL),
            )  # fmt: skip
        console.print(table)
    if memory := report.get("memory"):
        missed = " (missed)" if memory["ratio"] > memory["goal"] else ""
        console.print(
            f"Peak memory, {memory['shape']}: {memory['packed_gigabytes']} GB packed, {memory['plain_row_gigabytes']} GB for one "
            f"plain row of the trunk's length: {memory['ratio']} times (at most {memory['goal']}){missed}"
        )
    if curve := report.get("curve"):
        table = Table(title="A packed update over K, G and the prompt", title_justify="left")
        for heading in ("K", "G", "prompt", "tokens", "seconds", "fitted"):
            table.add_column(heading, justify="right")
        for point in curve["points"]:
            said = f"{point['seconds']:.2f}" if "seconds" in point else "extrapolated"
            names = (f"{point[name]:,}" for name in ("states", "samples", "prompt", "tokens"))
            table.add_row(*names, said, f"{point['fitted_seconds']:.2f}")
        console.print(table)
        missed = " (missed)" if curve["largest_error"] > curve["goal"] else ""
        console.print(
            f"Fit: {curve['fit']['token'] * 1e3:.2f} ms a token, {curve['fit']['action_token'] * 1e3:.2f} ms an action token, "
            f"{curve['fit']['attended_pair'] * 1e9:.2f} ns an attended pair; largest error {curve['largest_error']:.0%} (at most "
            f"{curve['goal']:.0%}){missed}"
        )


def _within(value: float, goal: float) -> str:
    return f"{value:.1e}" + (f" (over {goal:.0e})" if value > goal else "")


def plot_update(curve: dict[str, Any], path: str) -> None:
    """Measured against fitted seconds over tokens, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    measured = [point for point in curve["points"] if "seconds" in point]
    axes.loglog([p["tokens"] for p in measured], [p["seconds"] for p in measured], "o", label="measured")
    axes.loglog(
        [p["tokens"] for p in curve["points"]], [p["fitted_seconds"] for p in curve["points"]], "x", label="fitted"
    )
    axes.set(
        xlabel="tokens of the packed row",
        ylabel="seconds of an update",
        title="A packed update over K, G and the prompt",
    )
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
