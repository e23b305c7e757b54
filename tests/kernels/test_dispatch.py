"""What `implementation=None` takes, and that it says so."""

import logging

import jax
import pytest

from moejax.errors import UserError
from moejax.kernels import accepted, compat, dispatch
from moejax.kernels.grouped_matmul import implementations

AVAILABLE = ("plain", "fast", "faster")
PRODUCTS = ("forward", "grad_rhs")


def choose(named=None, *, obstacle=lambda name: None, dtype="bfloat16", **options):
    return dispatch.choose(
        *("kernel", named, AVAILABLE),
        products=PRODUCTS,
        dtype=dtype,
        obstacle=obstacle,
        portable=dispatch.Portable("plain", "it is right everywhere"),
        **options,
    )


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Sets platform and kind of device; the user has accepted nothing."""
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))
    monkeypatch.setattr(compat, "GPU_KERNELS_SINCE", (0,))  # what this JAX lacks is another matter
    dispatch._announce.cache_clear()

    def use(platform, kind, libtpu=(0, 0, 50)):
        monkeypatch.setattr(compat, "target_platform", lambda: platform)
        monkeypatch.setattr(compat, "target_device_kind", lambda: kind)
        monkeypatch.setattr(compat, "_libtpu_version", lambda: libtpu)

    yield use
    dispatch._announce.cache_clear()


@pytest.mark.parametrize(
    "platform, kind, want, level",
    [
        ("cpu", "cpu", "tile_scan", logging.INFO),
        ("gpu", "NVIDIA H100 80GB HBM3", "tile_scan", logging.WARNING),
        ("tpu", "TPU v5", "xla", logging.WARNING),
        ("tpu", "TPU v5 lite", "tile_scan", logging.WARNING),
        ("tpu", "TPU v6 lite", "tile_scan", logging.WARNING),
        ("tpu", "TPU7x", "tile_scan", logging.WARNING),
    ],
)
def test_grouped_matmul_takes_what_is_never_dense(device, caplog, platform, kind, want, level):
    device(platform, kind)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert set(implementations.choose("caller", None, "bfloat16")) == {want}
    (record,) = caplog.records  # once
    assert record.levelno == level
    assert all(word in record.message for word in ("caller (bfloat16)", want, kind))
    assert ("moejax verify-kernels --accept" in record.message) == (level == logging.WARNING)


def test_an_old_compiler_for_tpus_expands_one_product(device):
    device("tpu", "TPU v5", libtpu=(0, 0, 42))
    assert set(implementations.choose("caller", None, "bfloat16")) == {"tile_scan"}
    assert implementations.is_dense("xla")
    device("tpu", "TPU v5", libtpu=(0,))  # not to be told
    assert implementations.is_dense("xla")


def test_without_accepted_results_it_takes_the_portable_one_with_a_warning(device, caplog):
    device("tpu", "TPU v5")
    for _ in range(3):
        assert choose() == ("plain", "plain")
    (record,) = caplog.records  # once
    for words in ("kernel (bfloat16)", "'plain' on TPU v5: it is right", "verify-kernels --accept"):
        assert words in record.message


def test_there_is_nothing_to_warn_of_where_no_other_could_serve(device, caplog):
    device("gpu", "H100")
    with caplog.at_level(logging.INFO):
        assert choose(obstacle=lambda name: None if name == "plain" else "no") == ("plain",) * 2
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "'plain' on H100: no other can be accepted there" in record.message


def test_there_is_nothing_to_warn_of_where_those_that_serve_cannot_be_accepted(device, caplog):
    device("gpu", "H100")
    refuse = lambda name: "no" if name == "faster" else None
    with caplog.at_level(logging.INFO):
        for acceptable in ((), ("plain",), ("plain", "faster")):
            dispatch._announce.cache_clear()
            choose(acceptable=acceptable, obstacle=refuse)
        choose(acceptable=("plain", "fast"), obstacle=refuse)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO] * 3 + [logging.WARNING]


@pytest.mark.parametrize(
    "platform, kind, dtype, level",
    [
        ("gpu", "H100", "float64", logging.INFO),  # no kit has tolerances for it
        ("gpu", "A100", "float16", logging.INFO),  # only the dense one serves besides
        ("gpu", "H100", "float16", logging.WARNING),
        ("tpu", "TPU v5", "float64", logging.INFO),
        ("tpu", "TPU v5", "float16", logging.WARNING),  # tile_scan, where XLA's is not dense
    ],
)
def test_grouped_matmul_warns_only_where_something_may_be_accepted(
    device, caplog, platform, kind, dtype, level
):
    device(platform, kind)
    with caplog.at_level(logging.INFO), jax.enable_x64(True):
        implementations.choose("caller", None, dtype)
    (record,) = caplog.records
    assert record.levelno == level
    assert ("verify-kernels" in record.message) == (level == logging.WARNING)


def test_others_are_not_even_asked_where_results_were_accepted(device):
    """They would be imported for it, and Pallas takes half a second."""
    device("gpu", "H100")
    accepted.store("H100", {"kernel": {"bfloat16": dict.fromkeys(PRODUCTS, "fast")}}, {})
    asked = []
    assert choose(obstacle=lambda name: asked.append(name)) == ("fast", "fast")
    assert set(asked) == {"fast"}


def test_takes_what_the_user_accepted_for_each_product(device, caplog):
    device("gpu", "H100")
    choices = {"bfloat16": {"forward": "fast", "grad_rhs": "faster"}}
    accepted.store("H100", {"kernel": choices}, {})
    with caplog.at_level(logging.INFO):
        assert choose() == ("fast", "faster")
        assert choose(dtype="float32") == ("plain",) * 2  # nothing was accepted for it
    assert "forward by 'fast', grad_rhs by 'faster' on H100" in caplog.records[0].message
    assert caplog.records[1].levelno == logging.WARNING
    device("gpu", "A100")
    assert choose() == ("plain",) * 2


def test_replaces_what_was_accepted_where_it_cannot_serve(device, caplog):
    device("gpu", "H100")
    choices = {"bfloat16": {"forward": "fast", "grad_rhs": "gone since"}}
    accepted.store("H100", {"kernel": choices}, {})
    refuse = lambda name: "no" if name == "fast" else None
    assert choose(obstacle=refuse) == ("plain",) * 2


def test_says_that_accepted_results_are_of_other_versions(device, caplog, monkeypatch):
    device("gpu", "H100")
    accepted.store("H100", {"kernel": {"bfloat16": dict.fromkeys(PRODUCTS, "fast")}}, {})
    assert choose() == ("fast", "fast")
    monkeypatch.setattr(accepted, "sources_hash", lambda: "changed")
    assert choose() == ("plain",) * 2
    assert "other versions of them were accepted" in caplog.records[-1].message


def test_a_named_implementation_is_used_or_refused(device):
    device("tpu", "TPU v5")
    assert choose("plain") == ("plain",) * 2
    with pytest.raises(UserError, match="kernel has no implementation 'nope'"):
        choose("nope")
    with pytest.raises(UserError, match="caller: implementation 'fast' cannot serve.*too odd"):
        choose("fast", obstacle=lambda name: "too odd", caller="caller")


def test_the_mesh_decides_platform_and_kind():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    assert (compat.target_platform(), compat.target_device_kind()) == ("cpu", "cpu")
    with jax.sharding.use_abstract_mesh(mesh):
        assert (compat.target_platform(), compat.target_device_kind()) == ("tpu", "TPU v5")


def test_an_unannounced_choice_is_announced_when_it_runs(device, caplog):
    device("cpu", "cpu")
    with caplog.at_level(logging.INFO):
        with dispatch.unannounced():
            assert choose() == ("plain",) * 2
        assert not caplog.records
        choose()
    assert len(caplog.records) == 1
