"""Pictures of the routers: load of every expert over time, entropy, MaxVio, dead experts."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moejax.analysis import figures, routing
from moejax.analysis.figures import BLUE, VERMILION
from moejax.analysis.history import History

MOST_LAYERS = 12  # panels of the heatmap
_WORST_LAYERS = 4  # of these panels, where there are more layers
_MOST_COLUMNS = 300  # of one panel; more records are averaged in bins
_DEAD = 0.01  # of the even share, as in `health.RouterHealth`
LOAD_TICKS = {0.25: "≤ ¼", 0.5: "½", 1.0: "1", 2.0: "2", 4.0: "≥ 4"}


def plot_expert_load(history: History) -> Figure:
    """One panel per MoE layer: step across, expert upwards, colour = load over the even share."""
    rows = shown_layers(history.load)
    num_columns = 2 if len(rows) <= 4 else 3
    num_columns = min(num_columns, len(rows))
    num_rows = -(-len(rows) // num_columns)
    figure = figures.new_figure(1.1 + (2.6 if num_rows <= 2 else 2.1) * num_rows)
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    steps, load = figures.bin_records(history.steps, history.load, _MOST_COLUMNS)
    for position, axes in enumerate(grid.flat):
        if position >= len(rows):
            axes.set_visible(False)
            continue
        mesh = _draw_load(axes, steps, load[:, rows[position]])
        axes.set_title(f"layer {history.moe_layers[rows[position]]}")
        below = position + num_columns < len(rows)
        axes.tick_params(labelbottom=not below)
        figures.step_axis(axes, [], num_ticks=7 if num_columns < 3 else 5, label=not below)
        if position % num_columns == 0:
            axes.set_ylabel("expert")
    bar = figure.colorbar(mesh, ax=grid, extend="min", aspect=30, shrink=min(1.0, 2.4 / num_rows))
    bar.set_ticks(list(LOAD_TICKS), labels=list(LOAD_TICKS.values()))
    bar.ax.minorticks_off()
    bar.set_label("load / even share")
    figure.suptitle(_load_title(len(rows), history), x=0.01, ha="left", fontsize=11.5)
    return figure


def plot_router(history: History) -> Figure:
    """Per layer: router entropy and MaxVio. Over all layers: load percentiles, dead experts."""
    figure = figures.new_figure(7.4)
    (entropy, violation), (spread, dead) = figure.subplots(2, 2)
    _layer_lines(entropy, history, history.layers["router/entropy"])
    entropy.set(title="Router entropy", ylabel="mean per token, 1 = uniform", ylim=(0.0, 1.03))
    max_vio = _violation(history)
    _layer_lines(violation, history, max_vio)
    violation.set(title="MaxVio of the load", ylabel="(max − mean) / mean")
    violation.set_ylim(0.0, 1.08 * np.nanmax(max_vio, initial=0.5))
    _layer_key(figure, [entropy, violation], history)
    _draw_percentiles(spread, history)
    _draw_dead(dead, history)
    return figure


def shown_layers(load: NDArray) -> list[int]:
    """Rows of `load` `[N, L, E]` to draw: all, or `MOST_LAYERS` of them where there are more.

    These are evenly spaced, from the first to the last, but for the few with the most dead
    experts and then the highest MaxVio in the last fifth of the records, those without a load
    before all: trouble must not hide.
    """
    num_layers = load.shape[1]
    if num_layers <= MOST_LAYERS:
        return list(range(num_layers))
    recent = load[-max(1, len(load) // 5) :]
    dead = np.nan_to_num(routing.num_dead_experts(recent, _DEAD).sum(0), nan=np.inf)
    violation = routing.max_vio(recent).mean(0)
    worst_first = np.lexsort((violation, dead))[::-1]
    spaced = np.linspace(0, num_layers - 1, MOST_LAYERS - _WORST_LAYERS).round().astype(int)
    rows = dict.fromkeys(spaced.tolist())
    for row in worst_first.tolist():
        if len(rows) == MOST_LAYERS:
            break
        rows[row] = None
    return sorted(rows)


def _draw_load(axes: Axes, steps: NDArray, load: NDArray):
    """`load` is [N, E]; clipped to [1/4, 4] even shares, dead experts below the scale: black."""
    ratio = routing.relative_load(load).T  # [E, N]
    axes.grid(False)
    axes.set_facecolor("#bdbdbd")  # records without a load
    axes.yaxis.set_major_locator(figures.whole_ticks(5))
    edges = np.arange(len(ratio) + 1) - 0.5
    mesh = axes.pcolormesh(_edges(steps), edges, load_colours(ratio), **load_scale())
    mesh.set_rasterized(True)
    return mesh


def load_colours(ratio: NDArray) -> NDArray:
    """What to draw for loads over the even share: within [1/4, 4], and dead ones below it."""
    return np.where(ratio <= _DEAD, 1e-3, np.clip(ratio, 0.25, 4.0))


def load_scale() -> dict[str, object]:
    """Blue (starved) over white (even) to red; the ends are cut so that black stays apart."""
    colours = matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))
    colormap = LinearSegmentedColormap.from_list("load", colours)
    colormap = colormap.with_extremes(under="black", bad="#bdbdbd")
    return {"cmap": colormap, "norm": LogNorm(0.25, 4.0)}


def _edges(steps: NDArray) -> NDArray:
    """Cell borders half-way between the steps; a single step gets a cell of width 1."""
    steps = np.asarray(steps, np.float64)
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _load_title(num_shown: int, history: History) -> str:
    num_layers = history.load.shape[1]
    if num_shown == num_layers:
        return "Load of every expert over time (black: dead)"
    return (
        f"Load of every expert over time (black: dead). {num_shown} of {num_layers} MoE layers: "
        "the least balanced and some evenly spaced"
    )


def _violation(history: History) -> NDArray:
    written = history.layers["router/max_vio"]
    return written if written.size else routing.max_vio(history.load)


def _layer_lines(axes: Axes, history: History, values: NDArray) -> None:
    """`values` is [N, L]; smoothed if there are many records, thin if there are many lines."""
    steps = history.steps
    look = {"linewidth": 1.6 if values.shape[1] <= 12 else 0.9, **figures.point_style(steps)}
    steps, lines = (steps, values) if figures.is_short(steps) else figures.smooth(steps, values)
    for row, colour in enumerate(figures.depth_colours(values.shape[1])):
        axes.plot(steps, lines[:, row], color=colour, **look)
    figures.step_axis(axes, history.steps)


def _layer_key(figure: Figure, panels: list[Axes], history: History) -> None:
    """Names the layers of the lines: a legend for up to eight, a colour bar for more."""
    layers = history.moe_layers
    if len(layers) <= 8:
        names = [f"layer {layer}" for layer in layers]
        panels[-1].legend(
            panels[-1].get_lines(), names, loc="center left", bbox_to_anchor=(1.02, 0.5)
        )
        return
    scale = ScalarMappable(Normalize(layers[0], layers[-1]), figures.depth_colormap())
    bar = figure.colorbar(scale, ax=panels, aspect=18)
    bar.locator = figures.whole_ticks(6)
    bar.update_ticks()
    bar.set_label("layer")


def _draw_percentiles(axes: Axes, history: History) -> None:
    """Fan of the relative load over the experts of all layers together."""
    ratio = routing.relative_load(history.load).reshape(len(history.steps), -1)
    steps, values = history.steps, np.percentile(ratio, [0, 5, 25, 50, 75, 95, 100], axis=1).T
    if not figures.is_short(steps):
        steps, values = figures.smooth(steps, values)
    least, low, lower, median, upper, high, most = values.T
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, lw=0, label="5 to 95%")
    axes.fill_between(steps, lower, upper, color=BLUE, alpha=0.35, lw=0, label="25 to 75%")
    points = figures.point_style(steps)
    axes.plot(steps, median, color=BLUE, label="median", **points)
    for extreme, label in ((most, "largest and smallest"), (least, None)):
        axes.plot(steps, extreme, color=VERMILION, linewidth=1.0, label=label, **points)
    axes.set(title="Load percentiles, all layers", ylabel="load / even share")
    axes.set_ylim(0.0, max(2.0, 1.08 * np.nanmax(most, initial=0.0)))
    figures.step_axis(axes, history.steps)
    figures.legend_below(axes, num_columns=2)


def _draw_dead(axes: Axes, history: History) -> None:
    """How many experts are dead and, where any were, how many token choices were dropped."""
    dead = routing.num_dead_experts(history.load, _DEAD).sum(1)
    axes.step(history.steps, dead, color=BLUE, where="mid", **figures.point_style(history.steps))
    num_experts = history.load.shape[1] * history.load.shape[2]
    axes.set(title="Dead experts, all layers", ylabel=f"experts below 1% (of {num_experts})")
    axes.set_ylim(0.0, max(4.0, 1.15 * np.nanmax(dead, initial=0.0)))
    axes.yaxis.set_major_locator(figures.whole_ticks(5))
    figures.step_axis(axes, history.steps)
    dropped = history.layers["router/dropped"]
    total = figures.short_number(np.nansum(dropped)) if np.isfinite(dropped).any() else "not known"
    text = f"token choices dropped: {total}"
    axes.text(0.02, 0.96, text, transform=axes.transAxes, va="top", fontsize=9.5)
