"""What a run has left on disk, in a form in which two runs can be compared bit for bit."""

import hashlib
import json
import os
import pathlib
import re

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
_TIMING = ("tokens_per_second", "model_flops_per_second", "peak_share", "own_work_ms")
_LEFTOVER = re.compile(r".*(orbax-checkpoint-tmp.*|\.deleting|\.partial)|\.building-.*")


def committed(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that have their name, ascending."""
    found = (re.fullmatch(r"step_(\d+)", p.name) for p in (workdir / CHECKPOINTS).glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def starts(workdir: pathlib.Path) -> list[int]:
    """The step from which each session of the run went on, in their order."""
    return [record["step"] for record in _records(workdir) if record["kind"] == "run"]


def figures(workdir: pathlib.Path) -> dict[str, dict]:
    """{"kind step": values} of every record of a step, without what depends on the clock.

    Raises AssertionError where one is there twice.
    """
    found: dict[str, dict] = {}
    for record in _records(workdir):
        if record["kind"] in ("train", "eval"):
            key = f"{record['kind']} {record['step']}"
            assert key not in found, f"{key} is there twice"
            found[key] = {n: v for n, v in record["values"].items() if n not in _TIMING}
    return found


def leftovers(*folders: pathlib.Path) -> list[str]:
    """Files and folders that only a killed or running process has."""
    found = (path for folder in folders for path in folder.rglob("*"))
    return sorted(str(path) for path in found if _LEFTOVER.fullmatch(path.name))


def digests(workdir: pathlib.Path, step: int) -> dict[str, str]:
    """{path of a leaf: SHA-256 of its bytes} of a checkpoint, and of its manifest's content.

    In a process of its own: the arrays are read by Orbax.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, json.dumps(read_digests(workdir, step)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(write, json.dumps({"error": repr(error)[:1000]}).encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        found = json.loads(answer.read())
    assert os.waitpid(pid, 0)[1] == 0, found
    return found


def read_digests(workdir: pathlib.Path, step: int) -> dict[str, str]:
    """`digests`, in this process."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    folder = workdir / CHECKPOINTS / f"step_{step:08d}"
    content = json.loads((folder / "manifest" / "manifest.json").read_text())["content"]
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    shapes = reader.metadata(folder / "state").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    found = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    assert found.keys() == content["leaves"].keys()
    marks = {path: hashlib.sha256(x.tobytes()).hexdigest() for path, x in found.items()}
    described = json.dumps([content["leaves"], content["extra"], content["step"]], sort_keys=True)
    return marks | {"manifest": hashlib.sha256(described.encode()).hexdigest()}


def _records(workdir: pathlib.Path) -> list[dict]:
    """Every whole line; a killed process may have left half of the last one."""
    path = workdir / METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
