"""Eight MXFP4 experts of gpt-oss's width, imported in less memory than the model takes."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from moejax.interop.mxfp4 import Mxfp4Files
from moejax.interop.tensor_files import TensorFiles
from tests.interop.test_streaming import COMMAND, LOAD

pytestmark = pytest.mark.long

NUM_LAYERS, NUM_EXPERTS, WIDTH, VOCABULARY = 8, 8, 2880, 2048
LARGEST = 2 * NUM_EXPERTS * WIDTH * 2 * WIDTH  # bytes of one layer's gate_up_proj in bfloat16
LIMIT = int(2e9 + 1.3 * LARGEST)

CONFIG = {
    "model_type": "gpt_oss",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": NUM_EXPERTS,
    "num_experts_per_tok": 4,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}


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


def write(directory):
    """A directory like the published one, but for fewer experts; a shard per layer."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    rng, weight_map = np.random.default_rng(0), {}
    draw = lambda *shape: (rng.standard_normal(shape, np.float32) / 64).astype("bfloat16")
    for layer in range(NUM_LAYERS + 1):
        shard = {}
        if layer == NUM_LAYERS:
            shard["model.embed_tokens.weight"] = draw(VOCABULARY, WIDTH)
            shard["lm_head.weight"] = draw(VOCABULARY, WIDTH)
            shard["model.norm.weight"] = draw(WIDTH)
        else:
            shard |= {f"model.layers.{layer}.{k}": v for k, v in _layer(rng, draw)}
        name = f"model-{layer}.safetensors"
        safetensors.numpy.save_file(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _layer(rng, draw):
    for name, width in (("q", 4096), ("k", 512), ("v", 512)):
        yield f"self_attn.{name}_proj.weight", draw(width, WIDTH)
        yield f"self_attn.{name}_proj.bias", draw(width)
    yield "self_attn.o_proj.weight", draw(WIDTH, 4096)
    yield "self_attn.o_proj.bias", draw(WIDTH)
    yield "self_attn.sinks", draw(64)
    yield "input_layernorm.weight", draw(WIDTH)
    yield "post_attention_layernorm.weight", draw(WIDTH)
    yield "mlp.router.weight", draw(NUM_EXPERTS, WIDTH)
    yield "mlp.router.bias", draw(NUM_EXPERTS)
    for name, width in (("gate_up_proj", 2 * WIDTH), ("down_proj", WIDTH)):
        shape = (NUM_EXPERTS, width, WIDTH // 32)
        yield f"mlp.experts.{name}_bias", draw(NUM_EXPERTS, width)
        yield f"mlp.experts.{name}_scales", rng.integers(115, 125, shape, np.uint8)
        yield f"mlp.experts.{name}_blocks", rng.integers(0, 256, (*shape, 16), np.uint8)


def test_importing_and_exporting_take_less_memory_than_the_model(tmp_path):
    source, exported = tmp_path / "source", tmp_path / "exported"
    write(source)
    assert limited(LOAD, source).returncode != 0  # the limit is one
    for words in (
        ("import-hf", source, tmp_path / "imported"),
        ("export-hf", tmp_path / "imported", exported),
    ):
        done = limited(COMMAND, *words)
        assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    packed, written = Mxfp4Files(source), TensorFiles(exported)
    assert written.names == packed.names
    sizes = [2 * np.prod(written.shape(name)) for name in written.names]
    assert sum(sizes) > 1.5 * LIMIT
    for name in sorted(written.names):
        if name.endswith("_proj"):
            shape = written.shape(name)
            one = (slice(5, 6), slice(None), slice(None))
            found = written.read(name, shape)[one]
            expected = np.asarray(packed.read(name, shape)[one])
            np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
