"""What updates and decoding cost on a GPU: `swirl bench speed --only gpu`.

A random model of the shape of a 1.5B Llama, bf16. An update of K=8 states, G=8 candidates of 64 tokens and a trunk of 2,000 is timed packed
against plain rows (all candidates of a state at once, logits at action tokens only), and its arithmetic against the matrix products that
this card was measured to do. Decoding 64 samples by the engine is timed against `generate()`.
"""

from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from swirl_benchmarks.speed_rollout import Row, engine_of, generate
from swirl_benchmarks.speed_update import machine, packs_of, stream_of, tree_of, update, work
from swirl_benchmarks.timing import in_turn, show, spread
from swirl_env.errors import ConfigError

STATES, SAMPLES, TRUNK, ACTION, RESULT = 8, 8, 2000, 64, 160
BATCH, PROMPT, NEW = 64, 500, 128
GOALS = {"update": 7.0, "utilisation": 0.35, "decoding": 3.0}


def model_of(device: str = "cuda", **shape: int) -> Any:
    """A random Llama, by default of 1.5 billion weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 49_152, "max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(**size | shape, eos_token_id=None, bos_token_id=None, pad_token_id=None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def _synchronised(work: Any) -> None:
    import torch

    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_products(device: Any, dtype: Any, size: int) -> float:
    """Multiplications and additions a second of large matrix products."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = in_turn({"product": partial(_synchronised, lambda: [left @ right for _ in range(10)])}, 5)["product"]
    return 10 * 2 * size**3 / float(np.median(times))


def operations(model, tree: Any) -> float:
    """Arithmetic of a forward and backward pass over a packed tree: 6 a weight and token, output head at action tokens only, 12 a layer,
    width and attended pair."""
    tokens, action_tokens, pairs = work(tree)
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name
    )
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 6.0 * (body * tokens + head * action_tokens) + 12.0 * config.num_hidden_layers * width * pairs


def gpu_figures(
    model: Any = None, rounds: int = 5, states: int = STATES, samples: int = SAMPLES, trunk: int = TRUNK, action: int = ACTION,
    result: int = RESULT, batch: int = BATCH, prompt: int = PROMPT, new: int = NEW, product: int = 8192,
) -> dict[str, Any]:  # fmt: skip
    """Ratios of updates and decoding, and the share of the measured peak.

    Raises:
        ConfigError: there is no GPU, and no model was given to try the code on.
    """
    import torch
    from swirl_agents.engine import Request

    if model is None:
        if not torch.cuda.is_available():
            raise ConfigError("--only gpu needs an NVIDIA GPU and a CUDA build of torch; none was found.")
        model = model_of()
    vocabulary, device = model.config.vocab_size, model.device
    tree = tree_of(states, samples, trunk - (states - 1) * (action + result), stream_of(model), action, result)
    weights_M = torch.ones(states * samples, device=device)
    contestants = {
        kind: partial(_synchronised, partial(update, model, packs_of(tree, kind == "plain", device), weights_M))
        for kind in ("packed", "plain")
    }
    seconds = in_turn(contestants, rounds)
    model.zero_grad(set_to_none=True)
    done = operations(model, tree) / float(np.median(seconds["packed"]))
    peak = _peak_products(device, model.dtype, product)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, vocabulary, prompt).astype(np.int32) for _ in range(batch)]
    engine = engine_of(model)  # one for all rounds: what was captured stays

    def decode() -> None:
        requests = [Request(ids, [Row(new)]) for ids in prompts]
        engine.store.clear()
        for request in requests:
            engine.add(request)
        while any(request.left for request in requests):
            engine.step()

    acted = in_turn(
        {
            "engine": partial(_synchronised, decode),
            "generate": partial(_synchronised, partial(generate, model, prompts, [new] * batch)),
        },
        rounds,
    )
    return {
        "machine": machine("random Llama", model) | {"weights": sum(p.numel() for p in model.parameters())},
        "update": {
            "shape": f"K={states}, G={samples}, trunk {trunk}, actions {action}", "packed_seconds": spread(seconds["packed"]),
            "plain_seconds": spread(seconds["plain"]), "ratio": spread(seconds["plain"] / seconds["packed"]),
            "goal": GOALS["update"], "operations_a_second": done, "peak_operations_a_second": peak,
            "utilisation": round(done / peak, 4), "utilisation_goal": GOALS["utilisation"],
        },
        "decoding": {
            "shape": f"{batch} samples, prompts of {prompt}, {new} new tokens", "seconds": spread(acted["engine"]),
            "generate_seconds": spread(acted["generate"]), "ratio": spread(acted["generate"] / acted["engine"]),
            "tokens_per_second": round(batch * new / float(np.median(acted["engine"])), 1), "goal": GOALS["decoding"],
        },
    }  # fmt: skip


def print_gpu(report: dict[str, Any], console: Console) -> None:
    """The figures in sentences; what misses its goal is marked."""
    one, two = report["update"], report["decoding"]

    def mark(value: float, goal: float) -> str:
        return f"(goal {goal})" if value >= goal else f"(goal {goal}, missed)"

    console.print(
        f"{report['machine']['device']}, {report['machine']['weights'] / 1e9:.2f}B weights, {report['machine']['dtype']}"
    )
    console.print(
        f"Update, {one['shape']}: {show(one['packed_seconds'], 3)} s packed, {show(one['plain_seconds'], 3)} s plain, "
        f"{show(one['ratio'], 2)} times faster {mark(one['ratio']['median'], one['goal'])}; {one['utilisation']:.0%} of the matrix "
        f"products measured here {mark(one['utilisation'], one['utilisation_goal'])}"
    )
    console.print(
        f"Decoding, {two['shape']}: {two['tokens_per_second']:,.0f} tokens/s, {show(two['ratio'], 2)} times as fast as generate() "
        f"{mark(two['ratio']['median'], two['goal'])}"
    )
