"""A model larger than the memory that importing and exporting it may take."""

import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

LARGEST = 50304 * 2048 * 2  # bytes of the embedding, the largest tensor
LIMIT = int(2e9 + 1.3 * LARGEST)

MAKE = pathlib.Path(__file__).parents[2] / "tools" / "bench_import.py"
COMMAND = "import sys; from moejax.commands import main; sys.exit(main(sys.argv[1:]))"
LOAD = "import sys; from moejax.interop import hf; hf.load(sys.argv[1])"


def limited(*words):
    """Runs Python in a process whose heap and anonymous memory are at most LIMIT bytes."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    return subprocess.run(
        [sys.executable, *map(str, words)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("num_layers", [4, 16])  # 3.8 GB; all of OLMoE, 13.8 GB
def test_importing_and_exporting_take_less_memory_than_the_model(tmp_path, num_layers):
    if shutil.disk_usage(tmp_path).free < num_layers * 3e9:
        pytest.skip(f"needs {num_layers * 3} GB on the disk of {tmp_path}")
    source = tmp_path / "source"
    made = limited(MAKE, "--make", source, "--layers", num_layers)
    assert made.returncode == 0, made.stderr
    weights = sorted(source.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) > 1.5 * LIMIT
    assert limited("-c", LOAD, source).returncode != 0  # the limit is one
    imported = limited("-c", COMMAND, "import-hf", source, tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    exported = limited("-c", COMMAND, "export-hf", tmp_path / "imported", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    for path in weights:
        same = ["cmp", path, tmp_path / "exported" / path.name]
        assert subprocess.run(same, check=False).returncode == 0
