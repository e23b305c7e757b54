"""Pictures of a run: loss, throughput, optimiser. Each function draws one figure from a History."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moejax.analysis import figures
from moejax.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION
from moejax.analysis.history import History


def plot_loss(history: History) -> Figure:
    """Language-model loss (nats per token) and bits per byte, training and held out."""
    figure = figures.new_figure(4.2)
    left, right = figure.subplots(1, 2)
    _train_and_eval(left, history, "loss/lm", "eval/loss")
    left.set(title="Loss", ylabel="nats per token")
    figures.legend_below(left, num_columns=4)
    _train_and_eval(right, history, "bits_per_byte", "eval/bits_per_byte")
    right.set(title="Compression", ylabel="bits per byte")
    _compressor_lines(right, history)
    figures.legend_below(right, num_columns=4)
    return figure


def plot_throughput(history: History) -> Figure:
    """Tokens per second, and the share of the device's peak (or model FLOP/s where unknown)."""
    figure = figures.new_figure(3.6)
    left, right = figure.subplots(1, 2)
    _rate(left, history, history.scalar("tokens_per_second"), BLUE)
    left.set(title="Throughput", ylabel="tokens per second")
    share = history.scalar("peak_share")
    if np.isfinite(share).any():
        _rate(right, history, 100 * share, GREEN)
        right.set(title="Share of the device's peak", ylabel="% of peak FLOP/s")
    else:
        _rate(right, history, history.scalar("model_flops_per_second"), GREEN)
        right.set(title="Model arithmetic (device peak not known)", ylabel="model FLOP/s")
    return figure


def plot_optimizer(history: History) -> Figure:
    """Learning rate; gradient and update norm on a log scale, with skipped steps marked."""
    figure = figures.new_figure(3.6)
    left, right = figure.subplots(1, 2)
    rate = history.scalar("learning_rate")
    left.plot(history.steps, rate, color=BLUE, **figures.point_style(history.steps))
    left.set(title="Learning rate", ylabel="learning rate")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    figures.step_axis(left, history.steps)
    left.set_ylim(bottom=0.0)
    _norms(right, history)
    return figure


def _train_and_eval(axes: Axes, history: History, train_name: str, eval_name: str) -> None:
    train, held_out = history.scalar(train_name), history.evaluation(eval_name)
    figures.plot_series(axes, history.steps, train, BLUE, "training")
    line = {"color": VERMILION, "marker": "o", "markersize": 5, "linewidth": 1.2}
    if np.isfinite(held_out).any():
        axes.plot(history.eval_steps, held_out, **line, label="held out")
    figures.step_axis(axes, np.concatenate([history.steps, history.eval_steps]))
    figures.fit_y(axes, train, held_out)
    figures.mark_outside(axes, history.steps, train, BLUE)
    figures.mark_outside(axes, history.eval_steps, held_out, VERMILION)


def _compressor_lines(axes: Axes, history: History) -> None:
    finished = history.finished or {}
    low, high = axes.get_ylim()
    for name, colour, dash in (("gzip", GREY, (0, (5, 2))), ("xz", PURPLE, (0, (2, 1.5)))):
        value = finished.get(f"{name}_bits_per_byte")
        if isinstance(value, int | float) and np.isfinite(value):
            axes.axhline(value, color=colour, linestyle=dash, label=f"{name} -9 ({value:.2f})")
            low, high = min(low, 0.94 * value), max(high, 1.06 * value)
    axes.set_ylim(low, high)


def _rate(axes: Axes, history: History, values: np.ndarray, colour: str) -> None:
    axes.plot(
        history.steps, values, color=colour, linewidth=1.2, **figures.point_style(history.steps)
    )
    finite = values[np.isfinite(values)]
    if finite.size:
        median = float(np.median(finite))
        text = f"median {figures.short_number(median)}"
        axes.axhline(median, color=GREY, linestyle=(0, (5, 2)), linewidth=1.2, label=text)
        axes.set_ylim(0.0, 1.15 * finite.max() or 1.0)
        axes.legend(loc="lower right")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: figures.short_number(value)))
    figures.step_axis(axes, history.steps)


def _norms(axes: Axes, history: History) -> None:
    for name, colour, label in (
        ("grad_norm", BLUE, "gradient"),
        ("update_norm", GREEN, "update"),
    ):
        values = history.scalar(name)
        positive = np.where(values > 0, values, np.nan)
        if np.isfinite(positive).any():
            figures.plot_series(axes, history.steps, positive, colour, label)
            axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    skipped = np.nan_to_num(history.scalar("skipped"))
    where = history.steps[np.diff(skipped, prepend=0.0) > 0]
    if where.size:
        marks = {"color": ORANGE, "linestyle": "none", "marker": "v", "markersize": 7}
        text = f"{int(skipped.max())} skipped steps"
        top = axes.get_xaxis_transform()
        axes.plot(where, np.full(where.size, 0.97), **marks, transform=top, label=text)
    axes.set(title="Norm of gradient (before clipping) and update", ylabel="L2 norm")
    figures.step_axis(axes, history.steps)
    figures.legend_below(axes, num_columns=3)
