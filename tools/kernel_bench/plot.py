"""A picture of what `bench_kernels.py` measured: the share of the measured dense peak.

    python tools/kernel_bench/plot.py a.json [b.json ...] --out kernels.png

One panel for each product, one group of bars for each model. A bar is the balanced distribution,
the thin line on it reaches from the slowest to the fastest one. Wrong results are left out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Shades by family, the first for its first member.
FAMILIES = {
    "dense": ("0.75",),
    "moejax": ("#08306b", "#2171b5", "#6baed6", "#9ecae1", "#c6dbef", "#41b6c4", "#a1dab4"),
    "ragged_dot": ("#cb181d", "#fc9272"),
    "tokamax": ("#006d2c", "#74c476", "#005a32", "#c7e9c0"),
    "torch": ("#6a51a3",),
    "other": ("#f16913", "#fdae6b", "#8c2d04"),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(words)
    reports = [json.loads(path.read_text()) for path in args.json]
    draw(reports).savefig(args.out, dpi=130)


def draw(reports: list[dict[str, Any]]) -> plt.Figure:
    """The figure, for one or several reports."""
    bars = _bars(reports)
    products = list(dict.fromkeys(product for product, _, _ in bars))
    names = list(dict.fromkeys(name for _, _, name in bars))
    columns = min(2, len(products))
    lines = -(-len(products) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(7.5 * columns, 2.9 * lines + 1),
        squeeze=False,
        layout="constrained",
    )
    colours = _colours(names)
    for axis, product in zip(axes.flat, products, strict=False):
        _panel(axis, product, {k[1:]: v for k, v in bars.items() if k[0] == product}, colours)
    for axis in axes.flat[len(products) :]:
        axis.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False
    )
    figure.suptitle(_title(reports), fontsize=11)
    return figure


def _bars(reports: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """(product, model, variant) -> distribution -> share of the dense peak."""
    bars: dict[tuple[str, str, str], dict[str, float]] = {}
    for report in reports:
        where = f" ({report['machine']['device_kind']})" if len(reports) > 1 else ""
        for row in report["rows"]:
            if row["status"] == "ok" and row.get("median") and row["flops"]:
                key = row["product"], row["model"], row["variant"] + where
                bars.setdefault(key, {})[row["distribution"]] = row["share_of_peak"]
    return bars


def _colours(names: list[str]) -> dict[str, str]:
    colours, seen = {}, dict.fromkeys(FAMILIES, 0)
    for name in names:
        family = next((f for f in FAMILIES if name.startswith(f)), "other")
        shades = FAMILIES[family]
        colours[name] = shades[seen[family] % len(shades)]
        seen[family] += 1
    return colours


def _panel(axis: plt.Axes, product: str, bars: dict, colours: dict[str, str]) -> None:
    models = list(dict.fromkeys(model for model, _ in bars))
    names = [name for name in colours if any(n == name for _, n in bars)]
    width = 0.85 / max(len(names), 1)
    for at, model in enumerate(models):
        for i, name in enumerate(names):
            if shares := bars.get((model, name)):
                x = at + (i - (len(names) - 1) / 2) * width
                values = [100 * share for share in shares.values()]
                axis.bar(
                    x,
                    100 * shares.get("balanced", max(shares.values())),
                    0.92 * width,
                    color=colours[name],
                )
                if len(values) > 1:
                    axis.plot([x, x], [min(values), max(values)], color="black", linewidth=0.8)
    axis.set_xticks(range(len(models)), [m.replace("-", "-\n", 1) for m in models], fontsize=8)
    axis.set_title(product, fontsize=10, loc="left")
    axis.set_ylabel("% of dense peak", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(bottom=0)


def _title(reports: list[dict[str, Any]]) -> str:
    parts = []
    for report in reports:
        where, peak = report["machine"], report["ceilings"]["flops"] / 1e12
        parts.append(
            f"{where['device_kind']}, {report['dtype']}, jax {where['versions']['jax']}: "
            f"100% is {peak:.3g} TFLOP/s"
        )
    return "\n".join([*parts, "bars: balanced groups; lines: slowest to fastest distribution"])


if __name__ == "__main__":
    main()
