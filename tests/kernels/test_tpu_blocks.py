"""Blocks of the TPU kernels fit in VMEM and leave no core without work."""

import pytest

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.tpu.blocks import Blocks, Footprint, blocks_over_rows

BFLOAT16 = Footprint(rows=2, weights=2, results=2, sums=4)
GLU = Footprint(rows=2, weights=4, results=6, sums=8)
GLU_IN_FLOAT32 = Footprint(rows=4, weights=8, results=12, sums=8)

# (R, G, K, N), operands, and the blocks that the TPU compiler accepts (test_tpu_aot.py).
CHOICES = {
    "Mixtral-8x7B": ((32768, 8, 4096, 14336), GLU, Blocks(256, 4096, 512)),
    "OLMoE-1B-7B": ((131072, 64, 2048, 1024), GLU, Blocks(256, 2048, 1024)),
    "Qwen3-30B-A3B": ((131072, 128, 2048, 768), GLU, Blocks(256, 2048, 768)),
    "DeepSeek-V3": ((131072, 32, 7168, 2048), GLU, Blocks(256, 7168, 512)),
    "gpt-oss-120b": ((65536, 128, 2880, 2880), GLU, Blocks(128, 2880, 1024)),
    "Mixtral-8x7B in float32": ((32768, 8, 4096, 14336), GLU_IN_FLOAT32, Blocks(128, 4096, 512)),
    "Mixtral-8x7B, down": ((32768, 8, 14336, 4096), BFLOAT16, Blocks(128, 14336, 512)),
    "too wide for VMEM": ((65536, 8, 65536, 1024), BFLOAT16, Blocks(512, 512, 1024)),
    "a few rows": ((20, 64, 40, 72), BFLOAT16, Blocks(32, 40, 128)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_blocks(name):
    sizes, footprint, want = CHOICES[name]
    assert blocks_over_rows(*sizes, footprint) == want
    assert footprint.of(want) <= 40 * 2**20


def test_a_footprint_counts_operands_and_results_twice():
    blocks = Blocks(rows=2, inner=3, outer=5)
    assert BFLOAT16.of(blocks) == 2 * (2 * 2 * 3 + 2 * 3 * 5 + 2 * 2 * 5 + 4 * 2 * 5)


@pytest.mark.parametrize("kind, columns", [("TPU v5", 384), ("TPU v6 lite", 768)])
def test_both_cores_of_a_device_get_columns(monkeypatch, kind, columns):
    monkeypatch.setattr(compat, "target_device_kind", lambda: kind)
    assert blocks_over_rows(131072, 128, 2048, 768, GLU).outer == columns
