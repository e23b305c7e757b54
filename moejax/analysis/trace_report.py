"""The report's sections about routing traces: pictures and figures of each, and comparisons."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moejax.analysis import (
    coactivation_plot,
    comparison_plots,
    figures,
    multilingual,
    routing,
    trace_plots,
)
from moejax.analysis.comparison import Comparison, compare
from moejax.analysis.html import Picture, Section
from moejax.analysis.trace_file import TraceFile
from moejax.analysis.trace_names import HELD_OUT, SUFFIX, TRACES
from moejax.analysis.trace_summary import TraceSummary, summarise
from moejax.errors import UserError

_TAU = 0.3  # the smallest at which the paper's groups of experts do not overlap


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    file: str
    title: str
    caption: str
    draw: Callable[[Any], Figure]


_PLANS = (
    _Plan(
        file="load",
        title="Load",
        caption="Share of the choices over an even share, of the text of this trace. Pale "
        "everywhere: this text uses all experts alike. Red experts are its own; a model trained to "
        "balance over its training data may still be uneven on one kind of text.",
        draw=trace_plots.plot_load,
    ),
    _Plan(
        file="entropy",
        title="Entropy",
        caption="Blue: how undecided the router is about one token, 0 certain, 1 uniform. Red: how "
        "evenly the choices of all tokens spread. Low blue with high red is a router that tells "
        "tokens apart and still uses every expert.",
        draw=trace_plots.plot_entropy,
    ),
    _Plan(
        file="together",
        title="Co-activation",
        caption="How often one token chooses both of two experts, over how often it would by "
        "chance, in the layer where choices say most about each other (mutual information of two "
        "choices of one token, below right). Red: they work together; black: never; grey: chance "
        "alone would give fewer than five tokens. The bars name the pairs that share most of their "
        "tokens.",
        draw=coactivation_plot.plot_coactivation,
    ),
    _Plan(
        file="segments",
        title="Segments",
        caption="SRP: F1 of the best choice of experts for whole segments of m tokens against the "
        "router's own choices; dashed is what keeping every expert on gives. SCH: hit rate of a "
        "cache per layer that holds so many experts and sees ahead. High values suit offloading. "
        "Both are of sequences spread evenly over the trace: see the key figures for how many "
        "tokens.",
        draw=trace_plots.plot_segments,
    ),
    _Plan(
        file="attribution",
        title="Attribution",
        caption="The experts with the highest mean router probability on this text, all layers "
        "together: the candidates for tuning or unlearning it with one expert. Shared experts have "
        "no probability. About 100,000 tokens are needed for a stable ranking. A diamond far from "
        "its bar is an expert that is chosen more or less often than its probability says.",
        draw=trace_plots.plot_attribution,
    ),
)
_COMPARED = (
    _Plan(
        file="divergence",
        title="Divergence",
        caption="Jensen-Shannon divergence of the choices per layer: 0 is the same experts equally "
        "often, 0.69 (ln 2) no common expert. Dashed: even against odd documents of one and the "
        "same trace, which is what chance and the mix of documents give (of pieces of held-out "
        "rows chance alone: pieces of one document fall on both sides). With sentence pairs, "
        "right: the mean over pairs, divided by the room that the entropies leave (0 to 1).",
        draw=comparison_plots.plot_divergence,
    ),
    _Plan(
        file="shift",
        title="Which experts",
        caption="Orange experts serve more tokens of the second text, violet ones of the first, in "
        "percent points of the tokens.",
        draw=comparison_plots.plot_shift,
    ),
)


def trace_files(run_dir: pathlib.Path) -> list[pathlib.Path]:
    """The traces of a run by name, that of its held-out rows first: others compare with it."""
    found = (run_dir / TRACES).glob(f"*{SUFFIX}")
    return sorted(found, key=lambda path: (path.stem != HELD_OUT, path.name))


def trace_sections(
    paths: Sequence[pathlib.Path], out: pathlib.Path, *, paired: bool = False
) -> list[Section]:
    """A section for every trace, and one that compares the first with each other one.

    The PNG files go into `out`. UserError where a trace cannot be read or they do not compare.
    """
    names = labels(paths)
    summaries = [summarise(TraceFile(path), name) for path, name in zip(paths, names, strict=True)]
    pairs = [compare(summaries[0], other, paired=paired) for other in summaries[1:]]
    sections = [
        Section(
            title=f"Routing of {one.name}",
            figures=_figures(one),
            pictures=_pictures(_plans(one), one, f"trace{number}", out),
        )
        for number, one in enumerate(summaries)
    ]
    sections += [
        Section(
            title=f"{pair.other.name} against {pair.first.name}",
            figures=_differences(pair),
            pictures=_pictures(_COMPARED, pair, f"traces_0_{number}", out),
        )
        for number, pair in enumerate(pairs, start=1)
    ]
    return sections


def labels(paths: Sequence[pathlib.Path]) -> list[str]:
    """A name for every trace: its file's, or where two have the same, the folders that differ.

    `runs/tiny/traces/python.npz` and `runs/tuned/traces/python.npz` are `tiny/python` and
    `tuned/python`. UserError where a file is named twice.
    """
    whole = [path.resolve().with_suffix("") for path in paths]
    if len(set(whole)) < len(whole):
        raise UserError("a trace is named twice: it would be compared with itself")
    if len({path.stem for path in paths}) == len(paths):
        return [path.stem for path in paths]
    common = pathlib.Path(os.path.commonpath(whole))
    parts = [path.relative_to(common).parts for path in whole]
    short = ["/".join(p for p in own if p != TRACES) for own in parts]
    return short if len(set(short)) == len(short) else ["/".join(own) for own in parts]


def _plans(summary: TraceSummary) -> tuple[_Plan, ...]:
    coupled = coactivation_plot.most_coupled(summary.together) is not None
    return tuple(plan for plan in _PLANS if coupled or plan.file != "together")


def _pictures(plans: Sequence[_Plan], what: Any, name: str, out: pathlib.Path) -> list[Picture]:
    found = []
    for plan in plans:
        path = out / f"{name}_{plan.file}.png"
        with figures.style():
            plan.draw(what).savefig(path)
        found.append(Picture(path=path, title=plan.title, caption=plan.caption))
    return found


def _figures(summary: TraceSummary) -> dict[str, str]:
    trace, info = summary.trace, summary.trace.info
    violation = routing.max_vio(summary.counts)
    worst = int(np.nanargmax(violation))
    return {
        "File": str(trace.path),
        "Text": _some(info.sources),
        "Tokens": f"{trace.num_tokens:,}",
        "Sequences": f"{trace.num_sequences:,} of at most {info.sequence_length} tokens",
        "Documents": f"{trace.num_documents:,} {info.documents}",
        "Experts": f"{info.num_experts} in {len(info.layers)} layers, top-{info.k}",
        "Weights": f"{info.weights.get('folder')}, step {info.weights.get('step')}",
        "Fingerprint of the weights": str(info.weights.get("fingerprint", ""))[:12],
        "Highest MaxVio": f"{violation[worst]:.2f} in layer {info.layers[worst]}",
        "Experts without a token": str(int((summary.counts == 0).sum())),
        "Tokens looked at for SRP": f"{summary.segments.num_routing_tokens:,}",
        "Tokens looked at for SCH": f"{summary.segments.num_cache_tokens:,}",
    }


def _differences(pair: Comparison) -> dict[str, str]:
    info = pair.first.trace.info
    farthest = int(np.nanargmax(pair.jsd))
    shares = {"share": pair.shift, "reference": np.zeros_like(pair.shift)}
    own = multilingual.specialised_experts(**shares, tau=_TAU).sum()
    lost = multilingual.specialised_experts(
        share=-pair.shift, reference=shares["reference"], tau=_TAU
    ).sum()
    out = {
        "Weights": "the same" if pair.same_weights else "different",
        "Largest divergence": f"{pair.jsd[farthest]:.4f} nats in layer {info.layers[farthest]}",
        f"Experts of {pair.other.name} (τ = {_TAU})": str(int(own)),
        f"Experts of {pair.first.name} (τ = {_TAU})": str(int(lost)),
    }
    if pair.pairs is not None:
        out["Sentence pairs"] = f"{pair.first.trace.num_documents:,}"
    return out


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
