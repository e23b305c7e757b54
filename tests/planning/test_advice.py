"""What is said of a step that does not fit names a setting, and the figure that it follows from."""

from moejax.planning.advice import advice
from moejax.planning.memory import Memory
from tests.planning import planned

SIZES = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}


def memory(state, needed, capacity=100):
    return Memory(
        held={"parameters": int(state * 1e9), "batch": 7},
        padding=None,
        temporaries=None,
        results=None,
        code=None,
        needed=int(needed * 1e9),
        capacity=int(capacity * 1e9),
    )


def said(found, *overrides, num_slices=1, **sizes):
    experiment = planned.experiment(planned.SMOKE[0], "batch_size=32", *overrides)
    return " ".join(advice(experiment, found, SIZES | sizes, num_slices=num_slices))


def test_nothing_where_it_fits():
    assert not said(memory(60, 99))


def test_says_by_how_much_and_what_the_state_takes():
    assert "too much by 20.0 GB: the state takes 10.0 GB of 100.0 GB" in said(memory(10, 120))


def test_a_large_state_is_split():
    assert "mesh.fsdp=16 and mesh.data=1 a device holds about 15.0 GB" in said(
        memory(60, 120), data=4
    )
    assert "twice as many devices with mesh.fsdp=8 holds about 30.0 GB" in said(memory(60, 120))


def test_a_state_is_split_within_a_slice():
    text = said(memory(60, 120), data=4, num_slices=2)
    assert "mesh.fsdp=8 and mesh.data=2 a device holds about 30.0 GB" in text
    text = said(memory(60, 120), data=4, num_slices=4)
    assert "slices of twice as many chips with mesh.fsdp=8 hold about 30.0 GB" in text
    assert "mesh.data" not in text


def test_large_activations_are_computed_again_or_in_parts():
    text = said(memory(10, 120))
    assert 'model.remat="full" ' in text
    assert "num_microbatches=2 (it is 1) leaves 50%" in text
    assert "dtype" not in text  # it is bfloat16
    assert "remat" not in said(memory(10, 120), 'model.remat="full"')
    assert 'model.dtype="bfloat16"' in said(memory(10, 120), 'model.dtype="float32"')


def test_microbatches_that_divide():
    assert "num_microbatches=4 (it is 2)" in said(memory(10, 120), "num_microbatches=2")


def test_one_sequence_at_a_time_is_split_itself():
    text = said(memory(10, 120), "num_microbatches=4")
    assert "mesh.context=2" in text
    assert "sequence_length=64" in text
    assert "num_microbatches" not in text
