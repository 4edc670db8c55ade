"""Settings of the algorithms; importable without torch, so that a command line can show them."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class SftConfig:
    """How to imitate."""

    learning_rate: float = 1e-4
    """peak learning rate of AdamW"""
    epochs: int = 3
    """passes over the trajectories"""
    batch_size: int = 4
    """trajectories an update"""


@dataclass(frozen=True)
class SwirlConfig:
    """How to improve."""

    learning_rate: float = 1e-5
    """peak learning rate of AdamW"""
    epochs: int = 1
    """passes over the kept trajectories"""
    batch_size: int = 4
    """trajectories an update; all of their states are used"""
    samples: int = 4
    """G: actions sampled at each state"""
    temperature: float = 1.0
    """tau of sampling and of log pi"""
    beta: float = 0.02
    """weight of the KL term to the starting checkpoint"""
    max_new_tokens: int = 64
    """L_max: token cap of an action"""
    row_tokens: int = 8192
    """token budget of a packed row (memory grows with it); an action that does not fit with its state is left out"""
    reference: Annotated[bool, tyro.conf.arg(aliases=["--reference"])] = False
    """plain rows, one a candidate, in place of tree-packed ones: same loss, several times slower"""
