"""The picture of mixtures of adapters: how many of them share the work, in every layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moejax.analysis import figures
from moejax.analysis.figures import BLUE, VERMILION
from moejax.analysis.history import History

_NAME = "support_size"


def support_sizes(values: dict[str, NDArray], prefix: str = "") -> dict[int, NDArray]:
    """{layer: its effective support size by record}, of the layers that have mixtures."""
    start = f"{prefix}{_NAME}/"
    found = {int(n.removeprefix(start)): v for n, v in values.items() if n.startswith(start)}
    return dict(sorted(found.items()))


def plot_support_size(history: History) -> Figure:
    """Effective support size per layer: over the run, and at the end, also held out."""
    sizes = support_sizes(history.scalars)
    held_out = support_sizes(history.evals, "eval/")
    layers, colours = list(sizes), figures.depth_colours(len(sizes))
    figure = figures.new_figure(3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, (layer, values) in zip(colours, sizes.items(), strict=True):
        label = f"layer {layer}" if layer in (layers[0], layers[-1]) else None
        style = {"color": colour, **figures.point_style(history.steps)}
        left.plot(history.steps, values, label=label, **style)
    left.set(title="Effective support size", ylabel="adapters")
    figures.step_axis(left, history.steps)
    figures.legend_below(left, num_columns=2)
    last = [_last(values) for values in sizes.values()]
    right.plot(layers, last, color=BLUE, marker="o", linestyle="none", label="training")
    if held_out:
        ends = [_last(values) for values in held_out.values()]
        shape = {"marker": "x", "linestyle": "none", "markersize": 8}
        right.plot(list(held_out), ends, color=VERMILION, label="held out", **shape)
    right.set(title="At the end, by layer", xlabel="layer")
    right.xaxis.set_major_locator(figures.whole_ticks(8))
    most = [np.nanmax(v, initial=1.0) for v in (*sizes.values(), *held_out.values())]
    left.set_ylim(0, 1.08 * max(most))
    figures.legend_below(right, num_columns=2)
    return figure


def _last(values: NDArray) -> float:
    """The last known value, or NaN."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else float("nan")
