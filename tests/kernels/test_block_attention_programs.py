"""What block attention becomes: no array over all pairs, and which implementation was taken."""

import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels import accepted, dispatch
from moejax.kernels.block_attention import implementations, moba_attention

N, HEADS, BLOCK = 8192, 4, 32
TARGETS = (N - 1) // BLOCK
SMALL = {"width": 8, "block_size": BLOCK, "top_k": 4}


def program(implementation, *, platforms=("cpu",), length=N, width=8, segmented=False, **options):
    """The lowered value and gradients, one text for each platform."""
    attend = functools.partial(moba_attention, implementation=implementation, **options)

    def run(q, k, v, ids, d_out):
        ids = ids if segmented else None
        out, vjp = jax.vjp(lambda *a: attend(*a, segment_ids=ids), q, k, v)
        return out, vjp(d_out)

    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct((1, length, *s), dtype)
    q, kv, ids = shape(HEADS, width), shape(2, width), shape(dtype=jnp.int32)
    traced = jax.jit(run).trace(q, kv, kv, ids, q)
    return [traced.lower(lowering_platforms=(p,)).as_text() for p in platforms]


def largest(text: str) -> int:
    """Elements of the largest array."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return max(math.prod(map(int, shape.rstrip("x").split("x"))) for shape in set(shapes))


def summing_scatters(text: str) -> list[str]:
    """Scatters that do anything but put a value in its place."""
    bodies = re.findall(r'"stablehlo.scatter".*?\^bb0[^\n]*\n\s*([^\n]*)', text, flags=re.DOTALL)
    assert len(bodies) == text.count('"stablehlo.scatter"')
    return [body for body in bodies if "stablehlo.return" not in body]


def test_a_summing_scatter_would_be_found():
    add = jax.jit(lambda x, i, y: x.at[i].add(y))
    put = jax.jit(lambda x, i, y: x.at[i].set(y))
    x, i = jnp.zeros(5), jnp.zeros(3, int)
    assert len(summing_scatters(add.lower(x, i, x[:3]).as_text())) == 1
    assert not summing_scatters(put.lower(x, i, x[:3]).as_text())


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("implementation", ["scan", "packed"])
def test_no_array_over_all_pairs_on_any_platform(implementation, segmented):
    """Neither of queries and keys, nor of the scores of all heads' queries and blocks."""
    for text in program(
        implementation, platforms=("cpu", "tpu", "cuda"), segmented=segmented, **SMALL
    ):
        assert largest(text) < HEADS * N * TARGETS < N * N
        assert not summing_scatters(text)


def test_the_definition_has_such_an_array():
    (text,) = program("reference", length=512, **SMALL)
    assert largest(text) >= 512 * 512


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "packed"])
def test_temporaries_grow_as_the_keys(implementation):
    """Compiled: four times the keys take at most about four times the memory."""

    def temporaries(length):
        attend = functools.partial(
            moba_attention, implementation=implementation, block_size=128, top_k=4
        )
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        run = lambda *a: jax.vjp(attend, *a)[1](a[0])
        return jax.jit(run).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    # Far beyond the scores of a chunk, which do not grow.
    assert temporaries(2**17) < 4.4 * temporaries(2**15)


@pytest.mark.parametrize(
    "length, top_k, want, words",
    [
        (256, 2, "scan", "of 256 keys, all in 2 blocks of 128"),
        (implementations.CROSSOVER * 256 - 1, 2, "scan", "few for 2 blocks of 128"),
        (implementations.CROSSOVER * 256, 2, "packed", "packed"),
        (4096, 2, "packed", "packed"),
    ],
)
def test_what_none_takes_and_that_it_says_so(caplog, monkeypatch, length, top_k, want, words):
    monkeypatch.setitem(accepted.SHIPPED, "block_attention", {"cpu": "packed"})
    dispatch._announce.cache_clear()
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    sizes = {"block_size": 128, "top_k": top_k}
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            jax.eval_shape(functools.partial(moba_attention, **sizes), q, q, q)
    (record,) = caplog.records  # once
    assert record.levelno == logging.INFO
    assert all(text in record.message for text in ("moba_attention", f"'{want}'", words))
    chosen = implementations.choose(None, "float32", num_keys=length, **sizes)
    assert set(chosen) == {want}


def test_where_nothing_was_accepted_it_takes_packed_and_says_why(caplog, monkeypatch):
    monkeypatch.setattr(accepted, "SHIPPED", {})
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        implementations.choose(None, "float32", num_keys=65536, block_size=128, top_k=8)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "65536 keys are many for 1024 that are seen" in record.message
