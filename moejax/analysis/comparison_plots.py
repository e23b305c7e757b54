"""Pictures of two traces: how far apart layer by layer, and which experts make the difference."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moejax.analysis import figures
from moejax.analysis.comparison import Comparison
from moejax.analysis.figures import BLUE, GREEN, GREY, ORANGE
from moejax.analysis.trace_plots import (
    bar_style,
    expert_axis,
    grid_height,
    layer_columns,
    layer_rows,
    line_style,
)


def plot_divergence(comparison: Comparison) -> Figure:
    """Jensen-Shannon divergence of the choices per layer; with pairs, the normalised one too."""
    info = comparison.first.trace.info
    names = (comparison.first.name, comparison.other.name)
    figure = figures.new_figure(4.6, width=figures.WIDTH if comparison.pairs is not None else 7.0)
    panels = figure.subplots(1, 2 if comparison.pairs is not None else 1, squeeze=False)[0]
    rows = np.arange(len(info.layers))
    mark = line_style(len(rows))
    panels[0].plot(rows, comparison.jsd, color=BLUE, label="between both", **mark)
    dashes = ((0, (5, 2)), (0, (2, 1.5)))
    for name, floor, colour, dash in zip(
        names, comparison.floors, (GREY, ORANGE), dashes, strict=True
    ):
        if np.isfinite(floor).any():
            panels[0].plot(
                *(rows, floor),
                color=colour,
                linestyle=dash,
                label=f"within {figures.short_name(name)}",
            )
    figure.suptitle(" and ".join(map(figures.short_name, names)), x=0.01, ha="left", fontsize=11.5)
    panels[0].set(title="Choices of all tokens", ylabel="Jensen-Shannon divergence, nats")
    panels[0].set_ylim(0, 1.1 * max(1e-4, np.nanmax([comparison.jsd, *comparison.floors])))
    if comparison.pairs is not None:
        panels[1].plot(rows, comparison.pairs, color=GREEN, **mark)
        panels[1].set(title="Sentence pairs", ylabel="JSD / (ln E − mean entropy)")
        panels[1].set_ylim(0, 1.1 * max(0.01, np.nanmax(comparison.pairs)))
    for axes in panels:
        layer_columns(axes, info.layers)
    figures.legend_below(panels[0], num_columns=1)
    return figure


def plot_shift(comparison: Comparison) -> Figure:
    """Layers down, experts across: by how many percent points more tokens activate an expert."""
    info = comparison.first.trace.info
    figure = figures.new_figure(grid_height(len(info.layers)))
    axes = figure.subplots()
    percent = 100 * comparison.shift
    most = max(1.0, np.nanmax(np.abs(percent), initial=0.0))
    image = axes.imshow(
        percent, aspect="auto", interpolation="nearest", cmap="PuOr_r", vmin=-most, vmax=most
    )
    expert_axis(axes, info.num_experts)
    layer_rows(axes, info.layers)
    first, other = (
        figures.short_name(comparison.first.name),
        figures.short_name(comparison.other.name),
    )
    axes.set_title(f"Tokens that activate an expert: {other} minus {first}")
    bar = figure.colorbar(image, ax=axes, **bar_style(len(info.layers)))
    bar.set_label("percent points")
    return figure
