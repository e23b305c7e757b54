"""Views show the right entries, all entries are somebody's, and copies are exact."""

import ml_dtypes
import numpy as np
import pytest

from moejax.interop.views import AS_IS, TRANSPOSED, Every, Pairs, Run, copy_into

TURNED = [Run(transpose=True, num_parts=2, index=i) for i in range(2)]
INTERLEAVED = [Every(num_parts=2, index=i) for i in range(2)]
PAIRS = [[Pairs(transpose=t, kept=2, rotated=4)] for t in (False, True)]


def test_what_each_shows():
    tensor = np.arange(24).reshape(2, 4, 3)
    np.testing.assert_array_equal(AS_IS(tensor), tensor)
    np.testing.assert_array_equal(TRANSPOSED(tensor), tensor.transpose(0, 2, 1))
    gate, up = (view(tensor) for view in TURNED)
    np.testing.assert_array_equal(gate[1], tensor[1, :2].T)
    np.testing.assert_array_equal(up[1], tensor[1, 2:].T)
    gate, up = (view(tensor.transpose(0, 2, 1)) for view in INTERLEAVED)
    np.testing.assert_array_equal(gate, tensor.transpose(0, 2, 1)[..., [0, 2]])
    np.testing.assert_array_equal(up, tensor.transpose(0, 2, 1)[..., [1, 3]])


@pytest.mark.parametrize("views", [[AS_IS], [TRANSPOSED], TURNED, INTERLEAVED, *PAIRS])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_arrays_that_share_a_tensor_fill_it(views, shape):
    arrays = [np.random.default_rng(i).random(shape) for i in range(len(views))]
    tensor = np.full(views[0].tensor_shape(shape), np.nan)
    for view, array in zip(views, arrays, strict=True):
        copy_into(view(tensor), array)
    assert not np.isnan(tensor).any()
    for view, array in zip(views, arrays, strict=True):
        np.testing.assert_array_equal(view(tensor), array)


def test_pairs_become_halves_of_every_head():
    """Two heads of one entry that is kept and two pairs."""
    stored = np.array([0, 10, 20, 11, 21, 1, 12, 22, 13, 23])
    view = Pairs(kept=1, rotated=4)(np.stack([stored, -stored]))
    ours = np.array([0, 10, 11, 20, 21, 1, 12, 13, 22, 23])
    np.testing.assert_array_equal(view, [ours, -ours])
    np.testing.assert_array_equal(view[slice(1, 2), slice(3, 7)], [-ours[3:7]])
    turned = Pairs(transpose=True, kept=1, rotated=4)(np.stack([stored, -stored]).T)
    np.testing.assert_array_equal(turned, [ours, -ours])
    np.testing.assert_array_equal(Pairs(kept=1, rotated=4)(stored), ours)


def test_pairs_are_read_and_written_bit_for_bit():
    bits = np.random.default_rng(0).integers(0, 2**16, (24, 5), np.uint16)
    stored = bits.view(ml_dtypes.bfloat16)
    ours, again = np.empty((5, 24), stored.dtype), np.empty_like(stored)
    view = Pairs(transpose=True, kept=2, rotated=4)
    copy_into(ours, view(stored))
    copy_into(view(again), ours)
    np.testing.assert_array_equal(again.view(np.uint16), bits)
    assert (ours.T.view(np.uint16) != bits).any()


@pytest.mark.parametrize("shape", [(300, 7), (2, 130, 257), (1101, 300), (3, 2), (300, 1), (3,)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_copies_keep_every_bit(shape, dtype):
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    most = np.iinfo(bits).max  # every pattern of bits, those of NaN too
    source = np.random.default_rng(0).integers(0, most, shape, bits).view(dtype)
    axes = (*range(len(shape) - 2), *([-1, -2] if len(shape) > 1 else [0]))
    stored = np.empty(source.transpose(axes).shape, dtype)
    copy_into(stored.transpose(axes), source)
    np.testing.assert_array_equal(stored.view(bits), source.transpose(axes).view(bits))
    again = np.empty(shape, dtype)
    copy_into(again, stored.transpose(axes))
    np.testing.assert_array_equal(again.view(bits), source.view(bits))


def test_copies_convert_where_dtypes_differ():
    source = np.random.default_rng(0).random((200, 150), np.float32)
    target = np.empty((150, 200))
    copy_into(target.T, source)
    np.testing.assert_array_equal(target.T, source)
