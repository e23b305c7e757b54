"""Pictures of one routing trace, layer by layer: load, entropy, attribution, segments.

Each function draws one figure from a `TraceSummary`; the pairs of experts are in
`coactivation_plot.py`.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moejax.analysis import figures, routing
from moejax.analysis.attribution import rank_experts
from moejax.analysis.figures import BLUE, GREEN, GREY, ORANGE, VERMILION
from moejax.analysis.router_plots import LOAD_TICKS, load_colours, load_scale
from moejax.analysis.trace_segments import LOOK_AHEAD, WINDOWS
from moejax.analysis.trace_summary import TraceSummary

_MOST_RANKED = 16  # experts of the attribution ranking


def plot_load(summary: TraceSummary) -> Figure:
    """Layers down, experts across, colour = load over the even share; beside it MaxVio."""
    layers = summary.trace.info.layers
    figure = figures.new_figure(grid_height(len(layers)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    ratio = routing.relative_load(summary.counts)
    mesh = left.imshow(load_colours(ratio), aspect="auto", interpolation="nearest", **load_scale())
    expert_axis(left, ratio.shape[1])
    layer_rows(left, layers)
    left.set_title(f"Load of every expert: {figures.short_name(summary.name)}")
    bar = figure.colorbar(mesh, ax=left, **bar_style(len(layers)), extend="min")
    bar.set_ticks(list(LOAD_TICKS), labels=list(LOAD_TICKS.values()))
    bar.ax.minorticks_off()
    bar.set_label("load / even share (black: ≤ 1%)")
    violation = routing.max_vio(summary.counts)
    right.barh(np.arange(len(layers)), violation, color=BLUE, height=0.7)
    right.set(title="MaxVio", xlabel="excess / mean")
    right.set_xlim(0, 1.1 * max(0.5, np.nanmax(violation)))
    right.tick_params(labelleft=False)
    right.xaxis.set_major_locator(MaxNLocator(nbins=3))
    return figure


def plot_entropy(summary: TraceSummary) -> Figure:
    """Per layer: how sure the router is of a token, and over how many experts the load spreads."""
    info = summary.trace.info
    figure = figures.new_figure(3.8)
    left, right = figure.subplots(1, 2)
    rows = np.arange(len(info.layers))
    mark = line_style(len(rows))
    spread = routing.load_entropy(summary.counts)
    left.plot(rows, summary.entropy, color=BLUE, label="router, mean over tokens", **mark)
    left.plot(rows, spread, color=VERMILION, label="load", **mark)
    left.set(
        title=f"Entropy: {figures.short_name(summary.name)}",
        ylabel="nats / ln E (1 = uniform)",
        ylim=(0, 1.05),
    )
    right.plot(rows, routing.effective_experts(summary.counts), color=VERMILION, **mark)
    for height, text in ((info.num_experts, f"all {info.num_experts}"), (info.k, f"k = {info.k}")):
        right.axhline(height, color=GREY, linestyle=(0, (5, 2)), linewidth=1.0)
        right.annotate(
            *(text, (1, height)),
            **{"xycoords": ("axes fraction", "data"), "xytext": (-3, 3), "fontsize": 9},
            **{"textcoords": "offset points", "ha": "right", "color": GREY},
        )
    right.set(title="Experts in effective use", ylabel="exp(entropy of the load)")
    right.set_ylim(0, 1.12 * info.num_experts)
    for axes in (left, right):
        layer_columns(axes, info.layers)
    figures.legend_below(left, num_columns=2)
    return figure


def plot_attribution(summary: TraceSummary) -> Figure:
    """The experts with the highest mean router probability, over all layers together."""
    info = summary.trace.info
    best = rank_experts(summary.attribution, _MOST_RANKED)
    names = [f"layer {info.layers[row]}, expert {expert}" for row, expert, _ in best]
    share = routing.load_share(summary.counts)
    figure = figures.new_figure(max(3.6, 1.3 + 0.24 * len(best)))
    axes = figure.subplots()
    at = np.arange(len(best))
    axes.barh(at, [score for *_, score in best], color=BLUE, height=0.7, label="attribution")
    load = [share[row, expert] for row, expert, _ in best]
    axes.plot(load, at, "D", color=ORANGE, markersize=5, label="share of the choices")
    even = 1 / info.num_experts
    axes.axvline(even, color=GREY, linestyle=(0, (5, 2)), linewidth=1.2, label="1 / E")
    axes.set_yticks(at, labels=names)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05 * max([even, *load, *(score for *_, score in best)]))
    axes.set(
        title=f"Attribution, all layers ranked together: {figures.short_name(summary.name)}",
        xlabel="mean over sequences of the mean router probability",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure


def plot_segments(summary: TraceSummary) -> Figure:
    """Per layer: SRP for every window, and SCH for every size of the cache."""
    info, found = summary.trace.info, summary.segments
    figure = figures.new_figure(4.2)
    left, right = figure.subplots(1, 2)
    rows = np.arange(len(info.layers))
    mark = line_style(len(rows))
    for colour, window, srp in zip(
        figures.depth_colours(len(WINDOWS)), found.windows, found.srp, strict=True
    ):
        if np.isfinite(srp).any():
            left.plot(rows, srp, color=colour, label=f"m = {window}", **mark)
    share = info.k / info.num_experts
    floor = 2 * share / (1 + share)
    left.axhline(floor, color=GREY, linestyle=(0, (5, 2)), linewidth=1.2, label="all experts on")
    left.set(
        title=f"Segment routing (SRP): {figures.short_name(summary.name)}",
        ylabel="best F1 of a segment router",
    )
    for colour, size, rate in zip(
        (BLUE, GREEN, ORANGE), found.capacities, found.hit_rate, strict=False
    ):
        right.plot(rows, rate, color=colour, label=f"{size} experts", **mark)
    right.set(
        title=f"Segment cache (SCH): {LOOK_AHEAD} tokens ahead",
        ylabel="hits / choices",
    )
    for axes in (left, right):
        axes.set_ylim(0, 1.05)
        layer_columns(axes, info.layers)
        figures.legend_below(axes, num_columns=3)
    return figure


def grid_height(num_layers: int) -> float:
    """Inches for a picture with a row per layer."""
    return float(np.clip(1.5 + 0.2 * num_layers, 3.0, 10.0))


def bar_style(num_layers: int) -> dict[str, float]:
    """A colour bar as wide beside a high picture as beside a low one."""
    return {"aspect": 7.5 * grid_height(num_layers), "pad": 0.01, "extendfrac": 0.03}


def line_style(num_layers: int) -> dict[str, object]:
    """Markers on a line over few layers, so that single layers can be told."""
    return {"marker": "o", "markersize": 4} if num_layers <= 64 else {}


def layer_rows(axes: Axes, layers: tuple[int, ...]) -> None:
    """Names the rows of an image by layer."""
    axes.set_yticks(*_layer_ticks(layers, most=16))
    axes.set_ylabel("layer")


def layer_columns(axes: Axes, layers: tuple[int, ...]) -> None:
    """The layer axis of a line."""
    axes.set_xticks(*_layer_ticks(layers, most=9))
    pad = max(0.02 * len(layers), 0.3)
    axes.set_xlim(-pad, len(layers) - 1 + pad)
    axes.set_xlabel("layer")


def expert_axis(axes: Axes, num_experts: int) -> None:
    """The expert axis of an image."""
    axes.grid(False)
    axes.xaxis.set_major_locator(figures.whole_ticks(16))
    axes.set_xlim(-0.5, num_experts - 0.5)
    axes.set_xlabel("expert")


def _layer_ticks(layers: tuple[int, ...], *, most: int) -> tuple[list[int], list[str]]:
    """(rows, names) of the layers with round numbers; of all where they are few."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if len(layers) <= s * most)
    rows = [row for row, layer in enumerate(layers) if layer % step == 0] or [0]
    return rows, [str(layers[row]) for row in rows]
