"""Time of importing a random OLMoE of full width, against a copy of the same bytes.

    python tools/bench_import.py --layers 4 --json a.json
    python tools/bench_import.py --layers 16 --rounds 2

The two alternate, on the disk of --folder, and each ends when its bytes are on the disk. Before
each, the source is dropped from the page cache; with --cached it is read once instead. Then comes a
pause: a virtual machine may give freed memory back to its host, from where it returns several times
as slowly, and whoever starts at once finds some that was not given back yet. The import is the
command in a process of its own, start-up included. Sixteen layers are 13.8 GB and need three times
that of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import fiddle as fdl
import jax
import ml_dtypes
import numpy as np

from moejax.interop import hf
from moejax.train.manifest import versions
from moejax.types import named_leaves, tree_of

CONFIG = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "torch_dtype": "bfloat16",
}
PAUSE = 15.0  # seconds before each, so that both find memory in the same state
COMMAND = "import sys; from moejax.commands import main; sys.exit(main(sys.argv[1:]))"
BLOCK = np.random.default_rng(0).integers(0, 2**16, 2**22, np.uint16).view(ml_dtypes.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="on the disk to measure")
    parser.add_argument("--cached", action="store_true", help="the source is in the page cache")
    parser.add_argument("--make", type=pathlib.Path, help="only write the model, to this folder")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.layers)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = _measure(pathlib.Path(folder), args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def make(folder: pathlib.Path, num_layers: int) -> None:
    """Writes the random model, as little of it in memory as `hf.save` needs."""
    with tempfile.TemporaryDirectory() as config:
        values = json.dumps(CONFIG | {"num_hidden_layers": num_layers})
        (pathlib.Path(config) / "config.json").write_text(values)
        model = fdl.build(hf.model_config(config))
    shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    leaves = {path: _Leaf(path, leaf.shape) for path, leaf in shapes.items()}
    hf.save(model, tree_of(leaves), folder)


class _Leaf:
    """An array that is made slice by slice, where it is asked for."""

    dtype = BLOCK.dtype

    def __init__(self, path: str, shape: tuple[int, ...]):
        self.path, self.shape = path, shape

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        shift = sum(map(ord, self.path)) + sum(i * 1009 for i in index)
        return np.resize(np.roll(BLOCK, shift), self.shape[len(index) :])


def _measure(folder: pathlib.Path, args: argparse.Namespace) -> dict:
    source, out = folder / "source", folder / "out"
    make(source, args.layers)
    num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    ways: dict[str, Callable[[], None]] = {
        "copy": lambda: _copy(source, out),
        "import": lambda: _import(source, out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            _prepare(source, cached=args.cached)
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(out)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"{num_bytes / 1e9:.2f} GB, {'cached' if args.cached else 'on disk'}")
    for name, taken in seconds.items():
        print(f"  {name:8}", *(f"{each:6.1f}" for each in taken), "s")
    print("  ratio   ", *(f"{ratio:6.2f}" for ratio in ratios))
    given = {"layers": args.layers, "cached": args.cached, "bytes": num_bytes}
    return {"versions": versions(), "arguments": given, "seconds": seconds, "ratios": ratios}


def _prepare(source: pathlib.Path, *, cached: bool) -> None:
    os.sync()
    for path in source.iterdir():
        if cached:
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
        else:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(PAUSE)


def _copy(source: pathlib.Path, out: pathlib.Path) -> None:
    shutil.copytree(source, out)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _import(source: pathlib.Path, out: pathlib.Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMMAND, "import-hf", str(source), str(out)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
