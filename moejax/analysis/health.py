"""Watches the routers of a run and says in words when one is dying or collapsing.

`RouterHealth.update` takes one train record at a time and returns the sentences to print. A
record sums up the steps since the one before. Judged is the mean over the last records that
cover at least `min_span` steps, so that a single odd batch does not warn; trouble that stays is
reported within 100 steps as long as records come at least every 50 steps.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moejax.analysis import routing

_REBALANCE = (
    "raise the weight of the load-balance loss or switch on the loss-free bias, and check the "
    "router's learning rate and initial scale"
)


@dataclasses.dataclass(kw_only=True)
class RouterHealth:
    """Thresholds and memory of the router watch. Shares and counts refer to one MoE layer."""

    moe_layers: Sequence[int]
    """Global indices of the MoE layers, in the order of the rows of every per-layer value."""
    k: int
    """Experts per token. A collapsed top-k router still spreads its load over k experts."""
    choices_per_step: float = float("inf")
    """Tokens times k. With few choices an expert may get none by chance."""
    warmup_steps: int = 10
    """Records up to this step are ignored: an untrained router is lopsided."""
    min_span: int = 20
    """Steps that the judged records must cover."""
    dead_load: float = 0.01
    """An expert below this part of the even share is dead."""
    min_expected_choices: float = 20.0
    """Choices that an even share must give an expert in the judged records."""
    min_spread: float = 0.2
    """Collapse: `routing.load_spread` (0 is k experts, 1 is all E) below this."""
    max_concentration: float = 0.9
    """Collapse onto one expert: MaxVio above this part of the most it can be, E/k - 1."""
    min_entropy: float = 0.03
    """Over-confidence: a token's mean router entropy, divided by ln E, below this."""
    repeat_every: int = 1000
    """The same trouble in the same layer is reported again after this many steps."""
    min_gap: int = 50
    """Steps between two reports of one kind on one layer, even if more experts have died."""

    def __post_init__(self):
        self._forget()

    def update(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """Feeds the values of one train record; returns new warnings, one sentence each.

        Reads "router/load" `[L, E]`, "router/entropy" `[L]` (0 to 1) and "router/dropped" `[L]`,
        each where present. A step that is not after the last one (a rollback) starts over.
        """
        load = _array(values.get("router/load"), 2)
        if load.size == 0:
            return []
        if len(load) != len(self.moe_layers):
            raise ValueError(
                f"router/load has {len(load)} rows but moe_layers names {len(self.moe_layers)}: "
                "build RouterHealth with the global index of every MoE layer."
            )
        if self._last_step is not None and step <= self._last_step:
            self._forget()
        start = step if self._last_step is None else self._last_step
        self._last_step = step
        findings = self._broken(load) + self._dropped(values, load)
        if step > self.warmup_steps:
            entropy = _array(values.get("router/entropy"), 1)
            self._window.append(_Record(start, step, load, entropy))
            self._shrink_window()
            findings += self._judge_window()
        return self._report(step, findings)

    def _forget(self) -> None:
        self._last_step: int | None = None
        self._window: collections.deque[_Record] = collections.deque()
        self._dead_since: dict[tuple[int, int], int] = {}
        self._silent_since: dict[tuple[int, int], int] = {}
        self._reported: dict[tuple[str, int], _Report] = {}

    def _shrink_window(self) -> None:
        """Keeps the fewest latest records that are enough to judge."""
        while len(self._window) > 1 and self._is_enough(self._window[1]):
            self._window.popleft()

    def _is_enough(self, first: _Record) -> bool:
        """Whether the records from `first` to the latest can be judged."""
        span = self._window[-1].step - first.start
        if span < max(1, self.min_span):
            return False
        return span * self.choices_per_step / first.load.shape[1] >= self.min_expected_choices

    def _judge_window(self) -> list[_Finding]:
        window = self._window
        if not self._is_enough(window[0]):
            return []
        load = np.mean([record.load for record in window], 0)
        found = self._collapsed(load)
        collapsed = {finding.row for finding in found}  # where dead experts go without saying
        found += [finding for finding in self._dead(load) if finding.row not in collapsed]
        if all(len(record.entropy) == len(load) for record in window):
            found += self._overconfident(np.mean([record.entropy for record in window], 0))
        return found

    def _dead(self, load: NDArray) -> list[_Finding]:
        self._dead_since = self._since(self._dead_since, routing.dead_experts(load, self.dead_load))
        self._silent_since = self._since(self._silent_since, load == 0)
        found = []
        for row in sorted({row for row, _ in self._dead_since}):
            experts = [expert for r, expert in self._dead_since if r == row]
            silent = all((row, expert) in self._silent_since for expert in experts)
            since = self._silent_since if silent else self._dead_since
            steps = self._window[-1].step - max(since[row, expert] for expert in experts)
            part = "no token" if silent else f"less than {self.dead_load:.0%} of an even share"
            who = _some_experts(experts, load.shape[1])
            text = f"{who} received {part} for {steps} steps; {_REBALANCE}"
            found.append(_Finding("dead", row, len(experts), text, frozenset(experts)))
        return found

    def _since(self, before: dict[tuple[int, int], int], flags: NDArray) -> dict:
        """The step since which each flag has held, by (row, expert), where it holds now."""
        pairs = [(int(row), int(expert)) for row, expert in np.argwhere(flags)]
        return {pair: before.get(pair, self._window[0].start) for pair in pairs}

    def _collapsed(self, load: NDArray) -> list[_Finding]:
        num_experts = load.shape[1]
        spread, effective = routing.load_spread(load, self.k), routing.effective_experts(load)
        excess, most = routing.max_vio(load), num_experts / self.k - 1
        hottest = load.argmax(1)
        found = []
        for row in range(len(load)):
            share = f"expert {hottest[row]} takes {excess[row] + 1:.1f} times an even share"
            if spread[row] < self.min_spread:
                text = (
                    f"routing has collapsed: only {effective[row]:.1f} of {num_experts} experts "
                    f"are in effective use (top-{self.k} has at least {self.k}) and {share}"
                )
            elif excess[row] > max(1.0, self.max_concentration * most):
                text = f"routing has collapsed onto one expert: {share}, nearly every token"
            else:
                continue
            found.append(_Finding("collapse", row, 1 - spread[row], f"{text}; {_REBALANCE}"))
        return found

    def _overconfident(self, entropy: NDArray) -> list[_Finding]:
        text = (
            "the router is certain of one expert for every token (entropy {:.3f}, where 1 is "
            "uniform), so its gradient vanishes and the other choices count for nothing; add or "
            "raise the router z-loss or lower the router's learning rate"
        )
        return [
            _Finding("confidence", int(row), 1 - entropy[row], text.format(entropy[row]))
            for row in np.flatnonzero(entropy < self.min_entropy)
        ]

    def _broken(self, load: NDArray) -> list[_Finding]:
        text = (
            "the expert load is not a number; the activations or router weights have overflowed: "
            "lower the learning rate or go back to an earlier checkpoint"
        )
        rows = np.flatnonzero(~np.isfinite(load).all(1))
        return [_Finding("broken", int(row), 1.0, text) for row in rows]

    def _dropped(self, values: Mapping[str, Any], load: NDArray) -> list[_Finding]:
        dropped = _array(values.get("router/dropped"), 1)
        text = (
            "{:.0f} token choices found no room at their expert and were dropped since the last "
            "record; raise the capacity or use a transport that does not drop"
        )
        return [
            _Finding("dropped", int(row), dropped[row], text.format(dropped[row]))
            for row in np.flatnonzero(dropped > 0)
            if len(dropped) == len(load)
        ]

    def _report(self, step: int, findings: list[_Finding]) -> list[str]:
        fresh = [finding for finding in findings if self._is_fresh(step, finding)]
        for finding in fresh:
            self._reported[finding.kind, finding.row] = _Report(step, finding.experts)
        kinds = dict.fromkeys(finding.kind for finding in fresh)
        return [
            text for kind in kinds for text in self._words([f for f in fresh if f.kind == kind])
        ]

    def _is_fresh(self, step: int, finding: _Finding) -> bool:
        last = self._reported.get((finding.kind, finding.row))
        if last is None or step - last.step >= self.repeat_every:
            return True
        return step - last.step >= self.min_gap and not finding.experts <= last.experts

    def _words(self, findings: list[_Finding]) -> list[str]:
        """One sentence per layer, or one for all where more than three have the same trouble."""
        names = [self.moe_layers[finding.row] for finding in findings]
        if len(findings) <= 3:
            return [f"layer {name}: {f.text}" for name, f in zip(names, findings, strict=True)]
        worst = max(range(len(findings)), key=lambda i: findings[i].severity)
        some = _list_some(names, 4)
        return [
            f"{len(names)} of {len(self.moe_layers)} MoE layers ({some}) have the same trouble; "
            f"the worst, layer {names[worst]}: {findings[worst].text}"
        ]


@dataclasses.dataclass(frozen=True)
class _Record:
    start: int  # covers the steps after this one
    step: int  # up to this one
    load: NDArray  # [L, E]
    entropy: NDArray  # [L]


@dataclasses.dataclass(frozen=True)
class _Finding:
    kind: str
    row: int
    severity: float
    text: str
    experts: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class _Report:
    step: int
    experts: frozenset[int]


def _array(value: Any, ndim: int) -> NDArray:
    if value is None or np.size(value) == 0:
        return np.zeros((0,) * ndim)
    return np.asarray(value, np.float64)


def _some_experts(experts: list[int], num_experts: int) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]} has"
    if len(experts) <= 8:
        return f"experts {_list_some(experts, 8)} have"
    return f"{len(experts)} of {num_experts} experts ({_list_some(experts, 8)}) have"


def _list_some(items: list[int], most: int) -> str:
    """ "1, 2 and 3", or "1, 2, 3 and 9 more" where there are more than `most`."""
    shown = [str(item) for item in items[:most]]
    if len(items) > most:
        return f"{', '.join(shown)} and {len(items) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
