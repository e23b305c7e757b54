import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import ByteTokenizer, Data, DataError, Mixture, TextFiles
from moejax.data.mixture import PERIOD, Turns


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_shares_are_proportional_everywhere_and_turns_count_up(weights):
    turns = Turns(tuple(weights))
    n = np.arange(2 * PERIOD + 100)
    source, turn = turns(n)
    share = np.array(weights) / sum(weights)
    for k in range(len(weights)):
        mine = source == k
        np.testing.assert_array_equal(turn[mine], np.arange(mine.sum()))
        ahead = np.cumsum(mine) - share[k] * (n + 1)
        assert np.abs(ahead).max() < len(weights) + 2  # at every prefix, not only on average


def test_random_access_far_out():
    turns = Turns((0.7, 0.2, 0.1))
    far = 10**12 + np.arange(1000)
    source, turn = turns(far)
    np.testing.assert_array_equal(turns(far[500:])[1], turn[500:])
    assert abs(turn[source == 0][0] / far[0] - 0.7) < 1e-4


def test_golden():
    """Checkpoints count on this order: it must never change."""
    source, turn = Turns((3.0, 2.0, 1.0))(np.arange(12) + 10 * PERIOD)
    assert source.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0]
    assert (turn - turn[[np.argmax(source == k) for k in source]]).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        3,
        2,
        1,
        4,
        3,
        5,
    ]


def test_bad_weights_are_errors(unchecked):
    source = object()
    with pytest.raises(DataError, match="one weight per source"):
        Mixture(sources=(source,), weights=(1.0, 2.0)).check()
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="not a positive number"):
            Mixture(sources=(source, source), weights=(1.0, bad)).check()
    with pytest.raises(DataError, match="less than one row"):
        Turns((1.0, 1e-7))


def folder_of(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"{name} says something\n" * 30)
    return str(path)


def prepared(tmp_path, *sources):
    mixture = Mixture(sources=sources, weights=(1.0,) * len(sources))
    data = Data(train=mixture, tokenizer=ByteTokenizer(), cache_dir=str(tmp_path / "cache"))
    return data.prepare(seq_len=32, batch_size=2, seed=0)


def test_no_file_is_held_out_by_one_source_and_trained_on_by_another(tmp_path):
    outer = folder_of(tmp_path / "d", "a.py", "b.py", "in/a.py", "in/b.py", "in/c.md", "in/d.md")
    whole, inner = TextFiles(path=outer), TextFiles(path=f"{outer}/in")
    with pytest.raises(DataError, match=r"in/a.py' belongs to sources 0 and 1 of the mixture"):
        prepared(tmp_path, whole, inner)
    with pytest.raises(DataError, match="belongs to sources 0 and 1"):
        prepared(tmp_path, whole, TextFiles(path=outer, pattern="*.py", holdout_every=3))
    with pytest.raises(DataError, match="source 1 of the mixture is source 0 again"):
        prepared(tmp_path, inner, TextFiles(path=f"{outer}/in"))
    assert prepared(tmp_path, whole, TextFiles(path=f"{outer}/in", pattern="*.md"))
    assert prepared(tmp_path, whole, TextFiles(path=outer, pattern="in/*.py")), "held out alike"
