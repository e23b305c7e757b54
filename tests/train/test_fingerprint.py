"""Fingerprints: exact under any layout, and no change goes unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.train.fingerprint import fingerprint_words, fingerprints

_MASK = 2**32 - 1
DTYPES = [
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint8", "int8", "uint16"),
    *("bool", "complex64"),
]


def one(x) -> str:
    return fingerprints({"x": x})["x"]


def values(dtype, shape=(16, 24), seed=0):
    raw = np.random.default_rng(seed).integers(-100, 100, shape)
    return jnp.asarray(raw % 2 == 0 if dtype == "bool" else raw, dtype)


def reference(words: np.ndarray) -> str:
    """The definition with Python integers, one element after the other."""

    def scramble(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B & _MASK
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & _MASK
        return h ^ (h >> 16)

    halves = [(0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F)]
    out = ""
    for spread, stir in halves:
        total = 0
        for position, word in enumerate(words.ravel().tolist()):
            key = scramble((position * spread + stir) & _MASK)
            total += scramble((word ^ key) * stir & _MASK)
        out += f"{total & _MASK:08x}"
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, np.float16])
def test_definition(dtype):
    x = np.random.default_rng(1).integers(0, 100, (3, 4, 5)).astype(dtype)
    bits = x.view({4: np.uint32, 2: np.uint16, 1: np.uint8}[x.itemsize])
    assert one(jnp.asarray(x)) == reference(bits.astype(np.uint32))


def test_definition_of_64_bits():
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((3, 4))
        assert one(jnp.asarray(x)) == reference(x.view(np.uint32))
        assert one(jnp.int64(2**40)) != one(jnp.int64(2**41))


@pytest.mark.parametrize(
    "dtype, spec",
    [(dtype, ("b", "a")) for dtype in DTYPES]
    + [("float32", spec) for spec in [("a",), (None, "b"), ("a", "b"), (("a", "b"),), ()]],
)
def test_layout_makes_no_difference(dtype, spec):
    x = values(dtype)
    single = one(jax.device_put(x, jax.devices()[0]))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    assert one(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) == single


def test_leaves_on_different_devices_in_one_tree():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = values("float32")
    tree = {
        "one": jax.device_put(x, jax.devices()[3]),
        "all": jax.device_put(x, NamedSharding(mesh, PartitionSpec("a"))),
        "host": np.asarray(x),
    }
    found = fingerprints(tree)
    assert list(found) == ["all", "host", "one"]
    assert len(set(found.values())) == 1


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 383), bit=st.integers(0, 31), seed=st.integers(0, 5))
def test_any_flipped_bit_changes_both_halves(position, bit, seed):
    word = np.array(values("float32", seed=seed)).view(np.uint32)
    before = one(jnp.asarray(word))
    word.ravel()[position] ^= np.uint32(1 << bit)
    after = one(jnp.asarray(word))
    assert before[:8] != after[:8]
    assert before[8:] != after[8:]


@pytest.mark.parametrize("dtype, bits", [("bfloat16", 16), ("float16", 16), ("uint8", 8)])
def test_every_bit_of_a_small_array_counts(dtype, bits):
    x = np.array(values(dtype, (4,)))
    seen = {one(jnp.asarray(x))}
    for position in range(4):
        for bit in range(bits):
            y = x.copy()
            y.view(f"uint{bits}")[position] ^= 1 << bit
            seen.add(one(jnp.asarray(y)))
    assert len(seen) == 1 + 4 * bits


def test_paired_changes_do_not_cancel():
    """What a plain weighted sum of bit patterns misses: an even number of flipped signs."""
    x = values("float32", (64,)) + 0.5
    assert one(x) != one(x.at[jnp.array([3, 10])].multiply(-1.0))
    assert one(x) != one(-x)
    assert one(x) != one(x[::-1])
    assert one(x) != one(jnp.roll(x, 1))
    assert one(jnp.zeros(4)) != one(-jnp.zeros(4))  # the sign of zero is a bit like any other


def test_keys_and_scalars_and_empty():
    assert one(jax.random.key(0)) != one(jax.random.key(1))
    assert one(jax.random.key(0)) == one(jax.random.key_data(jax.random.key(0)))
    assert one(jnp.float32(0.0)) != one(jnp.float32(1.0))
    assert one(jnp.zeros((0, 3))) == "0" * 16


def test_under_jit_and_on_sub_byte_integers():
    x = values("int32")
    words = jax.jit(fingerprint_words)(x)
    assert "".join(f"{int(w):08x}" for w in words) == one(x)
    assert one(jnp.asarray([1, 2], jnp.int4)) != one(jnp.asarray([1, 3], jnp.int4))


def test_two_leaves_with_one_path_are_an_error():
    with pytest.raises(ValueError, match="path 'a/b'"):
        fingerprints({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
