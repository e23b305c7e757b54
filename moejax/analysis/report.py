"""Writes a run's report: the pictures as PNG files and one HTML page that holds them all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from matplotlib.figure import Figure

from moejax.analysis import adapter_plots, figures, html, plots, router_plots, trace_report
from moejax.analysis.goodput import goodput, read_sessions
from moejax.analysis.history import History, build_history
from moejax.analysis.metrics_file import iter_metrics
from moejax.errors import UserError

_METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    file: str
    title: str
    caption: str
    draw: Callable[[History], Figure]


_ALWAYS = (
    _Plan(
        file="loss.png",
        title="Loss",
        caption="Healthy: a steep start, then a slow decline, with the held-out points close to "
        "the training curve. A growing gap means memorising; a jump that stays means the run "
        "diverged. Bits per byte compare across tokenisers and with compressors: the dashed "
        "lines are gzip and xz on the same held-out files. A triangle at the upper edge is a "
        "record beyond the picture.",
        draw=plots.plot_loss,
    ),
    _Plan(
        file="throughput.png",
        title="Throughput",
        caption="Healthy: flat, but for the first record if it includes compilation. Regular dips "
        "are evaluations or checkpoints; a slow decline points to memory pressure or another "
        "process on the machine.",
        draw=plots.plot_throughput,
    ),
    _Plan(
        file="optimizer.png",
        title="Optimiser",
        caption="Healthy: the gradient norm falls early and then stays level. Steady growth comes "
        "before divergence. A triangle marks records in which steps were skipped because the loss, "
        "the gradient or the update was not finite or a spike: a few are harmless.",
        draw=plots.plot_optimizer,
    ),
)
_WITH_EXPERTS = (
    _Plan(
        file="expert_load.png",
        title="Expert load",
        caption="Healthy: pale everywhere after the first few hundred steps, so that every expert "
        "gets about its even share. A row that stays deep red takes tokens from the others; a row "
        "that turns black is dead: its weights no longer learn.",
        draw=router_plots.plot_expert_load,
    ),
    _Plan(
        file="router.png",
        title="Router",
        caption="Healthy: entropy falls from near 1 and settles well above 0, as the router learns "
        "to tell tokens apart without becoming certain; MaxVio, the excess of the fullest expert "
        "over the mean, falls below about 1 and stays; the load percentiles close in on 1; no "
        "expert is dead. A sudden drop of entropy with a rise of MaxVio is a collapse.",
        draw=router_plots.plot_router,
    ),
)


_WITH_MIXTURES = (
    _Plan(
        file="support_size.png",
        title="Mixtures of adapters",
        caption="How many adapters share the work: (sum of weights)² / sum of squared weights of "
        "each token, averaged over the projections of a layer. Close to 1 where a router gives all "
        "weight to one adapter, k where k weigh the same. Healthy: above 1, and the same held out "
        "as in training; a fall to 1 means that the other adapters are paid for and not used.",
        draw=adapter_plots.plot_support_size,
    ),
)


def write_report(
    run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Reads `run_dir/metrics.jsonl`, writes PNGs and `index.html` into `out`; returns the page.

    `out` is `run_dir/report` unless given. A run that is still going can be reported on. Routing
    traces in `run_dir/traces` get sections of their own.

    Raises:
        UserError: no such run, no training record in it, a damaged trace, or `out` cannot be
          written.
    """
    run_dir = pathlib.Path(run_dir)
    out = run_dir / "report" if out is None else pathlib.Path(out)
    traces = trace_report.trace_files(run_dir)
    if traces and not (run_dir / _METRICS).exists():  # a model that was imported, not trained
        return write_trace_report(traces, out)
    history = _read(run_dir)
    with _writing(out):
        pictures = [_draw(history, plan, out) for plan in _plans(history)]
        sections = [*_goodput(run_dir), *trace_report.trace_sections(traces, out)]
        page = html.render_page(history, pictures, _config_text(run_dir), sections)
        return _write(page, out)


def write_trace_report(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    paired: bool = False,
) -> pathlib.Path:
    """The report of one or more routing traces, the first compared with each other one.

    `out` is, unless given, a folder beside the first trace, named after it. `paired` says that
    document n of every trace is the same sentence.

    Raises:
        UserError: a file is no trace or damaged, the traces do not compare, or `out` cannot be
          written.
    """
    files = [pathlib.Path(path) for path in paths]
    out = files[0].with_suffix("") if out is None else pathlib.Path(out)
    with _writing(out):
        sections = trace_report.trace_sections(files, out, paired=paired)
        title = " and ".join(file.stem for file in files)
        return _write(html.render_sections(title, sections), out)


@contextlib.contextmanager
def _writing(out: pathlib.Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the report to {out}: {error.strerror}; name another folder with --out."
        ) from error


def _write(page: str, out: pathlib.Path) -> pathlib.Path:
    """Last and in one move, so that a reader never sees half of a page."""
    partial = out / "index.html.partial"
    partial.write_text(page, encoding="utf-8")
    return partial.replace(out / "index.html")


def _read(run_dir: pathlib.Path) -> History:
    metrics = run_dir / _METRICS
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory {run_dir}; give the workdir of a training run.")
    if not metrics.is_file():
        raise UserError(
            f"{run_dir} holds no metrics.jsonl, so it is not the workdir of a training run; "
            "give the directory that `moejax train` printed."
        )
    history = build_history(iter_metrics(metrics))
    if not len(history.steps):
        raise UserError(
            f"{metrics} holds no training record yet; let the run reach its first logged step "
            "(every log_every steps) and ask again."
        )
    return history


def _plans(history: History) -> tuple[_Plan, ...]:
    experts = _WITH_EXPERTS if history.load.size else ()
    mixtures = _WITH_MIXTURES if adapter_plots.support_sizes(history.scalars) else ()
    return _ALWAYS + experts + mixtures


def _draw(history: History, plan: _Plan, out: pathlib.Path) -> html.Picture:
    path = out / plan.file
    with figures.style():
        plan.draw(history).savefig(path)
    return html.Picture(path=path, title=plan.title, caption=plan.caption)


def _goodput(run_dir: pathlib.Path) -> list[html.Section]:
    sessions = read_sessions(run_dir)
    if not sessions:
        return []
    found = goodput(sessions)
    figures = {name.capitalize(): value for name, value in found.figures().items()}
    title = f"Where the time went: {found.line().partition(':')[0]}"
    return [html.Section(title=title, figures=figures, pictures=())]


def _config_text(run_dir: pathlib.Path) -> str | None:
    path = run_dir / "config.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
