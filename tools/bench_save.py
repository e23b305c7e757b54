"""How long a save holds up training: `python tools/bench_save.py [path=value ...]`.

Trains configs/tiny.py with and without checkpoints, by turns in one process each, and prints for
every save the time that the loop spent in it, part by part. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

PARTS = {
    "all": "moejax.train.checkpoint:Checkpointer.save",
    "the save before": "moejax.train.checkpoint:Checkpointer.wait",
    "starting fingerprints": "moejax.train.checkpoint:start_manifest",
    "clearing up": "moejax.train.checkpoint:Checkpointer._prepare",
    "handing over": "moejax.train.array_store:ArrayStore.write",
}


def main() -> int:
    """Prints what every save took, and the time of the run with and without saves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _train(args, every=int(args.child[0]), out=pathlib.Path(args.child[1]))
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        for _ in range(args.rounds):
            for every in (args.every, 0):
                words = [sys.executable, __file__, *sys.argv[1:], "--child", str(every), str(out)]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                _show(every, json.loads(out.read_text()))
    return 0


def _show(every: int, found: dict) -> None:
    total = found["seconds"]
    print(f"checkpoint_every={every}: {total:.1f} s from the second step to the last", flush=True)
    if every:
        saves = found["spent"]["all"]
        share = sum(saves) / total
        each = ", ".join(f"{1e3 * s:.0f}" for s in saves)
        print(f"  each save held the loop for {each} ms: {100 * share:.2f}% of that time")
        for part, spent in found["spent"].items():
            print(f"  {part:22} median {1e3 * statistics.median(spent):6.1f} ms")
        busy = 1e3 * statistics.median(found["busy"])
        print(f"  of all, the loop's own thread computed for {busy:.1f} ms")


def _train(args: argparse.Namespace, *, every: int, out: pathlib.Path) -> int:
    spent: dict[str, list[float]] = {part: [] for part in PARTS}
    busy: list[float] = []
    saving = [False]  # the parts count only within a save
    for part, target in PARTS.items():
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        whole = busy if part == "all" else None
        setattr(owner, name, _timed(getattr(owner, name), spent[part], saving, whole))
    from moejax.commands import main as command
    from moejax.train import writers

    times: list[float] = []
    write = writers.JsonLines.write

    def note(self, record):
        if record["kind"] == "train":
            times.append(time.monotonic())
        write(self, record)

    writers.JsonLines.write = note
    folder = tempfile.mkdtemp()
    try:
        words = ["train", "configs/tiny.py", f"workdir={folder}/run", f"checkpoint_every={every}"]
        words += ["log_every=1", "prompts=()", *args.overrides]
        status = command([*words, "--until", str(args.steps)])
    finally:
        shutil.rmtree(folder)
    seconds = times[-1] - times[0]
    out.write_text(json.dumps({"seconds": seconds, "spent": spent, "busy": busy}))
    return status


def _timed(function, into: list[float], saving: list[bool], busy: list[float] | None):
    """The function, with its seconds appended to `into`, and its thread's own to `busy`."""

    @functools.wraps(function)
    def run(*arguments, **named):
        if busy is not None:
            saving[0] = True
        start, own = time.perf_counter(), time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            if saving[0]:
                into.append(time.perf_counter() - start)
            if busy is not None:
                busy.append(time.thread_time() - own)
                saving[0] = False

    return run


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    sys.exit(main())
