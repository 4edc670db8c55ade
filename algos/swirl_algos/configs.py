"""Settings of the algorithms; importable without torch, so that a command line can show them."""

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrainerConfig:
    """How parameters change, whatever the algorithm."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """of the learning rate after its warm-up: linear or cosine to 0, or constant"""
    warmup: float = 0.1
    """share of the updates in which the learning rate rises"""
    max_grad_norm: float = 1.0
    """longer gradients are cut to this norm"""
    weight_decay: float = 0.0
    """of AdamW"""
    precision: Literal["no", "bf16"] | None = None
    """mixed precision of the model's passes; none: as accelerate launch says, else fp32"""
    gradient_checkpointing: bool = False
    """activations are computed again in the backward pass: less memory, about a third slower"""
    shard: bool = False
    """each process holds a share of every layer's weights, gradients and moments (FSDP2); also what accelerate launch --use_fsdp asks
    for. To sample, each card gathers all layers, in bf16 if that is the precision"""
    lora_rank: int = 0
    """rank of LoRA adapters on all linear layers (needs peft); 0: all weights are trained"""
    lora_alpha: int | None = None
    """scale of the adapters; none: twice the rank"""
    save_every: int = 10
    """updates between checkpoints to go on from; 0: only the end is saved"""
    tracker: str = "auto"
    """tensorboard, wandb, trackio, several joined by commas, none, or auto: tensorboard where it is installed"""


def lasting(config: Any) -> dict[str, Any]:
    """A config as JSON values, without those settings that do not change the result."""
    values = asdict(config)
    for trainer in (values, values.get("trainer", {})):
        for name in ("save_every", "tracker", "shard", "server"):
            trainer.pop(name, None)
    return values


def asks_for_shares(config: TrainerConfig) -> bool:
    """Whether layers are to be shared out, by the config or by the command that launched the processes."""
    return config.shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


@dataclass(frozen=True)
class SftConfig:
    """How to imitate."""

    learning_rate: float = 1e-4
    """peak learning rate of AdamW"""
    epochs: int = 3
    """passes over the trajectories"""
    batch_size: int = 4
    """trajectories an update, over all processes"""
    row_tokens: int = 4096
    """token budget of a packed row (memory grows with it); a longer trajectory is left out"""


@dataclass(frozen=True)
class PolicyConfig:
    """What the policy-gradient algorithms share."""

    learning_rate: float = 1e-5
    """peak learning rate of AdamW"""
    temperature: float = 1.0
    """tau of sampling and of log pi"""
    max_new_tokens: int = 64
    """token cap of an action, and L_max"""
    baseline: Literal["leave_one_out", "group"] = "leave_one_out"
    """what a reward is compared with: the mean of its siblings without or with itself"""
    normalise: bool = False
    """divide advantages by the group's standard deviation"""
    beta: float = 0.02
    """weight of the KL term to the starting checkpoint; 0: none, and no reference is kept"""
    kl: Literal["exact", "k2", "k3", "reward"] = "exact"
    """exact over the vocabulary; k2 or k3 of the sampled tokens; reward: k1 taken off the reward"""
    kl_target: float | None = None
    """KL (nats a token) that beta is adapted to; none: beta is fixed"""
    passes: int = 1
    """optimiser steps on the actions of an update; above 1 with PPO's clipped ratio"""
    clip: float = 0.2
    """how far the ratio may go from 1 where there are several passes"""
    entropy: float = 0.0
    """weight of an entropy bonus"""
    length: Literal["constant", "action", "token"] = "constant"
    """what a token counts: 1 / L_max, 1 / length of its action (grpo: trajectory), or 1 / all tokens"""
    row_tokens: int = 8192
    """token budget of a packed row (memory grows with it); an action that does not fit with its state is left out"""
    reference: bool = False
    """plain rows, one a candidate, in place of tree-packed ones: same loss, several times slower"""


@dataclass(frozen=True)
class SwirlConfig(PolicyConfig):
    """How to improve on recorded states."""

    epochs: int = 1
    """passes over the kept trajectories"""
    batch_size: int = 4
    """trajectories an update, over all processes; all of their states are used"""
    samples: int = 4
    """G: actions sampled at each state"""
    rounds: int = 1
    """1: offline, as in the paper; more: each further round acts, judges and filters anew with the policy of the one before"""


@dataclass(frozen=True)
class OnlineConfig(PolicyConfig):
    """What the algorithms that act while they learn share."""

    updates: int = 100
    """updates in all"""
    batch_size: int = 8
    """questions an update, over all processes"""
    samples: int = 4
    """episodes a question and update"""
    token_budget: int | None = None
    """sampled tokens after which training ends, however many updates are left (the schedule follows whichever is nearer its end); none:
    no limit"""


@dataclass(frozen=True)
class ReinforceConfig(OnlineConfig):
    """How to learn from each step's reward while acting."""

    discount: float = 0.0
    """of the rewards of later steps; 0: each step has its own"""
    reward: Literal["process", "outcome", "both"] = "process"
    """of the environment: process: the judge's score of a step; outcome: the official metric, at the last step; both: their mean"""


@dataclass(frozen=True)
class GrpoConfig(OnlineConfig):
    """How to learn from the outcome while acting."""

    baseline: Literal["leave_one_out", "group"] = "group"
    """what a reward is compared with: the mean of its siblings without or with itself"""
    normalise: bool = True
    """divide advantages by the group's standard deviation"""
    length: Literal["constant", "action", "token"] = "token"
    """what a token counts: 1 / L_max, 1 / length of its trajectory, or 1 / all tokens"""
