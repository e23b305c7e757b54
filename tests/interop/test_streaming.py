"""A model larger than the memory that importing and exporting it may take."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

LARGEST = 50304 * 2048 * 2  # bytes of the embedding, the largest tensor
LIMIT = int(2e9 + 1.3 * LARGEST)

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

# OLMoE at its published width; every slice of a leaf is made when it is asked for.
WRITE = """
import sys, fiddle as fdl, jax, ml_dtypes, numpy as np
from moejax.interop import hf
from moejax.types import named_leaves, tree_of

BLOCK = np.random.default_rng(0).integers(0, 2**16, 2**22, np.uint16).view(ml_dtypes.bfloat16)

class Leaf:
    def __init__(self, path, shape):
        self.path, self.shape, self.dtype = path, shape, BLOCK.dtype
    def __getitem__(self, index):
        shape = self.shape[len(index):]
        shift = sum(map(ord, self.path)) + sum(i * 1009 for i in index)
        return np.resize(np.roll(BLOCK, shift), shape)

source, target = sys.argv[1:]
model = fdl.build(hf.model_config(source))
shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
hf.save(model, tree_of({path: Leaf(path, x.shape) for path, x in shapes.items()}), target)
"""
COMMAND = "import sys; from moejax.commands import main; sys.exit(main(sys.argv[1:]))"
LOAD = "import sys; from moejax.interop import hf; hf.load(sys.argv[1])"


def limited(code, *words):
    """Runs Python code in a process whose heap and anonymous memory are at most LIMIT bytes."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("num_layers", [4, 16])  # 3.8 GB; all of OLMoE, 13.8 GB
def test_importing_and_exporting_take_less_memory_than_the_model(tmp_path, num_layers):
    if shutil.disk_usage(tmp_path).free < num_layers * 3e9:
        pytest.skip(f"needs {num_layers * 3} GB on the disk of {tmp_path}")
    config, source = tmp_path / "config", tmp_path / "source"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    made = limited(WRITE, config, source)
    assert made.returncode == 0, made.stderr
    weights = sorted(source.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) > 1.5 * LIMIT
    assert limited(LOAD, source).returncode != 0  # the limit is one
    imported = limited(COMMAND, "import-hf", source, tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    exported = limited(COMMAND, "export-hf", tmp_path / "imported", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    for path in weights:
        same = ["cmp", path, tmp_path / "exported" / path.name]
        assert subprocess.run(same, check=False).returncode == 0
