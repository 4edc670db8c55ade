"""Baselines as pure functions of rewards. NaN is unknown: it stays NaN, and the others are counted without it."""

import numpy as np

TINY = 1e-6
"""Added to a standard deviation before dividing by it."""


def leave_one_out(scores_G: np.ndarray) -> np.ndarray:
    """Score minus the mean of the other scored siblings (RLOO: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

    Args:
        scores_G: float[G] in [0, 1]; NaN where the judge could not tell.

    Returns:
        float[G]: advantages; NaN where the score is unknown or no sibling is scored, which carries no gradient.
    """
    scores_G = np.asarray(scores_G, dtype=np.float64)
    known_G = ~np.isnan(scores_G)
    others = known_G.sum() - 1
    if others < 1:
        return np.full(scores_G.shape, np.nan)
    mean_of_others_G = (np.nansum(scores_G) - scores_G) / others
    return scores_G - mean_of_others_G


def group_mean(scores_G: np.ndarray) -> np.ndarray:
    """Score minus the mean of the scored group, itself included (Shao et al. 2024, arXiv 2402.03300, without the division).
    It is (G - 1) / G times `leave_one_out`. Arguments as there."""
    scores_G = np.asarray(scores_G, dtype=np.float64)
    if (~np.isnan(scores_G)).sum() < 2:
        return np.full(scores_G.shape, np.nan)
    return scores_G - np.nanmean(scores_G)


BASELINES = {"leave_one_out": leave_one_out, "group": group_mean}


def advantages(
    scores_G: np.ndarray, baseline: str = "leave_one_out", normalise: bool = False, penalty_G: np.ndarray | None = None
) -> np.ndarray:  # fmt: skip
    """Advantages of one group.

    Args:
        scores_G: float[G], NaN where unknown.
        baseline: `leave_one_out` or `group`.
        normalise: divide by the group's standard deviation, as GRPO does (Shao et al. 2024, equation 3; it weighs questions by how
            unlike their samples are: Liu et al. 2025, arXiv 2503.20783).
        penalty_G: float[G]: what each costs (`kl = "reward"`). Its own advantage is taken off after the division, which would
            otherwise make the weight of a penalty cancel out where the scores are level.
    """
    scores_G = np.asarray(scores_G, dtype=np.float64)
    advantages_G = BASELINES[baseline](scores_G)
    if normalise and not np.isnan(advantages_G).all():
        advantages_G = advantages_G / (np.nanstd(scores_G) + TINY)
    if penalty_G is not None:
        advantages_G = advantages_G - BASELINES[baseline](np.where(np.isnan(scores_G), np.nan, penalty_G))
    return advantages_G


def returns(rewards_S: np.ndarray, discount: float) -> np.ndarray:
    """float[S]: sum over later steps j >= i of discount^(j - i) r_j (Williams 1992). 0 leaves each step its own reward, as SWiRL
    has it; an unknown reward makes every return that counts it unknown.

    Args:
        rewards_S: float[S], NaN where unknown.
        discount: in [0, 1].
    """
    returns_S = np.array(rewards_S, dtype=np.float64)
    if discount:
        for i in range(len(returns_S) - 2, -1, -1):
            returns_S[i] += discount * returns_S[i + 1]
    return returns_S
