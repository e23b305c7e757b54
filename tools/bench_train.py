"""Training speed of a small OLMoE on this machine, moejax and transformers in turn.

    python tools/bench_train.py                       moejax alone
    python tools/bench_train.py --peer-python PY      and transformers, run by the interpreter PY
                                                      (which needs torch and transformers)

Both train the same model from the same weights on the same batches: D 256, 4 layers, 4 heads, 16
experts of width 256, top-4, vocabulary 512, 8 sequences of 256 tokens, AdamW. The first losses
are compared (they must agree to 1e-4), so that the two really compute the same thing with the same
routing. Each side is a process of its own; they take turns, and the medians over turns are
printed with their ratio and the share of this machine's matmul peak, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from bench_train_sides import SHAPE, Moejax, Transformers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--peer-python", help="interpreter with torch and transformers")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps per turn")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=["moejax", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _serve(args)
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        workers = {"moejax": _Worker(sys.executable, "moejax", weights, args.dtype)}
        if args.peer_python:
            workers["transformers"] = _Worker(args.peer_python, "transformers", weights, args.dtype)
        figures = _measure(workers, args.turns, args.steps)
    _report(figures, args)
    return 0


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _measure(workers: dict[str, _Worker], turns: int, steps: int) -> dict:
    tokens = SHAPE["batch_size"] * SHAPE["length"]
    first = {name: worker.ask("step") for name, worker in workers.items()}
    if len({round(f["loss"], 3) for f in first.values()}) > 1:
        losses = {name: f["loss"] for name, f in first.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
            raise SystemExit(f"the two sides do not compute the same loss: {losses}")
    rates: dict[str, list[float]] = {name: [] for name in workers}
    peaks = []
    for _ in range(turns):
        for name, worker in workers.items():
            rates[name].append(tokens * steps / worker.ask(f"run {steps}")["seconds"])
        peaks.append(workers["moejax"].ask("peak")["flops"])
    about = {name: worker.ask("about") for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {"rates": rates, "peaks": peaks, "about": about, "first": first}


def _report(figures: dict, args: argparse.Namespace) -> None:
    rates = {name: statistics.median(values) for name, values in figures["rates"].items()}
    about = figures["about"]["moejax"]
    peak = statistics.median(figures["peaks"])
    share = rates["moejax"] * about["flops_per_token"] / peak
    print(f"small OLMoE, {args.dtype}, {about['params']:,} parameters, 8 x 256 tokens a step")
    for name, values in figures["rates"].items():
        print(
            f"  {name:13} {rates[name]:7,.0f} tokens/s   (median of {len(values)}, "
            f"{min(values):,.0f} to {max(values):,.0f})   {figures['about'][name]['versions']}"
        )
    print(f"  share of the f32 matmul peak of {peak / 1e9:.0f} GFLOP/s: {share:.0%}")
    if "transformers" in rates:
        pairs = zip(figures["rates"]["moejax"], figures["rates"]["transformers"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"  moejax / transformers, median of pairs: {ratio:.2f}")
        figures["ratio"] = ratio
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures | {"median": rates, "peak_share": share}, file, indent=1)


class _Worker:
    """A process that trains when asked, line by line."""

    def __init__(self, python: str, name: str, weights: str, dtype: str):
        command = [python, os.path.abspath(__file__), "--worker", name, "--weights", weights]
        self._process = subprocess.Popen(
            [*command, "--dtype", dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("ready")

    def ask(self, request: str) -> dict:
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _serve(args: argparse.Namespace) -> int:
    # Answers go to the real stdout; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = {"moejax": Moejax, "transformers": Transformers}[args.worker](args)
    for line in sys.stdin:
        request, *rest = line.split()
        answers.write(json.dumps(getattr(side, request)(*map(int, rest))) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
