"""Plants a mutation in a copy of the package and runs the unmodified `moejax verify` on it.

By hand: `python tests/verification/planting.py [NAME ...]` from the repository's root prints a row
of the table in docs/verify.md for each mutation, or for those named.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = pathlib.Path(__file__).parent / "configs"
NUM_DEVICES = 4
# Of the two comparisons, in float64 and as configured, only the first, which is the strict one.
QUICK = (
    "model.dtype=float64",
    "model.param_dtype=float64",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """A known bug of MoE trainers, as a patch to one file of the package.

    Attributes:
      name: short, for the command line and the test's id.
      story: the bug in one line.
      file: relative to the package.
      old: text that is in the file exactly once.
      new: what replaces it.
      variant: the one that is compared.
      caught: the first wrong tensor of it.
      config: CONFIG of the command line.
      overrides: path=value, of the command line.
    """

    name: str
    story: str
    file: str
    old: str
    new: str
    variant: str
    caught: str
    config: str = "configs/tiny.py:smoke"
    overrides: tuple[str, ...] = QUICK

    def command(self) -> list[str]:
        """What verifies the package in the variant that it shows in."""
        return verify_command(self.config, self.overrides, [self.variant])


def verify_command(config: str, overrides: tuple[str, ...], only: list[str]) -> list[str]:
    """`moejax verify` of the variants `only` on `NUM_DEVICES` simulated devices."""
    chosen = [part for text in only for part in ("--only", text)]
    devices = ["--devices", str(NUM_DEVICES)]
    return [sys.executable, "-m", "moejax", "verify", config, *overrides, *devices, *chosen]


def copy_package(folder: pathlib.Path) -> None:
    """The package and the configs, alone in `folder`."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("moejax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(CONFIGS, folder / "configs", ignore=ignored, dirs_exist_ok=True)


def plant(mutation: Mutation, folder: pathlib.Path) -> None:
    """Changes the copy in `folder`. Raises ValueError unless the text is there exactly once."""
    path = folder / "moejax" / mutation.file
    text = path.read_text()
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"{mutation.name}: its text is in {mutation.file} {count} times, not once: "
            "write the mutation anew for the code as it is now"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def run(command: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs it with the package in `folder`; programs compiled earlier are used again."""
    cache = os.environ.get("MOEJAX_CACHE") or str(ROOT / ".cache" / "verify")
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "JAX_PLATFORMS": "cpu",
        "MOEJAX_CACHE": cache,
        "MOEJAX_KERNELS": os.devnull + "/none",  # not what this machine's user has accepted
    }
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def first_wrong(output: str) -> str:
    """'variant in dtype: first wrong tensor: name (error), of n wrong ones', or ''."""
    found = re.search(r"^FAILED: (.*)$", output, re.MULTILINE)
    return found[1] if found else ""


def main(names: list[str]) -> None:
    from tests.verification.mutations import MUTATIONS

    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            copy_package(folder)
            plant(mutation, folder)
            start = time.monotonic()
            done = run(mutation.command(), folder)
        what = first_wrong(done.stdout) or f"NOT CAUGHT, status {done.returncode}"
        print(f"| {mutation.name} | {mutation.story} | {what} |", flush=True)
        print(f"{mutation.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        if not first_wrong(done.stdout):
            print(done.stdout[-1500:], done.stderr[-1500:], file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
