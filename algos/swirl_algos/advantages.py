"""Baselines as pure functions of the scores of one state's G samples."""

import numpy as np


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
