"""Prints what `bench_kernels.py` measured."""

from __future__ import annotations

import collections
from typing import Any

import jax

Row = dict[str, Any]


def print_case(rows: list[Row], told: set[tuple[str, str]]) -> None:
    """One table: the variants of one product, model and distribution.

    What is missing is printed with its reason unless it is among those `told`, which grows.
    """
    first = rows[0]
    measured = [row for row in rows if row.get("median") is not None]
    if not measured:
        return
    print(
        f"\n{first['product']}, {first['model']}, {first['distribution']}: "
        f"R {first['R']}, K {first['K']}, N {first['N']}, G {first['G']}"
    )
    print(
        f"{'':26}{'median ms':>11}{'least':>11}{'spread':>10}{'runs':>5}{_unit()[0]:>9}"
        f"{'peak':>6}{'dense':>7}{'roof':>6}{'temp MB':>9}{'error':>9}"
    )
    for row in measured:
        print(_line(row))
    for row in rows:
        if row["reason"] and (key := (row["variant"], row["reason"])) not in told:
            told.add(key)
            print(f"{row['variant']:26} {row['status']}: {row['reason'][:100]}")


def _line(row: Row) -> str:
    percent = lambda share: f"{100 * share:5.0f}%"
    ratio = f"{row['times_dense']:7.2f}" if row["times_dense"] else f"{'':7}"
    temp = f"{row['temp_bytes'] / 1e6:9.0f}" if row.get("temp_bytes") is not None else f"{'':9}"
    error = f"{row['error']:9.1e}" if "error" in row else f"{'':9}"
    rate = row["flops_per_second"] / _unit()[1]
    return (
        f"{row['variant']:26}{1e3 * row['median']:11.3f}{1e3 * row['least']:11.3f}"
        f"{1e3 * row['quartiles']:10.3f}{len(row['seconds']):5}{rate:9.3g}"
        f"{percent(row['share_of_peak'])}{ratio}{percent(row['share_of_roofline'])}{temp}{error}"
        f"{'  WRONG' if row['status'] == 'WRONG' else ''}"
    )


def print_summary(report: dict[str, Any]) -> None:
    """Last and short: every median in those of dense, and what is missing."""
    rows = [row for row in report["rows"] if row.get("median") is not None]
    right = [row for row in rows if row["status"] == "ok"]
    print("\nmedian over that of dense; in brackets the slowest distribution over balanced")
    cases: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in right:
        cases[row["product"], row["model"]][row["variant"]][row["distribution"]] = row
    for (product, model), found in cases.items():
        cells = [f"{name} {_cell(by)}" for name, by in found.items() if name != "dense"]
        dense = next(iter(found.get("dense", {}).values()), None)
        rate = f"dense {_rate(dense)}; " if dense and dense["flops"] else ""
        print(f"{product:17}{model:21}{rate}{'; '.join(cells)}")
    _print_missing(report["rows"])


def _unit() -> tuple[str, float]:
    return ("GFLOP/s", 1e9) if jax.default_backend() == "cpu" else ("TFLOP/s", 1e12)


def _rate(row: Row) -> str:
    name, size = _unit()
    return f"{row['flops_per_second'] / size:.3g} {name}"


def _cell(by_distribution: dict[str, Row]) -> str:
    one = by_distribution.get("balanced") or next(iter(by_distribution.values()))
    worst = max(row["median"] for row in by_distribution.values()) / one["median"]
    skew = f" ({worst:.2f})" if worst > 1.05 else ""
    return (
        f"{one['times_dense']:.2f}" if one["times_dense"] else f"{1e3 * one['median']:.3f} ms"
    ) + skew


def _print_missing(rows: list[Row]) -> None:
    wrong = sorted(
        {(r["variant"], r["product"], r["model"]) for r in rows if r["status"] == "WRONG"}
    )
    for variant, product, model in wrong:
        print(f"WRONG: {variant} in {product} of {model}")
    missing = collections.Counter(
        (r["variant"], r["status"], r["reason"][:120]) for r in rows if r["reason"]
    )
    for (variant, status, reason), count in missing.items():
        print(f"{status}, {count} rows: {variant}: {reason}")
