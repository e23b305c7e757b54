"""Views show the right entries, all entries are somebody's, and copies are exact."""

import ml_dtypes
import numpy as np
import pytest

from moejax.interop.views import AS_IS, TRANSPOSED, Every, Run, copy_into

TURNED = [Run(transpose=True, num_parts=2, index=i) for i in range(2)]
INTERLEAVED = [Every(num_parts=2, index=i) for i in range(2)]


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


@pytest.mark.parametrize("views", [[AS_IS], [TRANSPOSED], TURNED, INTERLEAVED])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_arrays_that_share_a_tensor_fill_it(views, shape):
    arrays = [np.random.default_rng(i).random(shape) for i in range(len(views))]
    tensor = np.full(views[0].tensor_shape(shape), np.nan)
    for view, array in zip(views, arrays, strict=True):
        view(tensor)[...] = array
    assert not np.isnan(tensor).any()
    for view, array in zip(views, arrays, strict=True):
        np.testing.assert_array_equal(view(tensor), array)


@pytest.mark.parametrize("shape", [(300, 7), (2, 130, 257), (3,)])
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
