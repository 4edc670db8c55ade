"""The plots of a report: each drawn once by matplotlib, as SVG whose colours are CSS variables (light and dark), and as PNG."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PALETTE = {
    "ink": ("#1f2329", "#e4e7eb"), "line": ("#d4d9df", "#3a4149"), "c0": ("#0b62c4", "#6cb0ff"), "c1": ("#b5500b", "#ffa657"),
    "c2": ("#1a7f37", "#56d364"), "c3": ("#8250df", "#d2a8ff"), "c4": ("#bf3989", "#ff9bce"), "c5": ("#57606a", "#a5aeb8"),
}  # fmt: skip
"""CSS variable -> (light, dark)."""
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
SERIES = [LIGHT[f"c{i}"] for i in range(6)]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"], "xtick.color": LIGHT["ink"], "ytick.color": LIGHT["ink"], "grid.color": LIGHT["line"],
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "legend.frameon": False, "lines.linewidth": 1.8,
}  # fmt: skip
CURVES = ("loss", "score", "outcome", "process", "kl", "entropy", "malformed", "repeated")
"""Metrics of an update that are drawn where they are there."""


@dataclass
class Plot:
    """One picture in both forms."""

    name: str
    svg: Markup
    png: bytes
    about: str


def _save(name: str, figure: Figure, about: str) -> Plot:
    name = re.sub(r"[^\w.-]+", "-", name)
    vector, pixels = io.StringIO(), io.BytesIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(pixels, format="png", dpi=160, facecolor="white")
    svg = vector.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' id="[A-Za-z]\w*_\d+"', "", svg)  # nothing points there, and other plots have the same
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg).replace("<svg ", '<svg role="img" aria-hidden="true" ', 1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Plot(name, Markup(svg), pixels.getvalue(), about)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def _cut(text: str, most: int = 34) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= most else f"...{text[-most:]}"


def intervals(name: str, title: str, figures: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Means with their intervals, one line each."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(5.6, 0.9 + 0.3 * len(figures))
        for i, one in enumerate(figures.values()):
            low, high = (one["mean"] if one[end] is None else one[end] for end in ("low", "high"))
            axes.plot([low, high], [i, i], color=SERIES[0])
            axes.plot([one["mean"]], [i], "o", color=SERIES[0])
        axes.set(xlabel=title, xlim=(-0.02, 1.02), ylim=(len(figures) - 0.5, -0.5))
        axes.set_yticks(range(len(figures)), [_cut(label) for label in figures])
        axes.grid(axis="y", visible=False)
        return _save(name, figure, f"{title}, mean and 95 % interval of each policy")


def curves(name: str, title: str, updates: Sequence[Mapping[str, Any]]) -> Plot:
    """Metrics over updates."""
    drawn = [key for key in CURVES if any(isinstance(one.get(key), (int, float)) for one in updates)]
    with mpl.rc_context(STYLE):
        rows = -(-len(drawn) // 2) or 1
        figure, many = _figure(5.6, 1.8 * rows + 0.3, rows, 2)
        for i, axes in enumerate(many):
            if i >= len(drawn):
                axes.set_visible(False)
                continue
            known = [
                (at, float(one[drawn[i]]))
                for at, one in enumerate(updates)
                if isinstance(one.get(drawn[i]), (int, float))
            ]
            x, y = np.array(known).T
            window = max(1, min(10, len(y) // 3))
            axes.plot(x, y, ".", color=SERIES[0], alpha=0.5, markersize=5)
            axes.plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid"), color=SERIES[0])
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_title(drawn[i], loc="left")
        figure.suptitle(_cut(title), fontsize=11, x=0.01, ha="left")
        figure.supxlabel("update", fontsize=10)
        return _save(name, figure, f"training {title}: {', '.join(drawn)} over updates")


def by_step(name: str, policies: Mapping[str, Sequence[tuple[float, int]]]) -> Plot:
    """Mean score at each step index."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(5.6, 2.8 + 0.2 * len(policies))
        for i, (policy, values) in enumerate(policies.items()):
            style: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "marker": "os^Dv"[i % 5],
                "linestyle": ("-", "--", ":")[i // len(SERIES) % 3],
            }
            axes.plot(range(1, len(values) + 1), [mean for mean, _ in values], label=_cut(policy), **style)
        axes.set(xlabel="step", ylabel="mean score", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
        return _save(name, figure, "mean score at each step of an episode")


def funnel(name: str, counts: Mapping[str, int]) -> Plot:
    """How many trajectories pass each test."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = _figure(5.6, 0.7 + 0.32 * len(counts))
        bars = axes.barh(list(counts), list(counts.values()), color=SERIES[0])
        axes.bar_label(bars, padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="trajectories", xlim=(0, max(counts.values()) * 1.1))
        axes.grid(axis="y", visible=False)
        return _save(name, figure, "how many trajectories pass each test")
