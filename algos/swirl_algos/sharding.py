"""Weights over many cards: each process holds a share of every layer (FSDP2, torch's `fully_shard`).

A pass gathers one layer after another and frees it behind itself; on the way back gradients are summed over the processes and
each keeps those of its share, and so the optimiser's state. What lies outside the layers (embeddings, output head, last norm) is whole in
every process. All processes gather at the same time, so they must make as many passes: `Trainer.passes` sees to that in updates.
Sampling takes as many passes as its episodes need, which differ: `whole` gathers all layers once for it, so a card must hold the model in the
precision of its passes (bf16: 2 bytes a weight), while what is at rest (weights, gradients, moments: 16 bytes a weight) is shared.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from swirl_env.errors import ConfigError


def shard(model, device: torch.device, processes: int, dtype: torch.dtype | None) -> None:
    """Share out the layers of a model, in place; the rest of it goes to the device.

    Args:
        model: the same in every process, on the CPU or on the device.
        device: of this process.
        processes: among which its layers are shared.
        dtype: that layers are gathered and run in; `None`: that of the weights.

    Raises:
        ConfigError: a model whose layers are not those of transformers.
    """
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no layers that could be shared out: leave out --trainer.shard.")
    for layer in layers:
        shared = fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(shared, FSDPModule)
        shared.set_gradient_divide_factor(1.0)  # losses are shares of the whole batch's: gradients add up,
        shared.set_force_sum_reduction_for_comms(True)  # which gloo too can do
    model.to(device)


@contextmanager
def whole(model) -> Iterator[None]:
    """All layers gathered, for passes that the processes do not make together; nothing where none is shared out."""
    layers = [one for one in model.modules() if isinstance(one, FSDPModule)]
    for layer in layers:
        layer.unshard()
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def gathered(tensors: Mapping[str, torch.Tensor], main: bool) -> dict[str, torch.Tensor]:
    """All of them whole, on the CPU of the main process and nowhere else; one is gathered at a time. To be called in all processes."""
    found = {}
    for name, one in tensors.items():
        whole_one = one.full_tensor() if isinstance(one, DTensor) else one
        if main:
            found[name] = whole_one.cpu().contiguous()
    return found


def shared_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is shared out, on its device."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def groups(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters for an optimiser, which takes those that are shared out and whole ones apart."""
    kinds: dict[bool, list[torch.nn.Parameter]] = {}
    for one in parameters:
        kinds.setdefault(isinstance(one, DTensor), []).append(one)
    return [{"params": some} for some in kinds.values()]


def squares(tensors: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Sums of squares: of whole tensors, and of this process's share of the others."""
    sums = [0.0, 0.0]
    for one in tensors:
        local = one.to_local() if isinstance(one, DTensor) else one
        sums[isinstance(one, DTensor)] += float(torch.linalg.vector_norm(local, dtype=torch.float64)) ** 2
    return sums[0], sums[1]


def cut_to(tensors: Iterable[torch.Tensor], norm: float, longest: float) -> None:
    """Scale gradients of this norm in place, so that it is at most `longest`."""
    if math.isfinite(norm) and norm > longest:
        for one in tensors:
            one.mul_(longest / (norm + 1e-6))
