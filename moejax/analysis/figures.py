"""One look for every picture: size, colours, axes. No pyplot, so no global state and no display."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#666666",
)
WIDTH = 10.0  # inches; at 110 dpi the 1100 pixels that the report shows at full size

_STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every picture; the caller's own matplotlib settings come back afterwards."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"}):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure whose layout keeps labels, legends and titles apart."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def step_axis(axes: Axes, steps: ArrayLike, *, num_ticks: int = 7, label: bool = True) -> None:
    """A step axis with whole-number ticks that spans exactly `steps`."""
    axes.xaxis.set_major_locator(whole_ticks(num_ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    steps = np.asarray(steps)
    if steps.size:
        low, high = steps.min(), steps.max()
        pad = max(0.02 * (high - low), 0.5)
        axes.set_xlim(low - pad, high + pad)
    if label:
        axes.set_xlabel("step")


def whole_ticks(most: int) -> MaxNLocator:
    """Ticks at round whole numbers."""
    return MaxNLocator(nbins=most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def short_number(value: float | np.floating) -> str:
    """1234567 -> "1.235M", 20000 -> "20k", 350 -> "350"."""
    for size, unit, letter in (
        (1e12, 1e12, "T"),
        (1e9, 1e9, "G"),
        (1e6, 1e6, "M"),
        (1e4, 1e3, "k"),
    ):
        if abs(value) >= size:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def short_name(name: str, most: int = 24) -> str:
    """A name that fits into a title beside another: its beginning and its end."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[half - most + 1 :]}"


def plot_series(axes: Axes, steps: NDArray, values: NDArray, colour: str, label: str) -> None:
    """A line; where it is long and noisy, a pale line with its smoothed course on top."""
    if is_short(values):
        axes.plot(steps, values, color=colour, label=label, marker="o", markersize=4)
        return
    axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
    axes.plot(*smooth(steps, values), color=colour, label=label)


def point_style(steps: NDArray) -> dict[str, object]:
    """Markers for a series so short that a line alone could not be seen."""
    return {"marker": "o", "markersize": 4} if is_short(steps) else {}


def legend_below(axes: Axes, *, num_columns: int) -> None:
    """A legend under the step axis, where it cannot cover data."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
            ncols=num_columns,
            columnspacing=1.2,
            handlelength=1.8,
        )


def is_short(values: NDArray) -> bool | np.bool_:
    """Few enough known points to mark each of them and to need no smoothing."""
    return len(values) <= 15 or np.isfinite(values).sum() <= 15


def smooth(steps: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    """The running median over 5% of the points, along the first axis; NaN is left out.

    A median, because one bad batch must not show. Near the start the window is cut on both
    sides alike, so that a steep start is not flattened. Long series are binned first.
    """
    steps, values = bin_records(steps, values, 600)
    values = np.where(np.isfinite(values), values, np.nan)
    half, count = max(1, len(values) // 40), len(values)
    rows = [values[max(0, i - half) : i + min(half, i) + 1] for i in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a window of nothing but NaN is NaN
        return steps, np.stack([np.nanmedian(row, axis=0) for row in rows])


def bin_records(steps: NDArray, values: NDArray, most: int) -> tuple[NDArray, NDArray]:
    """Means over runs of neighbouring records, so that at most `most` are left. NaN is left out."""
    size = -(-len(steps) // most)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0), starts)
    count = np.add.reduceat(known.astype(np.float64), starts)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return np.add.reduceat(steps, starts) / np.diff(starts, append=len(steps)), mean


def fit_y(axes: Axes, *series: ArrayLike, zero: bool = False) -> None:
    """Limits that a single spike cannot blow up; points beyond them become triangles on the edge.

    The range is that of the first value and of the middle 98% of all, which keeps the start of
    a loss curve and drops one bad batch.
    """
    finite = [np.asarray(s, np.float64)[np.isfinite(s)] for s in map(np.asarray, series)]
    values = np.concatenate([*finite, np.zeros(0)])
    if values.size == 0:
        return
    starts = [s[0] for s in finite if s.size]
    low, high = np.percentile(values, [1, 99]) if values.size > 50 else (values.min(), values.max())
    low, high = min(low, *starts, high), max(high, *starts, low)
    low = 0.0 if zero else low
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0.0 if zero else low - pad, high + pad)


def mark_outside(axes: Axes, steps: NDArray, values: NDArray, colour: str) -> None:
    """Small triangles on the upper edge where `values` lie above the axis, or are infinite."""
    above = np.asarray(steps)[np.asarray(values) > axes.get_ylim()[1]]
    if above.size:
        top = axes.get_xaxis_transform()
        axes.plot(above, np.full(above.size, 0.985), "^", color=colour, transform=top, markersize=6)


def depth_colours(count: int) -> list[tuple[float, ...]]:
    """One colour per layer, dark (first) to light (last), also apart in grey."""
    colormap = matplotlib.colormaps["viridis"]
    return [colormap(0.9 * i / max(count - 1, 1)) for i in range(count)]


def depth_colormap() -> Colormap:
    """The continuous form of `depth_colours`."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256))
    return LinearSegmentedColormap.from_list("depth", colours)


def no_data(axes: Axes, text: str) -> None:
    """Says in an otherwise empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
