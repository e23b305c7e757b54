"""A stored config must not be able to run code of its own choice."""

import json
import pathlib
import subprocess

import fiddle as fdl
import pytest
import toy_experiment as toy

from moejax.config import symbols
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.config.serialize import dump_config, load_dumped
from moejax.errors import UserError


def document(body, sources=None):
    return json.dumps({"format": 1, "versions": {}, "config": body, "sources": sources or {}})


def call(name, **args):
    return {"__call__": name, "args": args}


ATTACKS = [
    "os:system",
    "posix:system",
    "subprocess:Popen",
    "builtins:eval",
    "builtins:exec",
    "builtins:getattr",
    "builtins:__import__",
    "importlib:import_module",
    "functools:partial",
    "pickle:loads",
    "shutil:rmtree",
    "operator:attrgetter",
    "fiddle:build",
    "jax.numpy:load",
    "jax:pure_callback",
    "numpy:fromfile",
    "flax.serialization:from_bytes",
    "moejax.commands:main",
    "moejax.config.load:load_config",
    "moejax.config.symbols:find",
    "moejax.config.trust:Policy",
    "moejax.config.symbols:SourceFile",
    "moejax.__main__:main",
    "moejax:errors",
    "moejax.errors:UserError",
    "moejax.optim.schedule:math",
    "moejax.optim.schedule:dataclasses",
    "moejax.optim.schedule:jnp.load",
    "moejax.optim.schedule:WSD.build",
    "moejax.optim.schedule:WSD.__init__.__globals__",
    "moejax.optim.schedule:__builtins__",
    "moejax.optim.schedule:__loader__",
    "moejax.optim.schedule:UserError",
    "moejax.optim.schedule.os:system",
    "moejax.optim.schedule:",
    "moejax.optim..schedule:WSD",
    "moejax.no_such_module:WSD",
    "moejaxevil.schedule:WSD",
    "my.py:Mine",
    "./my.py:Mine",
    "system",
    "",
]


@pytest.mark.parametrize("kind", ["__call__", "__partial__", "__symbol__"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_by_name(name, kind):
    inner = {"__symbol__": name} if kind == "__symbol__" else {kind: name, "args": {}}
    body = call("optax:chain", **{"0": inner})
    with pytest.raises(UserError) as caught:
        load_dumped(document(body))
    assert repr(name if ":" in name else ":" + name) in str(caught.value)
    assert "add --trust-config" in str(caught.value)
    assert str(caught.value).startswith("0: ")


def test_functions_of_moejax_may_stand_as_values_but_are_not_called():
    name = "moejax.types:mean"
    with pytest.raises(UserError, match="it is no component"):
        load_dumped(document(call(name)))
    with pytest.raises(UserError, match="it is no component"):
        load_dumped(document(call("optax:chain", **{"0": {"__symbol__": name}})))


def test_components_of_moejax_and_listed_functions_are_allowed():
    body = call(
        "optax:chain",
        **{
            "0": call("moejax.optim.schedule:WSD", peak=1e-3, warmup_steps=2),
            "1": call("optax:clip", max_delta=1.0),
        },
    )
    config = load_dumped(document(body))
    assert config[0].peak == 1e-3


def test_a_function_that_returns_a_component_of_its_module_is_built_and_no_other():
    config = load_dumped(document(call("moejax.data.source:python_stdlib", holdout_every=9)))
    assert fdl.build(config).holdout_every == 9
    for name in ("moejax.data.source:existing", "moejax.train.loop:train"):
        with pytest.raises(UserError, match="it is no component"):
            load_dumped(document(call(name)))


def test_a_function_of_a_component_package_may_be_a_value_and_a_partial():
    for inner in (
        {"__symbol__": "moejax.optim.optimizer:global_norm"},
        {"__partial__": "moejax.optim.optimizer:global_norm", "args": {}},
    ):
        load_dumped(document(call("optax:chain", **{"0": inner})))
    with pytest.raises(UserError, match="it is no component"):
        load_dumped(document(call("moejax.optim.optimizer:global_norm")))


def test_every_listed_function_is_found_again_by_its_name():
    from moejax.config import known, trust

    for name in known._symbols():
        obj = known.symbol(name)
        recorded, source = trust.record(obj)
        assert known.symbol(recorded) is obj
        assert source is None


@pytest.mark.parametrize(
    "value", [{"__reduce__": ["os:system", "x"]}, {"__call__": "optax:clip", "__tuple__": []}]
)
def test_unknown_kinds_of_value_are_refused(value):
    with pytest.raises(UserError, match="unknown kind of value at 0"):
        load_dumped(document(call("optax:chain", **{"0": value})))


@pytest.mark.parametrize(
    "name", ["jax.numpy:load", "numpy:os", "numpy.dtype:__class__", "os:system"]
)
def test_dtypes_are_a_fixed_list(name):
    with pytest.raises(UserError, match="there is no dtype"):
        load_dumped(document(call("optax:chain", **{"0": {"__dtype__": name}})))


def test_trusted_loads_any_name():
    body = call("subprocess:Popen", args=["true"])
    assert fdl.get_callable(load_dumped(document(body), trusted=True)) is subprocess.Popen


# The user's own code.

MINE = """
import toy_experiment as toy

class Mine(toy.Top):
    sharpness: float = 2.0

def squared(x):
    return x * x

class NotAComponent:
    def __init__(self, path="x"):
        raise RuntimeError("ran")

imported_name = toy.Top
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "code" / "mine_toy.py"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


@pytest.fixture
def stored(mine):
    config = apply_overrides(
        toy.config.as_buildable(),
        [f"block.ffn.router={mine}:Mine", f"block.ffn.activation={mine}:squared"],
    )
    return dump_config(config, {})


def test_own_code_is_stored_with_path_hash_and_copy(mine, stored):
    source = json.loads(stored)["sources"]["mine_toy.py"]
    assert source == {
        "path": str(mine),
        "sha256": symbols.sha256(MINE),
        "module": None,
        "text": MINE,
    }


def test_own_code_unchanged_is_loaded(stored):
    ffn = fdl.build(load_dumped(stored)).block.ffn
    assert ffn.router.sharpness == 2.0
    assert ffn.activation(3) == 9


@pytest.mark.parametrize("change, state", [("edit", "has changed"), ("delete", "is gone")])
def test_own_code_changed_or_gone_needs_trust(mine, stored, change, state):
    if change == "edit":
        mine.write_text(MINE.replace("2.0", "3.0"))
    else:
        mine.unlink()
    with pytest.raises(UserError) as caught:
        load_dumped(stored)
    assert str(caught.value) == (
        "block.ffn.router: the stored config names 'mine_toy.py:Mine', which is not loaded "
        f"because its file {mine} {state} since the run was started; if you trust this config, "
        "add --trust-config"
    )
    trusted = load_dumped(stored, trusted=True)
    assert fdl.build(trusted).block.ffn.router.sharpness == 2.0  # the copy, not the edited file
    again = json.loads(dump_config(trusted, {}))["sources"]["mine_toy.py"]
    assert again == json.loads(stored)["sources"]["mine_toy.py"]


def test_own_code_inside_the_run_is_not_loaded(mine, stored):
    (mine.parent / "config.json").write_text(stored)
    with pytest.raises(UserError, match="lies inside the run that names it"):
        load_config(mine.parent)


def own(path, name, module=None, kind="__call__"):
    text = pathlib.Path(path).read_text()
    source = {"path": str(path), "sha256": symbols.sha256(text), "text": text, "module": module}
    inner = {"__symbol__": f"x:{name}"} if kind == "__symbol__" else call(f"x:{name}")
    return document(call("optax:chain", **{"0": inner}), {"x": source})


@pytest.mark.parametrize("name", ["NotAComponent", "squared", "imported_name", "toy", "__loader__"])
def test_of_own_code_only_components_defined_there_are_built(mine, name):
    with pytest.raises(UserError, match="which is not loaded because"):
        load_dumped(own(mine, name))


def test_own_code_is_not_even_imported_for_a_name_it_does_not_define(tmp_path):
    path = tmp_path / "script_toy.py"
    path.write_text("raise RuntimeError('imported')\n")
    with pytest.raises(UserError, match="defines no class of that name"):
        load_dumped(own(path, "Anything"))


@pytest.mark.parametrize("library", [subprocess.__file__, fdl.__file__, symbols.__file__])
def test_installed_packages_are_not_own_code(library):
    with pytest.raises(UserError, match="is part of an installed package"):
        load_dumped(own(library, "Popen"))


def test_a_link_to_other_code_is_not_own_code(mine, tmp_path):
    link = tmp_path / "link_toy.py"
    link.symlink_to(mine)
    with pytest.raises(UserError, match="is not given by its real, absolute path"):
        load_dumped(own(link, "Mine"))


def test_a_stated_module_name_does_not_import_another_module(mine):
    loaded = load_dumped(own(mine, "Mine", module="antigravity"))
    assert fdl.get_callable(loaded[0]).sharpness == 2.0


def test_two_files_of_one_name_are_kept_apart(tmp_path):
    overrides = []
    for folder, path in (("a", "block.ffn.router"), ("b", "extra")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "same_toy.py"
        file.write_text(MINE.replace("2.0", "4.0" if folder == "a" else "5.0"))
        overrides.append(f"{path}={file}:Mine")
    stored = dump_config(apply_overrides(toy.config.as_buildable(), overrides), {})
    built = fdl.build(load_dumped(stored))
    assert (built.block.ffn.router.sharpness, built.extra.sharpness) == (4.0, 5.0)
