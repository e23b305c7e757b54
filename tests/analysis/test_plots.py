"""Pictures: nothing overlaps, nothing is clipped, and the data is what was drawn."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_run import SyntheticRun

from moejax.analysis import figures, plots, router_plots
from moejax.analysis.history import build_history

DRAW = {
    "loss": plots.plot_loss,
    "throughput": plots.plot_throughput,
    "optimizer": plots.plot_optimizer,
    "load": router_plots.plot_expert_load,
    "router": router_plots.plot_router,
}
RUNS = {
    "one record": SyntheticRun(num_records=1, finished=False, peak_known=False),
    "300 records": SyntheticRun(dead_layer=3, collapse_layer=1),
    "one layer": SyntheticRun(num_layers=1, num_experts=2, k=2, num_records=5),
    "48 layers": SyntheticRun(num_layers=48, num_experts=128, k=8, num_records=12),
}


def history_of(run: SyntheticRun):
    return build_history(run.records())


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_no_text_overlaps_or_leaves_the_picture(run):
    history = history_of(RUNS[run])
    for draw in DRAW.values():
        with figures.style():
            figure = draw(history)
            check_layout(figure)


def check_layout(figure: Figure) -> None:
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(boxes) > 8
    for text, box in boxes:
        assert box.x0 >= page.x0 - 1, f"{text!r} is cut off on the left"
        assert box.x1 <= page.x1 + 1, f"{text!r} is cut off on the right"
        assert box.y0 >= page.y0 - 1, f"{text!r} is cut off below"
        assert box.y1 <= page.y1 + 1, f"{text!r} is cut off above"
    for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
        apart = (
            min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0) < 1
            or min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0) < 1
        )
        assert apart, f"{a!r} overlaps {b!r}"


def drawn_texts(figure: Figure) -> list[Text]:
    """Without what matplotlib keeps but does not draw: hidden panels, ticks beyond the limits."""
    unseen = set()
    for axes in figure.axes:
        if not axes.get_visible():
            unseen.update(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not low <= tick.get_loc() <= high:
                    unseen.update(tick.findobj(Text))
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [text for text in texts if text not in unseen]


def test_heatmap_shows_load_over_the_even_share():
    run = SyntheticRun(num_records=20, num_layers=2, dead_layer=1, dead_expert=5)
    history = history_of(run)
    figure = router_plots.plot_expert_load(history)
    mesh = figure.axes[1].collections[0]
    shown = np.asarray(mesh.get_array()).reshape(16, 20)
    ratio = history.load[:, 1].T * 16
    alive = np.delete(np.arange(16), 5)
    np.testing.assert_allclose(shown[alive], np.clip(ratio[alive], 0.25, 4), rtol=1e-5)
    assert (shown[5] < mesh.norm.vmin).all()  # drawn black
    assert mesh.norm(1.0) == pytest.approx(0.5)  # an even share is the middle of the scale


def test_few_layers_are_all_shown():
    assert router_plots.shown_layers(np.ones((3, 5, 4))) == [0, 1, 2, 3, 4]


def test_of_many_layers_the_sick_ones_are_shown():
    run = SyntheticRun(num_records=60, num_layers=40, dead_layer=20, collapse_layer=7)
    history = history_of(run)
    rows = router_plots.shown_layers(history.load)
    assert len(rows) == len(set(rows)) == 12
    assert {0, 7, 20, 39} <= set(rows)
    figure = router_plots.plot_expert_load(history)
    assert "12 of 40 MoE layers" in figure.get_suptitle()
    assert figure.axes[rows.index(20)].get_title() == "layer 20"


def test_long_runs_are_binned_by_means_without_nan():
    values = np.array([[1.0], [3.0], [np.nan], [5.0], [7.0]])
    steps, means = figures.bin_records(np.arange(5), values, most=3)
    assert steps.tolist() == [0.5, 2.5, 4.0]
    assert means.ravel().tolist() == [2.0, 5.0, 7.0]


def test_smoothing_ignores_one_spike_and_keeps_the_start():
    values = np.linspace(9, 3, 200)
    values[100] = 1e6
    steps, smoothed = figures.smooth(np.arange(200), values)
    assert smoothed[0] == 9.0
    assert smoothed.max() == 9.0
    assert len(steps) == 200


def test_a_spike_does_not_flatten_the_loss_but_is_marked():
    history = history_of(SyntheticRun(num_spikes=0, num_records=100))
    history.scalars["loss/lm"][60] = 1e9
    figure = plots.plot_loss(history)
    axes = figure.axes[0]
    assert axes.get_ylim()[1] < 20
    marks = [line for line in axes.get_lines() if line.get_marker() == "^"]
    assert [line.get_xdata().tolist() for line in marks] == [[history.steps[60]]]


def test_skipped_steps_are_marked_where_the_count_grows():
    history = history_of(SyntheticRun(num_spikes=2, num_records=60))
    figure = plots.plot_optimizer(history)
    (marks,) = [line for line in figure.axes[1].get_lines() if line.get_marker() == "v"]
    grew = np.flatnonzero(np.diff(history.scalar("skipped"), prepend=0))
    assert marks.get_xdata().tolist() == history.steps[grew].tolist()
    assert f"{len(grew)} skipped steps" in [t.get_text() for t in figure.findobj(Text)]


@pytest.mark.parametrize(
    "value, text", [(350, "350"), (9473, "9473"), (2e4, "20k"), (1.2e9, "1.2G")]
)
def test_short_number(value, text):
    assert figures.short_number(value) == text


def test_held_out_points_above_the_picture_are_marked():
    history = history_of(SyntheticRun(num_spikes=0, num_records=400))
    history.evaluation("eval/loss")[-1] = 1e9
    axes = plots.plot_loss(history).axes[0]
    marks = [line for line in axes.get_lines() if line.get_marker() == "^"]
    assert axes.get_ylim()[1] < 20
    assert [line.get_xdata().tolist() for line in marks] == [[history.eval_steps[-1]]]


def test_what_is_not_known_of_experts_is_not_drawn_as_health():
    history = history_of(SyntheticRun(num_records=60, num_layers=40))
    history.load[:, 3] = np.nan
    history.layers["router/dropped"][:] = np.nan
    assert 3 in router_plots.shown_layers(history.load)
    figure = router_plots.plot_router(history)
    (dead,) = (axes for axes in figure.axes if axes.get_title().startswith("Dead experts"))
    assert np.isnan(dead.get_lines()[0].get_ydata()).all()
    assert [text.get_text() for text in dead.texts] == ["token choices dropped: not known"]
