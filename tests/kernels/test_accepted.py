"""The store of accepted results: what it finds, replaces and refuses to read."""

import json

import jaxlib
import pytest

from moejax.errors import UserError
from moejax.kernels import accepted

PRODUCTS = ("forward",)
FAST = {"kernel": {"bfloat16": {"forward": "fast"}}}


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    target = tmp_path / "new" / "kernels.json"
    monkeypatch.setenv("MOEJAX_KERNELS", str(target))
    return target


def look_up(kind):
    return accepted.look_up("kernel", "bfloat16", kind, PRODUCTS)


def every(name):
    return {"forward": name}


def test_finds_what_was_stored_and_where(file):
    assert look_up("H100") is None
    assert accepted.store("H100", FAST, {"kernel": {"bfloat16": "any"}}) == file
    assert look_up("H100").choices == {"forward": "fast"}
    assert str(file) in look_up("H100").source
    assert accepted.look_up("other", "bfloat16", "H100", PRODUCTS) is None


def test_a_second_result_replaces_the_first_of_its_kind_only(file):
    accepted.store("H100", FAST, {})
    accepted.store("H200", FAST, {})
    accepted.store("H100", {"kernel": {"bfloat16": {"forward": "faster"}}}, {})
    assert look_up("H100").choices == {"forward": "faster"}
    assert look_up("H200").choices == {"forward": "fast"}
    assert len(json.loads(file.read_text())) == 2


def test_results_of_other_kernels_and_dtypes_stay(file):
    accepted.store("H100", FAST, {"kernel": {"bfloat16": 3.0}})
    accepted.store("H100", {"kernel": {"float32": every("slow")}}, {"kernel": {"float32": 4.0}})
    accepted.store("H100", {"other": {"int32": every("odd")}}, {"other": {"int32": 5.0}})
    (record,) = json.loads(file.read_text())
    kernel = {"bfloat16": every("fast"), "float32": every("slow")}
    assert record["choices"] == {"kernel": kernel, "other": {"int32": every("odd")}}
    figures = {"bfloat16": 3.0, "float32": 4.0}
    assert record["figures"] == {"kernel": figures, "other": {"int32": 5.0}}


def test_results_under_other_conditions_are_stale_and_go(file, monkeypatch):
    accepted.store("H100", FAST, {})
    assert not accepted.is_stale("H100")
    monkeypatch.setattr(accepted, "sources_hash", lambda: "changed")
    assert accepted.is_stale("H100")
    assert not accepted.is_stale("H200")
    accepted.store("H100", {"other": {"int32": every("odd")}}, {})
    (record,) = json.loads(file.read_text())
    assert record["choices"] == {"other": {"int32": every("odd")}}


@pytest.mark.parametrize(
    "package",
    ["jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "triton"],
)
def test_results_depend_on_what_compiles_and_runs_them(package, monkeypatch):
    installed = accepted._version
    accepted.store("H100", FAST, {})
    assert look_up("H100").choices == {"forward": "fast"}  # also where something is absent
    monkeypatch.setattr(accepted, "_version", lambda p: "99.0" if p == package else installed(p))
    assert look_up("H100") is None
    assert accepted.is_stale("H100")


def test_versions_are_those_installed_and_none_of_what_is_not(monkeypatch):
    monkeypatch.setattr(accepted, "_PACKAGES", ("jaxlib", "no-such-package"))
    assert accepted.conditions("H100") == {
        "device_kind": "H100",
        "jaxlib": jaxlib.__version__,
        "no-such-package": None,
        "kernels": accepted.sources_hash(),
    }


@pytest.mark.parametrize(
    "kernel, dtype, shipped",
    [("grouped_matmul", "bfloat16", "tile_scan"), ("least_loaded", "int32", "jnp")],
)
def test_the_users_result_goes_before_the_shipped_one(kernel, dtype, shipped):
    here = lambda kind="cpu": accepted.look_up(kernel, dtype, kind, PRODUCTS)
    assert here().choices == every(shipped)
    assert here("TPU v5") is None
    accepted.store("cpu", {kernel: {dtype: every("fast")}}, {})
    assert here().choices == every("fast")


@pytest.mark.parametrize("text", ["no json", "3", '[{"conditions": {}}]'])
def test_a_file_of_something_else_is_an_error(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(UserError, match="kernels.json does not hold results.*delete it"):
        look_up("H100")


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEJAX_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert accepted.path() == tmp_path / "moejax" / "kernels.json"
