"""Losses as pure functions of what happens at action tokens.

Shapes: `n` action tokens, of one action or of many. All log-probs are those of softmax(logits / tau), in nats.
"""

import torch


def swirl_loss(
    logprobs_n: torch.Tensor,
    kl_n: torch.Tensor,
    advantages_n: torch.Tensor,
    *,
    beta: float,
    max_tokens: int,
    actions: int,
) -> torch.Tensor:
    """These tokens' share of the loss of SWiRL's stage 2.

        L = -(1/N) sum_g A_g sum_t log pi(a_t) / L_max  +  beta (1/N) sum_g sum_t KL_t / L_max

    The paper (section 2.2) names the algorithm only by citing Gemma 2: REINFORCE with a KL term to the starting
    checkpoint. Dividing by the constant L_max rather than by the action's own length leaves no length bias
    (Liu et al. 2025, arXiv 2503.20783).

    Args:
        logprobs_n: log pi of the sampled tokens.
        kl_n: KL(pi || pi_ref) at the same positions.
        advantages_n: A_g of the action that each token belongs to.
        beta: weight of the KL term.
        max_tokens: L_max, the token cap of an action.
        actions: N, scored actions in the batch.
    """
    return (beta * kl_n - advantages_n * logprobs_n).sum() / (max_tokens * actions)
