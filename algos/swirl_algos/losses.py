"""Losses as pure functions of the log-distributions at action tokens.

Shapes: `A` action tokens of one action, `V` vocabulary. All log-probs are those of softmax(logits / tau), in nats.
"""

import torch


def token_logprobs(logprobs_AV: torch.Tensor, ids_A: torch.Tensor) -> torch.Tensor:
    """float[A]: log pi(a_t | s, a_<t) of the tokens that were taken."""
    return logprobs_AV.gather(-1, ids_A[..., None]).squeeze(-1)


def exact_kl(logprobs_AV: torch.Tensor, reference_AV: torch.Tensor) -> torch.Tensor:
    """float[A]: KL(pi || pi_ref) at each action position, exact over the vocabulary."""
    return (logprobs_AV.exp() * (logprobs_AV - reference_AV)).sum(-1)


def swirl_loss(
    logprobs_A: torch.Tensor, kl_A: torch.Tensor, advantage: float, *, beta: float, max_tokens: int, actions: int
) -> torch.Tensor:
    """One action's share of the loss of SWiRL's stage 2.

        L = -(1/N) sum_g A_g sum_t log pi(a_t) / L_max  +  beta (1/N) sum_g sum_t KL_t / L_max

    The paper (section 2.2) names the algorithm only by citing Gemma 2: REINFORCE with a KL term to the starting
    checkpoint. Dividing by the constant L_max rather than by the action's own length leaves no length bias
    (Liu et al. 2025, arXiv 2503.20783).

    Args:
        logprobs_A: log pi of the sampled tokens.
        kl_A: KL(pi || pi_ref) at the same positions.
        advantage: A_g.
        beta: weight of the KL term.
        max_tokens: L_max, the token cap of an action.
        actions: N, scored actions in the batch.
    """
    return (beta * kl_A.sum() - advantage * logprobs_A.sum()) / (max_tokens * actions)
