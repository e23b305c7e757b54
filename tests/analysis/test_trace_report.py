"""The report of traces: alone, of a run, of two that are compared; readable at every size."""

import argparse
import pathlib
import re

import numpy as np
import pytest
from synthetic_run import SyntheticRun, write_run
from synthetic_trace import trace_info, write_trace
from test_plots import check_layout

from moejax.analysis import coactivation_plot, comparison_plots, figures, routing, trace_plots
from moejax.analysis.comparison import compare
from moejax.analysis.report import write_report, write_trace_report
from moejax.analysis.trace_file import TraceFile
from moejax.analysis.trace_report import labels
from moejax.analysis.trace_summary import summarise
from moejax.commands import report
from moejax.errors import UserError

ONE = {"load", "entropy", "together", "segments", "attribution"}
TWO = {"divergence", "shift"}


def pngs(folder, prefix):
    return {path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.png")}


def test_traces_become_part_of_a_runs_report(tmp_path):
    run = write_run(tmp_path / "run", SyntheticRun(num_records=2, num_layers=0).records())
    assert "Routing of" not in write_report(run).read_text()
    write_trace(run / "traces" / "a.npz")
    write_trace(run / "traces" / "held_out.npz", seed=1)
    page = write_report(run)
    text = page.read_text()
    assert re.findall("<h2>((?:Routing|a ).*?)</h2>", text) == [
        *("Routing of held_out", "Routing of a", "a against held_out")
    ]
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert shown["Tokens"] == "315"
    assert shown["Experts"] == "8 in 3 layers, top-2"
    assert shown["Sequences"] == "18 of at most 40 tokens"
    assert pngs(page.parent, "trace0_") == pngs(page.parent, "trace1_") == ONE
    assert pngs(page.parent, "traces_0_1_") == TWO
    assert text.count("data:image/png;base64,") == 3 + 2 * len(ONE) + len(TWO)


def test_an_imported_model_has_traces_and_no_metrics(tmp_path):
    write_trace(tmp_path / "traces" / "python.npz")
    page = write_report(tmp_path)
    assert page == tmp_path / "report" / "index.html"
    assert "<h1>python</h1>" in page.read_text()


def test_a_router_of_one_choice_has_no_pairs(tmp_path):
    page = write_trace_report([write_trace(tmp_path / "a.npz", trace_info(k=1))])
    assert page == tmp_path / "a" / "index.html"
    assert pngs(page.parent, "trace0_") == ONE - {"together"}


def run_command(*words):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(word) for word in words]))


def test_the_command(tmp_path, capsys):
    one, two = (write_trace(tmp_path / name, seed=n) for n, name in enumerate(("a.npz", "b.npz")))
    assert run_command(one, two, "--paired", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "index.html")
    assert "<dt>Sentence pairs</dt><dd>18</dd>" in (tmp_path / "out" / "index.html").read_text()
    for words, message in (
        ((tmp_path, one), "of runs, one"),
        ((one, "--paired"), "name two or more"),
        ((one, one), "named twice"),
        ((tmp_path / "c.txt",), "neither a run's folder nor a trace"),
        ((tmp_path / "none",), "neither a run's folder nor a trace"),
        ((tmp_path / "none.npz",), "cannot read the trace"),
        ((one, "--out", one), "cannot write the report"),
    ):
        with pytest.raises(UserError, match=message):
            run_command(*words)


def test_traces_are_called_by_what_tells_them_apart():
    paths = ("runs/tiny/traces/python.npz", "runs/tuned/traces/python.npz")
    assert labels([pathlib.Path(path) for path in paths]) == ["tiny/python", "tuned/python"]
    assert labels([pathlib.Path("a/x.npz"), pathlib.Path("b/y.npz")]) == ["x", "y"]
    paths = ("r/traces/x.npz", "r/x.npz")
    assert labels([pathlib.Path(path) for path in paths]) == ["traces/x", "x"]


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    path = write_trace(tmp_path_factory.mktemp("trace") / "a.npz")
    return summarise(TraceFile(path), "a")


def test_pictures_show_what_was_measured(summary):
    figure = trace_plots.plot_load(summary)
    shown = np.asarray(figure.axes[0].get_images()[0].get_array())
    ratio = routing.relative_load(summary.counts)
    np.testing.assert_allclose(shown, np.clip(ratio, 0.25, 4))
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    np.testing.assert_allclose(bars, routing.max_vio(summary.counts))
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["1", "2", "4"]  # global layers, not rows
    figure = trace_plots.plot_attribution(summary)
    row, expert = np.unravel_index(summary.attribution.argmax(), (3, 8))
    best = figure.axes[0].get_yticklabels()[0].get_text()
    assert best == f"layer {(1, 2, 4)[row]}, expert {expert}"
    assert figure.axes[0].patches[0].get_width() == summary.attribution.max()
    figure = comparison_plots.plot_divergence(compare(summary, summary))
    assert (figure.axes[0].get_lines()[0].get_ydata() == 0).all()


LARGE = {"num_experts": 128, "k": 8, "layers": tuple(range(3, 51))}
SIZES = {
    "128 experts, 48 layers": (trace_info(**LARGE), {"batch_size": 1, "count": 2}),
    "one layer, one choice": (trace_info(num_experts=2, k=1, layers=(0,)), {"count": 1}),
    "64 experts": (trace_info(num_experts=64, k=8, layers=tuple(range(16))), {"count": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_no_text_overlaps_or_leaves_the_picture(size, tmp_path, monkeypatch):
    info, options = SIZES[size]
    name = "a_rather_long_name_of_a_text_in_german"
    one, two = (
        summarise(TraceFile(write_trace(tmp_path / f"{n}.npz", info, seed=n, **options)), name)
        for n in (0, 1)
    )
    both = compare(one, two, paired=True)
    draws = [
        *((draw, one) for draw in (trace_plots.plot_load, trace_plots.plot_entropy)),
        *((draw, one) for draw in (trace_plots.plot_segments, trace_plots.plot_attribution)),
        (comparison_plots.plot_divergence, both),
        (comparison_plots.plot_shift, both),
    ]
    if info.k > 1:
        draws.append((coactivation_plot.plot_coactivation, one))
    for draw, what in draws:
        with figures.style():
            check_layout(draw(what))
