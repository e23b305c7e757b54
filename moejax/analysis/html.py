"""The report page: one HTML file with everything inside, readable offline, in light and dark."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moejax.analysis.figures import short_number
from moejax.analysis.history import History

_CSS = """
:root { color-scheme: light dark; --page: #fafafa; --card: #fff; --text: #1c1c1c; --dim: #5c5c5c;
  --line: #dcdcdc; --warn: #fff3df; --edge: #d98a00; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --card: #202327; --text: #e6e6e6;
  --dim: #a2a6ab; --line: #393e44; --warn: #3a2f1c; --edge: #e0a13a; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
.dim, figcaption { color: var(--dim); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .6rem; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .8rem; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.warnings li { background: var(--warn); border-left: 4px solid var(--edge); list-style: none;
  margin: .4rem 0; padding: .4rem .8rem; }
.warnings { padding: 0; }
figure { margin: 0 0 1.2rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); box-sizing: border-box; padding: .4rem; }
figcaption { margin-top: .4rem; max-width: 60rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; font: .85rem/1.4 ui-monospace, monospace; }
summary { cursor: pointer; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG of the report: its heading, and a caption that says what healthy looks like."""

    path: pathlib.Path
    title: str
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report under a heading of its own: figures (label to value), then pictures."""

    title: str
    figures: dict[str, str]
    pictures: Sequence[Picture]


def render_page(
    history: History,
    pictures: Sequence[Picture],
    config_text: str | None,
    sections: Sequence[Section] = (),
) -> str:
    """The page of a run. Whatever comes from the run is escaped; nothing is loaded."""
    name = str(history.run.get("name") or "Unnamed run")
    parts = [
        _key_figures(history),
        _warnings(history),
        *(_picture(picture, "h2") for picture in pictures),
        *map(_section, sections),
        _sample(history),
        _details("Configuration", config_text),
        _details("Versions", _version_text(history.run.get("versions"))),
    ]
    return _page(name, _subtitle(history), parts)


def render_sections(title: str, sections: Sequence[Section]) -> str:
    """A page of sections alone, such as traces without a run."""
    return _page(title, "routing traces", [_section(section) for section in sections])


def _page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    name = _escape(title)
    frame = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name} – moejax report</title><style>{_CSS}</style></head><body>",
        f"<h1>{name}</h1>",
        f'<p class="dim">{_escape(subtitle)}</p>',
        *parts,
        "</body></html>\n",
    ]
    return "\n".join(part for part in frame if part)


def _section(section: Section) -> str:
    pictures = "\n".join(_picture(picture, "h3") for picture in section.pictures)
    return f"<h2>{_escape(section.title)}</h2>{_figure_list(section.figures)}{pictures}"


def key_figures(history: History) -> dict[str, str]:
    """Label to value, in the order of the page; what the run does not know is left out."""
    run, finished = history.run, history.finished or {}
    step = int(history.steps[-1])
    held_out = finished.get("eval/bits_per_byte", last(history.evaluation("eval/bits_per_byte")))
    share = _median(history.scalar("peak_share"))
    figures = {
        "Parameters": _count(run.get("num_params")),
        "Active parameters per token": _count(run.get("num_active_params")),
        "Experts": _experts(history),
        "Steps": f"{step:,}",
        "Skipped steps": _count(last(history.scalar("skipped"))),
        "Tokens, padding included": _count(run.get("tokens_per_step"), times=step),
        "Training loss (median of last 10)": _decimal(_median(history.scalar("loss/lm")[-10:])),
        "Held-out loss": _decimal(last(history.evaluation("eval/loss"))),
        "Held-out bits per byte": _decimal(held_out),
        "gzip -9 on the same files": _decimal(finished.get("gzip_bits_per_byte")),
        "xz -9 on the same files": _decimal(finished.get("xz_bits_per_byte")),
        "Tokens per second (median)": _count(_median(history.scalar("tokens_per_second"))),
        "Share of peak (median)": f"{share:.1%}" if math.isfinite(share) else None,
        "Time": _duration(history.wall_seconds) if history.wall_seconds else None,
        "Device": run.get("device"),
    }
    return {label: str(value) for label, value in figures.items() if value is not None}


def last(values: NDArray) -> float:
    """The last finite value, or NaN."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan


def _subtitle(history: History) -> str:
    parts = [str(history.run["config"])] if history.run.get("config") else []
    if history.started is not None:
        start = datetime.datetime.fromtimestamp(history.started, datetime.UTC)
        parts.append(f"started {start:%Y-%m-%d %H:%M} UTC")
    state = "finished" if history.finished else "not finished"
    parts.append(f"{state}, at step {int(history.steps[-1]):,}")
    for count, word in ((history.num_resumes, "resumed"), (history.num_rollbacks, "rolled back")):
        if count:
            parts.append(f"{word} {'once' if count == 1 else f'{count} times'}")
    return " · ".join(parts)


def _key_figures(history: History) -> str:
    return f"<h2>Key figures</h2>{_figure_list(key_figures(history))}"


def _figure_list(figures: dict[str, str]) -> str:
    rows = figures.items()
    cells = [f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in rows]
    return f"<dl>{''.join(cells)}</dl>"


def _warnings(history: History) -> str:
    heading = "<h2>Warnings</h2>"
    if not history.warnings:
        return f'{heading}<p class="dim">None.</p>'
    items = [f"<li><b>Step {w.step:,}</b> {_escape(w.text)}</li>" for w in history.warnings]
    return f'{heading}<ul class="warnings">{"".join(items)}</ul>'


def _picture(picture: Picture, level: str) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    title, caption = _escape(picture.title), _escape(picture.caption)
    return (
        f'<{level}>{title}</{level}><figure><img alt="{title}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _sample(history: History) -> str:
    sample = (history.finished or {}).get("sample")
    return f"<h2>Sample</h2><pre>{_escape(sample)}</pre>" if sample else ""


def _details(title: str, text: str | None) -> str:
    if not text:
        return ""
    return f"<h2>{title}</h2><details><summary>Show</summary><pre>{_escape(text)}</pre></details>"


def _version_text(versions: Any) -> str:
    """One line per package, from a dictionary or from "name version, name version"."""
    if isinstance(versions, dict):
        return "\n".join(f"{name} {version}" for name, version in versions.items())
    return str(versions or "").replace(", ", "\n")


def _experts(history: History) -> str | None:
    run, layers = history.run, len(history.moe_layers)
    if not layers:
        return "none (dense model)"
    return f"{run.get('num_experts', history.load.shape[2])} in {layers} layers, top-{run.get('k')}"


def _median(values: NDArray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def _decimal(value: Any) -> str | None:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) else None


def _count(value: Any, *, times: int = 1) -> str | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return short_number(value * times)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.1f} s"


def _escape(text: Any) -> str:
    return html.escape(str(text), quote=True)
