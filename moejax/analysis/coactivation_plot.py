"""Picture of the experts that tokens choose together, in the layer where it matters most."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moejax.analysis import figures
from moejax.analysis.coactivation import (
    choice_information,
    pair_lift,
    strongest_pairs,
)
from moejax.analysis.figures import BLUE, GREY, VERMILION
from moejax.analysis.router_plots import LOAD_TICKS, load_colours, load_scale
from moejax.analysis.trace_plots import layer_columns, line_style
from moejax.analysis.trace_summary import TraceSummary

_MOST_PAIRS = 12
_MIN_EXPECTED = 5.0  # tokens that a pair should have by chance before its colour means anything


def most_coupled(together: NDArray) -> int | None:
    """The row of the layer with the highest `choice_information`; None where k is 1."""
    information = np.asarray(choice_information(together))
    return None if np.isnan(information).all() else int(np.nanargmax(information))


def plot_coactivation(summary: TraceSummary) -> Figure:
    """The matrix of the most coupled layer, its strongest pairs, and the coupling per layer."""
    info = summary.trace.info
    figure = figures.new_figure(6.2)
    left, above, below = figure.subplot_mosaic(
        [["matrix", "pairs"], ["matrix", "layers"]], width_ratios=(1.55, 1)
    ).values()
    row = most_coupled(summary.together)
    information = np.asarray(choice_information(summary.together))
    if row is None:
        for axes in (left, above, below):
            figures.no_data(axes, "every token chooses one expert")
        return figure
    together = summary.together[row]
    layer = info.layers[row]
    _matrix(figure, left, together)
    left.set_title(f"Chosen together in layer {layer}: {figures.short_name(summary.name)}")

    pairs = strongest_pairs(together, _MOST_PAIRS)
    at = np.arange(len(pairs))
    above.barh(at, [overlap for *_, overlap in pairs], color=VERMILION, height=0.7)
    above.set_yticks(at, labels=[f"{i} + {j}" for i, j, _ in pairs])
    above.invert_yaxis()
    above.grid(False, axis="y")
    above.set(title=f"Strongest pairs, layer {layer}", xlabel="tokens with both / with either")
    above.set_xlim(0, 1.1 * max(overlap for *_, overlap in pairs))

    rows = np.arange(len(info.layers))
    below.plot(rows, information, color=BLUE, **line_style(len(rows)))
    least = np.log(info.num_experts / (info.num_experts - 1))
    dashes = {"linestyle": (0, (5, 2)), "linewidth": 1.2}
    below.axhline(least, color=GREY, **dashes, label="even and independent")
    below.set_ylim(0, 1.25 * max(np.nanmax(information), least))
    below.set(title="What one choice says of another", ylabel="nats")
    below.legend(loc="upper right")
    layer_columns(below, info.layers)
    return figure


def _matrix(figure: Figure, axes, together: NDArray) -> None:
    """Black: at most 1% of chance. Grey: the diagonal, and too few tokens to say."""
    ratio = pair_lift(together, min_expected=_MIN_EXPECTED)
    image = axes.imshow(load_colours(ratio), interpolation="nearest", **load_scale())
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(figures.whole_ticks(10))
    axes.set(xlabel="expert", ylabel="expert")
    bar = figure.colorbar(image, ax=axes, location="bottom", extend="min", aspect=34, shrink=0.9)
    bar.set_ticks(list(LOAD_TICKS), labels=list(LOAD_TICKS.values()))
    bar.ax.minorticks_off()
    bar.set_label("times as often as by chance")
