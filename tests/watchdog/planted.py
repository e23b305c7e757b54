"""`moejax` with a hang planted in one of its phases, in the process that PLANT_PROCESS names.

A Slurm job that was requeued does not hang again.

python tests/watchdog/planted.py PHASE train configs/tiny.py:smoke workdir=...
"""

import atexit
import ctypes
import os
import sys


def stuck_in_c(*unused, **unused_too):
    """With the interpreter's lock held, so that no handler runs."""
    while True:
        ctypes.PyDLL(None).sleep(1000)


def plant(phase):
    """Replaces a function that the phase calls by one that hangs."""
    from moejax.data.pipeline import Data
    from moejax.train import layout
    from moejax.train.array_store import ArrayStore
    from moejax.train.assemble import Assembled
    from moejax.train.metrics import Accumulator
    from moejax.train.run_step import RunStep

    lay_out, batches = layout.global_batch, []

    def third_batch(*args):
        batches.append(args)
        return stuck_in_c() if len(batches) == 3 else lay_out(*args)

    owner, name, replacement = {
        "prepare": (Data, "prepare", stuck_in_c),
        "restore": (Assembled, "initial_state", stuck_in_c),
        "compile": (RunStep, "_compile", stuck_in_c),
        "data": (layout, "global_batch", third_batch),
        "step": (Accumulator, "add", stuck_in_c),
        "save": (ArrayStore, "write", stuck_in_c),
    }[phase]
    setattr(owner, name, replacement)


if __name__ == "__main__":
    process = os.environ.get("MOEJAX_PROCESS_ID") or os.environ.get("SLURM_PROCID", "0")
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    here = first and process == os.environ.get("PLANT_PROCESS", "0")
    if here and "MOEJAX_WATCHDOG_PIPE" in os.environ:  # the child, not the watchdog itself
        if sys.argv[1] == "start":
            stuck_in_c()
        elif sys.argv[1] == "exit":
            atexit.register(stuck_in_c)
        else:
            plant(sys.argv[1])

    from moejax.commands import main

    sys.exit(main(sys.argv[2:]))
