"""How speed is measured: contestants in turn within each round, so that a busy moment hits all; medians, and ratios round by round."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def spread(values: Any) -> dict[str, float]:
    """Median and quartiles; of fewer than four rounds, the least and the most."""
    values = np.asarray(values, float)
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75] if len(values) > 3 else [0, 0.5, 1])
    return {"median": round(float(median), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def show(figure: Mapping[str, float], places: int = 1) -> str:
    """`median [low, high]`, or one figure where there was one round."""
    if figure["low"] == figure["high"]:
        return f"{figure['median']:.{places}f}"
    return f"{figure['median']:.{places}f} [{figure['low']:.{places}f}, {figure['high']:.{places}f}]"


def in_turn(contestants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Seconds of each contestant in each round; the first `warm_up` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + warm_up):
        for name, contestant in contestants.items():
            gc.collect()
            began = time.perf_counter()
            contestant()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}
