"""Supervised fine-tuning on trajectories: the warm start, and the paper's comparison (section 4.5).

    L = -(1/|A|) sum_{t in A} log pi(a_t | everything before)

over the action tokens A of a batch of trajectories; prompt, tool and template tokens are masked. A trajectory is one row:
it is append-only, so all of its actions are learned in one pass. (Where the chat template rewrites history, each action is a
row of its own.)
"""

from collections.abc import Callable, Sequence

import torch
from swirl_agents.rendering import Encoded, Renderer

from swirl_algos.configs import SftConfig
from swirl_algos.optimize import Optimizer, TrainingError, shuffled_batches
from swirl_env.types import Message, Trajectory, Transcript


def finished(trajectory: Trajectory) -> Transcript:
    """The transcript of a whole trajectory, its last action included."""
    last = trajectory.steps[-1]
    ids = None if last.tokens is None else last.tokens.action_ids
    return Transcript((*trajectory.states()[-1].messages, Message("assistant", last.action.text, ids)))


def _rows(renderer: Renderer, trajectory: Trajectory) -> list[Encoded]:
    """What to learn of a trajectory."""
    whole = finished(trajectory)
    if not renderer.rewrites:
        return [renderer.encode(whole)]
    ends = [i + 1 for i, message in enumerate(whole.messages) if message.role == "assistant"]
    rows = [renderer.encode(Transcript(whole.messages[:end])) for end in ends]
    return [Encoded(row.ids, row.spans[-1:]) for row in rows]


def train(
    model, tokenizer, trajectories: Sequence[Trajectory], config: SftConfig, *, seed: int = 0,
    log: Callable[[dict], None] = lambda metrics: None,
) -> None:  # fmt: skip
    """Fine-tune `model` in place.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        trajectories: what to imitate.
        config: learning rate, epochs, batch size.
        seed: of the order of the trajectories.
        log: called once an update with `update`, `loss` (nats a token), `gradient_norm`, `tokens`.

    Raises:
        TrainingError: there is nothing to learn from, or the loss is not finite.
    """
    renderer = Renderer(tokenizer)
    encoded = [row for trajectory in trajectories if trajectory.steps for row in _rows(renderer, trajectory)]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    fitting = [one for one in encoded if len(one.ids) <= context]
    if not fitting:
        raise TrainingError(
            f"No trajectory to imitate: {len(trajectories)} given, {len(encoded) - len(fitting)} too long."
        )
    batches = shuffled_batches(fitting, config.epochs, config.batch_size, seed)
    optimizer = Optimizer(model, config.learning_rate, len(batches))
    model.train()
    for update, batch in enumerate(batches):
        targets = sum(end - start for one in batch for start, end in one.spans)
        total = 0.0
        for one in batch:
            at = torch.tensor([t for start, end in one.spans for t in range(start, end)], device=model.device)
            ids = torch.tensor(one.ids, device=model.device).long()[None]
            logits = model(ids, use_cache=False, logits_to_keep=at - 1).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, at], reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        norm = optimizer.step(total)
        log({"update": update, "updates": len(batches), "loss": total, "gradient_norm": norm, "tokens": targets,
             "too_long": len(encoded) - len(fitting)})  # fmt: skip
    model.eval()
