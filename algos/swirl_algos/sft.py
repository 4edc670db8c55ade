"""Supervised fine-tuning on trajectories: the warm start, and the paper's comparison (section 4.5).

    L = -(1/|A|) sum_{t in A} log pi(a_t | everything before)

over the action tokens A of a batch of trajectories; prompt, tool and template tokens are masked. A trajectory is
append-only, so all of its actions are learned in one pass. (Where the chat template rewrites history, each action is a row of
its own.)
"""

from collections.abc import Sequence

import torch
from swirl_agents.rendering import Encoded, Renderer

from swirl_algos import tree
from swirl_algos.configs import SftConfig
from swirl_algos.folders import content
from swirl_algos.policy_gradient import layout_for, spelled
from swirl_algos.trainer import Trainer, TrainingError, shuffled_batches
from swirl_algos.tree import State
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


def train(trainer: Trainer, trajectories: Sequence[Trajectory], config: SftConfig) -> None:
    """Fine-tune `trainer.model` in place.

    Args:
        trainer: the model in training.
        trajectories: what to imitate.
        config: learning rate, epochs, batch size.

    Logs once an update `loss` (nats a token), `gradient_norm`, `learning_rate`, `tokens`, `too_long` (over the model's context or
    `row_tokens`, left out).

    Raises:
        TrainingError: there is nothing to learn from, or the loss is not finite.
    """
    model, renderer = trainer.model, Renderer(trainer.tokenizer)
    encoded = [
        row for trajectory in spelled(renderer, trajectories) if trajectory.steps for row in _rows(renderer, trajectory)
    ]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    fitting = [one for one in encoded if len(one.ids) <= min(context, config.row_tokens)]
    if not fitting:
        raise TrainingError(
            f"No trajectory to imitate: {len(trajectories)} given, {len(encoded) - len(fitting)} too long. Generate more, or use a "
            "filter that keeps some."
        )
    lay_out = layout_for(model)
    batches = shuffled_batches(fitting, config.epochs, config.batch_size, trainer.seed)
    for update in trainer.updates(len(batches), "sft", config, content(trajectories)):
        model.train()
        trees = [[State(one.ids[:a], [one.ids[a:b]]) for a, b in one.spans] for one in trainer.mine(batches[update])]
        targets = sum(len(state.actions[0]) for states in trees for state in states)
        tokens = int(trainer.total({"tokens": targets})["tokens"])
        total = 0.0

        def loss(terms: tree.Terms) -> torch.Tensor:
            nonlocal total
            value = -terms.logprobs_n.sum() / tokens  # noqa: B023
            total += float(value.detach())
            return value

        with trainer.autocast(), trainer.checkpointing():
            for pack, counts in trainer.passes(lay_out, trees, config.row_tokens):
                tree.backward(model, None, pack, loss if counts else tree.nothing)
        trainer.log(trainer.step(total) | {"tokens": tokens, "too_long": len(encoded) - len(fitting)})


if __name__ == "__main__":
    from swirl_algos.launch import main

    main("sft")
