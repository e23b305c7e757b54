"""The picture of mixtures: every layer's support size, and only in runs that have mixtures."""

import json

import numpy as np
import pytest

from moejax.analysis import adapter_plots, figures
from moejax.analysis.history import build_history
from moejax.analysis.report import write_report
from tests.analysis.test_plots import check_layout


def records(layers, num_records=20):
    run = {"kind": "run", "step": 0, "time": 0.0, "values": {}}
    out = [run]
    for i in range(1, num_records + 1):
        sizes = {f"support_size/{layer}": 1 + 6.0 / (i + layer) for layer in layers}
        values = {"loss/lm": 5.0, "learning_rate": 1e-3} | sizes
        out.append({"kind": "train", "step": i, "time": float(i), "values": values})
    held_out = {f"eval/{name}": 1.5 for name in sizes} | {"eval/loss": 5.0}
    return [*out, {"kind": "eval", "step": num_records, "time": 99.0, "values": held_out}]


@pytest.mark.parametrize("layers", [(3,), range(4), range(0, 48, 2)])
def test_every_layer_is_drawn_whole(layers):
    history = build_history(records(layers))
    with figures.style():
        figure = adapter_plots.plot_support_size(history)
        check_layout(figure)
    left, right = figure.axes
    assert len(left.lines) == len(layers)
    for line, layer in zip(left.lines, layers, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 1 + 6.0 / (np.arange(1, 21) + layer))
        assert line.get_ydata().max() < left.get_ylim()[1]
    training, held_out = right.lines
    np.testing.assert_array_equal(training.get_xdata(), list(layers))
    np.testing.assert_allclose(training.get_ydata(), [1 + 6.0 / (20 + n) for n in layers])
    np.testing.assert_allclose(held_out.get_ydata(), 1.5)


@pytest.mark.parametrize("layers", [(), (0, 1)])
def test_the_report_has_it_where_there_are_mixtures(tmp_path, layers):
    lines = [json.dumps(record) for record in records(layers)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path)
    assert (page.parent / "support_size.png").exists() == bool(layers)
    assert ("Mixtures of adapters" in page.read_text()) == bool(layers)
