"""Losses as pure functions of what happens at action tokens.

Shapes: `n` action tokens, of one action or of many; `M` actions. All log-probs are those of softmax(logits / tau), in nats.
SWiRL's loss (paper section 2.2, which names the algorithm only by citing Gemma 2: REINFORCE with a KL term to the starting
checkpoint) is made of these parts:

    L = -(1/N) sum_g A_g sum_t log pi(a_t) / L_max  +  beta (1/N) sum_g sum_t KL_t / L_max
"""

import numpy as np
import torch


def policy_loss(
    logprobs_n: torch.Tensor, advantages_n: torch.Tensor, old_n: torch.Tensor | None = None, clip: float = 0.2
) -> torch.Tensor:
    """float[n]: what a step of policy gradient minimises at each token.

    Without `old_n` -A log pi (REINFORCE; Williams 1992). With it PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347,
    equation 7), for several steps on the same actions: -min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho = pi / pi_old.

    Args:
        logprobs_n: log pi of the sampled tokens.
        advantages_n: of the action that each token belongs to.
        old_n: log pi at which they were sampled, without gradient.
        clip: how far the ratio may go before its gradient stops.
    """
    if old_n is None:
        return -advantages_n * logprobs_n
    ratio_n = torch.exp(logprobs_n - old_n)
    return -torch.minimum(ratio_n * advantages_n, ratio_n.clamp(1 - clip, 1 + clip) * advantages_n)


def kl_loss(kind: str, exact_n: torch.Tensor, logprobs_n: torch.Tensor, reference_n: torch.Tensor) -> torch.Tensor:
    """float[n]: the KL term at each token.

    Args:
        kind: `exact`: KL(pi || pi_ref) over the whole vocabulary. From the sampled token alone (Schulman, "Approximating KL
            divergence", 2020), d = log pi - log pi_ref: `k2`: d^2 / 2, whose gradient is that of the KL where tokens come from pi;
            `k3`: exp(-d) - 1 + d, unbiased in value, though not in gradient, as GRPO has it. (`k1` = d has the right value, and as a
            loss a gradient of 0 on average: it belongs into the reward, see `kl = "reward"`.)
        exact_n: from the vocabulary, with gradient.
        logprobs_n: of the sampled tokens, with gradient.
        reference_n: log pi_ref of the same.
    """
    if kind == "exact":
        return exact_n
    d_n = logprobs_n - reference_n
    if kind == "k2":
        return d_n.square() / 2
    if kind == "k3":
        return torch.exp(-d_n) - 1 + d_n
    raise ValueError(f"kl is exact, k2 or k3 here, got {kind!r}")


def token_weights(kind: str, lengths_M: np.ndarray, max_tokens: int, actions: int, tokens: int) -> np.ndarray:
    """float[M]: what each token of an action counts in the loss.

    Args:
        kind: `constant`: 1 / (L_max N): no length bias (Liu et al. 2025, arXiv 2503.20783). `action`: 1 / (own length x N): a token of a
            long action counts less (GRPO as published). `token`: 1 / all tokens: long actions count more (Yu et al. 2025,
            arXiv 2503.14476).
        lengths_M: tokens of each action (in `grpo`: of its whole trajectory).
        max_tokens: L_max.
        actions: N, scored actions of the global batch (`grpo`: trajectories).
        tokens: scored tokens of the global batch.
    """
    if kind == "constant":
        return np.full(len(lengths_M), 1 / (max_tokens * actions))
    if kind == "action":
        return 1 / (np.maximum(lengths_M, 1) * actions)
    if kind == "token":
        return np.full(len(lengths_M), 1 / tokens)
    raise ValueError(f"length is constant, action or token, got {kind!r}")


def adapted(beta: float, kl: float, target: float | None) -> float:
    """The next weight of the KL term: up where the KL is over its target, down where it is under, by at most a fifth of a tenth an
    update (Ziegler et al. 2019, arXiv 1909.08593, section 2.2). `None`: the weight stays."""
    if target is None:
        return beta
    return beta * (1 + 0.1 * float(np.clip(kl / target - 1, -0.2, 0.2)))
